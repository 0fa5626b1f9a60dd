"""What loaders are measured on, and how a loader is described."""

from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import simplejpeg

from cxrfast.bench.data import LongOrder
from cxrfast.pipelines.reader import Reader


@dataclass(frozen=True, kw_only=True)
class Job:
    """Load these rows of a set again and again, each time in a new order."""

    folder: Path
    """An existing folder for what a loader needs on the disk."""
    shards: Path
    """A set of JPEGs."""
    scale: int
    rows: np.ndarray
    """int64 (N,)"""
    batch: int
    """Images per batch; all N where they are fewer."""
    workers: int
    """Threads or processes a loader may use."""
    turn: bool
    """Whether each image is flipped with a probability of ½, then rotated by a uniform angle within ±15°, bilinear, black outside."""


Supply = AbstractContextManager[Iterator[Any]]
"""An endless iterator over batches, uint8 (n, H, W), (n, 1, H, W) or (n, H, W, 1), each valid until the next one is taken.
Closing it ends its threads and processes."""


class Peer(NamedTuple):
    """A way of loading that ours is compared with."""

    batches: Callable[[Job], Supply]
    prepare: Callable[[Job], object] = lambda job: None
    """Writes its input into the folder of a job, whether or not the job rotates images."""
    needs: str | None = None
    """Module of a library that cxrfast itself does not need."""
    turns: bool = True
    """Whether it can rotate."""
    pixels: bool = False
    """Whether it reads uncompressed pixels."""


def shuffled(job: Job) -> Iterator[list[int]]:
    """Endless full batches of the numbers of the job's rows, in ever new permutations."""
    order = LongOrder(rows=np.arange(len(job.rows)), micro_batch=min(job.batch, len(job.rows)))
    return (batch.tolist() for epoch in count() for batch in order.micro_batches(epoch))


def endless(epoch: Iterable[Any], pick: Callable[[Any], Any] = lambda batch: batch) -> Supply:
    """Repeat `epoch` forever; `pick` takes the images out of a batch."""

    def batches() -> Generator[Any]:
        while True:
            yield from map(pick, epoch)

    return closing(batches())


def jpegs(job: Job) -> Iterator[bytes]:
    with Reader(job.shards, job.scale) as reader:
        for row in job.rows.tolist():
            yield bytes(reader.read(row))


def pixels(job: Job) -> Iterator[np.ndarray]:
    """uint8 (H, W) of each row."""
    return (simplejpeg.decode_jpeg(data, "GRAY")[..., 0] for data in jpegs(job))


def files(job: Job) -> list[Path]:
    """The JPEGs of a job as files, written once."""
    folder = job.folder / "files"
    paths = [folder / f"{n:06d}.jpg" for n in range(len(job.rows))]
    if not folder.exists():
        folder.mkdir()
        for path, data in zip(paths, jpegs(job), strict=True):
            path.write_bytes(data)
    return paths
