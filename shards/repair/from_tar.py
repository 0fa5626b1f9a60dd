"""Derive the index and manifest of a damaged shard from its sound tar.

The grids in a manifest come from pixels before encoding, which a tar of JPEGs does not hold. So a lost manifest is built
again from the source if possible; otherwise its grids come from the decoded images. Nor does a tar hold the hashes of the
source images and the remarks on them; the shard's manifests at other scales do, and a set of one scale loses them.
"""

from dataclasses import dataclass, replace
from tarfile import TarError

import numpy as np

from cxrfast.files import sha256
from cxrfast.shards.building.tasks import Blueprint
from cxrfast.shards.format.info import SetInfo
from cxrfast.shards.format.manifest import ShardManifest
from cxrfast.shards.format.names import shard_files
from cxrfast.shards.format.tar import Contents, read_contents
from cxrfast.shards.images.cell_means import STEPS, pack, tolerance, unpack
from cxrfast.shards.repair.cell_means import take_grids
from cxrfast.shards.repair.state import NOTHING, RepairState, digest


@dataclass(frozen=True, kw_only=True)
class Derived:
    """Index and manifest of a sound tar."""

    index: bytes
    manifest: ShardManifest
    is_jpeg: bool
    is_exact: bool
    """False if the grids come from decoded images and the old ones did not, or if hashes and remarks are lost."""

    def put(self, state: RepairState, why: str = "") -> None:
        """Write index and manifest. `why`: why the shard could not be rebuilt from the source."""
        _, index, text = shard_files(self.manifest.scale, self.manifest.shard)
        state.put(index, self.index, "derived from its tar")
        if not state.is_good(text):
            how = "derived from its tar"
            if not self.is_exact:
                how += ", with grids from its images" if self.is_jpeg else ""
                how += (
                    "" if self.manifest.sources else ", without the hashes of its source images and the remarks on them"
                )
            if why and state.tree:
                how += f", because it could not be rebuilt from the source ({why})"
            state.put(text, self.manifest.to_json().encode(), how, is_new=not self.is_exact)


def derive(
    state: RepairState, blueprint: Blueprint, scale: int, shard: int, old: ShardManifest | None
) -> Derived | None:
    """Derive index and manifest from the tar; None if the tar itself is broken or holds other images."""
    name, info = shard_files(scale, shard)[0], blueprint.info
    tar = state.folder / name
    if not tar.is_file():
        return None
    found = state.sums[name] if state.is_good(name) else sha256(tar)
    if not state.is_good(name) and not (old and old.sha256 == found):
        return None
    try:
        contents = read_contents(tar)
    except (TarError, ValueError, OSError):
        return None
    quarantined = state.quarantined(info, scale, shard)
    rows = [row for row in info.rows_of(shard) if str(row) not in quarantined]
    if contents.rows != rows or contents.image_ids != blueprint.rows["image_id"].iloc[rows].tolist():
        return None
    made = ShardManifest(
        set=info.id,
        scale=scale,
        shard=shard,
        sha256=found,
        bytes=tar.stat().st_size,
        rows=contents.rows,
        crc32=contents.crc32,
        sizes=contents.sizes,
        quarantined=quarantined,
    )
    made, is_exact = _complete(state, info, made, old, contents)
    return Derived(index=contents.index, manifest=made, is_jpeg=info.codec == "jpeg", is_exact=is_exact)


def _complete(
    state: RepairState, info: SetInfo, made: ShardManifest, old: ShardManifest | None, contents: Contents
) -> tuple[ShardManifest, bool]:
    """Add to the manifest `made` what its tar does not hold; the second value says if it is the old manifest again."""
    tar, _, text = shard_files(made.scale, made.shard)
    if old and state.is_good(text):
        return old, True
    signed = state.sums.get(text)
    if signed is None and old == made:
        return made, True  # the set was built before there were grids and hashes
    known = state.about_sources(info, made)
    texts = [known, *([{"sources": old.sources, "remarks": old.remarks}] if old else []), NOTHING]
    stored = [old.grids] if old and old.grids else []
    for candidate in (replace(made, grids=grids, **about) for grids in ("", *stored) for about in texts):
        if signed == digest(candidate.to_json().encode()):
            return candidate, True
    grids = take_grids(state.folder / tar, contents.places, info.codec, state.workers)
    decoded = replace(made, grids=pack(grids), **known)
    if old and old.grids and not signed and replace(old, grids="", **NOTHING) == made:  # only its line is lost
        off = np.abs(unpack(old.grids, len(grids)) - grids.astype(np.int32)).max(initial=0)
        is_same = known in (NOTHING, {"sources": old.sources, "remarks": old.remarks})
        if is_same and off <= STEPS * tolerance(info.codec, info.quality, made.scale):
            return old, True
    for about in texts:
        if signed == digest(replace(decoded, **about).to_json().encode()):
            return replace(decoded, **about), True
    return decoded, info.codec == "raw" and bool(decoded.sources)
