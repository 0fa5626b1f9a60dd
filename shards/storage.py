"""Files in a local folder or behind any fsspec URL (s3://, gs://, sftp://, zip://…): names, sizes and bytes.

`Tree` holds source images: it never writes, and no path leads out of it. Shard sets are in `set_storage`.
"""

import errno
import os
import posixpath
import re
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import IO, Any

import numpy as np

from cxrfast.errors import ShardError
from cxrfast.files import open_file
from cxrfast.progress import Advance, progress
from cxrfast.shards.source_file import MISSING, NOT_A_FILE, PAUSES, UNREADABLE, size_of
from cxrfast.text import masked

URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
"""Start of a location that is not a path on this machine: `s3://bucket`, `zip://folder::archive.zip`."""

FAILING = 0.001
"""Fraction of the files that may fail with errors that come and go; with more, the file server is taken to be gone."""

STATS = 256
"""Files that a thread looks up in one call."""

FEW = 16
"""Remote folders listed one by one, at most; for more, everything below their common parent is listed at once."""


def relative(path: str) -> str:
    """`path` below a tree, normalised: `./a//b` → `a/b`, the tree itself → "". Raises ShardError if it leads out."""
    parts = PurePosixPath(path)
    if parts.is_absolute() or ".." in parts.parts or URL.match(path) or "\0" in path:
        raise ShardError(f"{path!r} is not a path below the source tree: give paths relative to it, without ..")
    return "" if str(parts) == "." else str(parts)


class Tree:
    """A folder of source files, on this machine or behind a URL. Its pickle is its location.

    `location`: as given; `name`: its last part; `is_local`: whether its files can be opened by path. All other paths are
    POSIX paths relative to it; "" is the tree itself. Raises ShardError if the tree cannot be reached.
    """

    def __init__(self, location: str | Path) -> None:
        self.location = os.fspath(location)
        self._fs, self._root = connect(self.location or ".")
        self.is_local = self._fs is None

    def __reduce__(self) -> tuple[type, tuple[str]]:
        return Tree, (self.location,)

    def __str__(self) -> str:
        return masked(self.location)

    def __repr__(self) -> str:
        return f"Tree({str(self)!r})"

    @property
    def name(self) -> str:
        root = os.path.abspath(self._root) if self.is_local else self._root
        return PurePosixPath(root).name or PurePosixPath(self.location).name

    @cached_property
    def roots(self) -> tuple[str, ...]:
        """Prefixes of absolute paths of the tree's files, each with a slash at its end."""
        if self.is_local:
            return tuple({f"{f(self._root).rstrip('/')}/": None for f in (os.path.abspath, os.path.realpath)})
        return (f"{self.location.rstrip('/')}/",)

    def read(self, path: str) -> bytes:
        """Return the whole file. Raises OSError, and FileNotFoundError if it does not exist, for any file system."""
        with as_oserror(path):
            if self.is_local:
                with self.open(path) as file:
                    return file.read()
            return self._fs.cat_file(self._at(path))

    def head(self, path: str, size: int) -> bytes:
        """Return the first bytes of a file, `size` at most; raises as `read` does."""
        with as_oserror(path):
            if self.is_local:
                with self.open(path) as file:
                    return file.read(size)
            return self._fs.cat_file(self._at(path), start=0, end=size)

    def why_not(self, path: str) -> str:
        """Why a file cannot be read; "" if it can."""
        try:
            self.head(path, 1)
        except OSError as error:
            return error.strerror or str(error)
        return ""

    def is_there(self) -> bool:
        """Whether the tree can be reached and holds anything: a mount that is lost leaves an empty folder."""
        if not self.is_local:
            self._fs.invalidate_cache()
        try:
            return any(self._list(""))
        except ShardError:
            return False

    def open(self, path: str) -> IO[bytes]:
        """The file, open for reading; raises as `read` does. Only a regular one: a FIFO would wait for ever."""
        with as_oserror(path):
            if self.is_local:
                return open(open_file(Path(self._at(path))), "rb")
            return self._fs.open(self._at(path), "rb")

    def exists(self, path: str) -> bool:
        return os.path.exists(self._at(path)) if self.is_local else self._info(path) is not None

    def is_dir(self, path: str) -> bool:
        if self.is_local:
            return os.path.isdir(self._at(path))
        info = self._info(path)
        # over HTTP a page of links counts as a file; here it is a folder
        return info is not None and (info["type"] == "directory" or any(self._list(path)))

    def files(self, path: str) -> list[str]:
        """Names of the files directly in the folder `path`, sorted; empty if there is no such folder."""
        return self._list(path)[0]

    def folders(self, path: str) -> list[str]:
        """Names of the folders directly in the folder `path`, sorted; empty if there is no such folder."""
        return self._list(path)[1]

    def glob(self, pattern: str) -> list[str]:
        """Sorted paths of files and folders that match; `*`, `?` and `[…]` match within one name."""
        found = [""]
        for part in relative(pattern).split("/"):
            listed = ((folder, self._list(folder)) for folder in found)
            found = [
                posixpath.join(folder, name)
                for folder, (files, folders) in listed
                for name in (*files, *folders)
                if fnmatchcase(name, part)
            ]
        return sorted(found)

    def sizes(self, paths: Iterable[str]) -> np.ndarray:
        """Bytes of every file, int64; MISSING, NOT_A_FILE or UNREADABLE (all negative) where there is none to read.

        Local files are looked up in threads, since network file systems answer slowly; remote folders are listed, since
        one request per file would take hours. Raises ShardError if the tree does not answer.
        """
        paths = [relative(path) for path in paths]
        with progress("looking for images", len(paths)) as advance:
            return self._stat(paths, advance) if self.is_local else self._listed_sizes(paths, advance)

    def _stat(self, paths: list[str], advance: Advance) -> np.ndarray:
        """Errors that may pass are tried again; a few that stay are bad files, many are a server that is gone."""

        def look(path: str) -> int | OSError:
            try:
                return size_of(f"{self._root}/{path}")
            except OSError as error:
                return error

        found: list[int | OSError] = []
        with ThreadPoolExecutor(16) as pool:
            starts = range(0, len(paths), STATS)
            for some in pool.map(lambda start: [look(path) for path in paths[start : start + STATS]], starts):
                found += some
                advance(len(some))
        for pause in PAUSES:
            if again := [n for n, size in enumerate(found) if isinstance(size, OSError)]:
                time.sleep(pause)
                for n in again:
                    found[n] = look(paths[n])
        failed = [n for n, size in enumerate(found) if isinstance(size, OSError)]
        if len(failed) > max(1, FAILING * len(paths)):
            raise ShardError(
                f"{len(failed):,} of {len(paths):,} images cannot be looked up in {self} (first: {paths[failed[0]]}: "
                f"{found[failed[0]]}): check the file server and run the same command again"
            )
        return np.array([UNREADABLE if isinstance(size, OSError) else size for size in found], np.int64)

    def _listed_sizes(self, paths: list[str], advance: Advance) -> np.ndarray:
        listings = _listings({posixpath.dirname(path) for path in paths})
        found: dict[str, int | None] = {}
        for n, (folder, deep) in enumerate(listings):
            found |= self._sizes_in(folder, deep)
            advance(len(paths) * (n + 1) // len(listings) - len(paths) * n // len(listings))
        sizes = [found.get(path, MISSING) for path in paths]
        if None in sizes:
            raise ShardError(
                f"{self} does not report the size of {paths[sizes.index(None)]}: copy it to a local disk first"
            )
        return np.array(sizes, np.int64)

    def _sizes_in(self, folder: str, deep: bool) -> dict[str, int | None]:
        """Sizes of the files in a folder, by path; with `deep` also of those in all folders below it."""
        infos: dict[str, Any] = {}
        with self._reaching(folder), suppress(FileNotFoundError, NotADirectoryError):
            if deep:
                infos = self._fs.find(self._at(folder), detail=True, withdirs=True)
            else:
                infos = {info["name"]: info for info in self._fs.ls(self._at(folder), detail=True)}
        return {
            name.removeprefix(self._root).strip("/"): NOT_A_FILE if info["type"] == "directory" else info["size"]
            for name, info in infos.items()
            if info["type"] in ("file", "directory")
        }

    def _list(self, path: str) -> tuple[list[str], list[str]]:
        """Names of the files and of the folders in a folder, each sorted; a link counts as its target."""
        files: list[str] = []
        folders: list[str] = []
        here = self._at(path)
        with self._reaching(path), suppress(FileNotFoundError, NotADirectoryError):
            if self.is_local:
                with os.scandir(here) as entries:
                    for entry in entries:
                        (folders if _leads_to_folder(entry) else files).append(entry.name)
            else:
                for info in self._fs.ls(here, detail=True):
                    full = info["name"].rstrip("/")
                    if full != here.rstrip("/"):  # object stores list the folder itself too, and a file in itself
                        (folders if info["type"] == "directory" else files).append(full.rpartition("/")[2])
        return sorted(files), sorted(folders)

    def _info(self, path: str) -> dict[str, Any] | None:
        with self._reaching(path), suppress(FileNotFoundError, NotADirectoryError):
            return self._fs.info(self._at(path))
        return None

    def _at(self, path: str) -> str:
        """`path` as the file system names it."""
        below = relative(path)
        if not below:
            return self._root
        return f"{self._root.rstrip('/')}/{below}" if self._root else below

    @contextmanager
    def _reaching(self, path: str) -> Iterator[None]:
        """Turn any failure into a ShardError: fsspec's file systems raise whatever their drivers raise."""
        try:
            yield
        except ShardError:
            raise
        except Exception as error:
            where = posixpath.join(str(self), path) if path else str(self)
            raise ShardError(f"{where} cannot be reached ({_reason(error)})") from error


def _leads_to_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads in a circle
        return False


def _listings(folders: set[str]) -> list[tuple[str, bool]]:
    """Folders to list so that every file in `folders` is seen, and whether to list everything below each."""
    if len(folders) <= FEW:
        return [(folder, False) for folder in sorted(folders)]
    groups: dict[str, list[str]] = {}
    for folder in folders:
        groups.setdefault(folder.partition("/")[0], []).append(folder)
    if len(groups) > FEW:
        return [("", True)]
    return sorted((posixpath.commonpath(group), top != "") for top, group in groups.items())


def connect(url: str) -> tuple[Any, str]:
    """A URL's file system and path there; None and the path if it is on this machine."""
    if not URL.match(url):
        return None, url
    import fsspec.core
    from fsspec.implementations.local import LocalFileSystem

    try:
        fs, root = fsspec.core.url_to_fs(url)
        fs.invalidate_cache()  # instances are shared, and their listings may be stale
    except ImportError as error:
        hint = " (pip install 'cxrfast[remote]')" if url.startswith("s3://") else ""
        raise ShardError(f"{masked(url)} needs a driver that is not installed: {masked(str(error))}{hint}") from error
    except ValueError as error:
        raise ShardError(
            f"{masked(url)} cannot be opened ({masked(str(error))}): give a folder, or a URL that fsspec knows (s3://, gs://, sftp://, zip://, …)"
        ) from error
    except Exception as error:  # drivers raise unrelated exceptions
        raise ShardError(f"{masked(url)} cannot be opened ({_reason(error)})") from error
    return (None, root) if isinstance(fs, LocalFileSystem) else (fs, root)


@contextmanager
def as_oserror(path: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ShardError):
        raise
    except Exception as error:
        raise OSError(errno.EIO, _reason(error), path) from error


def _reason(error: Exception) -> str:
    return masked(f"{type(error).__name__}: {error}") if str(error) else type(error).__name__
