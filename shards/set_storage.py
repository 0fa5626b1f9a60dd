"""A shard set in a local folder or behind any fsspec URL, to copy from or to."""

import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from cxrfast.errors import ShardError
from cxrfast.files import LARGEST, NOT_REGULAR, open_file, replacing
from cxrfast.shards.format.names import NAMES
from cxrfast.shards.storage import as_oserror, connect
from cxrfast.text import masked

CHUNK = 8 * 2**20
"""Bytes of a set read, hashed and written at a time. S3 wants parts of at least 5 MiB, and at most 10,000 per object."""


class SetStorage:
    """The place of a shard set, existing or not; all names are relative to it, with slashes.

    A file appears only when it is whole, except on file systems that show partial files (sftp, smb); readers compare sizes
    and hashes there. Methods raise ShardError if the storage cannot be reached; `open` and the files raise OSError, which
    is worth another try.
    """

    def __init__(self, location: str | Path) -> None:
        self.location = os.fspath(location)
        self._fs, root = connect(self.location)
        self.is_local = self._fs is None
        self.root = os.path.abspath(root) if self.is_local else root.rstrip("/")
        """Its path on its file system: absolute, or bucket and prefix, or empty in an archive."""
        if self.is_local and os.path.exists(self.root) and not os.path.isdir(self.root):
            raise ShardError(f"{self} is a file: give the folder of a shard set")

    def __str__(self) -> str:
        return masked(self.location)

    def overlaps(self, other: "SetStorage") -> bool:
        """Is one the same place as the other, or inside it?"""
        if self._fs != other._fs:
            return False
        a, b = (os.path.realpath(p.root) if p.is_local else p.root for p in (self, other))
        return f"{a}/".startswith(f"{b}/") or f"{b}/".startswith(f"{a}/")

    def names(self) -> list[str]:
        """Names of files and folders directly in it, sorted; empty if it does not exist yet."""
        found: list[str] = []
        with self._reached(), suppress(FileNotFoundError):
            if self.is_local:
                return sorted(os.listdir(self.root))
            self._fs.invalidate_cache()
            found = self._fs.ls(self.root, detail=False)
        return sorted({name for path in found if (name := path.removeprefix(self.root).strip("/"))})

    def sizes(self) -> dict[str, int]:
        """Bytes of every file of the set that exists, SHA256SUMS included."""
        found: dict[str, int] = {}
        with self._reached():
            if self.is_local:
                for path in Path(self.root).rglob("*"):
                    with suppress(FileNotFoundError):  # a temporary file, renamed meanwhile
                        status = path.stat()
                        name = str(path.relative_to(self.root))
                        if NAMES.fullmatch(name) and not stat.S_ISREG(status.st_mode):
                            raise ShardError(f"{path} {NOT_REGULAR}: it cannot be part of a set")
                        found[name] = status.st_size
            else:
                self._fs.invalidate_cache()
                listed = self._fs.find(self.root, detail=True)
                found = {path.removeprefix(self.root).lstrip("/"): info["size"] for path, info in listed.items()}
        found = {name: size for name, size in found.items() if NAMES.fullmatch(name) or name == "SHA256SUMS"}
        if None in found.values():
            raise ShardError(f"{self} does not report the sizes of its files: download the set by other means")
        return found

    def read(self, name: str) -> bytes:
        """A small file, whole. Raises ShardError for one that is too large to be part of a set."""
        with self._reached(), self.open(name) as file:
            if len(data := file.read(LARGEST + 1)) > LARGEST:
                raise ShardError(f"{name} in {self} has more than {LARGEST:,} bytes: it is damaged")
            return data

    def sha256(self, name: str) -> str:
        digest = hashlib.sha256()
        with self._reached(), self.open(name) as file:
            while chunk := file.read(CHUNK):
                digest.update(chunk)
        return digest.hexdigest()

    def open(self, name: str) -> IO[bytes]:
        """A file, open for reading chunk by chunk, without read-ahead."""
        with as_oserror(at := self._at(name)):
            if self.is_local:
                return open(open_file(Path(at)), "rb")
            return self._fs.open(at, "rb", block_size=CHUNK, cache_type="none")

    @contextmanager
    def writing(self, name: str) -> Iterator[IO[bytes]]:
        """A new file, which appears when the block ends; if it raises, neither file nor upload remains."""
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
        from fsspec.spec import AbstractBufferedFile

        with suppress(Exception):  # the original error is more informative
            if isinstance(file, AbstractBufferedFile):
                file.closed = True  # else garbage collection closes it, which uploads
                file.discard()
            else:
                file.close()
                self._fs.rm_file(at)

    def remove(self, name: str) -> None:
        with self._reached(), suppress(FileNotFoundError):
            (os.unlink if self.is_local else self._fs.rm_file)(self._at(name))

    def make_folders(self, names: list[str]) -> None:
        """Make the storage and folders in it, where the file system has folders."""
        for path in (self.root, *map(self._at, names)):
            if self.is_local:
                with self._reached():
                    os.makedirs(path, exist_ok=True)
            elif "/" in path:  # buckets are never created
                with suppress(Exception):  # there already, or an object store; where it is neither, writing fails
                    self._fs.mkdir(path, create_parents=False)

    def _at(self, name: str) -> str:
        return f"{self.root}/{name}" if self.root else name

    @contextmanager
    def _reached(self) -> Iterator[None]:
        """Turn any failure into a ShardError that names the storage."""
        try:
            with as_oserror(self.root):
                yield
        except OSError as error:
            what = error.strerror or str(error) or type(error).__name__
            if self.is_local:
                raise ShardError(f"{error.filename or self}: {what}") from error
            raise ShardError(
                f"{self} cannot be reached ({what}): check the address, the credentials and the network; "
                "AWS_ENDPOINT_URL is the address of an S3 server other than Amazon's"
            ) from error
