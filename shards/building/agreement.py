"""Whether two manifests of a shard describe the same images: the same row must come from the same source image everywhere.

The manifests say so by the hashes of the source images, and by the grids of the pixels, which need no tar.
"""

from collections.abc import Iterable, Iterator

import numpy as np

from cxrfast.shards.format.info import SetInfo
from cxrfast.shards.format.manifest import ShardManifest, source_hashes
from cxrfast.shards.images.cell_means import SIDE, STEPS, edges, tolerance, unpack

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
