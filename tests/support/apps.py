"""`cxrfast app` in a process of its own."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple


class Served(NamedTuple):
    """An app."""

    address: str
    process: "subprocess.Popen[str]"


def heed_ctrl_c() -> None:
    """In a new process: a shell's background jobs, such as a run of these tests, ignore SIGINT, and so do their children."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def served(*words: object, folder: Path) -> Iterator[Served]:
    """`cxrfast app` with these words in a process of its own, which runs in `folder`. Ends by Ctrl-C, silently."""
    command = [sys.executable, "-W", "ignore", "-m", "cxrfast", "app", *map(str, words), "--port", "0"]
    process = subprocess.Popen(
        command,
        cwd=folder,
        env={**os.environ, "TMPDIR": str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=heed_ctrl_c,
    )
    try:
        assert process.stdout
        found = next((m for line in process.stdout if (m := re.search(r"http://\S+", line))), None)
        assert found, process.communicate(timeout=20)
        yield Served(found[0], process)
        assert process.poll() is None, "the app lives on"
    finally:
        if process.poll() is None:
            os.kill(process.pid, signal.SIGINT)
        output, errors = process.communicate(timeout=20)
    assert (process.returncode, output, errors) == (0, "stopped\n", "")
