"""Signals that ask a training to stop, and the one step at which all of its ranks agree to do so.

A scheduler sends SIGTERM when it takes a machine away and SIGUSR1 or SIGUSR2 ahead of the walltime, as told; torchrun
passes them on where `--signals-to-handle` names them. Ranks hear of a signal at different times, hence the votes.
"""

import signal
import threading
from datetime import timedelta
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from cxrfast.distributed import World

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)

TORCHRUN_SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2"
"""What torchrun is told to pass on: its own four, and two of which it would die, leaving its workers alone."""


class Preempted(SystemExit):
    """A signal asked for an end, and the ranks have saved: exit code 128 + signal, as a shell has it."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.number = number
        self.signal = signal.Signals(number).name


class StopRequest:
    """While entered, the first of `SIGNALS` is noted instead of ending the process; a second SIGINT interrupts at once.

    Elsewhere than in the main thread, where Python lets nobody handle signals, nothing is noted.
    """

    def __init__(self) -> None:
        self.number = 0
        """Of the signal that came; 0 before."""
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.number and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.number = number


class Votes:
    """What any rank asks for, all ranks learn at the same step: one step later, so that none waits for an answer."""

    def __init__(self, ranks: World, questions: int) -> None:
        self.ranks, self.questions = ranks, questions
        # gloo on GPUs, too: NCCL would have each step wait for the device
        self._group = dist.new_group(backend="gloo", timeout=timedelta(minutes=30)) if ranks.size > 1 else None
        self._asked: tuple[torch.Tensor, Any] | None = None

    def cast(self, *asked: int) -> list[int]:
        """Largest number that any rank asked in its last call, one a question; in its own call where it is the only rank.

        Every rank has to call it as often as the others.
        """
        if self._group is None:
            return list(asked)
        before = self._take()
        votes = torch.tensor(asked, dtype=torch.int64)
        self._asked = votes, dist.all_reduce(votes, dist.ReduceOp.MAX, group=self._group, async_op=True)  # type: ignore[arg-type]
        return before

    def close(self) -> None:
        """Wait for what is under way; its answer is lost."""
        self._take()

    def _take(self) -> list[int]:
        if self._asked is None:
            return [0] * self.questions
        votes, work = self._asked
        self._asked = None
        work.wait()
        return votes.tolist()


def is_lost_rank(error: BaseException) -> bool:
    """Is this what a rank gets to see when another one has ended?"""
    text = str(error)
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError)
        and any(word in text for word in ("gloo/transport", "Connection closed", "NCCL"))
    )
