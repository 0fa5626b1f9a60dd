"""set.json: who the set is, what it was made from and how."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cxrfast import __version__
from cxrfast.errors import ShardError
from cxrfast.files import json_bytes, write_bytes
from cxrfast.machine import installed
from cxrfast.shards.format.recipe import ImageRecipe

SCHEMA = 2


@dataclass(frozen=True, kw_only=True)
class SetInfo:
    """set.json. Written when the set is laid out; only `relabel` changes it, and only its labels."""

    schema: int = SCHEMA
    id: str
    """Hash of rows, images, patients and recipe; see `building.layout.set_id`."""
    source: str
    source_options: dict[str, Any]
    """What the source was told in addition to the tree, as JSON values."""
    labels: list[str]
    labels_from: str = ""
    """The table that `relabel` took them from, `name sha256:…` of its bytes; "": the source's own."""
    seed: int
    images: int
    studies: int
    patients: int
    rows_per_shard: int
    codec: str
    quality: int | None
    """Quality of the JPEGs; None (JSON: null) where the codec is raw."""
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
        return ImageRecipe(seed=self.seed, codec=self.codec, quality=self.quality, resize=self.resize, grey=self.grey)

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


def versions() -> dict[str, str]:
    """Versions of cxrfast and of the libraries that decide the bytes of a set."""
    packages = {
        "numpy": ("numpy", "numpy"),
        "opencv": ("opencv-python-headless", "cv2"),
        "pyarrow": ("pyarrow", "pyarrow"),
        "simplejpeg": ("simplejpeg", "simplejpeg"),
    }
    return {"cxrfast": __version__, **{name: installed(*names) or "unknown" for name, names in packages.items()}}
