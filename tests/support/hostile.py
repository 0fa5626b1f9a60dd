"""Commands on hostile input, in this process: they do the right thing or refuse it with a message, and touch nothing else.

`watch` records what Python opens for writing, removes, renames, starts or connects to outside some folders.
"""

import os
import resource
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

from click.testing import CliRunner

from cxrfast.cli.main import cli

SECONDS = 120
"""A command that takes longer hangs."""

CHANGES = {
    "os.remove": {0: 1},
    "os.rmdir": {0: 1},
    "os.mkdir": {0: 2},
    "os.rename": {0: 2, 1: 3},
    "os.link": {1: 3},
    "os.symlink": {1: 2},
    "os.truncate": {0: 0},
    "os.chmod": {0: 2},
    "os.chown": {0: 3},
    "os.utime": {0: 3},
    "shutil.rmtree": {0: 1},
}
"""Events of Python's audit hooks that change files: which arguments are paths, and in which folders (an open one, or -1)."""

STARTS = ("os.exec", "os.posix_spawn", "os.system", "subprocess.Popen")
KNOWN = ("'/sbin/ldconfig'", "'-m', 'cxrfast.app.worker'")
"""Programs that may start: torch asks the first for libraries, and the app keeps its model in the second."""

REACHES = (
    "socket.connect",
    "socket.getaddrinfo",
    "socket.bind",
    "urllib.Request",
    "ftplib.connect",
    "http.client.connect",
)


OWN = tuple(f"{os.path.realpath(tempfile.gettempdir())}/{name}" for name in ("cxrfast-bench-", "torchinductor_"))
"""Starts of the paths of temporary folders that commands and torch make."""


class Watch:
    """What happens inside `watch`, for the whole process: audit hooks cannot be removed."""

    allowed: Sequence[str] = ()
    is_on = False
    found: ClassVar[list[str]] = []
    is_installed = False

    @classmethod
    def hook(cls, event: str, arguments: tuple[Any, ...]) -> None:
        if not cls.is_on:
            return
        if event == "open":
            path, mode, flags = arguments
            writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            if isinstance(path, str | bytes | os.PathLike) and (writes or set(mode or "") & set("wax+")):
                cls.check(event, path)
        elif event in CHANGES:
            for n, folder in CHANGES[
                event
            ].items():  # in an open folder only `rmtree` works, which has an event of its own
                if isinstance(arguments[n], str | bytes | os.PathLike) and arguments[folder] in (
                    arguments[n],
                    -1,
                    None,
                ):
                    cls.check(event, arguments[n])
        else:
            starts = event in STARTS and not any(program in repr(arguments) for program in KNOWN)
            if starts or (event in REACHES and not (event.startswith("socket.") and _is_local(arguments))):
                cls.found.append(f"{event} {arguments!r:.200}")

    @classmethod
    def check(cls, event: str, path: Any) -> None:
        cls.is_on = False  # realpath is not to be watched
        try:
            text = os.fsdecode(path)
            place = os.path.join(os.path.realpath(os.path.dirname(text) or "."), os.path.basename(text))
            real = os.path.realpath(text) if event == "open" else place
            inside = any(real == one or real.startswith(one + "/") for one in cls.allowed)
            if not inside and not real.startswith(OWN):
                cls.found.append(f"{event} {text!r:.200}")
        finally:
            cls.is_on = True


def _is_local(arguments: tuple[Any, ...]) -> bool:
    address = arguments[-1] if arguments else None
    host = address[0] if isinstance(address, tuple) and address else address
    return isinstance(address, str | bytes) or host in ("127.0.0.1", "::1", "localhost")


@contextmanager
def watch(*allowed: Path) -> Iterator[list[str]]:
    """List of what is done outside `allowed`, the folder for temporary files, caches of libraries and /dev/null."""
    if not Watch.is_installed:
        sys.addaudithook(Watch.hook)
        Watch.is_installed = True
    caches = [Path.home() / ".cache", Path.home() / ".config" / "matplotlib", Path("/dev"), Path(sys.prefix)]
    if "MPLCONFIGDIR" in os.environ:
        caches.append(Path(os.environ["MPLCONFIGDIR"]))
    Watch.allowed = [os.path.realpath(path) for path in (*allowed, *caches)]
    Watch.found = []
    Watch.is_on = True
    try:
        yield Watch.found
    finally:
        Watch.is_on = False


def outcome(words: Sequence[object], *allowed: Path, seconds: int = SECONDS, local: bool = True) -> str:
    """`right`, or `refused` and the last line of the message. Raises what the command raised if that is anything else.

    `allowed`: where the command may change files. `local`: it may not start processes or reach other machines.
    """
    signal.alarm(seconds)
    try:
        with watch(*allowed) as found:
            done = CliRunner().invoke(cli, [str(word) for word in words])
    finally:
        signal.alarm(0)
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code in (0, 2), (done.exit_code, done.output)
    assert "Traceback" not in done.output, done.output
    assert "\x1b" not in done.output, "an escape sequence reached the terminal"
    assert done.exit_code == 0 or done.output.strip(), "refused without a word"
    if local:
        assert not found, found
    return "right" if done.exit_code == 0 else f"refused {(done.output.strip().splitlines() or [''])[-1]}"


def try_seeds(first: int, last: int, attempt: Callable[[int, Path], str]) -> None:
    """Call `attempt` with each seed and a new folder, and print what it returns.

    It ends with the first error, or by SIGALRM; with CXRFAST_KEEP_GOING set it prints all errors instead.
    """
    keeps_going = "CXRFAST_KEEP_GOING" in os.environ
    if keeps_going:
        signal.signal(signal.SIGALRM, _timeout)
    for seed in range(first, last):
        with tempfile.TemporaryDirectory() as aside:
            try:
                print(attempt(seed, Path(aside)), flush=True)
            except BaseException as error:
                if not keeps_going or isinstance(error, KeyboardInterrupt):
                    raise
                print(f"seed {seed} FAILED {traceback.format_exc()}", flush=True)
            finally:
                os.chdir("/")


def _timeout(number: int, frame: object) -> None:
    raise TimeoutError("it hangs")


def limit_memory(gigabytes: int) -> None:
    """Address space of this process and its children."""
    resource.setrlimit(resource.RLIMIT_AS, (gigabytes * 2**30,) * 2)
