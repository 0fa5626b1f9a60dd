"""Signals that ask a training to stop: recorded, agreed on by all ranks, forwarded to the process that trains.

A scheduler sends SIGTERM when it takes a machine away and SIGUSR1 or SIGUSR2, if configured, before the walltime ends.
torchrun forwards the signals that `--signals-to-handle` names. Ranks receive them at different times, so they vote.
`Monitor.after_step` then returns STOP, and the trainer saves and raises `Stopped`.
"""

import os
import signal
import subprocess
import threading
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from cxrfast.distributed import World

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP)

TORCHRUN_SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2"
"""Signals that torchrun is to forward: its own four, and two that would kill it and orphan its workers."""

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""Signals that a process forwards to the training it started."""

LOST_RANK = (
    "another rank ended; see its message elsewhere in this log (if there is none, it was killed, perhaps because memory "
    "ran out); the same command resumes from the last checkpoint"
)


class Stopped(SystemExit):
    """A signal stopped a training. This is not an error: the same command resumes it.

    Exit code 128 + signal, as in a shell.
    """

    def __init__(self, name: str, number: int = signal.SIGTERM) -> None:
        super().__init__(128 + number)
        self.name = name
        """Name of the run."""
        self.signal = signal.Signals(number).name

    def __str__(self) -> str:
        return f"stopped by {self.signal} in {self.name}; the same command resumes it"


class StopRequest:
    """While entered, the first of `SIGNALS` is recorded instead of ending the process; a second SIGINT interrupts at once.

    The signal is answered at once by a line on stderr, since the step that runs may take long, and saving too. SIGHUP stays
    ignored where nohup ignores it. Does nothing outside the main thread, where Python cannot handle signals.
    """

    def __init__(self, name: str = "training", answers: bool = False) -> None:
        """`name`: of the run. `answers`: whether this process writes the line; one rank does."""
        self.number = 0
        """Number of the signal received; 0 for none."""
        self.name, self.answers = name, answers
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in _not_ignored(SIGNALS)}
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.number and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self.answers and not self.number:
            self._answer(number)
        self.number = number

    def _answer(self, number: int) -> None:
        """Write without the buffers of sys.stderr, which the code that was interrupted may be writing to."""
        again = "; Ctrl-C again ends it at once, back to the last checkpoint" if number == signal.SIGINT else ""
        line = f"\n{self.name}: {signal.Signals(number).name}: saving once this step is over{again}\n"
        with suppress(OSError):  # a terminal that was closed
            os.write(2, line.encode(errors="replace"))


def _not_ignored(signals: Sequence[signal.Signals]) -> list[signal.Signals]:
    """`signals` without SIGHUP where nohup ignores it."""
    is_nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return [number for number in signals if not (is_nohup and number == signal.SIGHUP)]


class Votes:
    """Share each rank's requests with all ranks at the same step, one step later, so that no rank waits for them."""

    def __init__(self, ranks: World, questions: int) -> None:
        self.ranks, self.questions = ranks, questions
        # gloo on GPUs, too: NCCL would have each step wait for the device
        self._group = dist.new_group(backend="gloo", timeout=timedelta(minutes=30)) if ranks.size > 1 else None
        self._asked: tuple[torch.Tensor, Any] | None = None

    def cast(self, *asked: int) -> list[int]:
        """For each question, the largest number of any rank in the previous call; in this call if there is only one rank.

        All ranks must call it equally often.
        """
        if self._group is None:
            return list(asked)
        before = self._take()
        votes = torch.tensor(asked, dtype=torch.int64)
        self._asked = votes, dist.all_reduce(votes, dist.ReduceOp.MAX, group=self._group, async_op=True)  # type: ignore[arg-type]
        return before

    def close(self) -> None:
        """Wait for the pending vote and drop its result."""
        self._take()

    def _take(self) -> list[int]:
        if self._asked is None:
            return [0] * self.questions
        votes, work = self._asked
        self._asked = None
        work.wait()
        return votes.tolist()


def is_lost_rank(error: BaseException) -> bool:
    """Whether a rank gets this error when another one has ended."""
    text = str(error)
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError)
        and any(word in text for word in ("gloo/transport", "Connection closed", "NCCL"))
    )


# Trainings in a process of their own


def call(command: Sequence[str]) -> tuple[int, int | None]:
    """Run a command to its end. Returns its exit code and the number of the last signal forwarded to it, if any.

    It runs in its own process group, so that a terminal's Ctrl-C reaches it once, through this process.
    """
    received: list[int] = []
    process: subprocess.Popen[bytes] | None = None

    def forward(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if process is not None:
            process.send_signal(number)

    before = {number: signal.signal(number, forward) for number in _not_ignored(FORWARDED)}
    try:
        process = subprocess.Popen(command, process_group=0)
        if received:  # while it was being started
            process.send_signal(received[-1])
        code = process.wait()
    finally:
        for number, old in before.items():
            signal.signal(number, old)
    return code, received[-1] if received else None
