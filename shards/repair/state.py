"""The state of a repair: what SHA256SUMS says, which files are suspect, what was done and what could not be done."""

import csv
from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import sha256 as new_sha256
from pathlib import Path

import pandas as pd

from cxrfast.errors import ShardError
from cxrfast.files import write_bytes
from cxrfast.shards.building.layout import assign_rows
from cxrfast.shards.format import manifest
from cxrfast.shards.format.info import SetInfo
from cxrfast.shards.format.manifest import ShardManifest, read_manifest
from cxrfast.shards.format.names import NAMES, files_in, shard_name
from cxrfast.shards.sources.read import read_source
from cxrfast.shards.storage import Tree
from cxrfast.shards.upkeep.problem import Problem

ASK = "give the source tree with --data"


@dataclass(kw_only=True)
class RepairState:
    """A repair under way, and in the end what it did."""

    folder: Path
    tree: Tree | None
    accept: bool
    """Keep new bytes where the old ones cannot be had."""
    workers: int
    sums: dict[str, str]
    """SHA256SUMS as far as it can be read."""
    suspects: set[str]
    """Files that `verify` named."""
    done: list[Problem] = field(default_factory=list)
    """File, and how it was repaired."""
    failed: dict[str, str] = field(default_factory=dict)
    """File, and why it could not be repaired."""

    def is_good(self, name: str) -> bool:
        """Has the file the hash that SHA256SUMS gives?"""
        return name in self.sums and name not in self.suspects

    def may_be_good(self, name: str) -> bool:
        """Does SHA256SUMS at least not say otherwise? It may have lost the line."""
        return name not in self.sums or self.is_good(name)

    def put(self, name: str, data: bytes, how: str, is_new: bool = False) -> None:
        """Write a file made again, if it differs; one that contradicts SHA256SUMS only if it is known to be new."""
        path = self.folder / name
        try:
            if path.is_file() and path.read_bytes() == data:
                return
            contradicts = name in self.sums and new_sha256(data).hexdigest() != self.sums[name]
            if contradicts and not (self.accept or is_new):
                self.failed[name] = "made again, it is not what SHA256SUMS says: restore it from a copy"
                return
            write_bytes(path, data)
        except OSError as error:
            self.failed[name] = f"cannot be written ({error.strerror}): move what is there away"
            return
        self.done.append(Problem(name, how))

    def shards(self) -> list[tuple[int, int]]:
        """Scale and number of every shard that SHA256SUMS or a file names."""
        names = {name for name in (*self.sums, *files_in(self.folder)) if NAMES.fullmatch(name)}
        return sorted({(int(p.parts[0]), int(p.stem)) for p in map(Path, names) if len(p.parts) == 2})

    def manifest(self, info: SetInfo, scale: int, shard: int) -> ShardManifest | None:
        """A shard's manifest if it can be read and is the one that belongs there."""
        try:
            m = read_manifest(self.folder, scale, shard)
        except ShardError:
            return None
        return m if m and (m.set, m.scale, m.shard) == (info.id, scale, shard) else None

    def manifests(self, info: SetInfo) -> Iterator[ShardManifest]:
        """All manifests that can be read and belong where they are."""
        for scale in manifest.scales_in(self.folder):
            for shard in manifest.built(self.folder, scale):
                if m := self.manifest(info, scale, shard):
                    yield m

    def quarantined(self, info: SetInfo, scale: int, shard: int) -> dict[str, str]:
        """Rows of a shard that were left out and why: by a manifest that is as it was written, else by quarantine.csv."""
        for other in (scale, *manifest.scales_in(self.folder)):
            if self.may_be_good(shard_name(other, shard, "json")) and (m := self.manifest(info, other, shard)):
                return m.quarantined
        rows = info.rows_of(shard)
        try:
            if self.may_be_good("quarantine.csv"):
                with open(self.folder / "quarantine.csv", newline="") as file:
                    return {line["row"]: line["reason"] for line in csv.DictReader(file) if int(line["row"]) in rows}
        except (OSError, ValueError, KeyError, TypeError):
            pass  # it cannot be read
        raise ShardError(
            f"neither a manifest of shard {shard} nor quarantine.csv says which rows were left out: delete the shard's "
            "files at all scales and run the same `cxrfast shard` command again"
        )

    def lines(self) -> list[str]:
        """What was done and what was not, one line per file."""
        done = [f"mended: {problem.path}: {problem.what}" for problem in self.done]
        return done + [f"not mended: {name}: {why}" for name, why in self.failed.items()]


def rows_of_source(tree: Tree, info: SetInfo) -> tuple[list[str], pd.DataFrame]:
    """Labels and rows as the source's tables give them; `bytes` is 0."""
    listed = read_source(info.source, tree, info.source_options)
    return list(listed.labels), assign_rows(listed.images, listed.labels, info.seed)
