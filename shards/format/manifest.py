"""A shard's manifest, NNNNNN.json: which rows it holds, and what proves that they are whole; quarantine.csv sums them up."""

import csv
import io
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from cxrfast.errors import ShardError
from cxrfast.files import write_bytes
from cxrfast.shards.format.names import SCALE, SHARD_FILE, shard_path
from cxrfast.shards.images.cell_means import unpack


@dataclass(frozen=True, kw_only=True)
class ShardManifest:
    """NNNNNN.json: written after the tar and its index, so its presence means that the shard is whole."""

    set: str
    scale: int
    shard: int
    sha256: str
    bytes: int
    rows: list[int]
    """Rows held, ascending, in the order of the tar."""
    crc32: list[int]
    """Checksum of each row's image bytes."""
    sizes: list[list[int]]
    """[height, width] of each row's source image as it was decoded, px."""
    quarantined: dict[str, str]
    """Rows that are left out (JSON keys are text) and why."""
    grids: str = ""
    """`cell_means.pack` of the grids of the rows held; "" where cxrfast built the shard before it took any."""

    @property
    def lacks_grids(self) -> bool:
        return bool(self.rows) and not self.grids

    def to_json(self) -> str:
        """The content of the file. Without grids it is what earlier versions wrote, byte for byte."""
        fields = asdict(self)
        if not self.grids:
            del fields["grids"]
        return json.dumps(fields) + "\n"

    def write(self, folder: Path) -> None:
        write_bytes(shard_path(folder, self.scale, self.shard, "json"), self.to_json().encode())


def read_manifest(folder: Path, scale: int, shard: int) -> ShardManifest | None:
    """The manifest of a shard, None if it was not built yet. Raises ShardError if it is damaged."""
    path = shard_path(folder, scale, shard, "json")
    try:
        m = ShardManifest(**json.loads(path.read_bytes()))
        if not len(m.rows) == len(m.crc32) == len(m.sizes):
            raise ValueError("lists of different lengths")
        if not isinstance(m.grids, str):
            raise ValueError("grids that are no text")
        if m.grids:
            unpack(m.grids, len(m.rows))
        if not all(isinstance(row, int) for row in (*m.rows, *map(int, m.quarantined))):
            raise ValueError("rows that are no numbers")
        return m
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, AttributeError) as error:
        raise ShardError(
            f"{path} is damaged: `cxrfast verify --repair {folder}` makes it again from its tar, or delete it and run "
            "`cxrfast shard` again to rebuild this shard"
        ) from error


def scales_in(folder: Path) -> list[int]:
    """The scales of which the set holds at least one shard. Raises OSError for a folder that cannot be read."""
    scales = (name for name in os.listdir(folder) if SCALE.fullmatch(name))
    return sorted(int(name) for name in scales if built(Path(folder), int(name)))


def built(folder: Path, scale: int) -> list[int]:
    """The shards of a scale that have their manifest. Raises OSError for a folder that cannot be read."""
    try:
        names = os.listdir(folder / str(scale))
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(int(name[:-5]) for name in names if SHARD_FILE.fullmatch(name) and name.endswith(".json"))


def read_manifests(folder: Path) -> Iterator[ShardManifest]:
    """Manifests of all shards that have one, by scale and number."""
    for scale in scales_in(folder):
        for shard in built(folder, scale):
            if m := read_manifest(folder, scale, shard):
                yield m


def quarantine_bytes(paths: dict[int, str], manifests: Iterable[ShardManifest]) -> bytes:
    """The content of quarantine.csv: row, path, reason."""
    reasons = {int(row): reason for m in manifests for row, reason in m.quarantined.items()}
    text = io.StringIO()
    lines = ((row, paths[row], reason) for row, reason in sorted(reasons.items()))
    csv.writer(text, lineterminator="\n").writerows([("row", "path", "reason"), *lines])
    return text.getvalue().encode()
