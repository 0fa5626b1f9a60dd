"""Call a function in its own process: its memory is measured separately, and a crash affects nothing else.

Imports little, since every import counts as memory of the process.
"""

import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection, Pipe
from typing import Any

import psutil

from cxrfast.errors import CxrfastError, RunError, is_out_of_memory
from cxrfast.units import duration

_parent: Connection | None = None


def tell(figure: str) -> None:
    """Report one more figure to the process that called `in_own_process`; in any other process, do nothing."""
    if _parent:
        _parent.send(("figure", figure))


def in_own_process(
    work: Callable[..., Any],
    options: dict[str, Any],
    *,
    limit: float = math.inf,
    on_figure: Callable[[str], object] = lambda figure: None,
    watch: Callable[[psutil.Process], object] | None = None,
) -> Any:
    """Return `work(**options)`, called in a new Python process that imports only the module of `work`.

    `limit`: seconds until the process is killed with everything it started. `on_figure` gets each figure that `work`
    reports with `tell`. `watch` is called with the process 20 times a second. Raises MemoryError if memory ran out
    there, else RunError with the reason.
    """
    ours, theirs = Pipe()
    end = time.monotonic() + limit
    with tempfile.TemporaryFile("w+", errors="replace") as output, ours:
        with theirs:
            command = [sys.executable, "-m", __name__, str(theirs.fileno())]
            process = psutil.Popen(
                command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stdout=output, stderr=output
            )
        try:
            ours.send((work, options))
            while True:
                if ours.poll(0.05 if watch else 0.5):
                    kind, value = ours.recv()
                    if kind != "figure":
                        break
                    on_figure(value)
                elif process.poll() is not None and not ours.poll():
                    raise EOFError
                if time.monotonic() > end:
                    raise RunError(f"it did not end within {duration(limit)} and was killed")
                if watch:
                    watch(process)
            with suppress(psutil.TimeoutExpired):
                process.wait(10)
        except (EOFError, OSError):  # it died
            code = process.wait()
            output.seek(0)
            last = (output.read().strip().splitlines() or [f"exit code {code}"])[-1]
            kind = "out of memory" if code == -9 or is_out_of_memory(RuntimeError(last)) else "failed"
            value = last
        finally:
            _kill(process)
    if kind == "answer":
        return value
    raise MemoryError(value) if kind == "out of memory" else RunError(value)


def _kill(process: psutil.Popen) -> None:
    """Kill a process and everything it started."""
    with suppress(psutil.NoSuchProcess):
        for one in (*process.children(recursive=True), process):
            with suppress(psutil.NoSuchProcess):
                one.kill()
    process.wait()


def answer(descriptor: int) -> None:
    """In the new process: receive a function with its options, send back what it returns or why it failed."""
    global _parent
    _parent = Connection(descriptor)
    try:
        work, options = _parent.recv()
        _parent.send(("answer", work(**options)))
    except CxrfastError as error:
        _parent.send(("failed", str(error)))
    except Exception as error:
        first_line = str(error).strip().splitlines()[:1]
        kind, name = "failed", type(error).__name__
        if is_out_of_memory(error):
            kind = name = "out of memory"
        _parent.send((kind, ": ".join([name, *first_line])))


if __name__ == "__main__":
    # the functions called here use the imported module, not this copy named __main__
    from cxrfast.bench import process

    process.answer(int(sys.argv[1]))
