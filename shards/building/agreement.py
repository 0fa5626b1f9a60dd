"""Whether all scales of a shard come from the same source images.

Manifests hold two things that tell, neither of which needs a tar. The hash of a source image's bytes finds any change. The
grid of its pixels finds a change where earlier versions wrote no hashes, and pixels that this version decodes differently
from the same bytes.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

from cxrfast.errors import ShardError
from cxrfast.shards.format.info import SetInfo
from cxrfast.shards.format.manifest import ShardManifest, source_hashes
from cxrfast.shards.images.cell_means import SIDE, STEPS, edges, grid, tolerance, unpack

# Manifests against each other


RESIZING = 3.0
"""Grey levels by which rounding and enlarging small images change the mean of a cell; noise of 13 × 17 px reached 2.98."""

WHITE = 255

STRUCTURED = 8.0
"""Standard deviation of a grid, in grey levels, above which two grids of one image correlate."""


def disagreements(manifests: Iterable[ShardManifest], info: SetInfo) -> Iterator[tuple[ShardManifest, str]]:
    """Manifests of one shard whose rows come from other images than at the smallest scale that can be compared, and which."""
    manifests = sorted(manifests, key=lambda m: m.scale)
    with_hashes, with_grids = ([m for m in manifests if m.sources], [m for m in manifests if m.grids])
    for m in manifests:
        what = other_sources(with_hashes[0], m) if m.sources else ""
        what = what or (other_pixels(with_grids[0], m, info) if m.grids else "")
        if what:
            yield m, what


def other_sources(one: ShardManifest, other: ShardManifest) -> str:
    """Which rows of a shard have source images with another hash than at another scale, or ""."""
    there, here = source_hashes(one), source_hashes(other)
    changed = [row for row in here if there.get(row, here[row]) != here[row]]
    if not changed:
        return ""
    return f"{len(changed):,} rows were made from other source images than at {one.scale} px (first: row {changed[0]})"


def other_pixels(one: ShardManifest, other: ShardManifest, info: SetInfo) -> str:
    """Which rows of a shard have grids that differ by more than two scales of an image do, or ""."""
    if one is other or one.rows != other.rows or not one.rows:
        return ""
    grids = [unpack(m.grids, len(m.rows)).reshape(len(m.rows), -1) / STEPS for m in (one, other)]
    off = np.abs(grids[0] - grids[1]).max(axis=1)
    differ = (off > allowed(one.scale, other.scale, info)) | (_correlation(*grids) < 0)
    if not differ.any():
        return ""
    return (
        f"{int(differ.sum()):,} rows show other images than at {one.scale} px (first: row {one.rows[int(differ.argmax())]}), "
        f"by up to {off[differ].max():.0f} grey levels: their source images changed between two builds"
    )


def allowed(one: int, other: int, info: SetInfo) -> float:
    """Largest difference in grey levels between the grids of one image at two scales.

    Grids may come from decoded JPEGs. Sides that 4 does not divide have cells of different sizes, and an image that is
    padded may lie a pixel further to one side.
    """
    return RESIZING + sum(
        tolerance(info.codec, info.quality, scale)
        + WHITE * _misalignment(scale)
        + (WHITE * SIDE / scale if info.resize == "pad" else 0)
        for scale in (one, other)
    )


def _misalignment(scale: int) -> float:
    """Largest distance of a border between cells from its quarter of the side, in cells."""
    return max(abs(SIDE * edge / scale - number) for number, edge in enumerate(edges(scale)))


def _correlation(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Correlation of pairs of grids (n, 16); 1 where either has little structure."""
    one, other = (grids - grids.mean(axis=1, keepdims=True) for grids in (one, other))
    spread = one.std(axis=1), other.std(axis=1)
    is_structured = (spread[0] > STRUCTURED) & (spread[1] > STRUCTURED)
    return np.where(is_structured, (one * other).mean(axis=1) / np.maximum(spread[0] * spread[1], 1e-9), 1.0)


# Source images against manifests


COARSE = 64
"""px; grids of smaller scales allow for more rounding, so that a larger scale is preferred for the comparison."""

ADVICE = "give --data the tree that the set was built from, or build a new set with another --out"


class SourceChanged(ShardError):
    """A source image is not the one that another scale was made from."""


@dataclass(frozen=True, kw_only=True)
class Earlier:
    """Rows of one shard as its manifests describe them."""

    hashes: dict[int, bytes] = field(default_factory=dict)
    """Hash of each row's source image, where a manifest holds it."""
    hashed_at: int = 0
    """Scale that the hashes are quoted from, px."""
    scale: int | None = None
    """Scale of `grids`, px; None if no manifest holds grids."""
    grids: dict[int, np.ndarray] = field(default_factory=dict)
    """int16 (4, 4) grid of each row."""

    def check_hash(self, row: int, path: str, found: bytes) -> None:
        """Raises SourceChanged if the source image has another hash than that of the scales there are."""
        if self.hashes.get(row, found) != found:
            raise SourceChanged(
                f"{path} (row {row}) is not the file that its image at {self.hashed_at} px was made from: it has the same "
                f"name, but other bytes; {ADVICE}"
            )

    def check_pixels(self, row: int, path: str, picture: np.ndarray, info: SetInfo) -> None:
        """Raises SourceChanged if `picture`, uint8 at `scale`, differs from what was written for the row.

        Grids that were taken from decoded JPEGs, by a repair, differ from those of the pixels before encoding; so the
        difference that decoding makes is allowed.
        """
        if self.scale is None or row not in self.grids:
            return
        off = np.abs(grid(picture).astype(np.int32) - self.grids[row]).max() / STEPS
        if off > tolerance(info.codec, info.quality, self.scale):
            why = (
                "this version of cxrfast decodes it differently: build a new set with another --out"
                if row in self.hashes
                else f"the file has changed since, or this version of cxrfast decodes it differently: {ADVICE}"
            )
            raise SourceChanged(
                f"{path} (row {row}) now gives other pixels than its image at {self.scale} px, by up to {off:.0f} grey "
                f"levels: {why}"
            )


def earlier(manifests: Iterable[ShardManifest]) -> Earlier:
    """What the manifests of one shard, at any scales, say."""
    manifests = sorted(manifests, key=lambda m: m.scale)
    hashes: dict[int, bytes] = {}
    hashed = [m for m in manifests if m.sources]
    for m in reversed(hashed):
        hashes |= source_hashes(m)
    with_grids = [m for m in manifests if m.grids]
    if not with_grids:
        return Earlier(hashes=hashes, hashed_at=hashed[0].scale if hashed else 0)
    best = next((m for m in with_grids if m.scale >= COARSE), with_grids[-1])
    return Earlier(
        hashes=hashes,
        hashed_at=hashed[0].scale if hashed else 0,
        scale=best.scale,
        grids=dict(zip(best.rows, unpack(best.grids, len(best.rows)), strict=True)),
    )
