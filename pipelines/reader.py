"""A row number in, its bytes out: `preadv` from the tars of one scale, checked against the set's manifests.

The tars are not mapped: a mapped tar that is cut short kills the process, and mapped pages count as resident. Readers may
be used from threads, after a fork and, pickled, in spawned processes.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from isal.isal_zlib import crc32  # ten times as fast as zlib's, the same values

from cxrfast.errors import LoadError, ShardError
from cxrfast.files import open_file
from cxrfast.shards.format.codec import pgm_header
from cxrfast.shards.format.tar import read_index
from cxrfast.shards.images.cell_means import SIDE, unpack
from cxrfast.shards.shard_set import ShardSet

OPEN_FILES = 512
"""Tars kept open; further ones are opened for each read."""

GAP = 64 * 1024
"""Rows of a tar that are at most this many bytes apart are read ahead in one request."""

PIECE = 128 * 1024
"""Bytes per read-ahead request: Linux cuts a longer one down to the device's readahead window."""

PROBES = 4
"""Rows of a batch that are probed to see whether it is in memory already."""


class Reader:
    """The images of one scale of a shard set.

    Raises LoadError if the scale is absent, or a tar is missing, cut short or from another set.
    """

    def __init__(self, folder: Path | str, scale: int) -> None:
        self.shard_set, self.scale = ShardSet(folder), scale
        self.folder, self.info = self.shard_set.folder, self.shard_set.info
        self.is_raw = self.info.codec == "raw"
        """True if images are stored as pixels, not as JPEGs."""
        self._advice = f"`cxrfast verify {self.folder}` lists the damage"
        shards = self.shard_set.shards(scale)
        if not shards:
            there = ", ".join(map(str, self.shard_set.scales)) or "none"
            raise LoadError(
                f"{self.folder} holds no shards at {scale} px (scales there: {there}): "
                f"build them with `cxrfast shard --scale {scale}`"
            )
        self._tar = np.full(self.info.images, -1, np.int32)
        self._offset, self._size = np.zeros((2, self.info.images), np.int64)
        self.crc32 = np.zeros(self.info.images, np.uint32)
        """uint32 (images,): checksum of each row's bytes; 0 for rows that this scale does not have."""
        self.grids = np.full((self.info.images, SIDE, SIDE), -1, np.int16)
        """int16 (images, 4, 4): see `grid`; -1 for rows that this scale does not have and in shards without grids."""
        for shard in shards:
            self._open_index(shard)
        self.largest = int(self._size.max())
        """Bytes of the largest image."""
        self._header = pgm_header(scale, scale)
        self._files: dict[int, int] = {}

    def _open_index(self, shard: int) -> None:
        tar = self.shard_set.path(self.scale, shard)
        try:
            manifest = self.shard_set.manifest(self.scale, shard)
            assert manifest is not None  # `built` lists manifests
            size = os.stat(tar).st_size
            index = np.array(read_index(self.folder, self.scale, shard), np.int64).reshape(-1, 3)
        except FileNotFoundError:
            raise LoadError(f"{tar} is missing: {self._advice}") from None
        except OSError as error:
            raise LoadError(f"{error.filename} cannot be read ({error.strerror}): {self._advice}") from error
        except ShardError as error:
            raise LoadError(str(error)) from error
        if manifest.set != self.info.id:
            raise LoadError(f"{tar} belongs to another set: {self._advice}")
        if size != manifest.bytes:
            raise LoadError(f"{tar} has {size:,} bytes, its manifest says {manifest.bytes:,}: {self._advice}")
        rows, offsets, sizes = index.T
        if rows.tolist() != manifest.rows or (len(rows) and (offsets + sizes).max() > size):
            raise LoadError(f"the index of {tar} belongs to another tar: {self._advice}")
        self._tar[rows], self._offset[rows], self._size[rows] = shard, offsets, sizes
        self.crc32[rows] = manifest.crc32
        if manifest.grids:
            self.grids[rows] = unpack(manifest.grids, len(rows))

    @property
    def rows(self) -> np.ndarray:
        """int64, ascending: rows that this scale has (neither quarantined nor still to be built)."""
        return np.flatnonzero(self._tar >= 0)

    def bytes_of(self, rows: np.ndarray) -> int:
        """Total bytes of the images of `rows`. Raises LoadError for row numbers out of range."""
        if len(rows) and not 0 <= rows.min() <= rows.max() < len(self._tar):
            self._find(int(rows.min()))
            self._find(int(rows.max()))
        return int(self._size[rows].sum())

    def read(self, row: int, buffer: bytearray | None = None) -> memoryview:
        """Bytes of the image of `row`, read into `buffer` if it is large enough (see `largest`).

        Raises LoadError naming row and tar if they differ from the bytes written when the set was built.
        """
        shard, size = self._find(row)
        view = memoryview(buffer if buffer is not None and len(buffer) >= size else bytearray(size))[:size]
        self._check(row, shard, self._pread(row, shard, [view]), size, crc32(view))
        return view

    def read_pixels(self, row: int, out: np.ndarray) -> None:
        """Read the pixels of `row` of a raw set into `out`, uint8 (scale, scale), contiguous. Raises LoadError like `read`."""
        shard, size = self._find(row)
        header, pixels = bytearray(len(self._header)), out.data.cast("B")
        fits = size == len(header) + len(pixels)
        if fits:
            self._check(row, shard, self._pread(row, shard, [header, pixels]), size, crc32(pixels, crc32(header)))
        if not fits or header != self._header:
            raise LoadError(f"{self._path(shard)}, row {row} is not a raw image of {self.scale} px: {self._advice}")

    def _find(self, row: int) -> tuple[int, int]:
        """Shard and size in bytes. Raises LoadError for a row that does not exist or is not in this scale."""
        if not 0 <= row < len(self._tar):
            raise LoadError(f"row {row} does not exist: {self.folder} has rows 0 to {len(self._tar) - 1:,}")
        shard = int(self._tar[row])
        if shard < 0:
            raise LoadError(f"row {row} is not in {self.folder} at {self.scale} px: quarantined, or not built yet")
        return shard, int(self._size[row])

    def _pread(self, row: int, shard: int, into: list[Any]) -> int:
        try:
            if (descriptor := self._files.get(shard)) is not None:
                return os.preadv(descriptor, into, int(self._offset[row]))
            with self._opened(shard) as descriptor:
                return os.preadv(descriptor, into, int(self._offset[row]))
        except OSError as error:
            raise LoadError(f"{self._path(shard)}, row {row}: {error.strerror}; {self._advice}") from error

    def _check(self, row: int, shard: int, got: int, size: int, crc: int) -> None:
        if got < size:
            raise LoadError(f"{self._path(shard)} ends inside row {row}: {self._advice}")
        if crc != self.crc32[row]:
            raise LoadError(f"{self._path(shard)}, row {row}: the image's bytes have changed; {self._advice}")

    @contextmanager
    def _opened(self, shard: int) -> Iterator[int]:
        descriptor = self._files.get(shard)
        if descriptor is not None:
            yield descriptor
            return
        descriptor = open_file(self._path(shard))
        try:
            yield descriptor
        finally:
            # setdefault is atomic: of two threads that open the same tar, one keeps its descriptor
            if len(self._files) >= OPEN_FILES or self._files.setdefault(shard, descriptor) != descriptor:
                os.close(descriptor)

    def _path(self, shard: int) -> Path:
        return self.shard_set.path(self.scale, shard)

    # Reading ahead

    def advise(self, rows: np.ndarray) -> None:
        """Ask the system to read the images of `rows` ahead; rows close to each other in a tar in one request.

        Does nothing if they seem to be in memory, or on systems without such advice. Never raises OSError: reading the
        rows will.
        """
        if not hasattr(os, "posix_fadvise") or self._in_memory(rows[:: max(1, len(rows) // PROBES)]):
            return
        order = np.lexsort((self._offset[rows], self._tar[rows]))
        shards, starts = self._tar[rows][order], self._offset[rows][order]
        ends = starts + self._size[rows][order]
        cuts = np.flatnonzero((np.diff(shards) != 0) | (starts[1:] - ends[:-1] > GAP)) + 1
        firsts, lasts = np.r_[0, cuts], np.r_[cuts, len(rows)] - 1
        for shard, start, end in zip(
            shards[firsts].tolist(), starts[firsts].tolist(), ends[lasts].tolist(), strict=True
        ):
            try:
                with self._opened(shard) as descriptor:
                    for piece in range(start - start % PIECE, end, PIECE):
                        first = max(start, piece)
                        os.posix_fadvise(descriptor, first, min(end, piece + PIECE) - first, os.POSIX_FADV_WILLNEED)
            except OSError:
                continue

    def _in_memory(self, rows: np.ndarray) -> bool:
        """True if the last byte of each row is in the page cache; False if the system cannot tell."""
        if not hasattr(os, "RWF_NOWAIT"):
            return False
        byte = [bytearray(1)]
        try:
            for row in rows.tolist():
                shard, size = self._find(row)
                with self._opened(shard) as descriptor:
                    os.preadv(descriptor, byte, int(self._offset[row]) + size - 1, os.RWF_NOWAIT)
        except (OSError, LoadError):  # BlockingIOError where it is not
            return False
        return True

    def close(self) -> None:
        while self._files:
            os.close(self._files.popitem()[1])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}}

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
