"""The index and manifest of a damaged shard, derived from its sound tar.

A manifest's grids are of pixels before they were encoded, which a tar of JPEGs does not hold. So a lost manifest is built
again from the source where there is one; else it gets the grids of the decoded images.
"""

from dataclasses import dataclass, replace
from hashlib import sha256 as new_sha256
from tarfile import TarError

import numpy as np

from cxrfast.files import sha256
from cxrfast.shards.building.tasks import Blueprint
from cxrfast.shards.format.info import SetInfo
from cxrfast.shards.format.manifest import ShardManifest
from cxrfast.shards.format.names import shard_files, shard_name, shard_path
from cxrfast.shards.format.tar import Contents, read_contents
from cxrfast.shards.images.cell_means import STEPS, pack, tolerance, unpack
from cxrfast.shards.repair.cell_means import take_grids
from cxrfast.shards.repair.state import RepairState


@dataclass(frozen=True, kw_only=True)
class Derived:
    """What a sound tar tells of its index and manifest."""

    index: bytes
    manifest: ShardManifest
    is_exact: bool
    """False where the grids are of decoded images, and were of others."""

    def put(self, state: RepairState, why: str = "") -> None:
        """Write index and manifest. `why`: what kept the shard from being built again from the source."""
        _, index, text = shard_files(self.manifest.scale, self.manifest.shard)
        state.put(index, self.index, "made again from its tar")
        if not state.is_good(text):
            how = "made again from its tar" + ("" if self.is_exact else ", its grids from its images")
            if why and state.tree:
                how += f", since from the source it could not be ({why})"
            state.put(text, self.manifest.to_json().encode(), how, is_new=not self.is_exact)


def derive(
    state: RepairState, blueprint: Blueprint, scale: int, shard: int, old: ShardManifest | None
) -> Derived | None:
    """Derive index and manifest from the tar; None if the tar itself is broken or holds other images."""
    tar = shard_path(state.folder, scale, shard, "tar")
    name = shard_name(scale, shard, "tar")
    if not tar.is_file():
        return None
    digest = state.sums[name] if state.is_good(name) else sha256(tar)
    if not state.is_good(name) and not (old and old.sha256 == digest):
        return None
    try:
        contents = read_contents(tar)
    except (TarError, ValueError, KeyError, TypeError, AttributeError):
        return None
    quarantined = state.quarantined(blueprint.info, scale, shard)
    rows = [row for row in blueprint.info.rows_of(shard) if str(row) not in quarantined]
    if contents.rows != rows or contents.image_ids != blueprint.rows["image_id"].iloc[rows].tolist():
        return None
    made = ShardManifest(
        set=blueprint.info.id,
        scale=scale,
        shard=shard,
        sha256=digest,
        bytes=tar.stat().st_size,
        rows=contents.rows,
        crc32=contents.crc32,
        sizes=contents.sizes,
        quarantined=quarantined,
    )
    made, is_exact = _with_grids(state, blueprint.info, made, old, contents)
    return Derived(index=contents.index, manifest=made, is_exact=is_exact)


def _with_grids(
    state: RepairState, info: SetInfo, made: ShardManifest, old: ShardManifest | None, contents: Contents
) -> tuple[ShardManifest, bool]:
    """The manifest `made` from a tar, with grids, and whether these are those that it had."""
    tar, _, text = shard_files(made.scale, made.shard)
    if old and state.is_good(text):
        return old, True
    signed = state.sums.get(text)
    if signed == _digest(made) or (signed is None and old == made):
        return made, True  # of a set that was built before there were grids
    grids = take_grids(state.folder / tar, contents.places, info.codec, state.workers)
    decoded = replace(made, grids=pack(grids))
    if old and old.grids and not signed and replace(old, grids="") == made:  # only its line is lost
        off = np.abs(unpack(old.grids, len(grids)) - grids.astype(np.int32)).max(initial=0)
        if off <= STEPS * tolerance(info.codec, info.quality, made.scale):
            return old, True
    return decoded, info.codec == "raw" or signed == _digest(decoded)


def _digest(m: ShardManifest) -> str:
    return new_sha256(m.to_json().encode()).hexdigest()
