import os
import re
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cxrfast import log
from cxrfast.progress import progress
from cxrfast.units import duration


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (59.4, "59s"),
        (59.6, "1m00s"),
        (75, "1m15s"),
        (3599.7, "1h00m"),
        (3725, "1h02m"),
        (360_000, "100h00m"),
    ],
)
def test_durations_are_short(seconds, text):
    assert duration(seconds) == text


@given(st.floats(0, 1e6))
def test_a_duration_is_right_to_the_smaller_of_its_two_units(seconds):
    text = duration(seconds)
    total, number = 0, ""
    for letter in text:
        if letter.isdigit():
            number += letter
        else:
            total, number = total + int(number) * {"h": 3600, "m": 60, "s": 1}[letter], ""
    assert abs(total - seconds) <= (60 if "h" in text else 0.5)


@pytest.fixture(autouse=True)
def shown():
    log.show()
    yield
    log.LOGGER.setLevel("NOTSET")


def test_where_stderr_is_not_a_terminal_a_step_ends_in_one_plain_line(capsys):
    with progress("sharding", 1500, unit="images") as advance:
        for _ in range(15):
            advance(100)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("sharding: 1,500/1,500 images, ")
    assert err.count("\n") == 1


def test_a_long_step_says_now_and_then_how_long_it_will_take(capsys):
    with progress("hashing", 3, unit="MB", every=0) as advance:
        advance()
        advance(note="loss 0.3")
        advance()
    first, second, last = capsys.readouterr().err.splitlines()
    assert first.startswith("hashing: 1/3 MB, ")
    assert first.endswith(" left")
    assert second.endswith(" left  loss 0.3")
    assert last.startswith("hashing: 3/3 MB")
    assert " left" not in last


def test_a_step_with_nothing_to_do_and_a_quiet_one_say_nothing(capsys):
    with progress("sharding", 0):
        pass
    with log.quiet(), progress("sharding", 10) as advance:
        advance(3, note="x")
        advance()
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_a_bar_fits_one_line_of_a_terminal(columns):
    script = (
        "import logging\nfrom cxrfast import log\nfrom cxrfast.progress import progress\nlog.show()\n"
        "with progress('gradcam densenet121-2048/fold-0 Edema', 377110) as advance:\n"
        "    advance(300000, note='loss 0.1234, waiting 2 %')\n"
        "    logging.getLogger('cxrfast.x').info('a [bold]message[/] :100: ' + 'x' * 200)"
    )
    master, slave = os.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": str(columns), "LINES": "25"}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, stderr=slave, stdout=subprocess.PIPE, check=True, env=environment)
    os.close(slave)
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", os.read(master, 100_000).decode())
    os.close(master)
    assert done.stdout == b""
    lines = [line for line in re.split(r"[\r\n]+", text) if "a [bold]" not in line]
    assert max(map(len, lines)) <= columns
    assert any("gra" in line and "300,000/377,110" in line and "images/s" in line for line in lines)
    assert "a [bold]message[/] :100: " + "x" * 200 in text.replace("\r\n", "")
