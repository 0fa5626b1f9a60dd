"""Cache of decoded pixels: one file per set, scale and size on a local disk, shared by all ranks of a machine.

The file is mapped for reading, which saves a copy, and written with `pwrite`, so that a full disk is an error and not
a signal. A row is valid once two checksums are stored: of the bytes it was decoded from, and of its pixels, which each
process checks at first use. So the file may be deleted, cut off by a crash or left over from another version at any time:
invalid rows are decoded again. The file must not be shortened while in use. Only its user may read it, and neither links
nor files of others are used, since anybody can guess its name.
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
from cxrfast.files import open_own
from cxrfast.pipelines.reader import Reader
from cxrfast.units import size as in_words


class PixelCache:
    """Pixels of a reader's rows at `size`, in `folder`; see the module.

    Raises LoadError if the folder cannot be used or has too little room for all rows.
    """

    def __init__(self, folder: Path | str, reader: Reader, size: int) -> None:
        self.size, self._source, self._file = size, reader.crc32, -1
        self._writing = threading.Lock()
        """Held while `_file` is used: once closed, its number may belong to another file."""
        images = len(reader.crc32)
        self.path = Path(folder) / f"{reader.info.id}-{reader.scale}-{size}.pixels"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open_own(self.path)
            needed = len(reader.rows) * size * size - os.fstat(self._file).st_blocks * 512
            free = shutil.disk_usage(self.path.parent).free
            if needed > free:
                raise LoadError(
                    f"the cache {self.path} needs {in_words(needed)} more and {self.path.parent} has {in_words(free)} free: "
                    "choose another folder, or train without a cache"
                )
            os.ftruncate(self._file, images * size * size)  # unwritten parts are holes
            with open(open_own(self.path.with_suffix(".sums"), os.O_APPEND), "ab+") as sums:
                os.posix_fallocate(sums.fileno(), 0, 8 * images)  # writing to a mapped hole on a full disk is a signal
                self._sums = np.frombuffer(mmap.mmap(sums.fileno(), 8 * images), np.uint32).reshape(images, 2)
            self._pixels = np.frombuffer(mmap.mmap(self._file, images * size * size, prot=mmap.PROT_READ), np.uint8)
            self._pixels = self._pixels.reshape(images, size, size)
        except OSError as error:
            raise LoadError(
                f"the cache {self.path} cannot be used ({_what(error)}): choose another folder, which only you write to"
            ) from error
        self._checked = np.zeros(images, bool)
        self._is_full = False

    def get(self, row: int) -> np.ndarray | None:
        """uint8 (size, size), read-only, in the page cache; None if the row is not cached yet."""
        if self._checked[row] or self._check(row):
            return self._pixels[row]
        return None

    def take(self, rows: np.ndarray, out: np.ndarray) -> bool:
        """Copy the pixels of `rows`, int64 (N,), to `out`, uint8 (N, size, size). If a row is not cached, do nothing: False."""
        if not (self._checked[rows].all() or all(self._check(row) for row in rows[~self._checked[rows]].tolist())):
            return False
        np.take(self._pixels, rows, axis=0, out=out, mode="clip")  # `raise`, the default, copies once more
        return True

    def has(self, rows: np.ndarray) -> np.ndarray:
        """bool (N,): which rows seem to be cached, by checksum; their pixels are not read."""
        return self._checked[rows] | (self._sums[rows, 0] == self._source[rows])

    def _check(self, row: int) -> bool:
        source, pixels = self._sums[row].tolist()
        is_right = source == self._source[row] and crc32(self._pixels[row]) == pixels
        self._checked[row] = is_right
        return is_right

    def put(self, row: int, image: np.ndarray) -> None:
        """Store `image`, uint8 (size, size), as the pixels of `row`. On a full disk, warn once and stop storing.

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
        self._sums[row] = self._source[row], crc32(data)  # after the pixels: they are valid from now on

    def close(self) -> None:
        """Close the file; pixels that were handed out stay valid."""
        with self._writing:
            if self._file >= 0:
                os.close(self._file)
                self._file = -1

    def __del__(self) -> None:
        self.close()


def _what(error: OSError) -> str:
    """What happened, and to which file if not to the cache's first one."""
    name = Path(str(error.filename or "")).name
    return f"{name} {error.strerror}" if name.endswith(".sums") else str(error.strerror)
