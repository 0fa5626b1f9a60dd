"""Description of a shard set: its id, what it was made from and how. It is in rows.parquet, with a copy in set.json."""

from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

from cxrfast import __version__
from cxrfast.errors import ShardError
from cxrfast.files import json_bytes, open_file, read_file, write_bytes
from cxrfast.machine import installed
from cxrfast.shards.format.recipe import ImageRecipe
from cxrfast.text import LONGEST_NAME, find_fault, name_fault, shown

SCHEMA = 2

COPY = b"set.json"
"""Key of the copy of set.json in the metadata of rows.parquet."""

MOST_IMAGES = 10**8
"""Images of a set; a description that claims more is damaged, and memory for them would be allocated in vain."""

Count = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Number = Annotated[int, Meta(ge=1, le=MOST_IMAGES)]
SetId = Annotated[str, Meta(pattern=r"\A[0-9a-f]{32}\Z")]
"""Also the name of a folder (`--stage`) and of a file (`--cache`), so nothing else may be in it."""

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class SetInfo:
    """Description of a set. Written when the set is laid out; only `relabel` changes it, and only its labels."""

    schema: int = SCHEMA
    id: SetId
    """Hash of rows, images, patients and recipe; see `building.layout.set_id`."""
    source: Annotated[str, Meta(pattern=r"\A\w[\w.]*(:\w[\w.]*)?\Z", max_length=LONGEST_NAME)]
    """One of `sources.read.SOURCES`, or `package.module:function`."""
    source_options: dict[str, Any]
    """Options of the source in addition to the tree, as JSON values."""
    labels: list[str]
    labels_from: str = ""
    """Table that `relabel` took the labels from, as `name sha256:…`; "" if they are the source's own."""
    seed: int
    own_folds: bool = False
    """Whether the source gave the folds; else the seed decides them. In set.json only if it is true."""
    images: Number
    studies: Count
    patients: Count
    rows_per_shard: Number
    codec: str
    quality: int | None
    """Quality of the JPEGs; None (JSON: null) where the codec is raw."""
    dct: str | None
    """Forward DCT of the JPEGs, `accurate` or `fast`; None where the codec is raw. In set.json only where it is accurate:
    sets from before the choice existed are fast."""
    resize: str
    grey: str
    versions: dict[str, str]
    """Versions of the libraries that laid it out."""

    @property
    def shards(self) -> int:
        """Number of shards at each scale when the set is complete."""
        return -(-self.images // self.rows_per_shard)

    def rows_of(self, shard: int) -> range:
        """The rows that a shard holds or leaves out."""
        first = shard * self.rows_per_shard
        return range(first, min(first + self.rows_per_shard, self.images))

    @property
    def recipe(self) -> ImageRecipe:
        return ImageRecipe(**{field.name: getattr(self, field.name) for field in fields(ImageRecipe)})

    def to_bytes(self) -> bytes:
        """Contents of set.json."""
        value = asdict(self)
        if self.dct != "accurate":
            del value["dct"]
        if not self.own_folds:
            del value["own_folds"]
        return json_bytes(value)

    def write(self, folder: Path) -> None:
        write_bytes(folder / "set.json", self.to_bytes())


def is_laid_out(folder: Path) -> bool:
    """Has a set been laid out in this folder?"""
    return (folder / "rows.parquet").exists() or (folder / "set.json").exists()


def read_set(folder: Path) -> SetInfo:
    """The description of a set. Raises ShardError if there is none or if another schema version wrote it.

    It is read from rows.parquet, so that labels and description change together, or from set.json if that fails.
    """
    with suppress(ShardError):
        return read_info(Path(folder) / "rows.parquet")
    return read_set_json(folder)


def read_set_json(folder: Path) -> SetInfo:
    """The description in set.json. Raises ShardError like `read_set`."""
    path = Path(folder) / "set.json"
    if not path.is_file():
        raise ShardError(f"{folder} is not a shard set (no set.json): give the folder that `cxrfast shard --out` wrote")
    return parse_set(read_file(path), path)


def read_info(path: Path) -> SetInfo:
    """The description in a rows table. Raises ShardError if it is missing or damaged."""
    info = parse_set(_description(path), f"the copy of set.json in {path}")
    if info.images > path.stat().st_size:  # a row takes four bytes or more
        raise ShardError(f"{path} is too small for {info.images:,} images: it is damaged")
    return info


def write_set_json(folder: Path) -> None:
    """Write the description in rows.parquet to set.json, unless it is there already."""
    path, data = folder / "set.json", _description(folder / "rows.parquet")
    if not path.is_file() or read_file(path) != data:
        write_bytes(path, data)


def _description(path: Path) -> bytes:
    import pyarrow as pa  # here, since it takes longer to import than most commands on a set need
    import pyarrow.parquet as pq

    try:
        with open(open_file(path), "rb") as file:
            return pq.read_schema(file).metadata[COPY]
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError, MemoryError) as error:
        raise ShardError(
            f"{path} holds no copy of set.json ({error}): it is damaged, or from another version of cxrfast"
        ) from error


def parse_set(data: bytes, path: object) -> SetInfo:
    """Read the bytes of a set.json. Raises ShardError like `read_set`, naming `path`."""
    try:
        value = parse_json(data)
        schema = value.get("schema")
        if not isinstance(schema, int) or schema == SCHEMA:
            return _checked(value)
    except (ValueError, ShardError) as error:
        raise ShardError(
            f"{path} is damaged ({error}): restore it from a copy, or shard again into a new folder"
        ) from error
    raise ShardError(
        f"{path} has schema version {schema}, this cxrfast reads {SCHEMA}: "
        "use the cxrfast that built it, or shard again into a new folder"
    )


def _checked(value: dict[str, Any]) -> SetInfo:
    """A description from its fields. Raises ValueError or ShardError if they are wrong."""
    info = typed({"dct": "fast" if value.get("codec") == "jpeg" else None, **value}, SetInfo)
    if "schema" not in value:
        raise ValueError("it has no schema version")
    told = (*info.versions.keys(), *info.versions.values(), *info.labels_from.split(" sha256:", 1))
    if fault := find_fault((*info.labels, *told), name_fault):
        raise ValueError(fault)
    if len(set(info.labels)) < len(info.labels):
        raise ValueError("a label is listed twice")
    if info.recipe.quality != info.quality:
        raise ValueError("its JPEGs have no quality")
    if info.recipe.dct != info.dct:
        raise ValueError("its JPEGs have no DCT")
    return info


def parse_json(data: bytes) -> dict[str, Any]:
    """Read a JSON object. Raises ValueError if `data` is anything else."""
    try:
        return msgspec.json.decode(data, type=dict[str, Any])
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def typed(value: dict[str, Any], kind: type[T]) -> T:
    """A dataclass from its fields. Raises ValueError naming a field that is missing, unknown or of the wrong type."""
    if unknown := value.keys() - {field.name for field in fields(kind)}:  # type: ignore[arg-type]
        raise ValueError(f"unknown field {shown(min(unknown))}")
    return msgspec.convert(value, kind)


def versions() -> dict[str, str]:
    """Versions of cxrfast and of the libraries that decide the bytes of a set."""
    packages = {
        "numpy": ("numpy", "numpy"),
        "opencv": ("opencv-python-headless", "cv2"),
        "pyarrow": ("pyarrow", "pyarrow"),
        "simplejpeg": ("simplejpeg", "simplejpeg"),
    }
    return {"cxrfast": __version__, **{name: installed(*names) or "unknown" for name, names in packages.items()}}
