"""Decisions between training steps (continue, save or stop), early stopping, heartbeats, time spent waiting, profiles.

Numbers come in, decisions and numbers go out, a heartbeat goes into the run; nothing here knows the trainer.
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
"""Seconds between two reads of the losses; each read waits for the device."""

BEAT_SECONDS = 30.0
"""Seconds between two heartbeats in a run's state."""

RATE_STEPS = (10, 50)
"""A training's rate is measured from the first of these steps to the second, and reported once."""

PROFILE_STEPS = (10, 5)
"""Steps before a profile, and steps in it."""


class Action(Enum):
    """What a training does next."""

    CONTINUE = auto()
    SAVE = auto()
    STOP = auto()
    """Save and stop because of the signal in `Monitor.signal`."""
    CHECK = auto()
    """End with an error that names the bad loss or image seen by a rank."""


class Monitor:
    """Decides after each step what to do next, the same on all ranks at the same step.

    `checkpoint_minutes`, `checkpoint_steps` (None: no limit): largest distance between two checkpoints.
    """

    def __init__(self, ranks: World, checkpoint_minutes: float, checkpoint_steps: int | None) -> None:
        self.is_first = ranks.is_first
        self.checkpoint_seconds, self.checkpoint_steps = 60 * checkpoint_minutes, checkpoint_steps
        self.votes = Votes(ranks, questions=3)
        self.signal = 0
        """Number of the signal for which the ranks agreed to stop; 0 for none."""
        self.is_rate_reported = False
        self.start_epoch(0, 0)

    def start_epoch(self, steps: int, images: int) -> None:
        """`steps`: left in this epoch; `images`: already used in it."""
        self.steps = steps
        self.begun = self.saved = self.looked = time.monotonic()
        self.first_images = images
        self.warm_since, self.warm_images = self.begun, images
        """End of the warm-up steps, and images used until then."""

    def is_look_due(self) -> bool:
        """Whether to read the losses on the device now; if so, not again for LOOK_SECONDS."""
        now = time.monotonic()
        is_due = now - self.looked >= LOOK_SECONDS
        if is_due:
            self.looked = now
        return is_due

    def steady_rate(self, done: int, images: int) -> float | None:
        """Images/s after the warm-up, reported once, at step RATE_STEPS[1]; None at all other steps."""
        if done == RATE_STEPS[0]:
            self.warm_since, self.warm_images = time.monotonic(), images
        if done != RATE_STEPS[1] or self.is_rate_reported:
            return None
        self.is_rate_reported = True
        return (images - self.warm_images) / (time.monotonic() - self.warm_since)

    def after_step(self, done: int, signal: int, is_bad: bool) -> Action:
        """What to do after step number `done` of this epoch.

        `signal`: received by this rank, or 0. `is_bad`: whether this rank has seen a bad loss or image.
        """
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
            self.saved = time.monotonic()
            return Action.SAVE
        return Action.CONTINUE

    def after_validation_batch(self, signal: int) -> Action:
        """STOP or CONTINUE after a batch that every rank has; the caller closes the votes after the last one."""
        self.signal, *_ = self.votes.cast(signal, 0, 0)
        if not self.signal:
            return Action.CONTINUE
        self.votes.close()
        return Action.STOP


def is_over(config: TrainConfig, counters: Counters) -> bool:
    """Whether all epochs are done, or the validation loss has not fallen for `stop_after` epochs (early stopping)."""
    return counters.epoch >= config.epochs or (config.stops_early and counters.stale >= config.stop_after)


class Heartbeat:
    """Writes a run's state, progress, rate and time left into its state.json. One rank calls it.

    `images`, `validated`: images in an epoch's training and in its validation.
    """

    def __init__(self, run: Run, counters: Counters, images: int, validated: int) -> None:
        self.run, self.counters, self.images, self.validated = run, counters, images, validated
        self.written = 0.0

    def is_due(self) -> bool:
        return time.monotonic() - self.written >= BEAT_SECONDS

    def beat(self, images_per_s: float, area: float | None = None) -> float:
        """Write that the run is alive. Returns the seconds left, at most.

        `area`: of the images whose rate this is, see `TrainConfig.area_at`; default: this epoch's.
        """
        config, epoch = self.run.config, self.counters.epoch
        rate = images_per_s * (area or config.area_at(epoch))
        work = config.work(epoch, self.images, self.validated) - self.counters.consumed * config.area_at(epoch)
        self.write("running", images_per_s=images_per_s, eta_seconds=work / rate)
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
    """Function to call after each step; it writes a trace of a few steps to `path` if requested and not there yet."""
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
    """Iterates batches and sums the seconds during which training had to wait for one.

    On a GPU a wait lasts from the end of the last kernel queued before the batch was requested to the batch's arrival: a
    host that runs ahead of the GPU may always wait in `next` at no cost. Work that an engine queues for the batch on its
    consumer's stream (a copy, the proof of pixels) counts as waiting.
    """

    def __init__(self, batches: Iterator[Batch], device: torch.device = CPU) -> None:
        self.batches, self.device = batches, device
        self._waited = 0.0
        self._waits: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()
        """Start and end of each wait that the GPU may not have reached yet."""

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
        """An event in the GPU's queue; None on a CPU."""
        if self.device.type != "cuda":
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    @property
    def waited(self) -> float:
        """Seconds, for the batches that the GPU has reached."""
        while self._waits and self._waits[0][1].query():
            asked, arrived = self._waits.popleft()
            self._waited += asked.elapsed_time(arrived) / 1000
        return self._waited

    def close(self) -> None:
        """Close a generator, and wait until the GPU has reached the last batch."""
        if isinstance(self.batches, Generator):
            self.batches.close()
        if self._waits:
            self._waits[-1][1].synchronize()
