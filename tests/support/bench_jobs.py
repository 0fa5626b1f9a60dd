"""Functions that tests of benchmarks call in a process of their own, and a wait for such processes to end."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from signal import Signals

from cxrfast.bench.process import tell


def report_three(a: int) -> list[object]:
    for n in range(3):
        tell(f"figure {n}")
    print("noise on stdout")
    return [a, "torch" in sys.modules]


def fail(how: Exception | Signals) -> None:
    if isinstance(how, Signals):
        os.kill(os.getpid(), how)
    else:
        raise how


def hang(folder: Path) -> None:
    """Start a process, write its number and ours into `folder`, and sleep."""
    started = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    (folder / "new").write_text(f"{os.getpid()} {started.pid}")
    (folder / "new").rename(folder / "pids")
    time.sleep(600)


def within_20_seconds(is_so: Callable[[], bool]) -> bool:
    """Whether it comes true in time."""
    deadline = time.monotonic() + 20
    while not is_so() and time.monotonic() < deadline:
        time.sleep(0.01)
    return is_so()
