"""Commands print whatever the terminal can show, and end as usual whatever becomes of their standard streams."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from commands import run
from runs import make_run

from cxrfast.cli.main import cli
from cxrfast.cli.streams import degraded

CXRFAST = f"{shlex.quote(sys.executable)} -m cxrfast"
STRANGE = "0.91 ± 0.02 → † ‡ × − – … · ≥ µ é 中"
PLAIN = r"0.91 +/- 0.02 -> * ** x - - ... * >= u \xe9 \u4e2d"


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Two folds with predictions."""
    folder = tmp_path_factory.mktemp("streams") / "runs"
    for fold in (0, 1):
        make_run(folder, 64, fold)
    return folder


def shell(line: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """What bash makes of a line with redirections."""
    done = run("bash", "-c", line, **environment)
    assert "Traceback" not in done.stdout + done.stderr, done.stderr
    assert "Exception ignored" not in done.stderr
    assert "Logging error" not in done.stderr
    return done


def test_characters_that_an_encoding_lacks_become_others_or_their_escapes():
    assert degraded(STRANGE, "utf-8") == STRANGE
    assert degraded(STRANGE, "ascii") == PLAIN
    assert degraded("± é †", "latin-1") == "± é *"


def test_a_table_on_a_terminal_of_ascii_keeps_its_columns(runs):
    done = CliRunner(charset="ascii").invoke(cli, ["evaluate", str(runs)])
    assert (done.exit_code, done.stdout_bytes.isascii(), done.stderr_bytes.isascii()) == (0, True, True), done.output
    lines = done.stdout.splitlines()
    table = [line for line in lines if line[:1] in "|+"]
    assert len(table) > 5
    assert len({len(line) for line in table}) == 1, "a replacement moved the columns"
    assert any(" +/- 0." in line for line in table)
    assert (runs / "evaluation" / "auroc.md").read_text().count("±") > 1, "files keep their characters"


C = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}


@pytest.mark.parametrize("variables", [C, {"TERM": "dumb"}, {"PYTHONIOENCODING": "ascii"}, {"NO_COLOR": "1"}])
def test_other_locales_and_terminals_show_the_same_words(runs, variables):
    usual, other = (run(sys.executable, "-m", "cxrfast", "status", runs, **given) for given in ({}, variables))
    assert other.returncode == 0
    words = [sorted(re.findall(r"\b[A-Za-z][A-Za-z.]+", done.stdout)) for done in (usual, other)]  # ages differ
    assert words[0] == words[1]


@pytest.mark.parametrize("columns", ["1", "20", "0", "x", "-5"])
def test_any_width_of_the_terminal_will_do(runs, columns):
    done = shell(f"{CXRFAST} status {runs}", COLUMNS=columns)
    assert done.returncode == 0


@pytest.mark.parametrize(
    "redirected", [">&-", "2>&-", ">&- 2>&-", "<&-", "2>/dev/full", "| true", "| head -1", "2>&1 | true"]
)
@pytest.mark.parametrize(("arguments", "code"), [("status RUNS", 0), ("status none", 2)])
def test_streams_that_are_closed_or_not_read_change_no_exit_code(runs, arguments, code, redirected):
    line = f"{CXRFAST} {arguments.replace('RUNS', str(runs))} {redirected}; exit ${{PIPESTATUS[0]}}"
    assert shell(line).returncode == code


@pytest.mark.parametrize("arguments", ["status RUNS", "--help", "--version"])
def test_a_full_disk_behind_stdout_is_an_error(runs, arguments):
    done = shell(f"{CXRFAST} {arguments.replace('RUNS', str(runs))} > /dev/full")
    assert (done.returncode, "no space or quota left (while writing)" in done.stderr) == (2, True)


def test_a_reader_that_leaves_does_not_end_a_command_that_has_more_to_do(runs):
    """rich would leave with SystemExit at the first line that nobody reads."""
    code = (
        "import sys; from cxrfast.cli.streams import prepare; from cxrfast import log; prepare(); log.show()\n"
        "for n in range(200): log.LOGGER.info('line'); print('line', flush=True)\n"
        "open(sys.argv[1], 'w').write('done')"
    )
    left = runs.parent / "left"
    done = shell(f"{shlex.quote(sys.executable)} -c {shlex.quote(code)} {left} 2>&1 | true; exit ${{PIPESTATUS[0]}}")
    assert (done.returncode, left.read_text()) == (0, "done")


def test_a_file_is_never_opened_in_place_of_a_closed_stream(tmp_path):
    code = (
        "import sys; from cxrfast.cli.streams import prepare; prepare()\n"
        "file = open(sys.argv[1], 'w'); print('lost'); print('lost', file=sys.stderr); sys.exit(file.fileno() < 3)"
    )
    line = f"{shlex.quote(sys.executable)} -c {shlex.quote(code)} {tmp_path / 'kept'} <&- >&- 2>&-"
    assert shell(line).returncode == 0
    assert (tmp_path / "kept").read_text() == ""


def test_variables_of_other_programs_that_make_no_sense_do_not_break_a_command(runs):
    nonsense = {
        "NO_COLOR": "1",
        "RANK": "x",
        "OMP_NUM_THREADS": "lots",
        "SLURM_JOB_ID": "\x1b[31m",
        "HOME": "/proc/none",
    }
    done = shell(f"{CXRFAST} status {runs}", **nonsense)
    assert done.returncode == 0
    assert "\x1b" not in done.stdout + done.stderr
    refused = shell(f"{CXRFAST} status none", RANK="\x1b[31m")
    assert (refused.returncode, "\x1b" in refused.stderr) == (2, False)


def test_an_empty_variable_counts_as_not_set():
    code = "from cxrfast import config; print(config.DATA, config.SHARDS)"
    done = run(sys.executable, "-c", code, CXRFAST_DATA="", CXRFAST_SHARDS="")
    assert done.stdout.split() == ["data/mimic-cxr-jpg", "data/shards"]
