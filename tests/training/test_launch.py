"""Signals of this process reach the child, which is waited for."""

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from cxrfast.training.launch import Stopped, call

CHILD = """
import signal, sys, time
def end(number, frame):
    time.sleep(0.3)
    open(sys.argv[1], "a").write(f"{number} ")
    sys.exit(7)
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
    signal.signal(number, end)
open(sys.argv[1], "w").write("up ")
time.sleep(30)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_is_passed_on_once_and_the_child_is_waited_for(tmp_path: Path, number: int) -> None:
    seen = tmp_path / "seen"

    def interrupt() -> None:
        while not (seen.exists() and seen.read_text()):
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    threading.Thread(target=interrupt).start()
    assert call([sys.executable, "-c", CHILD, str(seen)]) == (7, number)
    assert seen.read_text() == f"up {int(number)} ", "after its own clean-up, and told once"
    assert signal.getsignal(number) is before


def test_without_a_signal_there_is_only_the_exit_code() -> None:
    assert call(["sh", "-c", "exit 3"]) == (3, None)


def test_a_stop_has_a_shells_exit_code() -> None:
    assert Stopped("x").exit_code == 143
    assert Stopped("x", signal.SIGUSR1).exit_code == 138
    assert "stopped by SIGUSR1 in densenet121-32/fold-0" in str(Stopped("densenet121-32/fold-0", signal.SIGUSR1))
