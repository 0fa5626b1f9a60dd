"""Decoded pixels of a set at one size, filled as rows are first decoded: one file on a local disk that all ranks of a
machine share.

Mapped for reading, so that what is kept costs no copy, and written with `pwrite`, so that a full disk is an error and not
a signal. A row counts once its checksums are there: of the bytes it was decoded from, and of its pixels, which are checked
when a process first uses them. So the file may be deleted, cut off by a crash or left from another version at any time:
rows that are not right are decoded again. Nobody may shorten it while it is used.
"""

import mmap
import os
import shutil
import threading
import warnings
from pathlib import Path

import numpy as np
from isal.isal_zlib import crc32

from cxrfast.errors import LoadError, is_disk_full
from cxrfast.pipelines.reader import Reader
from cxrfast.units import size as in_words


class PixelCache:
    """Pixels of the rows of a reader, resized to `size`, in `folder`; see the module.

    Raises LoadError where the folder cannot be used or has too little room for all rows.
    """

    def __init__(self, folder: Path | str, reader: Reader, size: int) -> None:
        self.size, self._source, self._file = size, reader.crc32, -1
        self._writing = threading.Lock()
        """Held while `_file` is used: a number that was given back may be another file's."""
        images = len(reader.crc32)
        self.path = Path(folder) / f"{reader.info.id}-{reader.scale}-{size}.pixels"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            self._make_room(images * size * size, len(reader.rows) * size * size)
            sums = os.open(self.path.with_suffix(".sums"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise LoadError(
                f"the cache {self.path} cannot be used ({error.strerror}): choose another folder"
            ) from error
        try:
            os.posix_fallocate(sums, 0, 8 * images)  # a mapped hole that finds the disk full would be a signal
            self._sums = np.frombuffer(mmap.mmap(sums, 8 * images), np.uint32).reshape(images, 2)
            self._pixels = np.frombuffer(mmap.mmap(self._file, images * size * size, prot=mmap.PROT_READ), np.uint8)
            self._pixels = self._pixels.reshape(images, size, size)
        except OSError as error:
            raise LoadError(
                f"the cache {self.path} cannot be used ({error.strerror}): choose another folder"
            ) from error
        finally:
            os.close(sums)
        self._checked = np.zeros(images, bool)
        self._is_full = False

    def _make_room(self, length: int, needed: int) -> None:
        folder = self.path.parent
        there, free = os.fstat(self._file).st_blocks * 512, shutil.disk_usage(folder).free
        if needed - there > free:
            raise LoadError(
                f"the cache {self.path} needs {in_words(needed - there)} more and {folder} has {in_words(free)} free: "
                "choose another folder, or train without a cache"
            )
        os.ftruncate(self._file, length)  # a hole where nothing was written yet

    def get(self, row: int) -> np.ndarray | None:
        """uint8 (size, size), read-only, in the page cache; None if it is not there yet."""
        if self._checked[row] or self._check(row):
            return self._pixels[row]
        return None

    def take(self, rows: np.ndarray, out: np.ndarray) -> bool:
        """Copy the pixels of `rows`, int64 (N,), to `out`, uint8 (N, size, size). False, and nothing done, if one is not there."""
        if not (self._checked[rows].all() or all(self._check(row) for row in rows[~self._checked[rows]].tolist())):
            return False
        np.take(self._pixels, rows, axis=0, out=out, mode="clip")  # `raise`, the default, copies once more
        return True

    def has(self, rows: np.ndarray) -> np.ndarray:
        """bool (N,): which of the rows seem to be there. Looks at no pixel."""
        return self._checked[rows] | (self._sums[rows, 0] == self._source[rows])

    def _check(self, row: int) -> bool:
        source, pixels = self._sums[row].tolist()
        is_right = source == self._source[row] and crc32(self._pixels[row]) == pixels
        self._checked[row] = is_right
        return is_right

    def put(self, row: int, image: np.ndarray) -> None:
        """Keep `image`, uint8 (size, size), as the pixels of `row`. On a full disk it warns once and keeps no more.

        Does nothing once the cache is closed.
        """
        data = np.ascontiguousarray(image)
        with self._writing:
            if self._is_full or self._file < 0:
                return
            try:
                written = os.pwrite(self._file, data.data, row * data.size)
            except OSError as error:
                if not is_disk_full(error):
                    raise LoadError(f"the cache {self.path} cannot be written ({error.strerror})") from error
                written = -1
            self._is_full = is_full = written != data.size
        if is_full:
            warnings.warn(f"the disk of the cache {self.path} is full: other rows are decoded again", stacklevel=2)
            return
        self._sums[row] = self._source[row], crc32(data)  # after the pixels: they count from now on

    def close(self) -> None:
        """Give the file back; pixels that were handed out stay valid."""
        with self._writing:
            if self._file >= 0:
                os.close(self._file)
                self._file = -1

    def __del__(self) -> None:
        self.close()
