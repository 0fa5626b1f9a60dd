"""Input of benchmarks: phantoms where no shard set is given, and an order whose epochs outlast a measurement."""

from collections.abc import Generator
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import numpy as np

from cxrfast.phantoms.dataset import synth
from cxrfast.pipelines.loader import Batch, Loader
from cxrfast.shards.build import build

PHANTOMS = 200

MIMIC_IMAGES = 377_110
"""Number of images of MIMIC-CXR-JPG."""

LONG = 250_000
"""Images per epoch of a LongOrder, at least."""


def make_phantoms(folder: Path, scales: list[int]) -> Path:
    """Make a shard set of phantom radiographs as large as the largest scale; return its folder."""
    synth(folder / "source", images=PHANTOMS, size=min(2048, max(256, max(scales))))
    build(folder / "source", folder / "shards", scales)
    return folder / "shards"


@dataclass(frozen=True, kw_only=True)
class LongOrder:
    """Permutations of `rows`, one after the other, cut into full micro-batches, as one epoch of at least `LONG` images.

    A pipeline starts once per epoch; in a long epoch no start falls into a measurement, however few the rows are. Rows
    repeat within a micro-batch that is larger than their number.
    """

    rows: np.ndarray
    """int64 (N,)"""
    micro_batch: int
    seed: int = 0

    def micro_batches(self, epoch: int = 0, consumed: int = 0) -> list[np.ndarray]:
        images = max(LONG, self.micro_batch)
        shape = (-(-images // len(self.rows)), len(self.rows))
        words = np.random.Philox(key=np.array([self.seed, epoch], np.uint64)).random_raw(shape[0] * shape[1])
        rows = self.rows[np.argsort(words.reshape(shape), axis=1)].ravel()
        steps = len(rows) // self.micro_batch
        return list(rows[: steps * self.micro_batch].reshape(steps, self.micro_batch))[consumed // self.micro_batch :]


def endless(loader: Loader) -> Generator[Batch]:
    """The batches of one epoch after the other."""
    return (batch for epoch in count() for batch in loader.epoch(epoch))
