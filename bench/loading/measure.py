"""The measurements of `cxrfast bench load`: a job comes in, images/s go out, and how the two engines differ on a device."""

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import replace
from itertools import repeat
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import simplejpeg
import torch

from cxrfast.bench.data import LongOrder, endless
from cxrfast.bench.harness import Budget, Measurement, gpu_used_bytes, interleave, rate
from cxrfast.bench.loading.job import Job, Supply
from cxrfast.errors import LoadError
from cxrfast.pipelines.host import WARP, warp_matrix
from cxrfast.pipelines.loader import Loader
from cxrfast.pipelines.order import Augment, EvalOrder, TrainOrder
from cxrfast.pipelines.reader import Reader
from cxrfast.shards.shard_set import ShardSet

Batches = Callable[[], Supply]
"""Opens an endless supply of batches; closing it ends its threads and processes."""


def ours(job: Job, engine: str, device: torch.device, cache: Path | None = None, **options: Any) -> Batches:
    """Our Loader over the rows of a job. `cache` is filled first. `options`: arguments of the Loader."""

    @contextmanager
    def open_loader() -> Iterator[Iterator[Any]]:
        order = LongOrder(rows=job.rows, micro_batch=min(job.batch, len(job.rows)))
        augment = Augment() if job.turn else None
        given = {"device": device, "threads": job.workers, **options}
        with Reader(job.shards, job.scale) as reader:
            loader = Loader(reader, order, augment=augment, engine=engine, cache=cache, **given)
            if cache:
                loader.order = EvalOrder(rows=job.rows, micro_batch=order.micro_batch)
                for _ in loader.epoch():
                    pass
                loader.order = order
            images = (batch.image for batch in endless(loader))
            with closing(loader), closing(images):
                yield images

    return open_loader


def measurement(batches: Batches, device: torch.device) -> Measurement:
    """Images/s of what `batches` supplies; its start and first batches do not count."""

    def measure(seconds: float) -> float:
        with batches() as supply:
            for _ in range(3):
                next(supply)
            return rate(lambda: len(next(supply)), seconds, device)

    return measure


def limit(job: Job) -> Measurement:
    """Bare decoding, and turning where the job says so, in `workers` threads from bytes in memory into warm buffers."""
    with Reader(job.shards, job.scale) as reader:
        rows = job.rows[: max(1, 256 * 2**20 // reader.largest)]
        jpegs = [bytes(reader.read(row)) for row in rows.tolist()]
    draws = zip(*(drawn.tolist() for drawn in Augment().draw(0, 0, rows)), strict=True)
    matrices = [warp_matrix(job.scale, angle, flip) for angle, flip in draws]
    side = (job.scale, job.scale)

    def work(first: int, end: float) -> int:
        image, out = np.empty((*side, 1), np.uint8), np.empty(side, np.uint8)
        n = 0
        while time.perf_counter() < end:
            i = (first + n * job.workers) % len(jpegs)
            simplejpeg.decode_jpeg(jpegs[i], "GRAY", buffer=image)
            if job.turn:
                cv2.warpAffine(image[..., 0], matrices[i], side, dst=out, flags=WARP, borderValue=0)
            n += 1
        return n

    def measure(seconds: float) -> float:
        with ThreadPoolExecutor(job.workers) as threads:
            start = time.perf_counter()
            done = list(threads.map(work, range(job.workers), repeat(start + seconds)))
            return sum(done) / (time.perf_counter() - start)

    return measure


# Cold storage


def drop_pages(folder: Path, scale: int) -> None:
    """Drop the tars of a scale from the page cache. Raises LoadError where the system cannot."""
    if not hasattr(os, "posix_fadvise"):
        raise LoadError("this system cannot drop pages of a file: leave out --cold")
    shards = ShardSet(folder)
    for shard in shards.shards(scale):
        descriptor = os.open(shards.path(scale, shard), os.O_RDONLY)
        try:
            os.fsync(descriptor)  # dirty pages stay
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def pass_rate(job: Job, *, cold: bool, block: bool = False, ahead: bool = True) -> float:
    """Images/s of the host engine over one pass that only decodes, including its start."""
    if cold:
        drop_pages(job.shards, job.scale)
    with Reader(job.shards, job.scale) as reader:
        shard_rows = reader.info.rows_per_shard if block else None
        batch = min(job.batch, len(job.rows))
        order = TrainOrder(rows=job.rows, global_batch=batch, micro_batch=batch, shard_rows=shard_rows)
        if not ahead:
            reader.advise = lambda rows: None  # type: ignore[method-assign]
        with closing(Loader(reader, order, engine="host", threads=job.workers)) as loader:
            start = time.perf_counter()
            n = sum(len(batch.row) for batch in loader.epoch())
            return n / (time.perf_counter() - start)


# The engines

HARDWARE = (0.0, 0.65, 1.0)
"""Shares of a batch given to a GPU's JPEG engines; its cores decode the rest."""

COMPARED = 200
"""Images whose pixels are compared."""


def compare_engines(device: torch.device, seconds: float, rounds: int, job: Job, budget: Budget) -> dict[str, Any]:
    """The two engines compared at one scale: figures that decide what `auto` means on a GPU; else the CPU is measured.

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
