"""The measurements of `cxrfast bench load`: a shard set comes in, images/s and memory go out. Nothing is compared here."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import simplejpeg
import torch

from cxrfast.bench.data import LongOrder, endless
from cxrfast.bench.harness import rate
from cxrfast.bench.loading.job import Job
from cxrfast.errors import LoadError
from cxrfast.pipelines.host import WARP, warp_matrix
from cxrfast.pipelines.loader import Loader
from cxrfast.pipelines.order import Augment, EvalOrder, TrainOrder
from cxrfast.pipelines.reader import Reader
from cxrfast.shards.shard_set import ShardSet

Measurement = Callable[[float], float]
"""Takes the seconds it may use and returns images/s."""


def ours(job: Job, engine: str, device: torch.device, cache: Path | None = None, **options: Any) -> "Batches":
    """Our Loader over the rows of a job. `cache` is filled first. `options`: of the Loader."""

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


Batches = Callable[[], AbstractContextManager[Iterator[Any]]]
"""Opens an endless supply of batches; what is behind it is gone when it closes."""


def measurement(batches: Batches, device: torch.device) -> Measurement:
    """Images/s of what `batches` supplies; its start and first batches are not counted."""

    def measure(seconds: float) -> float:
        with batches() as supply:
            for _ in range(3):
                next(supply)
            return rate(lambda: len(next(supply)), seconds, device)

    return measure


def limit(job: Job) -> Measurement:
    """Bare decoding, and turning where the job says so, in `workers` threads over bytes in memory into buffers that are warm."""
    with Reader(job.shards, job.scale) as reader:
        rows = job.rows[: max(1, 256 * 2**20 // reader.largest)]
        jpegs = [bytes(reader.read(row)) for row in rows.tolist()]
    draws = zip(*(drawn.tolist() for drawn in Augment().draw(0, 0, rows)), strict=True)
    matrices = [warp_matrix(job.scale, angle, flip) for angle, flip in draws]
    side = (job.scale, job.scale)

    def work(first: int, end: float, done: list[int]) -> None:
        image, out = np.empty((*side, 1), np.uint8), np.empty(side, np.uint8)
        n = 0
        while time.perf_counter() < end:
            i = (first + n * job.workers) % len(jpegs)
            simplejpeg.decode_jpeg(jpegs[i], "GRAY", buffer=image)
            if job.turn:
                cv2.warpAffine(image[..., 0], matrices[i], side, dst=out, flags=WARP, borderValue=0)
            n += 1
        done.append(n)

    def measure(seconds: float) -> float:
        done: list[int] = []
        start = time.perf_counter()
        threads = [threading.Thread(target=work, args=(first, start + seconds, done)) for first in range(job.workers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return sum(done) / (time.perf_counter() - start)

    return measure


# Cold storage


def drop_pages(folder: Path, scale: int) -> None:
    """Put the tars of a scale out of the page cache. Raises LoadError where the system cannot."""
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
    """Images/s of the host engine over one pass, its start included; decoding only."""
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


# A large set


@dataclass(frozen=True, kw_only=True)
class Large:
    """Figures of a set as large as MIMIC-CXR-JPG, of tiny images."""

    rows: int
    shards: int
    order_ms: float
    """One epoch's micro-batches of this rank."""
    block_ms: float
    """The same in block order."""
    draws_ms: float
    open_seconds: float
    open_resident: int
    """Resident bytes of a process that has only imported the reader and opened the set."""
    images: int
    """Passed in one go, turned."""
    anonymous: list[int]
    """Anonymous resident bytes after each tenth of them."""


def order_ms(rows: int, shard_rows: int | None) -> float:
    order = TrainOrder(rows=np.arange(rows), global_batch=96, micro_batch=8, shard_rows=shard_rows)
    return _best_ms(lambda epoch: order.micro_batches(epoch))


def draws_ms(rows: int) -> float:
    numbers = np.arange(rows)
    return _best_ms(lambda epoch: Augment().draw(0, epoch, numbers))


def _best_ms(work: Callable[[int], Any]) -> float:
    """Median of five."""
    times = []
    for epoch in range(5):
        start = time.perf_counter()
        work(epoch)
        times.append(1e3 * (time.perf_counter() - start))
    return sorted(times)[2]


OPEN = """
import json, sys, time, psutil
from cxrfast.pipelines.reader import Reader
start = time.perf_counter()
reader = Reader(sys.argv[1], int(sys.argv[2]))
print(json.dumps([time.perf_counter() - start, psutil.Process().memory_info().rss]))
"""

PASS = """
import json, sys
from pathlib import Path
from cxrfast.pipelines.loader import Loader
from cxrfast.pipelines.order import Augment, EvalOrder, TrainOrder
from cxrfast.pipelines.reader import Reader

def anonymous():
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("Anonymous:")).split()[1])

reader, images = Reader(sys.argv[1], int(sys.argv[2])), int(sys.argv[3])
loader = Loader(reader, TrainOrder(rows=reader.rows, global_batch=64, micro_batch=64), augment=Augment(), engine="host")
found, seen, epoch = [], 0, 0
while seen < images:
    for batch in loader.epoch(epoch):
        seen += len(batch.row)
        if seen >= images * (len(found) + 1) / 10:
            found.append(anonymous())
            if len(found) == 10:
                break
    epoch += 1
print(json.dumps(found))
"""


def large(folder: Path, scale: int, images: int) -> Large:
    """Measure a set made by `trees.tiny_images`; opening and passing in processes of their own."""
    with Reader(folder, scale) as reader:
        info = reader.info
    seconds, resident = _python(OPEN, folder, scale)
    return Large(
        rows=info.images,
        shards=info.shards,
        order_ms=order_ms(info.images, None),
        block_ms=order_ms(info.images, info.rows_per_shard),
        draws_ms=draws_ms(info.images),
        open_seconds=seconds,
        open_resident=resident,
        images=images,
        anonymous=_python(PASS, folder, scale, images),
    )


def _python(code: str, *arguments: Any) -> Any:
    done = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        raise LoadError(f"the measurement failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    return json.loads(done.stdout)
