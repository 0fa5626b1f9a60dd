"""The two engines side by side on one device: rates, share of a GPU's JPEG engines, memory, agreement of pixels.

What a machine with a GPU has to tell before `auto` can be decided; without one it runs on the CPU all the same.
"""

from contextlib import closing
from dataclasses import dataclass, replace

import torch

from cxrfast.bench.harness import Budget, take_turns
from cxrfast.bench.loading.job import Job
from cxrfast.bench.loading.measure import Measurement, measurement, ours
from cxrfast.pipelines.loader import Loader
from cxrfast.pipelines.order import Augment, EvalOrder
from cxrfast.pipelines.reader import Reader

HARDWARE = (0.0, 0.65, 1.0)
"""Shares of a batch that a GPU's JPEG engines are tried with; the others are decoded by its cores."""

COMPARED = 200
"""Images whose pixels are compared."""


@dataclass(frozen=True, kw_only=True)
class Engines:
    """At one scale. Rates are images/s, medians of the rounds, by task (A, B)."""

    scale: int
    host: dict[str, float]
    dali: dict[str, dict[str, float]]
    """By task, then by `hw_decoder_load`; `-` on a CPU."""
    images: int
    within_1: float
    """Share of pixels that stay within the image whose grey levels differ by at most 1 between the engines, turned."""
    within_4: float
    largest: int
    """Difference, grey levels."""
    gpu_bytes: int | None
    """GPU memory that the dali engine took, as the driver reports it, without torch's."""


def compare_engines(device: torch.device, seconds: float, rounds: int, job: Job, budget: Budget) -> Engines:
    counts, taken = _differences(job, device)  # first, while DALI holds no memory of earlier pipelines
    loads = {f"{load:g}": load for load in HARDWARE} if device.type == "cuda" else {"-": None}
    host: dict[str, float] = {}
    dali: dict[str, dict[str, float]] = {}
    for task in "AB":
        here = replace(job, turn=task == "B")
        each: dict[str, Measurement] = {"host": measurement(ours(here, "host", device), device)}
        for name, load in loads.items():
            each[name] = measurement(ours(here, "dali", device, hw_decoder_load=load), device)
        share = budget.share([0.0] * (2 if task == "A" else 1))
        figures = take_turns(f"engines, {job.scale} px, task {task}", each, seconds, rounds, share or budget)
        host[task] = figures.pop("host").median
        dali[task] = {name: figure.median for name, figure in figures.items()}
    total = int(counts.sum())
    return Engines(
        scale=job.scale,
        host=host,
        dali=dali,
        images=min(COMPARED, len(job.rows)),
        within_1=int(counts[:2].sum()) / total,
        within_4=int(counts[:5].sum()) / total,
        largest=int(counts.nonzero().max()),
        gpu_bytes=taken,
    )


def _differences(job: Job, device: torch.device) -> tuple[torch.Tensor, int | None]:
    """How many pixels differ by 0 … 255 grey levels, int64 (256,), and the GPU memory that dali took, bytes."""
    offset = torch.arange(job.scale, device=device) - (job.scale - 1) / 2
    inside = torch.hypot(offset[:, None], offset) < job.scale / 2 - 2
    counts = torch.zeros(256, dtype=torch.int64, device=device)
    is_gpu = device.type == "cuda"
    with Reader(job.shards, job.scale) as reader:
        order = EvalOrder(rows=job.rows[:COMPARED], micro_batch=job.batch)
        host, dali = (
            Loader(reader, order, augment=Augment(), device=device, engine=engine, threads=job.workers)
            for engine in ("host", "dali")
        )
        before = _gpu_bytes_outside_torch(device) if is_gpu else 0
        with closing(host), closing(dali):
            for one, other in zip(dali.epoch(), host.epoch(), strict=True):
                difference = (one.image.int() - other.image.int()).abs()[:, 0, inside]
                counts += torch.bincount(difference.ravel(), minlength=256)
            taken = _gpu_bytes_outside_torch(device) - before if is_gpu else None
    return counts.cpu(), taken


def _gpu_bytes_outside_torch(device: torch.device) -> int:
    """Bytes in use on the GPU that torch's allocator does not hold."""
    free, total = torch.cuda.mem_get_info(device)
    return total - free - torch.cuda.memory_reserved(device)
