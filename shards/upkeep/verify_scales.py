"""Compare the scales of a set with each other, for sets that were built before scales were compared while building."""

from collections.abc import Iterator
from pathlib import Path

from cxrfast.shards.building.agreement import disagreements
from cxrfast.shards.format import manifest
from cxrfast.shards.format.info import SetInfo
from cxrfast.shards.format.manifest import read_manifest
from cxrfast.shards.format.names import shard_name
from cxrfast.shards.upkeep.problem import Problem


def scale_problems(folder: Path, info: SetInfo) -> Iterator[Problem]:
    """Yield shards with rows that come from other images than at the smallest scale that can be compared."""
    scales = manifest.scales_in(folder)
    for shard in range(info.shards):
        manifests = [m for scale in scales if (m := read_manifest(folder, scale, shard))]
        for m, what in disagreements(manifests, info):
            yield Problem(shard_name(m.scale, shard, "tar"), what, is_signed=True)
