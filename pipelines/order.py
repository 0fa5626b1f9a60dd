"""The rows of each batch on each rank, and their random rotations and flips. Pure numpy: no files, clock or global state.

The number of ranks only decides which rank gets which micro-batch: 8, 4, 2 or 1 ranks see the same ones.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from cxrfast.errors import LoadError
from cxrfast.shuffle import permutation

WINDOW = 4
"""Number of shards whose rows a block order shuffles together."""


@dataclass(frozen=True, kw_only=True)
class TrainOrder:
    """Each row at most once per epoch, in an order drawn from (seed, epoch); N mod global_batch rows are dropped.

    Micro-batch j of the M = global_batch / micro_batch in a global batch is its rows j::M; rank r takes j ≡ r (mod world).
    Raises LoadError where the sizes do not divide or no global batch can be filled.
    """

    rows: np.ndarray
    """int64 (N,), the split's rows."""
    global_batch: int
    """Images in one optimiser step, over all ranks."""
    micro_batch: int
    """Images in one forward pass."""
    seed: int = 0
    rank: int = 0
    world: int = 1
    shard_rows: int | None = None
    """Rows per shard (`reader.info.rows_per_shard`) for a block order, which suits storage that is slow to seek.

    It shuffles shards, and rows within windows of `WINDOW` shards, so that each tar is read in one short stretch.
    """

    def __post_init__(self) -> None:
        if self.shard_rows is not None and self.shard_rows < 1:
            raise LoadError(f"a shard cannot have {self.shard_rows} rows")
        if self.micro_batch < 1 or self.global_batch % self.micro_batch:
            raise LoadError(
                f"global batch {self.global_batch} is not a multiple of micro-batch {self.micro_batch}: "
                f"micro-batches that fit are {_divisors(self.global_batch)}"
            )
        if not 0 <= self.rank < self.world:
            raise LoadError(f"rank {self.rank} does not exist: {self.world} ranks are numbered from 0")
        if self.accumulation % self.world:
            raise LoadError(
                f"{self.world} ranks cannot share the {self.accumulation} micro-batches of a global batch "
                f"({self.global_batch} / {self.micro_batch}): start {_divisors(self.accumulation)} ranks, "
                "or change --micro-batch"
            )
        if len(self.rows) < self.global_batch:
            raise LoadError(
                f"{len(self.rows):,} training rows do not fill one global batch of {self.global_batch}: "
                "use a smaller --global-batch or more images"
            )

    @property
    def accumulation(self) -> int:
        """M: micro-batches in a global batch, over all ranks."""
        return self.global_batch // self.micro_batch

    @property
    def steps(self) -> int:
        """Global batches in an epoch."""
        return len(self.rows) // self.global_batch

    def __len__(self) -> int:
        """Micro-batches of this rank in an epoch."""
        return self.steps * self.accumulation // self.world

    def global_batches(self, epoch: int, consumed: int = 0) -> np.ndarray:
        """int64 (steps left, global_batch): the rows of each optimiser step after the first `consumed` samples."""
        if consumed % self.global_batch:
            raise LoadError(f"position {consumed} is not at the start of a global batch of {self.global_batch}")
        if self.shard_rows is None:
            rows = self.rows[permutation(len(self.rows), self.seed, epoch)]
        else:
            rows = in_blocks(self.rows, self.shard_rows, self.seed, epoch)
        whole = rows[: self.steps * self.global_batch].reshape(self.steps, self.global_batch)
        return whole[consumed // self.global_batch :]

    def micro_batches(self, epoch: int, consumed: int = 0) -> list[np.ndarray]:
        """This rank's micro-batches, int64 (micro_batch,) each, `accumulation / world` per global batch."""
        steps = self.global_batches(epoch, consumed)
        cut = steps.reshape(len(steps), self.micro_batch, self.accumulation).transpose(0, 2, 1)
        return list(cut[:, self.rank :: self.world].reshape(-1, self.micro_batch))


def in_blocks(rows: np.ndarray, shard_rows: int, seed: int, epoch: int) -> np.ndarray:
    """Shuffle the shards of `rows`, int64 (N,), then the rows within windows the size of `WINDOW` shards."""
    shards, shard_of_row = np.unique(rows // shard_rows, return_inverse=True)
    key, counter = np.array([seed, epoch], np.uint64), np.array([0, 0, 0, 1], np.uint64)  # not a global order's words
    words = np.random.Philox(key=key, counter=counter).random_raw(len(shards) + len(rows))
    shard_words, row_words = words[: len(shards)], words[len(shards) :]

    place_of_shard = np.empty(len(shards), np.int64)
    place_of_shard[np.argsort(shard_words)] = np.arange(len(shards))
    by_shard = rows[np.argsort(place_of_shard[shard_of_row], kind="stable")]

    window_of_place = np.arange(len(rows), dtype=np.uint64) // np.uint64(WINDOW * shard_rows)
    draw_of_place = row_words >> np.uint64(24)
    key_of_place = window_of_place << np.uint64(40) | draw_of_place  # by window, and in a window by the draw's 40 bits
    return by_shard[np.argsort(key_of_place, kind="stable")]


@dataclass(frozen=True, kw_only=True)
class EvalOrder:
    """Every row exactly once, on exactly one rank, in the given order. The ranks take batches in turn."""

    rows: np.ndarray
    micro_batch: int
    seed: int = 0
    rank: int = 0
    world: int = 1

    def __len__(self) -> int:
        """Batches of this rank."""
        return len(range(self.rank * self.micro_batch, len(self.rows), self.micro_batch * self.world))

    def micro_batches(self, epoch: int = 0, consumed: int = 0) -> list[np.ndarray]:
        """This rank's batches of `micro_batch` rows, int64; the last batch of all may be shorter."""
        starts = range(consumed, len(self.rows), self.micro_batch)
        return [self.rows[s : s + self.micro_batch] for s in starts][self.rank :: self.world]


class Order(Protocol):
    """What a Loader needs: number and rows of this rank's batches, and the seed for augmentation."""

    @property
    def seed(self) -> int: ...

    def __len__(self) -> int: ...

    def micro_batches(self, epoch: int, consumed: int) -> list[np.ndarray]: ...


@dataclass(frozen=True)
class Work:
    """One micro-batch to load."""

    rows: np.ndarray
    """int64 (N,)"""
    angles: np.ndarray | None = None
    """float32 (N,), degrees, counter-clockwise; None without augmentation."""
    flips: np.ndarray | None = None
    """bool (N,), horizontal, before the rotation."""


@dataclass(frozen=True, kw_only=True)
class Augment:
    """Random rotation about the centre and horizontal flip; pixels from outside the image are black."""

    degrees: float = 15.0
    """Angles are uniform in ±degrees, counter-clockwise as seen."""
    flip: float = 0.5
    """Probability of a horizontal flip, which comes before the rotation."""

    def draw(self, seed: int, epoch: int, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Angles float32 (N,) in degrees and flips bool (N,), which depend only on (seed, epoch, row)."""
        key = _mix(_mix(np.array([seed], np.uint64)) + np.uint64(epoch))
        words = _mix(key + rows.astype(np.uint64))
        unit = (words >> np.uint64(40)).astype(np.float64) / 2**24
        other = (words & np.uint64(2**24 - 1)).astype(np.float64) / 2**24
        return ((2 * unit - 1) * self.degrees).astype(np.float32), other < self.flip


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser (Steele, Lea and Flood 2014): a bijection of 64-bit words that scatters neighbours."""
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def _divisors(n: int) -> str:
    """Divisors of `n` up to 4096, for a message."""
    return ", ".join(str(d) for d in range(1, min(n, 4096) + 1) if n % d == 0)
