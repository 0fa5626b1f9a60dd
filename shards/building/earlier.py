"""What a shard's manifests say about its source images, so that every scale comes from the same ones.

The hash of a file's bytes finds any change. The grid of its pixels at an earlier scale finds a change where earlier versions
wrote no hashes, and pixels that this version decodes differently from the same bytes.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from cxrfast.errors import ShardError
from cxrfast.shards.format.info import SetInfo
from cxrfast.shards.format.manifest import ShardManifest, source_hashes
from cxrfast.shards.images.cell_means import STEPS, grid, tolerance, unpack

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
