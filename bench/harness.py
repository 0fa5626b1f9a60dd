"""How all benchmarks measure: interleaved rounds, medians, a time limit, a process per piece of work, and where they ran."""

import copy
import logging
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch
from torch import nn

from cxrfast.bench.process import in_own_process, tell
from cxrfast.distributed import dali_build, nvidia_driver
from cxrfast.machine import memory_bytes, processor, usable_cores
from cxrfast.progress import progress
from cxrfast.shards.format.info import versions
from cxrfast.units import duration

log = logging.getLogger(__name__)

T = TypeVar("T")

Measurement = Callable[[float], float]
"""Takes the seconds it may use and returns images/s."""


@dataclass(frozen=True)
class Measured:
    """Rates of one measurement in images/s, one value per round."""

    rounds: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)

    def ratio(self, other: "Measured") -> float:
        """Median over the rounds of this rate / the other's in the same round, so that drift of the machine cancels."""
        return statistics.median(a / b for a, b in zip(self.rounds, other.rounds, strict=True))


# Time

GRACE = 30.0
"""Seconds a process may continue after the whole budget is used up, before it is killed."""


@dataclass(frozen=True)
class Budget:
    """The time until which work may start. Without an end there is always enough."""

    end: float = math.inf
    """On `clock`, which is the same for all processes of a machine."""
    last: float = math.inf
    """The end of the whole budget, where this is a share of it."""
    clock: Callable[[], float] = time.monotonic

    @classmethod
    def of(cls, minutes: float | None, clock: Callable[[], float] = time.monotonic) -> "Budget":
        """A budget of some minutes from now; None: no end."""
        end = math.inf if minutes is None else clock() + 60 * minutes
        return cls(end, end, clock)

    @property
    def left(self) -> float:
        """Seconds, at least 0."""
        return max(0.0, self.end - self.clock())

    @property
    def left_of_all(self) -> float:
        """Seconds until the whole budget is over, at least 0."""
        return max(0.0, self.last - self.clock())

    def share(self, least: list[float]) -> "Budget | None":
        """The share of the first of several pieces of work. `least`: seconds that each of them takes at least.

        Those that fit, in this order, get their least and equal parts of the rest. None if not even the first fits.
        """
        left = self.left
        needed = [seconds for seconds in accumulate(least) if seconds <= left]
        if not (left and needed):
            return None
        return replace(self, end=self.clock() + least[0] + (left - needed[-1]) / len(needed))


def in_time(
    pieces: Mapping[str, tuple[int, int, T]],
    work: Callable[[T, Budget], list[list[float]] | None],
    budget: Budget,
    left_out: dict[str, str],
    turn: float = 0.0,
) -> None:
    """Do the pieces of work that there is time for, each within its share; note the others in `left_out`.

    `pieces`: by name, with the scale and the images of a step. `work` returns the rounds of its rates in images/s, or None
    if it failed: they tell how long the next pieces take with one round and the longest time around the rounds so far.
    `turn`: seconds that each measurement is given.
    """
    around, pace = 0.0, list[float]()  # seconds per pixel of each measurement

    def turns(scale: int, images: int, rounds: int) -> float:
        """Seconds of a burn-in and some rounds. A turn is a step to warm up, then `turn` seconds or one step."""
        steps = [seconds * scale**2 * images for seconds in pace]
        return sum((rounds + 1) * step + max(turn / 4, step) + rounds * max(turn, step) for step in steps)

    for n, (name, (scale, images, piece)) in enumerate(pieces.items()):
        least = [around + turns(side, batch, 1) for side, batch, _ in list(pieces.values())[n:]]
        share = budget.share(least)
        if share is None:
            left_out[name] = no_time(least[0], budget.left)
            continue
        start = budget.clock()
        rates = work(piece, share)
        if rates is not None:
            pace = [1 / (statistics.median(rounds) * scale**2) for rounds in rates]
            longest = max(map(len, rates), default=1)
            around = max(around, budget.clock() - start - turns(scale, images, longest))


def no_time(needed: float, left: float) -> str:
    """Why something was left out, and what to do."""
    took = f"about {duration(needed)} needed, {duration(left)} left" if needed else "no time left"
    return f"{took}: give more --minutes, or measure less"


def announce(title: str, minutes: float | None, seconds: float, *lines: str) -> None:
    """Show the plan of a benchmark before it starts: what is measured, how long that takes, what is left out.

    `seconds`: what it takes at least, without a limit.
    """
    limit = "--minutes N ends it sooner"
    if minutes is not None:
        limit = f"with --minutes {minutes:g}, rounds end early and what does not fit is left out and named"
    log.info("\n  ".join([title, *lines, f"time: {duration(seconds)} or more; {limit}"]))


# Rounds


def interleave(
    measurements: Mapping[str, Measurement],
    seconds: float,
    rounds: int,
    budget: Budget | None = None,
    label: str = "",
) -> dict[str, Measured]:
    """Run every measurement for about `seconds` in turn, `rounds` times, after one shorter burn-in each.

    Each figure is told to the process that waits for this one, or shown in a progress bar with the `label`. Rounds that
    would exceed the budget are left out, except the first.
    """
    budget, results = budget or Budget(), {name: list[float]() for name in measurements}
    figures = len(measurements) * (rounds + 1) if label else 0
    with progress(label, figures, unit="figures") as advance:
        for n in range(rounds + 1):
            start = budget.clock()
            for name, measure in measurements.items():
                results[name].append(measure(seconds if n else seconds / 4))
                tell(name)
                advance(note=name)
            if n and budget.left < (budget.clock() - start) / 2:
                break
    return {name: Measured(values[1:]) for name, values in results.items()}


def measure_elsewhere(
    work: Callable[..., T], options: dict[str, Any], budget: Budget, label: str = "", figures: int = 0
) -> T:
    """`in_own_process` with the `budget` as an option of `work`, and a progress bar of the `figures` that it measures."""
    with progress(label, figures, unit="figures") as advance:
        return in_own_process(
            work,
            {**options, "budget": budget},
            limit=budget.left_of_all + GRACE,
            on_figure=lambda name: advance(note=name),
        )


def rate(step: Callable[[], int], seconds: float, device: torch.device) -> float:
    """Images/s of `step`, which handles some images and returns how many, repeated for `seconds`, at least once."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    wait()  # work that is still queued must not count
    start = time.perf_counter()
    images = step()
    while time.perf_counter() - start < seconds:
        images += step()
    wait()
    return images / (time.perf_counter() - start)


# The machine


def limit_memory(device: torch.device) -> None:
    """On a CPU, keep this process below the machine's memory: a failed allocation can be reported, a kill cannot."""
    if device.type == "cpu":
        limit = int(0.85 * memory_bytes())
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def peak_resident_bytes() -> int:
    """Peak resident memory of this process since it started."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def gpu_used_bytes(device: torch.device) -> int | None:
    """GPU memory in use by all processes, as the driver reports it; None on a CPU."""
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    return total - free


def saved_bytes(model: nn.Module, size: int, channels: int = 1) -> int:
    """Bytes autograd keeps between forward and backward per image, float32 (channels, size, size).

    Measured in training mode on the model's device, as a batch of three less a batch of two, which leaves out what does
    not grow with the batch. Each storage counts once and whole; parameters and buffers do not count, the images do.
    A model on the `meta` device is measured without computing or allocating anything. Call it within `torch.autocast`
    for another precision. What lives only during the two passes (gradients, a layer's recomputation) does not count.
    """
    trial = copy.deepcopy(model).train()  # a copy, since a forward pass moves BatchNorm's statistics
    device = next(trial.parameters()).device
    own = {tensor.untyped_storage()._cdata for tensor in (*trial.parameters(), *trial.buffers())}

    def kept(batch: int) -> int:
        storages: dict[int, torch.UntypedStorage] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                storages[storage._cdata] = storage  # held, so that no address is used twice
            return tensor

        image = torch.zeros((batch, channels, size, size), device=device)
        image = image.contiguous(memory_format=torch.channels_last)
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            trial(image)
        return sum(storage.nbytes() for storage in storages.values())

    return kept(3) - kept(2)  # one image of 32 px ends as a single pixel, which has no variance for BatchNorm


@contextmanager
def one_core() -> Iterator[None]:
    """Hold this thread and those it starts to one core, where the system can, so that a library's helper threads count."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


EXTRA = "pip install 'cxrfast[bench]'"
"""How to install most libraries that are compared with."""


def missing_library(module: str, advice: str = EXTRA) -> str:
    """Why a library cannot be imported, and what to do; empty if it can."""
    try:
        import_module(module)
    except (ImportError, OSError) as error:  # OSError: the Python package without a library that it loads
        return f"{error}: {advice}"
    return ""


def file_system(folder: Path) -> str | None:
    """Kind of the file system that holds a folder: `ext4`, `nfs4`, `tmpfs`."""
    mounts = [m for m in psutil.disk_partitions(all=True) if folder.resolve().is_relative_to(m.mountpoint)]
    return max(mounts, key=lambda m: len(m.mountpoint)).fstype if mounts else None


def provenance(device: torch.device) -> dict[str, Any]:
    """Machine, versions and command, as every result carries them. Contains no host, user or folder."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "command": " ".join(["cxrfast", *(Path(word).name for word in sys.argv[1:])]),
        "processor": processor(),
        "cores": usable_cores(),
        "memory_bytes": memory_bytes(),
        "gpu": gpu,
        "driver": nvidia_driver() if gpu else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "dali": dali_build(),
        **versions(),
        "commit": _commit(),
    }


def _commit() -> str | None:
    """The commit of a source checkout; None in an installed package."""
    top = Path(__file__).resolve().parent.parent
    if not (top / "pyproject.toml").exists():
        return None
    command = ["git", "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, cwd=top, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
