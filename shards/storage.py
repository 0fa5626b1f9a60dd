"""A source tree: a local folder or any fsspec URL (s3://, gs://, sftp://, zip://…) goes in, names, sizes and bytes come out.

It never writes, and no path leads out of it.
"""

import errno
import os
import posixpath
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import IO, Any

import numpy as np

from cxrfast.errors import ShardError
from cxrfast.progress import Advance, progress

URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
"""How a location begins that is not a path of this machine: `s3://bucket`, `zip://folder::archive.zip`."""

STATS = 256
"""Files that a thread asks for in one go."""

FEW = 16
"""Up to so many remote folders are listed one by one; of more, everything below what they share is listed at once."""


def relative(path: str) -> str:
    """`path` below a tree, tidied: `./a//b` → `a/b`, the tree itself → "". Raises ShardError for one that leads out."""
    parts = PurePosixPath(path)
    if parts.is_absolute() or ".." in parts.parts or URL.match(path) or "\0" in path:
        raise ShardError(f"{path!r} is no path below the source tree: give paths relative to it, without ..")
    return "" if str(parts) == "." else str(parts)


class Tree:
    """A folder of source files, on this machine or behind a URL; pickled, it is its location.

    `location`: as given; `name`: its last part; `is_local`: may its files be opened by path? All other paths are
    relative POSIX paths below it; those of the tree itself are "". Raises ShardError where the tree cannot be reached.
    """

    def __init__(self, location: str | Path) -> None:
        self.location = os.fspath(location)
        self._fs: Any = None
        self._root = self.location or "."
        if URL.match(self.location):
            self._fs, self._root = connect(self.location)
        self.is_local = self._fs is None

    def __reduce__(self) -> tuple[type, tuple[str]]:
        return Tree, (self.location,)

    def __str__(self) -> str:
        return self.location

    def __repr__(self) -> str:
        return f"Tree({self.location!r})"

    @property
    def name(self) -> str:
        root = os.path.abspath(self._root) if self.is_local else self._root
        return PurePosixPath(root).name or PurePosixPath(self.location).name

    @cached_property
    def roots(self) -> tuple[str, ...]:
        """What absolute paths of the tree's files begin with, each with a slash at its end."""
        if self.is_local:
            return tuple({f"{f(self._root).rstrip('/')}/": None for f in (os.path.abspath, os.path.realpath)})
        return (f"{self.location.rstrip('/')}/",)

    def read(self, path: str) -> bytes:
        """The whole file. Raises FileNotFoundError, or another OSError whatever the file system raised."""
        with as_oserror(path):
            if self.is_local:
                return Path(self._at(path)).read_bytes()
            return self._fs.cat_file(self._at(path))

    def open(self, path: str) -> IO[bytes]:
        """The file, open for reading; raises as `read` does."""
        with as_oserror(path):
            return open(self._at(path), "rb") if self.is_local else self._fs.open(self._at(path), "rb")

    def exists(self, path: str) -> bool:
        return os.path.exists(self._at(path)) if self.is_local else self._info(path) is not None

    def is_dir(self, path: str) -> bool:
        if self.is_local:
            return os.path.isdir(self._at(path))
        info = self._info(path)
        # a page of links is a file to HTTP, and a folder all the same
        return info is not None and (info["type"] == "directory" or any(self._list(path)))

    def files(self, path: str) -> list[str]:
        """Names of the files directly in the folder `path`, sorted; none where there is no such folder."""
        return self._list(path)[0]

    def folders(self, path: str) -> list[str]:
        """Names of the folders directly in the folder `path`, sorted; none where there is no such folder."""
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

    def sizes(self, paths: Iterable[str], quiet: bool = True) -> np.ndarray:
        """Bytes of every file, int64; -1 where there is none.

        On this machine threads ask for each file, since a network file system answers slowly; elsewhere folders are
        listed, since a request a file would take hours.
        """
        paths = [relative(path) for path in paths]
        with progress("looking for images", len(paths), quiet=quiet) as advance:
            return self._stat(paths, advance) if self.is_local else self._listed_sizes(paths, advance)

    def _stat(self, paths: list[str], advance: Advance) -> np.ndarray:
        def stat(path: str) -> int:
            try:
                return os.stat(f"{self._root}/{path}").st_size
            except (FileNotFoundError, NotADirectoryError):
                return -1

        def stat_some(first: int) -> list[int]:
            return [stat(path) for path in paths[first : first + STATS]]

        sizes: list[int] = []
        with ThreadPoolExecutor(16) as pool:
            for some in pool.map(stat_some, range(0, len(paths), STATS)):
                sizes += some
                advance(len(some))
        return np.array(sizes, np.int64)

    def _listed_sizes(self, paths: list[str], advance: Advance) -> np.ndarray:
        listings = _listings({posixpath.dirname(path) for path in paths})
        found: dict[str, int | None] = {}
        for n, (folder, deep) in enumerate(listings):
            found |= self._sizes_in(folder, deep)
            advance(len(paths) * (n + 1) // len(listings) - len(paths) * n // len(listings))
        sizes = [found.get(path, -1) for path in paths]
        if None in sizes:
            raise ShardError(
                f"{self} does not tell the size of {paths[sizes.index(None)]}: copy it to a local disk first"
            )
        return np.array(sizes, np.int64)

    def _sizes_in(self, folder: str, deep: bool) -> dict[str, int | None]:
        """Sizes of the files in a folder, and if `deep` in all folders below it, by path."""
        with self._reaching(folder):
            try:
                if deep:
                    infos = self._fs.find(self._at(folder), detail=True)
                else:
                    listed = self._fs.ls(self._at(folder), detail=True)
                    infos = {info["name"]: info for info in listed if info["type"] == "file"}
            except (FileNotFoundError, NotADirectoryError):
                return {}
        return {name.removeprefix(self._root).lstrip("/"): info["size"] for name, info in infos.items()}

    def _list(self, path: str) -> tuple[list[str], list[str]]:
        """Names of the files and of the folders in a folder, each sorted; a link counts as what it leads to."""
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
        with self._reaching(path):
            try:
                return self._fs.info(self._at(path))
            except (FileNotFoundError, NotADirectoryError):
                return None

    def _at(self, path: str) -> str:
        """`path` as the file system names it."""
        below = relative(path)
        if not below:
            return self._root
        return f"{self._root.rstrip('/')}/{below}" if self._root else below

    @contextmanager
    def _reaching(self, path: str) -> Iterator[None]:
        """Any failure inside becomes a ShardError: fsspec's file systems raise whatever their drivers do."""
        try:
            yield
        except ShardError:
            raise
        except Exception as error:
            where = posixpath.join(self.location, path) if path else self.location
            raise ShardError(f"{where} cannot be reached ({reason(error)})") from error


def _leads_to_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads in a circle
        return False


def _listings(folders: set[str]) -> list[tuple[str, bool]]:
    """Folders to list so that the files in all `folders` are seen, and whether with all that is below them."""
    if len(folders) <= FEW:
        return [(folder, False) for folder in sorted(folders)]
    groups: dict[str, list[str]] = {}
    for folder in folders:
        groups.setdefault(folder.partition("/")[0], []).append(folder)
    if len(groups) > FEW:
        return [("", True)]
    return sorted((posixpath.commonpath(group), top != "") for top, group in groups.items())


def connect(url: str) -> tuple[Any, str]:
    """The file system behind a URL and the URL's path there; none where it is this machine's own."""
    import fsspec.core
    from fsspec.implementations.local import LocalFileSystem

    try:
        fs, root = fsspec.core.url_to_fs(url)
        fs.invalidate_cache()  # instances are shared, and what was listed minutes ago may be history
    except ImportError as error:
        hint = " (pip install 'cxrfast[remote]')" if url.startswith("s3://") else ""
        raise ShardError(f"{url} needs a driver that is not installed: {error}{hint}") from error
    except ValueError as error:
        raise ShardError(
            f"{url} cannot be opened ({error}): give a folder, or a URL that fsspec knows (s3://, gs://, sftp://, zip://, …)"
        ) from error
    except Exception as error:  # drivers raise whatever they like
        raise ShardError(f"{url} cannot be opened ({reason(error)})") from error
    return (None, root) if isinstance(fs, LocalFileSystem) else (fs, root)


@contextmanager
def as_oserror(path: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ShardError):
        raise
    except Exception as error:
        raise OSError(errno.EIO, reason(error), path) from error


def reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
