"""A shard's manifest, NNNNNN.json: which rows it holds, and their checksums; quarantine.csv sums them up."""

import csv
import io
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Annotated

from msgspec import Meta

from cxrfast.errors import ShardError
from cxrfast.files import read_file, write_bytes
from cxrfast.shards.format.info import MOST_IMAGES, Count, Number, SetId, parse_json, typed
from cxrfast.shards.format.names import SCALE, SHARD_FILE, shard_path
from cxrfast.shards.format.source_hashes import unpack as unpack_hashes
from cxrfast.shards.images.bad_image import MAX_SIDE
from cxrfast.shards.images.cell_means import unpack
from cxrfast.text import find_fault, name_fault

Row = Annotated[str, Meta(pattern=r"\A(0|[1-9][0-9]{0,11})\Z")]
"""Number of a row as a JSON key."""


@dataclass(frozen=True, kw_only=True)
class ShardManifest:
    """Contents of NNNNNN.json: written after the tar and its index, so its presence means that the shard is whole."""

    set: SetId
    scale: Number
    shard: Annotated[int, Meta(ge=0, lt=MOST_IMAGES)]
    sha256: Annotated[str, Meta(pattern=r"\A[0-9a-f]{64}\Z")]
    bytes: Count
    rows: list[Annotated[int, Meta(ge=0, lt=MOST_IMAGES)]]
    """Rows held, ascending, in the order of the tar."""
    crc32: list[Annotated[int, Meta(ge=0, lt=2**32)]]
    """Checksum of each row's image bytes."""
    sizes: list[Annotated[list[Annotated[int, Meta(ge=1, le=MAX_SIDE)]], Meta(min_length=2, max_length=2)]]
    """[height, width] of each row's source image as it was decoded, px."""
    quarantined: dict[Row, str]
    """Rows left out and why."""
    remarks: dict[Row, list[str]] = field(default_factory=dict)
    """Rows held about which there is something to say, and what; see `images.remark`."""
    sources: str = ""
    """`source_hashes.pack` of the hashes of the source images of the rows held; "" in shards of versions before hashes."""
    grids: str = ""
    """`cell_means.pack` of the grids of the rows held; "" in shards of versions before grids."""

    @property
    def lacks_grids(self) -> bool:
        return bool(self.rows) and not self.grids

    def to_json(self) -> str:
        """Contents of the file. Without grids, hashes and remarks, the bytes that earlier versions wrote."""
        fields = asdict(self)
        for name in ("remarks", "sources", "grids"):
            if not fields[name]:
                del fields[name]
        return json.dumps(fields) + "\n"

    def write(self, folder: Path) -> None:
        write_bytes(shard_path(folder, self.scale, self.shard, "json"), self.to_json().encode())


def source_hashes(m: ShardManifest) -> dict[int, bytes]:
    """{row: hash of its source image}; empty if the manifest holds no hashes."""
    return dict(zip(m.rows, unpack_hashes(m.sources, len(m.rows)), strict=True)) if m.sources else {}


def read_manifest(folder: Path, scale: int, shard: int, rows: range | None = None) -> ShardManifest | None:
    """The manifest of a shard, None if it is not built. Raises ShardError if it is damaged or names rows outside `rows`."""
    path = shard_path(folder, scale, shard, "json")
    try:
        return parse_manifest(read_file(path), path, rows)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ShardError(f"{path} cannot be read ({error.strerror}): {_advice(path)}") from error


def parse_manifest(data: bytes, path: Path | str, rows: range | None = None) -> ShardManifest:
    """A manifest from the content of its file. Raises ShardError, naming `path`, as `read_manifest` does."""
    try:
        m = typed(parse_json(data), ShardManifest)
        _check(m, rows)
    except ValueError as error:
        raise ShardError(f"{path} is damaged ({error}): {_advice(path)}") from error
    return m


def _advice(path: Path | str) -> str:
    return (
        f"`cxrfast verify --repair {os.path.dirname(os.path.dirname(path))}` rebuilds it from its tar, or delete it "
        "and run `cxrfast shard` again to rebuild this shard"
    )


def _check(m: ShardManifest, rows: range | None) -> None:
    """Raises ValueError if the fields contradict each other."""
    if not len(m.rows) == len(m.crc32) == len(m.sizes):
        raise ValueError("lists of different lengths")
    if any(a >= b for a, b in pairwise(m.rows)):
        raise ValueError("rows that do not ascend")
    named = [*m.rows, *map(int, m.quarantined)]
    if len(set(named)) < len(named):
        raise ValueError("rows both held and quarantined")
    if rows is not None and not set(named) <= set(rows):
        raise ValueError(f"rows outside {rows.start} to {rows.stop - 1}")
    if not set(map(int, m.remarks)) <= set(m.rows):
        raise ValueError("remarks on rows that it does not hold")
    if m.sources:
        unpack_hashes(m.sources, len(m.rows))
    told = (*m.quarantined.values(), *(remark for remarks in m.remarks.values() for remark in remarks))
    if fault := find_fault(told, name_fault):
        raise ValueError(f"the reason {fault}")
    if m.grids:
        unpack(m.grids, len(m.rows))


def scales_in(folder: Path) -> list[int]:
    """Scales with at least one shard, ascending. Raises OSError for a folder that cannot be read."""
    scales = (name for name in os.listdir(folder) if SCALE.fullmatch(name))
    return sorted(int(name) for name in scales if built(Path(folder), int(name)))


def built(folder: Path, scale: int) -> list[int]:
    """Shards of a scale that have a manifest, ascending. Raises OSError for a folder that cannot be read."""
    try:
        names = os.listdir(folder / str(scale))
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(int(name[:-5]) for name in names if SHARD_FILE.fullmatch(name) and name.endswith(".json"))


def read_manifests(folder: Path) -> Iterator[ShardManifest]:
    """All manifests, by scale and number."""
    for scale in scales_in(folder):
        for shard in built(folder, scale):
            if m := read_manifest(folder, scale, shard):
                yield m


def _no_formula(path: str) -> str:
    """The same path, for a table that people open in a spreadsheet."""
    return f"./{path}" if path[:1] in "=+-@" else path


def quarantine_bytes(paths: dict[int, str], manifests: Iterable[ShardManifest]) -> bytes:
    """Contents of quarantine.csv: row, path, reason. Raises ShardError for a row without a path."""
    reasons = {int(row): reason for m in manifests for row, reason in m.quarantined.items()}
    if unknown := reasons.keys() - paths.keys():
        raise ShardError(f"a manifest names row {min(unknown)}, which rows.parquet does not have")
    text = io.StringIO()
    lines = ((row, _no_formula(paths[row]), reason) for row, reason in sorted(reasons.items()))
    csv.writer(text, lineterminator="\n").writerows([("row", "path", "reason"), *lines])
    return text.getvalue().encode()
