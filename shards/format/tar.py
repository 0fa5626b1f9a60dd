"""Write and read a shard's tar and its DALI index (v1.2)."""

import os
import re
import tarfile
import zlib
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Annotated

import msgspec

from cxrfast.errors import ShardError
from cxrfast.files import open_file, read_file, sync_folder, temporary_name, write_bytes
from cxrfast.shards.format.codec import SUFFIX
from cxrfast.shards.format.names import shard_path
from cxrfast.shards.images.bad_image import MAX_SIDE

AHEAD = 16 * 2**20
"""Bytes after which writing to disk is started, so that `close` waits for little."""

PLACE = "([0-9]{1,13}) ([0-9]{1,10})"
LINE = re.compile(rf"({'|'.join(SUFFIX.values())}) {PLACE} ([0-9]{{9,12}})\.\1 json {PLACE} \4\.json", re.ASCII)
"""Line of an index: suffix, offset, bytes and name of a row's image, then of its JSON."""


class TarWriter:
    """Writes a tar and its DALI index, hashing the tar; both get their names in `close`."""

    def __init__(self, folder: Path, scale: int, shard: int, codec: str) -> None:
        self.suffix = SUFFIX[codec]
        self.path = shard_path(folder, scale, shard, "tar")
        self.temporary = temporary_name(self.path)
        self.file = open(self.temporary, "wb", buffering=1 << 20)  # noqa: SIM115 - `discard` closes it
        self.digest, self.size, self.begun = sha256(), 0, 0
        self.index: list[str] = []
        self.crc32: list[int] = []

    def add(self, row: int, image: bytes, meta: bytes) -> None:
        first, second = self._member(f"{row:09d}.{self.suffix}", image), self._member(f"{row:09d}.json", meta)
        self.index.append(f"{self.suffix} {first} json {second}")
        self.crc32.append(zlib.crc32(image))
        if self.size - self.begun >= AHEAD and hasattr(os, "posix_fadvise"):
            self.file.flush()
            os.posix_fadvise(self.file.fileno(), self.begun, self.size - self.begun, os.POSIX_FADV_DONTNEED)
            self.begun = self.size

    def _member(self, name: str, data: bytes) -> str:
        header = tarfile.TarInfo(name)  # mtime 0 and owner 0: the same bytes from any user at any time
        header.size = len(data)
        self._write(header.tobuf(tarfile.USTAR_FORMAT))
        offset = self.size
        self._write(data)
        self._write(b"\0" * (-len(data) % tarfile.BLOCKSIZE))
        return f"{offset} {len(data)} {name}"

    def _write(self, data: bytes) -> None:
        self.file.write(data)
        self.digest.update(data)
        self.size += len(data)

    def close(self) -> tuple[str, int]:
        """Finish, sync and rename the tar and its index. Returns sha256 and size of the tar, in bytes."""
        self._write(b"\0" * 2 * tarfile.BLOCKSIZE)
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        write_bytes(self.path.with_suffix(".idx"), index_bytes(self.index))
        os.replace(self.temporary, self.path)
        sync_folder(self.path.parent)
        return self.digest.hexdigest(), self.size

    def discard(self) -> None:
        """Remove unfinished files; harmless after `close`."""
        try:
            self.file.close()
        except OSError:
            pass  # a full disk refuses the buffered bytes again
        finally:
            self.temporary.unlink(missing_ok=True)


def index_bytes(lines: list[str]) -> bytes:
    """A DALI index (v1.2) with these lines."""
    return "".join(f"{line}\n" for line in (f"v1.2 {len(lines)}", *lines)).encode()


LARGEST_MEMBER = 2**30
"""Bytes of a file in a tar; the largest raw image has 17 million."""


class Meta(msgspec.Struct):
    """The fields of the JSON next to an image that a manifest repeats."""

    image_id: str
    height: Annotated[int, msgspec.Meta(ge=1, le=MAX_SIDE)]
    width: Annotated[int, msgspec.Meta(ge=1, le=MAX_SIDE)]


@dataclass(frozen=True, kw_only=True)
class Contents:
    """Samples of a tar, read from the tar alone."""

    index: bytes
    """Content of its .idx file."""
    rows: list[int]
    places: list[tuple[int, int, int]]
    """Row, offset and bytes of each image, as `read_index` gives them."""
    image_ids: list[str]
    crc32: list[int]
    sizes: list[list[int]]


def read_contents(path: Path) -> Contents:
    """Everything in an undamaged tar that its index and manifest repeat.

    Raises ValueError, OSError or tarfile.TarError for a tar that is damaged or was written by something else.
    """
    lines: list[str] = []
    rows: list[int] = []
    places: list[tuple[int, int, int]] = []
    image_ids: list[str] = []
    crc32: list[int] = []
    sizes: list[list[int]] = []
    with open(open_file(path), "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
        members = tar.getmembers()
        if any(m.type != tarfile.REGTYPE or m.pax_headers or not 0 < m.size <= LARGEST_MEMBER for m in members):
            raise ValueError("something that `TarWriter` does not write")
        for image, text in zip(members[::2], members[1::2], strict=True):
            lines.append(
                " ".join(f"{Path(m.name).suffix[1:]} {m.offset_data} {m.size} {m.name}" for m in (image, text))
            )
            data, meta = (tar.extractfile(m).read() for m in (image, text))  # type: ignore[union-attr]
            rows.append(int(Path(image.name).stem))
            places.append((rows[-1], image.offset_data, image.size))
            crc32.append(zlib.crc32(data))
            values = msgspec.json.decode(meta, type=Meta)
            image_ids.append(values.image_id)
            sizes.append([values.height, values.width])
    return Contents(index=index_bytes(lines), rows=rows, places=places, image_ids=image_ids, crc32=crc32, sizes=sizes)


def read_index(folder: Path, scale: int, shard: int) -> list[tuple[int, int, int]]:
    """(row, offset, bytes) of every image in a tar, from its DALI index. Raises ShardError if it is damaged."""
    path = shard_path(folder, scale, shard, "idx")
    try:
        version, *lines = read_file(path).decode().splitlines()
        if version != f"v1.2 {len(lines)}":
            raise ValueError(f"first line {version!r}")
        samples = [LINE.fullmatch(line) for line in lines]
        if None in samples:
            raise ValueError(f"line {samples.index(None) + 2} is not an image and its JSON")
        return [(int(s[4]), int(s[2]), int(s[3])) for s in samples if s]
    except FileNotFoundError:
        raise ShardError(f"{path} is missing: run the same `cxrfast shard` command again") from None
    except ValueError as error:
        raise ShardError(f"{path} is damaged ({error}): `cxrfast verify {folder}` lists what else is") from error
