"""How to measure: interleaved rounds in one process, medians with their spread, and where it all ran."""

import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from matplotlib.figure import Figure as Plot

from cxrfast.distributed import dali_build, nvidia_driver
from cxrfast.errors import CxrfastError, RunError
from cxrfast.files import replacing, write_bytes, write_json
from cxrfast.machine import memory_bytes, processor, usable_cores
from cxrfast.progress import progress
from cxrfast.shards.manifest import versions


@dataclass(frozen=True)
class Figure:
    """Rates of one measurement, images/s, a value a round."""

    rounds: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)

    def ratio(self, other: "Figure") -> float:
        """Median over the rounds of this rate / the other's in the same round, so that drift of the machine cancels."""
        return statistics.median(a / b for a, b in zip(self.rounds, other.rounds, strict=True))


def interleave(measurements: Mapping[str, Callable[[float], float]], seconds: float, rounds: int) -> dict[str, Figure]:
    """Run every measurement for about `seconds` in turn, `rounds` times, after one shorter burn-in each.

    A measurement takes the seconds it may use and returns images/s.
    """
    for measure in measurements.values():
        measure(seconds / 4)
    results: dict[str, list[float]] = {name: [] for name in measurements}
    for _ in range(rounds):
        for name, measure in measurements.items():
            results[name].append(measure(seconds))
    return {name: Figure(values) for name, values in results.items()}


def take_turns(
    label: str, measurements: Mapping[str, Callable[[float], float]], seconds: float, rounds: int
) -> dict[str, Figure]:
    """`interleave`, with a progress bar."""
    with progress(label, len(measurements) * (rounds + 1), unit="figures") as advance:

        def shown(measure: Callable[[float], float]) -> Callable[[float], float]:
            def measure_and_show(seconds: float) -> float:
                found = measure(seconds)
                advance()
                return found

            return measure_and_show

        return interleave({name: shown(measure) for name, measure in measurements.items()}, seconds, rounds)


def rate(step: Callable[[], int], seconds: float, device: torch.device) -> float:
    """Images/s of `step`, which handles some images and returns how many, repeated until `seconds` are over; once at least."""
    images, start = 0, time.perf_counter()
    while True:
        images += step()
        if time.perf_counter() - start >= seconds:
            break
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return images / (time.perf_counter() - start)


def in_own_process(module: str, options: dict[str, Any]) -> Any:
    """What `answer` in `python -m module` makes of `options`, with memory of its own and no way to take others down.

    Raises MemoryError if memory ran short there, else RunError with the last line that the process wrote.
    """
    done = subprocess.run([sys.executable, "-m", module, json.dumps(options)], capture_output=True, text=True)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    raise MemoryError(last) if done.returncode == -9 or "memory" in last.lower() else RunError(last)


def answer(work: Callable[..., Any]) -> None:
    """Of the process that `in_own_process` starts: print what `work(**options)` returns, or exit with its error."""
    try:
        print(json.dumps(work(**json.loads(sys.argv[1]))))
    except (CxrfastError, RuntimeError, MemoryError) as error:
        lines = str(error).strip().splitlines()
        sys.exit(f"{type(error).__name__}: {lines[0] if lines else 'out of memory'}")


def limit_memory(device: torch.device) -> None:
    """On a CPU, keep this process below the machine's memory: a failed allocation can be told, a killed process cannot."""
    if device.type == "cpu":
        limit = int(0.85 * memory_bytes())
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def peak_resident_bytes() -> int:
    """Of this process since it started."""
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


def write_results(out: Path, name: str, values: dict[str, Any], text: str, plot: Plot | None) -> None:
    """NAME.json, NAME.md (`text`, then where it ran) and NAME.png in `out`."""
    write_json(out / f"{name}.json", values)
    notes = "\n".join(f"- {what}: {value}" for what, value in values["provenance"].items() if value is not None)
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
    """Of a source checkout; None in an installed package."""
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
