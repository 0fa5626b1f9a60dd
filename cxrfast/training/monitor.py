"""What accompanies the steps of an epoch: looks at the loss, heartbeats, checkpoints, votes to stop, a profile."""

import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from cxrfast.machine import resident_bytes
from cxrfast.pipelines.loader import Batch

CPU = torch.device("cpu")

LOOK_SECONDS = 5.0
"""Between two looks at the losses on the device, each of which waits for it."""

NEVER = 2**62
"""Number of a step that never comes."""

RATE_STEPS = (10, 50)
"""Steps of a training after which its rate is measured from, and told."""

PROFILE_STEPS = (10, 5)
"""Steps left out before a profile, and steps in it."""


class Watch:
    """What happens between the steps of an epoch of a `Trainer`: looks at the loss, heartbeats, checkpoints, and stopping."""

    def __init__(self, trainer: Any, batches: "Timed", steps: int) -> None:
        self.trainer, self.batches, self.steps = trainer, batches, steps
        self.begun = self.saved = self.looked = time.monotonic()
        self.first = trainer.consumed
        self.warm = (self.begun, self.first)
        """When the first steps, which warm everything up, were over, and the images until then."""
        self.is_bad = 0

    def note(self) -> str:
        """Loss, waiting and memory for the progress bar, every few seconds."""
        trainer, now = self.trainer, time.monotonic()
        if now - self.looked < LOOK_SECONDS:
            return ""
        self.is_bad = int(trainer.is_bad())
        share = self.batches.waited / (now - self.begun)
        memory = (trainer.gpu_peak() or resident_bytes()) / 2**30
        # rank 0's share, of all steps since the epoch began
        loss = float(trainer.loss) * trainer.ranks.size * trainer.config.global_batch / trainer.consumed
        trainer.beat((trainer.consumed - self.first) / (now - self.begun))
        self.looked = time.monotonic()
        return f"loss {loss:.4f}, waiting {share:.0%}, {memory:.1f} GiB"

    def after(self, done: int) -> None:
        """After step number `done` of this call. Raises Preempted, or RunError for a bad loss."""
        trainer, runtime = self.trainer, self.trainer.runtime
        if done == RATE_STEPS[0]:
            self.warm = (time.monotonic(), trainer.consumed)
        elif done == RATE_STEPS[1] and trainer.ranks.is_first and not trainer.is_rate_told:
            begun, images = self.warm
            trainer.tell_rate((trainer.consumed - images) / (time.monotonic() - begun))
        # rank 0's clock decides
        is_late = trainer.ranks.is_first and time.monotonic() - self.saved > 60 * runtime.checkpoint_minutes
        stop, late, bad = trainer.votes.cast(trainer.stop.number, int(is_late), self.is_bad)
        if bad:
            trainer.refuse_bad()
        if stop:
            trainer.preempt(stop)
        if done == self.steps:
            trainer.votes.close()
        elif late or (runtime.checkpoint_steps and done % runtime.checkpoint_steps == 0):
            trainer.save()
            self.saved = time.monotonic()


@contextmanager
def profiled(path: Path) -> Iterator[Callable[[], None]]:
    skipped, steps = PROFILE_STEPS
    schedule = torch.profiler.schedule(wait=skipped - 2, warmup=2, active=steps, repeat=1)
    with torch.profiler.profile(
        schedule=schedule, on_trace_ready=lambda profiler: profiler.export_chrome_trace(str(path)), record_shapes=True
    ) as profiler:
        yield profiler.step


class Timed(Iterator[Batch]):
    """Batches, and the seconds that whoever computes on them had nothing to do but wait for one.

    On a GPU that is the time between the last kernel that was queued before a batch was asked for and the batch's arrival:
    a host that runs ahead of the GPU may wait in `next` all the time and cost nothing. What an engine itself has the GPU do
    for the batch on its consumer's stream, a copy and the proof of pixels, counts as waiting.
    """

    def __init__(self, batches: Iterator[Batch], device: torch.device = CPU) -> None:
        self.batches, self.device = batches, device
        self._waited = 0.0
        self._waits: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()
        """Begin and end of each wait that the GPU may not have reached yet."""

    def __next__(self) -> Batch:
        start, asked = time.monotonic(), self._now()
        try:
            return next(self.batches)
        finally:
            arrived = self._now()
            if asked is None or arrived is None:
                self._waited += time.monotonic() - start
            else:
                self._waits.append((asked, arrived))

    def _now(self) -> torch.cuda.Event | None:
        """A mark in the GPU's queue; None on a CPU."""
        if self.device.type != "cuda":
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    @property
    def waited(self) -> float:
        """Seconds, of the batches that the GPU has come to."""
        while self._waits and self._waits[0][1].query():
            asked, arrived = self._waits.popleft()
            self._waited += asked.elapsed_time(arrived) / 1000
        return self._waited

    def close(self) -> None:
        """Close a generator, and wait until the GPU has come to the last batch."""
        if isinstance(self.batches, Generator):
            self.batches.close()
        if self._waits:
            self._waits[-1][1].synchronize()
