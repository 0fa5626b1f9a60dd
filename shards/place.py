"""A place of a shard set to copy from or to: a local folder or any fsspec URL (s3://, gs://, sftp://, …).

Names go in; sizes, bytes and writable files come out. A file is not seen at a place before it is whole, but for file
systems that show what is being written (sftp, smb); whoever reads there compares sizes and hashes.
"""

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from fsspec.spec import AbstractBufferedFile

from cxrfast.errors import ShardError
from cxrfast.files import replacing
from cxrfast.shards.format.names import NAMES
from cxrfast.shards.storage import URL, as_oserror, connect

CHUNK = 8 * 2**20
"""Bytes read, hashed and written at a time. S3 wants parts of at least 5 MiB, and 10,000 at most make an object."""


class Place:
    """Where a set lies or shall lie; all names are relative to it, with slashes.

    Methods raise ShardError where the place cannot be reached, but `open` and what they yield raise OSError: those
    failures are worth another try.
    """

    def __init__(self, location: str | Path) -> None:
        self.location = os.fspath(location)
        self._fs: Any = None
        root = self.location
        if URL.match(self.location):
            self._fs, root = connect(self.location)
        self.root = root.rstrip("/") if self._fs else os.path.abspath(root)
        """As its file system names it: an absolute path, or bucket and prefix, or nothing in an archive."""
        if self.is_local and os.path.exists(self.root) and not os.path.isdir(self.root):
            raise ShardError(f"{self.location} is a file: give the folder of a shard set")

    def __str__(self) -> str:
        return self.location

    @property
    def is_local(self) -> bool:
        return self._fs is None

    def overlaps(self, other: "Place") -> bool:
        """Is one of the two the other, or inside it?"""
        if self._fs != other._fs:
            return False
        a, b = (os.path.realpath(p.root) if p.is_local else p.root for p in (self, other))
        return f"{a}/".startswith(f"{b}/") or f"{b}/".startswith(f"{a}/")

    def names(self) -> list[str]:
        """Of files and folders directly in it, sorted; none if there is nothing yet."""
        with self._reached():
            try:
                if self.is_local:
                    return sorted(os.listdir(self.root))
                self._fs.invalidate_cache()
                found = self._fs.ls(self.root, detail=False)
            except FileNotFoundError:
                return []
        return sorted({name for path in found if (name := path.removeprefix(self.root).strip("/"))})

    def sizes(self) -> dict[str, int]:
        """Bytes of every file of the set that is there, SHA256SUMS included."""
        found: dict[str, int] = {}
        with self._reached():
            if self.is_local:
                for path in Path(self.root).rglob("*"):
                    with suppress(FileNotFoundError):  # a temporary file, renamed meanwhile
                        found[str(path.relative_to(self.root))] = path.stat().st_size
            else:
                self._fs.invalidate_cache()
                listed = self._fs.find(self.root, detail=True)
                found = {path.removeprefix(self.root).lstrip("/"): info["size"] for path, info in listed.items()}
        found = {name: size for name, size in found.items() if NAMES.fullmatch(name) or name == "SHA256SUMS"}
        if None in found.values():
            raise ShardError(f"{self} does not tell the sizes of its files: download the set by other means")
        return found

    def read(self, name: str) -> bytes:
        """A small file, whole."""
        with self._reached(), self.open(name) as file:
            return file.read()

    def sha256(self, name: str) -> str:
        digest = hashlib.sha256()
        with self._reached(), self.open(name) as file:
            while chunk := file.read(CHUNK):
                digest.update(chunk)
        return digest.hexdigest()

    def open(self, name: str) -> IO[bytes]:
        """For reading, a chunk at a time: nothing is read ahead."""
        at = self._at(name)
        with as_oserror(at):
            return open(at, "rb") if self.is_local else self._fs.open(at, "rb", block_size=CHUNK, cache_type="none")

    @contextmanager
    def writing(self, name: str) -> Iterator[IO[bytes]]:
        """A new file, which is there when the block ends; if it raises, there is neither the file nor half an upload."""
        at = self._at(name)
        if self.is_local:
            with replacing(Path(at)) as file:
                yield file
            return
        with as_oserror(at):
            file = self._fs.open(at, "wb", block_size=CHUNK)
        try:
            yield file
            with as_oserror(at):
                file.close()
        except BaseException:
            self._abandon(file, at)
            raise

    def _abandon(self, file: Any, at: str) -> None:
        with suppress(Exception):  # what brought us here tells more
            if isinstance(file, AbstractBufferedFile):
                file.closed = True  # else whoever collects the garbage closes it, and closing uploads
                file.discard()
            else:
                file.close()
                self._fs.rm_file(at)

    def remove(self, name: str) -> None:
        with self._reached(), suppress(FileNotFoundError):
            remove: Callable[[str], None] = os.unlink if self.is_local else self._fs.rm_file
            remove(self._at(name))

    def make_folders(self, names: list[str]) -> None:
        """The place itself and folders in it, where the file system has such things."""
        if self.is_local:
            with self._reached():
                for name in names:
                    os.makedirs(self._at(name), exist_ok=True)
            return
        for path in (self.root, *map(self._at, names)):
            if "/" in path:  # a bucket is never made
                with suppress(Exception):  # there already, or an object store; where it is neither, writing fails
                    self._fs.mkdir(path, create_parents=False)

    def _at(self, name: str) -> str:
        return f"{self.root}/{name}" if self.root else name

    @contextmanager
    def _reached(self) -> Iterator[None]:
        """Whatever fails inside becomes a ShardError that names the place."""
        try:
            with as_oserror(self.root):
                yield
        except OSError as error:
            what = error.strerror or str(error) or type(error).__name__
            if self.is_local:
                raise ShardError(f"{error.filename or self}: {what}") from error
            raise ShardError(
                f"{self} cannot be reached ({what}): check the address, the credentials and the network; "
                "AWS_ENDPOINT_URL says where an S3 server is that is not Amazon's"
            ) from error
