"""Figures of a set with as many rows as MIMIC-CXR-JPG: the order, opening, and the memory of a long pass.

Imports little, since `opening` measures the memory of a process that has only imported the reader.
"""

import statistics
import time
from collections.abc import Callable
from contextlib import closing
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from cxrfast.bench.process import in_own_process
from cxrfast.errors import LoadError, RunError
from cxrfast.pipelines.order import Augment, TrainOrder
from cxrfast.pipelines.reader import Reader


def large(folder: Path, scale: int, images: int) -> dict[str, Any]:
    """Measure a set made by `trees.tiny_images`, with `images` for the pass.

    ms of one epoch's micro-batches and draws; seconds and resident bytes of a process that has only imported the reader and
    opened the set; anonymous resident bytes of a process after each tenth of the images.
    """
    with Reader(folder, scale) as reader:
        info = reader.info
    numbers = np.arange(info.images)

    def order_ms(shard_rows: int | None) -> float:
        order = TrainOrder(rows=numbers, global_batch=96, micro_batch=8, shard_rows=shard_rows)
        return _median_ms(order.micro_batches)

    try:
        seconds, resident = in_own_process(opening, {"folder": folder, "scale": scale})
        anonymous = in_own_process(passing, {"folder": folder, "scale": scale, "images": images})
    except (RunError, MemoryError) as error:
        raise LoadError(f"measuring a large set failed: {error}") from error
    return {
        "rows": info.images,
        "shards": info.shards,
        "order_ms": order_ms(None),
        "block_ms": order_ms(info.rows_per_shard),
        "draws_ms": _median_ms(lambda epoch: Augment().draw(0, epoch, numbers)),
        "open_seconds": seconds,
        "open_resident": resident,
        "images": images,
        "anonymous": anonymous,
    }


def _median_ms(work: Callable[[int], object]) -> float:
    """Median over five epochs."""
    times = []
    for epoch in range(5):
        start = time.perf_counter()
        work(epoch)
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def opening(folder: Path, scale: int) -> tuple[float, int]:
    """Seconds to open the set, and the resident bytes of this process after it."""
    start = time.perf_counter()
    with Reader(folder, scale):
        return time.perf_counter() - start, psutil.Process().memory_info().rss


def passing(folder: Path, scale: int, images: int) -> list[int]:
    """Anonymous resident bytes of this process after each tenth of the images, rotated by the host engine."""
    from cxrfast.pipelines.loader import Loader

    found: list[int] = []
    seen = 0
    with Reader(folder, scale) as reader:
        order = TrainOrder(rows=reader.rows, global_batch=64, micro_batch=64)
        loader = Loader(reader, order, augment=Augment(), engine="host")
        batches = (batch for epoch in count() for batch in loader.epoch(epoch))
        with closing(loader), closing(batches):
            while len(found) < 10:
                seen += len(next(batches).row)
                if seen >= images * (len(found) + 1) / 10:
                    found.append(_anonymous_bytes())
    return found


def _anonymous_bytes() -> int:
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("Anonymous:")).split()[1])
