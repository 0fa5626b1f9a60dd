"""A repair in progress: what SHA256SUMS says, which files are suspect, what was repaired and what could not be."""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from cxrfast.errors import ShardError
from cxrfast.files import read_file, write_bytes
from cxrfast.shards.building.layout import assign_rows
from cxrfast.shards.format.info import SetInfo
from cxrfast.shards.format.manifest import ShardManifest, read_manifest, scales_in
from cxrfast.shards.format.names import shard_name
from cxrfast.shards.sources.any_table import is_outside
from cxrfast.shards.sources.read import SOURCES, as_stored, read_source
from cxrfast.shards.storage import Tree
from cxrfast.shards.upkeep.counts import read_quarantine
from cxrfast.shards.upkeep.problem import Problem

ASK = "give the source tree with --data"

NOTHING: dict[str, Any] = {"sources": "", "remarks": {}}
"""The fields of a manifest about source images, in a shard of an earlier version."""


@dataclass(kw_only=True)
class RepairState:
    """A repair in progress, and in the end its result."""

    folder: Path
    tree: Tree | None
    accept: bool
    """Keep new bytes where the old ones cannot be restored."""
    workers: int
    trusted: str | None = None
    """`package.module:function` that may be imported if the set names it as its source."""
    table: str | None = None
    """The table of a set whose source is `table`, where the user says it is."""
    sums: dict[str, str]
    """The readable lines of SHA256SUMS."""
    suspects: set[str]
    """Files with problems, according to `verify`."""
    done: list[Problem] = field(default_factory=list)
    """Files, and how each was repaired."""
    failed: dict[str, str] = field(default_factory=dict)
    """{file: why it could not be repaired}."""

    def is_good(self, name: str) -> bool:
        """True if the file has its hash in SHA256SUMS."""
        return name in self.sums and name not in self.suspects

    def may_be_good(self, name: str) -> bool:
        """True if the file has its hash in SHA256SUMS, or its line there is lost."""
        return name not in self.sums or self.is_good(name)

    def put(self, name: str, data: bytes, how: str, is_new: bool = False) -> None:
        """Write a restored file if it differs; one that contradicts SHA256SUMS only if `is_new` or new bytes are accepted."""
        path = self.folder / name
        try:
            if path.is_file() and read_file(path) == data:
                return
            if self.sums.get(name) not in (None, digest(data)) and not (self.accept or is_new):
                self.failed[name] = "the restored file differs from its hash in SHA256SUMS: restore it from a copy"
                return
            write_bytes(path, data)
        except OSError as error:
            self.failed[name] = f"cannot be written ({error.strerror}): move what is in its place elsewhere"
            return
        self.done.append(Problem(name, how))

    def shards(self, info: SetInfo) -> list[tuple[int, int]]:
        """Scale and number of every possible shard at the scales that SHA256SUMS or a folder names."""
        scales = {int(name.partition("/")[0]) for name in self.sums if "/" in name} | set(scales_in(self.folder))
        return [(scale, shard) for scale in sorted(scales) for shard in range(info.shards)]

    def manifest(self, info: SetInfo, scale: int, shard: int) -> ShardManifest | None:
        """A shard's manifest, if it can be read and belongs there."""
        try:
            m = read_manifest(self.folder, scale, shard)
        except ShardError:
            return None
        return m if m and (m.set, m.scale, m.shard) == (info.id, scale, shard) else None

    def quarantined(self, info: SetInfo, scale: int, shard: int) -> dict[str, str]:
        """{row: reason} of a shard's quarantined rows, from an undamaged manifest, else from quarantine.csv."""
        for other in (scale, *scales_in(self.folder)):
            if self.may_be_good(shard_name(other, shard, "json")) and (m := self.manifest(info, other, shard)):
                return m.quarantined
        rows = info.rows_of(shard)
        try:
            if self.may_be_good("quarantine.csv"):
                listed = read_quarantine(self.folder / "quarantine.csv", info.images)
                return {str(row): reason for row, reason in listed.items() if row in rows}
        except ShardError:
            pass  # it cannot be read
        raise ShardError(
            f"neither a manifest of shard {shard} nor quarantine.csv says which rows were quarantined: delete the shard's "
            "files at all scales and run the same `cxrfast shard` command again"
        )

    def about_sources(self, info: SetInfo, of: ShardManifest) -> dict[str, Any]:
        """The fields `sources` and `remarks` of an undamaged manifest of the same rows at another scale; else empty ones.

        They are about the source images, so they are the same at every scale.
        """
        for scale in scales_in(self.folder):
            if scale != of.scale and self.is_good(shard_name(scale, of.shard, "json")):
                m = self.manifest(info, scale, of.shard)
                if m and m.sources and m.rows == of.rows:
                    return {"sources": m.sources, "remarks": m.remarks}
        return NOTHING

    def lines(self) -> list[str]:
        """One line for each file that was repaired or could not be."""
        done = [f"repaired: {problem.path}: {problem.what}" for problem in self.done]
        return done + [f"not repaired: {name}: {why}" for name, why in self.failed.items()]


def digest(data: bytes) -> str:
    """sha256 of bytes, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def rows_of_source(state: RepairState, info: SetInfo) -> tuple[list[str], pd.DataFrame]:
    """Labels and rows from the source's tables; `bytes` is 0.

    A set may come from anybody, so what it says is not enough to import code, or to open a table outside the source tree.
    Raises ShardError that asks the user for either.
    """
    assert state.tree is not None
    if info.source not in SOURCES and info.source != state.trusted:
        raise ShardError(
            f"{state.folder} names the source {info.source}, which is code that a repair would run: if you trust it, add "
            f"--trust-source {info.source}"
        )
    options = info.source_options
    if state.table:
        options = as_stored(state.tree, {**options, "table": state.table})
    elif info.source == "table" and is_outside(location := str(options.get("table"))):
        raise ShardError(
            f"{state.folder} was built from the table {location}, which is outside --data: say where the table is, with "
            "--table"
        )
    listed = read_source(info.source, state.tree, options)
    return list(listed.labels), assign_rows(listed.images, listed.labels, info.seed)
