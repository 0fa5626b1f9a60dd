"""What happens between the steps of an epoch: whether to go on, save or stop; early stopping; heartbeats; waiting; a profile.

Numbers come in, decisions and numbers go out, a heartbeat into the run: nothing here knows the trainer.
"""

import socket
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from enum import Enum, auto
from pathlib import Path
from typing import Any

import torch

from cxrfast.config import TrainConfig
from cxrfast.distributed import World
from cxrfast.machine import slurm_job
from cxrfast.pipelines.loader import Batch
from cxrfast.runs.run import Run
from cxrfast.training.checkpoint import Counters
from cxrfast.training.signals import Votes

CPU = torch.device("cpu")

LOOK_SECONDS = 5.0
"""Between two looks at the losses on the device, each of which waits for it."""

BEAT_SECONDS = 30.0
"""Between two heartbeats in a run's state."""

RATE_STEPS = (10, 50)
"""Steps of a training after which its rate is measured from, and told."""

PROFILE_STEPS = (10, 5)
"""Steps left out before a profile, and steps in it."""


class Action(Enum):
    """What a training does after a step."""

    CONTINUE = auto()
    SAVE = auto()
    STOP = auto()
    """Save and stop, for the signal in `Monitor.signal`."""
    CHECK = auto()
    """Find the bad loss or image that a rank has seen, and end with an error."""


class Monitor:
    """Clock, votes and counts of a training: what to do after each step, the same on all ranks at the same step.

    `checkpoint_minutes`, `checkpoint_steps`: between two checkpoints, at most; no limit in steps if that is None.
    """

    def __init__(self, ranks: World, checkpoint_minutes: float, checkpoint_steps: int | None) -> None:
        self.is_first = ranks.is_first
        self.checkpoint_seconds, self.checkpoint_steps = 60 * checkpoint_minutes, checkpoint_steps
        self.votes = Votes(ranks, questions=3)
        self.signal = 0
        """Number of the signal that the ranks agreed to stop for; 0 for none."""
        self.is_rate_told = False
        self.start_epoch(0, 0)

    def start_epoch(self, steps: int, images: int) -> None:
        """`steps`: those left in this epoch; `images`: those already taken."""
        self.steps = steps
        self.begun = self.saved = self.looked = time.monotonic()
        self.first_images = images
        self.warm_since, self.warm_images = self.begun, images
        """When the first steps, which warm everything up, were over, and the images until then."""

    def rate(self, images: int) -> float:
        """Images/s since the epoch was started here; `images`: taken in it so far."""
        return (images - self.first_images) / (time.monotonic() - self.begun)

    def waiting_share(self, waited: float) -> float:
        """Fraction of the time since the epoch was started here that `waited` seconds are."""
        return waited / (time.monotonic() - self.begun)

    def is_look_due(self) -> bool:
        """Is it time to look at the losses on the device, which waits for it?"""
        return time.monotonic() - self.looked >= LOOK_SECONDS

    def note_look(self) -> None:
        self.looked = time.monotonic()

    def steady_rate(self, done: int, images: int) -> float | None:
        """Images/s once the first steps are over, told once: at step number RATE_STEPS[1]; None at all others."""
        if done == RATE_STEPS[0]:
            self.warm_since, self.warm_images = time.monotonic(), images
        if done != RATE_STEPS[1] or self.is_rate_told:
            return None
        self.is_rate_told = True
        return (images - self.warm_images) / (time.monotonic() - self.warm_since)

    def after_step(self, done: int, signal: int, is_bad: bool) -> Action:
        """What to do after step number `done` of this epoch; `signal`: that this rank got, or 0; `is_bad`: as it last looked."""
        is_late = self.is_first and time.monotonic() - self.saved > self.checkpoint_seconds  # rank 0's clock decides
        self.signal, late, bad = self.votes.cast(signal, int(is_late), int(is_bad))
        if bad:
            return Action.CHECK
        if self.signal:
            self.votes.close()
            return Action.STOP
        if done == self.steps:  # the end of the epoch saves
            self.votes.close()
            return Action.CONTINUE
        if late or (self.checkpoint_steps and done % self.checkpoint_steps == 0):
            return Action.SAVE
        return Action.CONTINUE

    def note_save(self) -> None:
        self.saved = time.monotonic()

    def after_validation_batch(self, signal: int) -> Action:
        """STOP or CONTINUE, after a batch that every rank has; close the votes after the last."""
        self.signal, *_ = self.votes.cast(signal, 0, 0)
        if not self.signal:
            return Action.CONTINUE
        self.votes.close()
        return Action.STOP


def is_over(config: TrainConfig, counters: Counters) -> bool:
    """Whether a training is over: all epochs are done, or early stopping ends it.

    Early stopping: the last `stop_after` epochs had no lower validation loss than the best one before them.
    """
    return counters.epoch >= config.epochs or counters.stale >= config.stop_after


class Heartbeat:
    """Writes into a run's state how it is, how far, how fast, and how long it will take. One rank calls it.

    `images`, `validated`: number of images that an epoch trains on and validates on.
    """

    def __init__(self, run: Run, counters: Counters, images: int, validated: int) -> None:
        self.run, self.counters, self.images, self.validated = run, counters, images, validated
        self.written = 0.0

    def is_due(self) -> bool:
        return time.monotonic() - self.written >= BEAT_SECONDS

    def beat(self, images_per_s: float, area: float | None = None) -> float:
        """Write that the run is alive. Returns the seconds left, at most.

        `area`: of the images that the rate is of, see `TrainConfig.area_at`; default: those of this epoch.
        """
        rate = images_per_s * (area or self.run.config.area_at(self.counters.epoch))
        seconds = self.seconds_left(rate)
        self.write("running", images_per_s=images_per_s, images_per_s_at_scale=rate, eta_seconds=seconds)
        return seconds

    def seconds_left(self, rate: float) -> float:
        """Seconds until the last epoch is done, at most; `rate`: images of the run's scale per second."""
        config, epoch = self.run.config, self.counters.epoch
        work = config.work(epoch, self.images, self.validated) - self.counters.consumed * config.area_at(epoch)
        return work / rate

    def write(self, state: str, **more: Any) -> None:
        counters = self.counters
        self.written = time.monotonic()
        self.run.set_state(
            state,
            host=socket.gethostname(),
            job=slurm_job(),
            epoch=counters.epoch,
            epochs=self.run.config.epochs,
            consumed=counters.consumed,
            epoch_images=self.images,
            best_val_loss=None if counters.best == float("inf") else counters.best,
            best_val_auroc=counters.best_auroc,
            **more,
        )


@contextmanager
def profiled(path: Path, is_wanted: bool) -> Iterator[Callable[[], None]]:
    """What to call after each step; a trace of a few of them goes to `path` if it is wanted and not there yet."""
    if not is_wanted or path.exists():
        yield lambda: None
        return
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
