"""A shard set on disk: its contents and paths. All other code reads sets through it; it writes nothing."""

from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from cxrfast.errors import ShardError
from cxrfast.shards.format.checksums import read_sums
from cxrfast.shards.format.info import read_set
from cxrfast.shards.format.manifest import ShardManifest, built, read_manifest, scales_in
from cxrfast.shards.format.names import shard_path
from cxrfast.shards.format.rows import read_rows


class ShardSet:
    """A set that `build` wrote or is writing; `info` describes it, as its set.json does.

        shards = ShardSet("data/shards")
        shards.info.labels, shards.scales, shards.rows()

    Raises ShardError if `folder` is not a shard set, or one of another schema version.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self.info = read_set(self.folder)

    @property
    def scales(self) -> list[int]:
        """Scales (px) with at least one shard, ascending."""
        return scales_in(self.folder)

    @property
    def is_whole(self) -> bool:
        """Is the set finished, with every shard at each of its scales?"""
        if not all(len(self.shards(scale)) == self.info.shards for scale in self.scales):
            return False
        try:
            return bool(read_sums(self.folder))
        except ShardError:
            return False

    def rows(self) -> pd.DataFrame:
        """rows.parquet, one line per image in the order of `row`. Raises ShardError if it is missing or damaged, or if its
        labels were replaced since the set was opened."""
        return read_rows(self.folder / "rows.parquet", self.info)

    def shards(self, scale: int) -> list[int]:
        """Numbers of the shards that are built at this scale, ascending."""
        return built(self.folder, scale)

    def manifest(self, scale: int, shard: int) -> ShardManifest | None:
        """A shard's manifest, None if the shard is not built. Raises ShardError if it is damaged."""
        return read_manifest(self.folder, scale, shard, self.info.rows_of(shard))

    def manifests(self) -> Iterator[ShardManifest]:
        """Manifests of all built shards, by scale and number. Raises ShardError for a damaged one."""
        for scale in self.scales:
            for shard in self.shards(scale):
                if m := self.manifest(scale, shard):
                    yield m

    def path(self, scale: int, shard: int, suffix: str = "tar") -> Path:
        """Path of a shard's tar, index (`idx`) or manifest (`json`)."""
        return shard_path(self.folder, scale, shard, suffix)
