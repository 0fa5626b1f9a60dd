"""Functions that tests of benchmarks call in a process of their own."""

import os
import subprocess
import sys
import time
from pathlib import Path

from cxrfast.bench.process import tell


def report_three(a: int) -> list[object]:
    for n in range(3):
        tell(f"figure {n}")
    print("noise on stdout")
    return [a, "torch" in sys.modules]


def fail(error: Exception) -> None:
    raise error


def die(signal: int) -> None:
    os.kill(os.getpid(), signal)


def hang(folder: Path) -> None:
    """Start a process, write its number and ours into `folder`, and sleep."""
    started = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    (folder / "new").write_text(f"{os.getpid()} {started.pid}")
    (folder / "new").rename(folder / "pids")
    time.sleep(600)
