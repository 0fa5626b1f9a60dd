"""One child process that gets the signals of this one, so that a training that is stopped ends in good order."""

import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class Stopped(Exception):
    """A signal ended the work, and what it had started has ended too. Not an error: the same command goes on."""

    def __init__(self, what: str, number: int = signal.SIGTERM) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name} in {what}; the same command goes on from there")
        self.exit_code = 128 + number
        """As a shell gives it: 143 for SIGTERM, 138 for SIGUSR1."""


def call(command: Sequence[str]) -> tuple[int, int | None]:
    """Run a command to its end. Its exit code, and the number of the last signal that was passed on to it, if any.

    It runs in a process group of its own: a terminal's Ctrl-C reaches it once, by way of this process.
    """
    received: list[int] = []
    process: subprocess.Popen[bytes] | None = None

    def forward(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if process is not None:
            process.send_signal(number)

    with _handling(forward):
        process = subprocess.Popen(command, process_group=0)
        if received:  # while it was started
            process.send_signal(received[-1])
        code = process.wait()
    return code, received[-1] if received else None


@contextmanager
def _handling(handler: "signal._HANDLER") -> Iterator[None]:
    before = {number: signal.signal(number, handler) for number in FORWARDED}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
