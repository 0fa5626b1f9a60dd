"""The two engines compared on one device: rates, share of a GPU's JPEG engines, memory, agreement of pixels.

These figures of a GPU decide what `auto` means there; without a GPU, the CPU is measured.
"""

from contextlib import closing
from dataclasses import replace
from typing import Any

import torch

from cxrfast.bench.harness import Budget, Measurement, gpu_used_bytes, interleave
from cxrfast.bench.loading.job import Job
from cxrfast.bench.loading.measure import measurement, ours
from cxrfast.pipelines.loader import Loader
from cxrfast.pipelines.order import Augment, EvalOrder
from cxrfast.pipelines.reader import Reader

HARDWARE = (0.0, 0.65, 1.0)
"""Shares of a batch given to a GPU's JPEG engines; its cores decode the rest."""

COMPARED = 200
"""Images whose pixels are compared."""


def compare_engines(device: torch.device, seconds: float, rounds: int, job: Job, budget: Budget) -> dict[str, Any]:
    """Figures at one scale.

    `host` and `dali`: images/s, medians of the rounds, by task (A, B), those of dali then by `hw_decoder_load`, `-` on a
    CPU. `within_1`, `within_4`: share of the pixels that stay in the rotated image whose grey levels differ by at most 1
    or 4 between the engines; `largest`: largest difference. `gpu_bytes`: GPU memory that the dali engine took, as the
    driver reports it, torch's left out.
    """
    counts, taken = _differences(job, device)  # first, while DALI holds no memory of earlier pipelines
    loads = {f"{load:g}": load for load in HARDWARE} if device.type == "cuda" else {"-": 1.0}
    host: dict[str, float] = {}
    dali: dict[str, dict[str, float]] = {}
    for task in "AB":
        here = replace(job, turn=task == "B")
        each: dict[str, Measurement] = {"host": measurement(ours(here, "host", device), device)}
        for name, load in loads.items():
            each[name] = measurement(ours(here, "dali", device, hw_decoder_load=load), device)
        share = budget.share([0.0] * (2 if task == "A" else 1))
        figures = interleave(each, seconds, rounds, share or budget, f"engines, {job.scale} px, task {task}")
        host[task] = figures.pop("host").median
        dali[task] = {name: figure.median for name, figure in figures.items()}
    total = int(counts.sum())
    return {
        "scale": job.scale,
        "host": host,
        "dali": dali,
        "images": min(COMPARED, len(job.rows)),
        "within_1": int(counts[:2].sum()) / total,
        "within_4": int(counts[:5].sum()) / total,
        "largest": int(counts.nonzero().max()),
        "gpu_bytes": taken,
    }


def _differences(job: Job, device: torch.device) -> tuple[torch.Tensor, int | None]:
    """Number of pixels that differ by 0 … 255 grey levels, int64 (256,), and the bytes of GPU memory that dali took."""
    offset = torch.arange(job.scale, device=device) - (job.scale - 1) / 2
    inside = torch.hypot(offset[:, None], offset) < job.scale / 2 - 2
    counts = torch.zeros(256, dtype=torch.int64, device=device)
    with Reader(job.shards, job.scale) as reader:
        order = EvalOrder(rows=job.rows[:COMPARED], micro_batch=job.batch)
        host, dali = (
            Loader(reader, order, augment=Augment(), device=device, engine=engine, threads=job.workers)
            for engine in ("host", "dali")
        )
        before = _gpu_bytes_outside_torch(device)
        with closing(host), closing(dali):
            for one, other in zip(dali.epoch(), host.epoch(), strict=True):
                difference = (one.image.int() - other.image.int()).abs()[:, 0, inside]
                counts += torch.bincount(difference.ravel(), minlength=256)
            taken = _gpu_bytes_outside_torch(device) - before
    return counts.cpu(), taken if device.type == "cuda" else None


def _gpu_bytes_outside_torch(device: torch.device) -> int:
    """Bytes in use on the GPU that torch's allocator does not hold."""
    return gpu_used - torch.cuda.memory_reserved(device) if (gpu_used := gpu_used_bytes(device)) else 0
