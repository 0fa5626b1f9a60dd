"""The files of a shard set that describe it: set.json, a manifest and an index a shard, quarantine.csv, SHA256SUMS."""

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

from cxrfast import __version__
from cxrfast.errors import ShardError
from cxrfast.files import sha256, write_bytes, write_json

SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class SetInfo:
    """set.json. Written when the set is planned and never changed."""

    schema: int = SCHEMA
    id: str
    """Hash of rows, images, patients and recipe; see `plan.set_id`."""
    source: str
    labels: list[str]
    seed: int
    images: int
    studies: int
    patients: int
    rows_per_shard: int
    codec: str
    quality: int
    resize: str
    grey: str
    versions: dict[str, str]
    """Of the libraries that planned it."""

    @property
    def shards(self) -> int:
        """Number of shards at each scale when the set is complete."""
        return -(-self.images // self.rows_per_shard)

    def write(self, folder: Path) -> None:
        write_json(folder / "set.json", asdict(self))


def read_set(folder: Path) -> SetInfo:
    """set.json of a set. Raises ShardError if there is none or if another schema version wrote it."""
    path = Path(folder) / "set.json"
    if not path.is_file():
        raise ShardError(f"{folder} is not a shard set (no set.json): give the folder that `cxrfast shard --out` wrote")
    try:
        value = json.loads(path.read_bytes())
        schema = value["schema"]
    except (ValueError, KeyError, TypeError) as error:
        raise ShardError(f"{path} is damaged: restore it from a copy, or shard again into a new folder") from error
    if schema != SCHEMA:
        raise ShardError(
            f"{folder} has schema version {schema}, this cxrfast reads {SCHEMA}: "
            "use the cxrfast that built it, or shard again into a new folder"
        )
    try:
        return SetInfo(**value)
    except TypeError as error:
        raise ShardError(
            f"{path} is damaged ({error}): restore it from a copy, or shard again into a new folder"
        ) from error


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
    """Of each row's image bytes."""
    quarantined: dict[str, str]
    """Rows that are left out (JSON keys are text) and why."""

    def write(self, folder: Path) -> None:
        write_bytes(shard_path(folder, self.scale, self.shard, "json"), (json.dumps(asdict(self)) + "\n").encode())


def shard_path(folder: Path, scale: int, shard: int, suffix: str) -> Path:
    return folder / str(scale) / f"{shard:06d}.{suffix}"


def read_manifest(folder: Path, scale: int, shard: int) -> ShardManifest | None:
    """The manifest of a shard, None if it was not built yet. Raises ShardError if it is damaged."""
    path = shard_path(folder, scale, shard, "json")
    try:
        return ShardManifest(**json.loads(path.read_bytes()))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise ShardError(f"{path} is damaged: delete it and run `cxrfast shard` again to rebuild this shard") from error


def scales_in(folder: Path) -> list[int]:
    """The scales of which the set holds at least one shard."""
    return sorted(int(p.name) for p in Path(folder).iterdir() if p.name.isdecimal() and any(p.glob("*.json")))


def built(folder: Path, scale: int) -> list[int]:
    """The shards of a scale that are whole."""
    return sorted(int(p.stem) for p in (folder / str(scale)).glob("[0-9]*.json"))


def write_quarantine(folder: Path, paths: dict[int, str], quarantined: dict[int, str]) -> None:
    """quarantine.csv: row, path, reason."""
    text = io.StringIO()
    lines = ((row, paths[row], reason) for row, reason in sorted(quarantined.items()))
    csv.writer(text, lineterminator="\n").writerows([("row", "path", "reason"), *lines])
    write_bytes(folder / "quarantine.csv", text.getvalue().encode())


def data_files(folder: Path) -> Iterator[Path]:
    """Every file of the set but SHA256SUMS, as paths relative to it."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != "SHA256SUMS":
            yield path.relative_to(folder)


def write_sums(folder: Path, manifests: list[ShardManifest]) -> None:
    """SHA256SUMS of every other file, sorted, as `sha256sum -c` reads it. Tars were hashed when they were written."""
    known = {shard_path(folder, m.scale, m.shard, "tar").relative_to(folder): m.sha256 for m in manifests}
    lines = [f"{known.get(path) or sha256(folder / path)}  {path}\n" for path in data_files(folder)]
    write_bytes(folder / "SHA256SUMS", "".join(lines).encode())


def read_sums(folder: Path) -> dict[str, str]:
    """{relative path: sha256}. Raises ShardError if the set was never finished."""
    path = folder / "SHA256SUMS"
    if not path.is_file():
        raise ShardError(f"{folder} is not finished (no SHA256SUMS): run the same `cxrfast shard` command again")
    try:
        *lines, end = path.read_text().split("\n")
        if end:
            raise ValueError("no newline at its end")
        return {name: digest for digest, name in (line.split("  ", 1) for line in lines)}
    except ValueError as error:  # bytes that are no text included
        raise ShardError(f"{path} is damaged: run the same `cxrfast shard` command again to write it anew") from error


def versions() -> dict[str, str]:
    """Of cxrfast and of the libraries that decide the bytes of a set."""
    packages = {"numpy": "numpy", "opencv": "opencv-python-headless", "pyarrow": "pyarrow", "simplejpeg": "simplejpeg"}
    return {"cxrfast": __version__, **{name: version(package) for name, package in packages.items()}}
