"""The files of a shard set that describe it: set.json, a manifest and an index a shard, quarantine.csv, SHA256SUMS."""

import csv
import io
import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cxrfast import __version__
from cxrfast.errors import ShardError
from cxrfast.files import json_bytes, sha256, write_bytes
from cxrfast.machine import installed
from cxrfast.shards.format.recipe import Recipe
from cxrfast.shards.images.grid import unpack

SCHEMA = 2


SCALE = re.compile(r"[1-9][0-9]*")
SHARD_FILE = re.compile(r"[0-9]{6,}\.(tar|idx|json)")
NAMES = re.compile(rf"(set\.json|rows\.parquet|quarantine\.csv|{SCALE.pattern}/{SHARD_FILE.pattern})")
"""Files of a set beside SHA256SUMS, relative to it."""


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
    labels_from: str = ""
    """The table that `relabel` took them from, `name sha256:…` of its bytes; "": the source's, as it was planned."""
    seed: int
    images: int
    studies: int
    patients: int
    rows_per_shard: int
    codec: str
    quality: int | None
    """Of JPEG; None (JSON: null) where the codec is raw."""
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
        info = SetInfo(**value)
        if not (info.images > 0 and info.rows_per_shard > 0):
            raise TypeError("no images, or no rows a shard")
        return info
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
    grids: str = ""
    """`grid.pack` of the grids of the rows held; "" where cxrfast built the shard before it took any."""

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


def shard_name(scale: int, shard: int, suffix: str) -> str:
    """A shard's file, relative to the set."""
    return f"{scale}/{shard:06d}.{suffix}"


def shard_path(folder: Path, scale: int, shard: int, suffix: str) -> Path:
    return Path(folder) / shard_name(scale, shard, suffix)


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


PLAN = ("set.json", "rows.parquet", "quarantine.csv")

WORKING = re.compile(r"lease(-\d+-of-\d+)?\.json")
"""There only while somebody writes into the set; see `lease`."""

WORKSHOP = "repair.tmp"
"""Folder in the set where a repair builds broken shards again."""

TEMPORARIES = re.compile(
    r"(set\.json|rows\.parquet|quarantine\.csv|SHA256SUMS|lease.*\.json|[0-9]{6,}\.(tar|idx|json))\.[\w.-]+\.tmp"
)


RELABELLING = "SHA256SUMS.relabelling"
"""Takes the place of SHA256SUMS while labels are replaced; see `relabel.write_labels`."""


UNFINISHED = "SHA256SUMS.unfinished"
"""What SHA256SUMS said of the shards that were there before a build that is under way, so that it signs no damage."""


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
    return not (ours or (path.is_dir() and SCALE.fullmatch(path.name)))


def files_in(folder: Path) -> list[str]:
    """Whatever is in the folder of a set and in the folders there, but sums and leases; sorted, relative to it.

    An empty folder ends with a slash. Raises OSError for a folder that cannot be read.
    """
    names: list[str] = []
    for name in os.listdir(folder):
        if name in ("SHA256SUMS", RELABELLING, UNFINISHED) or WORKING.fullmatch(name):
            continue
        if (folder / name).is_dir():
            names += [f"{name}/{inner}" for inner in os.listdir(folder / name)] or [f"{name}/"]
        else:
            names.append(name)
    return sorted(names)


def sums_bytes(sums: dict[str, str]) -> bytes:
    """The content of SHA256SUMS, as `sha256sum -c` reads it, from {relative path: sha256}."""
    return "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items())).encode()


def write_sums(folder: Path, manifests: list[ShardManifest]) -> None:
    """SHA256SUMS of the plan and of the shards of these manifests.

    A tar was hashed when it was written, and what was signed before this build keeps its hash: damage stays visible.
    Raises ShardError if a tar or index is missing.
    """
    known = {shard_name(m.scale, m.shard, "tar"): m.sha256 for m in manifests}
    if (folder / UNFINISHED).exists():
        known |= parse_sums((folder / UNFINISHED).read_bytes())[0]
    names = [shard_name(m.scale, m.shard, suffix) for m in manifests for suffix in ("tar", "idx", "json")]
    for name in names:
        if not (folder / name).is_file():
            raise ShardError(
                f"{folder / name} is missing: run the same `cxrfast shard` command again to build it again"
            )
    sums = {name: known.get(name) or sha256(folder / name) for name in (*names, *PLAN)}
    write_bytes(folder / "SHA256SUMS", sums_bytes(sums))
    (folder / UNFINISHED).unlink(missing_ok=True)


def mark_unfinished(folder: Path, rebuilt: Iterable[str]) -> None:
    """Mark a finished set as unfinished; the hashes of its shards are kept, but for those of the files `rebuilt`.

    Raises ShardError if the plan is not what was signed.
    """
    for earlier in (folder / UNFINISHED, folder / "SHA256SUMS"):
        if earlier.exists():
            break
    else:
        return
    try:
        sums, wrong = parse_sums(earlier.read_bytes())
    except FileNotFoundError:
        return  # another part of the build was quicker
    damaged = [name for name in sums if name in PLAN[:2] and sha256(folder / name) != sums[name]]
    if wrong and earlier.name == "SHA256SUMS":
        damaged.append(earlier.name)
    if damaged:
        raise ShardError(f"{folder / damaged[0]} is damaged: mend it first, with `cxrfast verify --repair {folder}`")
    leave = {*PLAN, *rebuilt}
    kept = {name: digest for name, digest in sums.items() if name not in leave}
    write_bytes(folder / UNFINISHED, sums_bytes(kept))
    (folder / "SHA256SUMS").unlink(missing_ok=True)


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
    """Versions of cxrfast and of the libraries that decide the bytes of a set."""
    packages = {
        "numpy": ("numpy", "numpy"),
        "opencv": ("opencv-python-headless", "cv2"),
        "pyarrow": ("pyarrow", "pyarrow"),
        "simplejpeg": ("simplejpeg", "simplejpeg"),
    }
    return {"cxrfast": __version__, **{name: installed(*names) or "unknown" for name, names in packages.items()}}
