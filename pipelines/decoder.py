"""A row number in, its grey pixels at one size out, on the CPU: from a JPEG, a raw image or the cache."""

import threading

import numpy as np
import simplejpeg

from cxrfast.errors import LoadError
from cxrfast.pipelines.cache import PixelCache
from cxrfast.pipelines.reader import Reader
from cxrfast.shards.images.resize import resize


def reduction(stored: int, size: int) -> int:
    """1, 2, 4 or 8: the largest factor that a decoder can shrink a JPEG of side `stored` by, to a multiple of `size`.

    A JPEG's blocks of 8 × 8 coefficients can be transformed to 4 × 4, 2 × 2 or 1 pixel. If the result is a multiple of
    `size`, 99.99 % of the pixels are within 1 grey level of decoding in full and averaging, none beyond 4, in 0.64 to 0.82
    of the time; otherwise they differ by up to 27, and no time is saved.
    """
    return max(factor for factor in (1, 2, 4, 8) if factor == 1 or stored % (factor * size) == 0)


class Pixels:
    """The rows of `reader` as uint8 (size, size). Thread-safe: each thread has its own buffers.

    Images are decoded at the size that `reduction` allows, then averaged down or enlarged to `size` as in sharding.
    """

    def __init__(self, reader: Reader, size: int, cache: PixelCache | None = None) -> None:
        self.reader, self.size, self.cache = reader, size, cache
        factor = reduction(reader.scale, size) if not reader.is_raw else 1
        self._side = reader.scale // factor
        """Side of the decoded image, px."""
        self._scaled = {"min_height": self._side, "min_width": self._side, "min_factor": factor} if factor > 1 else {}
        self._own = _Own(self._side, size, reader.largest)

    def get(self, row: int) -> np.ndarray:
        """uint8 (size, size), read-only and valid until the same thread's next call.

        Raises LoadError naming the row that cannot be read or decoded.
        """
        if self.cache and (kept := self.cache.get(row)) is not None:
            # warping pixels that are not in the processor's cache takes longer than this copy
            np.copyto(self._own.kept, kept)
            return self._own.kept
        return self._make(row, self._own.image)

    def put(self, row: int, out: np.ndarray) -> None:
        """Write the pixels of `row` into `out`, uint8 (size, size), contiguous. Raises as `get` does."""
        if self.cache and (kept := self.cache.get(row)) is not None:
            out[...] = kept
        elif self._side != self.size:
            out[...] = self.get(row)
        else:
            self._make(row, out)

    def put_all(self, rows: np.ndarray, out: np.ndarray) -> None:
        """`put` for rows int64 (N,) and `out` uint8 (N, size, size)."""
        if not (self.cache and self.cache.take(rows, out)):
            for row, image in zip(rows.tolist(), out, strict=True):
                self.put(row, image)

    def advise(self, rows: np.ndarray) -> None:
        """Ask the system to read `rows` ahead, except those in the cache."""
        if self.cache:
            rows = rows[~self.cache.has(rows)]
        if len(rows):
            self.reader.advise(rows)

    def _make(self, row: int, decoded: np.ndarray) -> np.ndarray:
        """Decode into `decoded`, resize into another array if needed, and fill the cache."""
        if self.reader.is_raw:
            self.reader.read_pixels(row, decoded)
        else:
            self._decode(row, decoded)
        image = resize(decoded, self.size, self.size)
        if self.cache:
            self.cache.put(row, image)
        return image

    def _decode(self, row: int, out: np.ndarray) -> None:
        data = self.reader.read(row, self._own.jpeg)
        try:
            if self._scaled:
                self._check_size(row, data)
            image = simplejpeg.decode_jpeg(data, "GRAY", buffer=out, **self._scaled)
            if image.shape[:2] != out.shape:
                self._check_size(row, data)
        except ValueError as error:
            self._check_size(row, data)  # a larger image does not fit into `out`
            raise LoadError(f"{self._where(row)} does not decode: {error}") from error

    def _check_size(self, row: int, data: memoryview) -> None:
        """Raise LoadError unless the JPEG `data` has the stored size."""
        try:
            height, width = simplejpeg.decode_jpeg_header(data)[:2]
        except ValueError as error:
            raise LoadError(f"{self._where(row)} does not decode: {error}") from error
        if (height, width) != (self.reader.scale, self.reader.scale):
            raise LoadError(f"{self._where(row)} has {width} × {height} px")

    def _where(self, row: int) -> str:
        return f"row {row} of {self.reader.folder} at {self.reader.scale} px"


class _Own(threading.local):
    """Buffers of a thread."""

    def __init__(self, side: int, size: int, bytes_: int) -> None:
        self.image, self.kept = np.empty((side, side), np.uint8), np.empty((size, size), np.uint8)
        self.jpeg = bytearray(bytes_)
