"""The files of a shard set that describe it: set.json, a manifest and an index a shard, quarantine.csv, SHA256SUMS."""

import csv
import io
import json
import re
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from cxrfast import __version__
from cxrfast.errors import ShardError
from cxrfast.files import json_bytes, sha256, write_bytes
from cxrfast.shards.recipe import Recipe

SCHEMA = 2


@dataclass(frozen=True, kw_only=True)
class SetInfo:
    """set.json. Written when the set is planned; only `relabel` changes it, and only its labels."""

    schema: int = SCHEMA
    id: str
    """Hash of rows, images, patients and recipe; see `plan.set_id`."""
    source: str
    source_options: dict[str, Any]
    """What the source was told beside the tree, as JSON values."""
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

    def rows_of(self, shard: int) -> range:
        """The rows that a shard holds or leaves out."""
        first = shard * self.rows_per_shard
        return range(first, min(first + self.rows_per_shard, self.images))

    @property
    def recipe(self) -> Recipe:
        return Recipe(seed=self.seed, codec=self.codec, quality=self.quality, resize=self.resize, grey=self.grey)

    def to_bytes(self) -> bytes:
        """The content of set.json."""
        return json_bytes(asdict(self))

    def write(self, folder: Path) -> None:
        write_bytes(folder / "set.json", self.to_bytes())


def read_set(folder: Path) -> SetInfo:
    """set.json of a set. Raises ShardError if there is none or if another schema version wrote it."""
    path = Path(folder) / "set.json"
    if not path.is_file():
        raise ShardError(f"{folder} is not a shard set (no set.json): give the folder that `cxrfast shard --out` wrote")
    return parse_set(path.read_bytes(), path)


def parse_set(data: bytes, path: object) -> SetInfo:
    """What the bytes of a set.json say; `path` names them in errors, which are those of `read_set`."""
    try:
        value = json.loads(data)
        schema = value["schema"]
    except (ValueError, KeyError, TypeError) as error:
        raise ShardError(f"{path} is damaged: restore it from a copy, or shard again into a new folder") from error
    if schema != SCHEMA:
        raise ShardError(
            f"{path} has schema version {schema}, this cxrfast reads {SCHEMA}: "
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
    sizes: list[list[int]]
    """[height, width] of each row's source image as it was decoded, px."""
    quarantined: dict[str, str]
    """Rows that are left out (JSON keys are text) and why."""

    def to_json(self) -> str:
        """The content of the file."""
        return json.dumps(asdict(self)) + "\n"

    def write(self, folder: Path) -> None:
        write_bytes(shard_path(folder, self.scale, self.shard, "json"), self.to_json().encode())


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


def read_manifests(folder: Path) -> list[ShardManifest]:
    """Of all whole shards, by scale and number."""
    return [
        m for scale in scales_in(folder) for shard in built(folder, scale) if (m := read_manifest(folder, scale, shard))
    ]


def quarantine_bytes(paths: dict[int, str], manifests: list[ShardManifest]) -> bytes:
    """The content of quarantine.csv: row, path, reason."""
    reasons = {int(row): reason for m in manifests for row, reason in m.quarantined.items()}
    text = io.StringIO()
    lines = ((row, paths[row], reason) for row, reason in sorted(reasons.items()))
    csv.writer(text, lineterminator="\n").writerows([("row", "path", "reason"), *lines])
    return text.getvalue().encode()


NAMES = re.compile(r"(set\.json|rows\.parquet|quarantine\.csv|[1-9]\d*/\d{6,}\.(tar|idx|json))")
"""Files of a set beside SHA256SUMS, relative to it."""

WORKING = re.compile(r"lease(-\d+-of-\d+)?\.json")
"""There only while somebody writes into the set; see `lease`."""

TEMPORARIES = re.compile(
    r"(set\.json|rows\.parquet|quarantine\.csv|SHA256SUMS|lease.*\.json|\d{6,}\.(tar|idx|json))\.[\w.-]+\.tmp"
)


RELABELLING = "SHA256SUMS.relabelling"
"""Takes the place of SHA256SUMS while labels are replaced; see `relabel.write_labels`."""


def check_labels_settled(folder: Path) -> None:
    """Raises ShardError while the labels of a set are replaced: table and set.json may not agree."""
    if (folder / RELABELLING).exists():
        raise ShardError(
            f"the labels of {folder} are being replaced, or that was interrupted: "
            "run the same `cxrfast relabel` command again"
        )


def is_temporary(path: Path) -> bool:
    """Is this a file of a set while it is written?"""
    return TEMPORARIES.fullmatch(path.name) is not None


def is_foreign(path: Path) -> bool:
    """Is this no file that a build killed before its plan was whole may have left in the folder of its set?"""
    ours = is_temporary(path) or WORKING.fullmatch(path.name) or path.name == "rows.parquet"
    return not (ours or (path.is_dir() and path.name.isdecimal()))


def files_in(folder: Path) -> list[str]:
    """Every file below `folder` but its sums and leases, as sorted paths relative to it."""
    paths = (str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    return sorted(path for path in paths if path not in ("SHA256SUMS", RELABELLING) and not WORKING.fullmatch(path))


def sums_bytes(sums: dict[str, str]) -> bytes:
    """The content of SHA256SUMS, as `sha256sum -c` reads it, from {relative path: sha256}."""
    return "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items())).encode()


def write_sums(folder: Path, manifests: list[ShardManifest]) -> None:
    """SHA256SUMS of every other file of the set. Tars were hashed when they were written."""
    known = {str(shard_path(folder, m.scale, m.shard, "tar").relative_to(folder)): m.sha256 for m in manifests}
    names = [name for name in files_in(folder) if NAMES.fullmatch(name)]
    sums = {name: known.get(name) or sha256(folder / name) for name in names}
    write_bytes(folder / "SHA256SUMS", sums_bytes(sums))


def read_sums(folder: Path, name: str = "SHA256SUMS") -> dict[str, str]:
    """{relative path: sha256}. Raises ShardError if the set was never finished."""
    path = folder / name
    if not path.is_file():
        check_labels_settled(folder)
        raise ShardError(
            f"{folder} is not finished (no SHA256SUMS): run the same `cxrfast shard` or `cxrfast stage` command again"
        )
    sums, wrong = parse_sums(path.read_bytes())
    if wrong:
        raise ShardError(f"{path} is damaged ({wrong[0]}): `cxrfast verify --repair {folder}` writes it anew")
    return sums


def parse_sums(data: bytes) -> tuple[dict[str, str], list[str]]:
    """{relative path: sha256} of the lines that can be read, and what is wrong with the others."""
    sums: dict[str, str] = {}
    wrong = []
    *lines, end = data.decode(errors="replace").split("\n")
    for number, line in enumerate(lines, 1):
        digest, name = line[:64], line[66:]
        if line[64:66] != "  " or not re.fullmatch("[0-9a-f]{64}", digest) or not NAMES.fullmatch(name) or name in sums:
            wrong.append(f"line {number} is no hash and name of a file")
        else:
            sums[name] = digest
    if list(sums) != sorted(sums):
        wrong.append("its lines are out of order")
    if end or not lines:
        wrong.append("no newline at its end")
    return sums, wrong


def versions() -> dict[str, str]:
    """Of cxrfast and of the libraries that decide the bytes of a set."""
    packages = {"numpy": "numpy", "opencv": "opencv-python-headless", "pyarrow": "pyarrow", "simplejpeg": "simplejpeg"}
    return {"cxrfast": __version__, **{name: version(package) for name, package in packages.items()}}
