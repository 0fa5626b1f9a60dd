"""How to measure: interleaved rounds in one process, medians with their spread, a time to end, and where it all ran."""

import json
import logging
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from matplotlib.figure import Figure

from cxrfast.distributed import dali_build, nvidia_driver
from cxrfast.errors import CxrfastError, RunError, is_out_of_memory
from cxrfast.files import replacing, write_bytes, write_json
from cxrfast.machine import memory_bytes, processor, usable_cores
from cxrfast.progress import Advance, progress
from cxrfast.shards.format.info import versions
from cxrfast.tables import Table
from cxrfast.units import duration

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Measured:
    """Rates of one measurement, images/s, a value a round."""

    rounds: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)

    def ratio(self, other: "Measured") -> float:
        """Median over the rounds of this rate / the other's in the same round, so that drift of the machine cancels."""
        return statistics.median(a / b for a, b in zip(self.rounds, other.rounds, strict=True))


# Time


@dataclass(frozen=True)
class Budget:
    """The time until which work may be started, or a share of it. Without an end there is always enough."""

    end: float = math.inf
    """On `clock`, which is the same for all processes of a machine."""
    last: float = math.inf
    """The end of the whole, where this is a share."""
    clock: Callable[[], float] = time.monotonic

    @classmethod
    def of(cls, minutes: float | None, clock: Callable[[], float] = time.monotonic) -> "Budget":
        """So many minutes from now on; None: no end."""
        end = math.inf if minutes is None else clock() + 60 * minutes
        return cls(end, end, clock)

    @property
    def left(self) -> float:
        """Seconds, at least 0."""
        return max(0.0, self.end - self.clock())

    @property
    def left_of_all(self) -> float:
        """Seconds, at least 0, until the whole is over."""
        return max(0.0, self.last - self.clock())

    def share(self, least: list[float]) -> "Budget | None":
        """The part of the first of several pieces of work, each of which takes at least so many seconds.

        Those that fit, in this order, get their least and equal parts of the rest. None if not even the first fits.
        """
        left, needed, fitting = self.left, 0.0, 0
        for seconds in least:
            if left <= 0 or needed + seconds > left:
                break
            needed, fitting = needed + seconds, fitting + 1
        return replace(self, end=self.clock() + least[0] + (left - needed) / fitting) if fitting else None


def least_seconds(wall: float, rounds: int, steps: list[float], seconds: float, growth: float = 1.0) -> float:
    """How long one round at another scale takes at least, judging by a scale that took `wall` seconds for `rounds` rounds.

    `steps`: seconds of one step of each measurement there; a turn is a step to warm up, then `seconds` or one step.
    `growth`: how much longer a step takes at the other scale. What came before and after the rounds stays as it was.
    """

    def turns(growth: float, rounds: int) -> float:
        return sum(
            (rounds + 1) * growth * step + max(seconds / 4, growth * step) + rounds * max(seconds, growth * step)
            for step in steps
        )

    return max(0.0, wall - turns(1.0, rounds)) + turns(growth, 1)


def announce(title: str, minutes: float | None, seconds: float, *lines: str) -> None:
    """Print the plan of a benchmark on stderr, before it starts: what is measured, how long that takes, what is left out.

    `seconds`: what it takes without a limit, at least.
    """
    limit = "--minutes N ends it sooner"
    if minutes is not None:
        limit = f"with --minutes {minutes:g}, rounds end early and what does not fit is left out and named"
    log.info("\n  ".join([title, *lines, f"time: {duration(seconds)} or more; {limit}"]))


def no_time(needed: float, left: float) -> str:
    """Why something was left out, and what to do."""
    took = f"about {duration(needed)} needed, {duration(left)} left" if needed else "no time left"
    return f"{took}: give more --minutes, or ask for less"


# Rounds


def interleave(
    measurements: Mapping[str, Callable[[float], float]],
    seconds: float,
    rounds: int,
    budget: Budget | None = None,
    told: Callable[[str], object] = lambda name: None,
) -> dict[str, Measured]:
    """Run every measurement for about `seconds` in turn, `rounds` times, after one shorter burn-in each.

    A measurement takes the seconds it may use and returns images/s; `told` hears its name each time. Rounds that would
    go beyond the budget are left out, all but the first.
    """
    budget = budget or Budget()
    for name, measure in measurements.items():
        measure(seconds / 4)
        told(name)
    results: dict[str, list[float]] = {name: [] for name in measurements}
    for _ in range(rounds):
        begun = budget.clock()
        for name, measure in measurements.items():
            results[name].append(measure(seconds))
            told(name)
        if budget.left < (budget.clock() - begun) / 2:
            break
    return {name: Measured(values) for name, values in results.items()}


def take_turns(
    label: str,
    measurements: Mapping[str, Callable[[float], float]],
    seconds: float,
    rounds: int,
    budget: Budget | None = None,
) -> dict[str, Measured]:
    """`interleave`, with a progress bar."""
    with progress(label, len(measurements) * (rounds + 1), unit="figures") as advance:
        return interleave(measurements, seconds, rounds, budget, lambda name: advance(note=name))


def rate(step: Callable[[], int], seconds: float, device: torch.device) -> float:
    """Images/s of `step`, which handles some images and returns how many, repeated until `seconds` are over; once at least."""
    _wait_for(device)  # what is still running was not counted
    images, start = 0, time.perf_counter()
    while True:
        images += step()
        if time.perf_counter() - start >= seconds:
            break
    _wait_for(device)
    return images / (time.perf_counter() - start)


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# Processes


GRACE = 30.0
"""Seconds after the end of the whole budget that a process gets before it is killed."""


def in_own_process(
    module: str, options: dict[str, Any], budget: Budget | None = None, advance: Advance | None = None
) -> Any:
    """What `answer` in `python -m module` makes of `options`, with memory of its own and no way to take others down.

    With a `budget` it is told its `end`, and killed `GRACE` after the whole is over. `advance` counts what it measures, as
    `tell` says. Raises MemoryError if memory ran short there, else RunError with the last line that the process wrote.
    """
    options = options | ({"end": budget.end} if budget else {}) | ({"telling": True} if advance else {})
    limit = budget.left_of_all + GRACE if budget else math.inf
    killed: list[int] = []
    result = ""
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(
            [sys.executable, "-m", module, json.dumps(options)], stdout=subprocess.PIPE, stderr=errors, text=True
        ) as process,
    ):
        timer = threading.Timer(min(limit, threading.TIMEOUT_MAX), lambda: killed.append(_kill(process.pid)))
        timer.daemon = True
        timer.start()
        try:
            for line in process.stdout or ():
                result = line
                if advance and line.startswith(TOLD):
                    advance(note=line.removeprefix(TOLD).strip())
            process.wait()
        except BaseException:
            _kill(process.pid)
            raise
        finally:
            timer.cancel()
        errors.seek(0)
        said = errors.read().strip().splitlines()
    if process.returncode == 0:
        return json.loads(result)
    if killed:
        raise RunError(f"it did not end within {duration(limit)} and was killed")
    last = said[-1] if said else f"exit code {process.returncode}"
    raise MemoryError(last) if process.returncode == -9 or is_out_of_memory(RuntimeError(last)) else RunError(last)


def _kill(pid: int) -> int:
    """A process and all that it has started."""
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        for one in (*process.children(recursive=True), process):
            with suppress(psutil.NoSuchProcess):
                one.kill()
    return pid


TOLD = "measured: "


def tell(figure: str) -> None:
    """In the process that `in_own_process` starts: say that one more figure was measured."""
    print(f"{TOLD}{figure}", flush=True)


def answer(work: Callable[..., Any]) -> None:
    """In the process that `in_own_process` starts: print what `work(**options)` returns, or exit with its error."""
    try:
        print(json.dumps(work(**json.loads(sys.argv[1]))))
    except (CxrfastError, RuntimeError, MemoryError) as error:
        lines = str(error).strip().splitlines()
        kind = "out of memory" if is_out_of_memory(error) else type(error).__name__
        sys.exit(": ".join([kind, *lines[:1]]))


def limit_memory(device: torch.device) -> None:
    """On a CPU, keep this process below the machine's memory: a failed allocation can be told, a killed process cannot."""
    if device.type == "cpu":
        limit = int(0.85 * memory_bytes())
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def peak_resident_bytes() -> int:
    """Peak resident memory of this process since it started."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@contextmanager
def one_core() -> Iterator[None]:
    """Hold this thread, and those it starts, to one core, where the system can: helper threads of a library then count."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def file_system(folder: Path) -> str | None:
    """Kind of the file system that holds a folder (`ext4`, `nfs4`, `tmpfs`), which its name would not tell."""
    here = folder.resolve()
    mounts = [m for m in psutil.disk_partitions(all=True) if here.is_relative_to(m.mountpoint)]
    return max(mounts, key=lambda m: len(m.mountpoint)).fstype if mounts else None


def write_results(out: Path, name: str, values: dict[str, Any], tables: list[Table], plot: Figure | None) -> None:
    """NAME.json, NAME.md (`tables`, then where it ran) and NAME.png in `out`."""
    write_json(out / f"{name}.json", values)
    notes = "\n".join(f"- {what}: {value}" for what, value in values["provenance"].items() if value is not None)
    text = "\n".join(table.markdown() for table in tables)
    write_bytes(out / f"{name}.md", f"{text}\n{notes}\n".encode())
    if plot:
        with replacing(out / f"{name}.png") as file:
            plot.savefig(file, format="png", dpi=120)


def provenance(device: torch.device) -> dict[str, Any]:
    """Machine, versions and command, as every result carries them. Names no host, no user and no folder."""
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
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            cwd=top,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
