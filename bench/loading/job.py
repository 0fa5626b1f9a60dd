"""What loaders are measured on and how one is described: a job comes in, files that a loader reads lie in its folder."""

from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import simplejpeg

from cxrfast.pipelines.reader import Reader


@dataclass(frozen=True, kw_only=True)
class Job:
    """Load these rows of a set again and again, in an order that is new each time."""

    folder: Path
    """For what a loader needs on the disk; it is there."""
    shards: Path
    """A set of JPEGs."""
    scale: int
    rows: np.ndarray
    """int64 (N,)"""
    batch: int
    """Images in a batch; all N where they are fewer."""
    workers: int
    """Threads or processes that a loader may use."""
    turn: bool
    """Rotate each image by a uniform angle within ±15°, bilinear, black outside, after a horizontal flip of every other one?"""


Supply = AbstractContextManager[Iterator[Any]]
"""An endless iterator over batches, uint8 (n, H, W), (n, 1, H, W) or (n, H, W, 1), each good until the next one is asked for.
Threads and processes behind it are gone when it closes."""


class Peer(NamedTuple):
    """A way of loading that ours is compared with."""

    what: str
    """One line."""
    prepare: Callable[[Job], object]
    """Writes what it reads into the folder of a job; whether the job turns images does not matter."""
    batches: Callable[[Job], Supply]
    turns: bool = True
    """Can it rotate?"""
    pixels: bool = False
    """Does it read uncompressed pixels?"""


@dataclass(frozen=True)
class Shuffled:
    """Numbers 0 … images - 1 in batches, list[int], endlessly, in a new order each time; an incomplete batch is left out."""

    images: int
    batch: int

    def __iter__(self) -> Iterator[list[int]]:
        random, batch = np.random.default_rng(), min(self.batch, self.images)
        while True:
            order = random.permutation(self.images)
            for start in range(0, self.images - batch + 1, batch):
                yield order[start : start + batch].tolist()


def endless(epoch: Iterable[Any], pick: Callable[[Any], Any] = lambda batch: batch) -> Supply:
    """Over and over again what iterating `epoch` gives; `pick` takes the images out of a batch."""

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
    """The JPEGs of a job as files; written unless they are there."""
    folder = job.folder / "files"
    paths = [folder / f"{n:06d}.jpg" for n in range(len(job.rows))]
    if not folder.exists():
        folder.mkdir()
        for path, data in zip(paths, jpegs(job), strict=True):
            path.write_bytes(data)
    return paths
