"""A row number in, its JPEG bytes out: `preadv` from the tars of one scale, checked against the set's manifests.

Not mapped: a mapped tar that is cut short kills the process, and mapped pages count as resident. Safe to use from
threads, after a fork and, pickled, in spawned processes.
"""

import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from cxrfast.errors import LoadError, ShardError
from cxrfast.shards.manifest import built, read_manifest, read_set, scales_in, shard_path
from cxrfast.shards.tar import read_index

OPEN_FILES = 512
"""Tars kept open; those beyond are opened for each read."""


class Reader:
    """The images of one scale of a shard set.

    Raises LoadError where the scale is absent, and names the tar that is missing, cut short or of another set.
    """

    def __init__(self, folder: Path | str, scale: int) -> None:
        self.folder, self.scale = Path(folder), scale
        self.info = read_set(self.folder)
        shards = built(self.folder, scale)
        if not shards:
            there = ", ".join(map(str, scales_in(self.folder))) or "none"
            raise LoadError(
                f"{self.folder} holds no shards at {scale} px (scales there: {there}): "
                f"build them with `cxrfast shard --scale {scale}`"
            )
        self._tar = np.full(self.info.images, -1, np.int32)
        self._offset, self._size = np.zeros((2, self.info.images), np.int64)
        self._crc32 = np.zeros(self.info.images, np.uint32)
        for shard in shards:
            self._open_index(shard)
        self._files: dict[int, int] = {}

    def _open_index(self, shard: int) -> None:
        tar = shard_path(self.folder, self.scale, shard, "tar")
        try:
            manifest = read_manifest(self.folder, self.scale, shard)
            assert manifest is not None  # `built` lists manifests
            size = os.stat(tar).st_size
            index = np.array(read_index(self.folder, self.scale, shard), np.int64).reshape(-1, 3)
        except FileNotFoundError:
            raise LoadError(f"{tar} is missing: {self._advice}") from None
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
        self._crc32[rows] = manifest.crc32

    @property
    def _advice(self) -> str:
        return f"`cxrfast verify {self.folder}` says what is damaged"

    @property
    def rows(self) -> np.ndarray:
        """int64, ascending: rows that this scale holds (neither quarantined nor left for a later build)."""
        return np.flatnonzero(self._tar >= 0)

    @property
    def largest(self) -> int:
        """Bytes of the largest image."""
        return int(self._size.max())

    def read(self, row: int, buffer: bytearray | None = None) -> memoryview:
        """The JPEG bytes of `row`, in `buffer` if it is large enough (see `largest`).

        Raises LoadError naming row and tar if they are not the bytes that were written when the set was built.
        """
        if not 0 <= row < len(self._tar):
            raise LoadError(f"row {row} does not exist: {self.folder} has rows 0 to {len(self._tar) - 1:,}")
        shard, size = int(self._tar[row]), int(self._size[row])
        if shard < 0:
            raise LoadError(f"row {row} is not in {self.folder} at {self.scale} px: quarantined, or not built yet")
        view = memoryview(buffer if buffer is not None and len(buffer) >= size else bytearray(size))[:size]
        try:
            got = self._pread(shard, view, int(self._offset[row]))
        except OSError as error:
            raise LoadError(f"{self._path(shard)}, row {row}: {error.strerror}; {self._advice}") from error
        if got != size:
            raise LoadError(f"{self._path(shard)} ends inside row {row}: {self._advice}")
        if zlib.crc32(view) != self._crc32[row]:
            raise LoadError(f"{self._path(shard)}, row {row}: the image's bytes have changed; {self._advice}")
        return view

    def _pread(self, shard: int, view: memoryview, offset: int) -> int:
        descriptor = self._files.get(shard)
        if descriptor is not None:
            return os.preadv(descriptor, [view], offset)
        descriptor = os.open(self._path(shard), os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        try:
            return os.preadv(descriptor, [view], offset)
        finally:
            # setdefault is atomic: of two threads that open the same tar, one keeps its descriptor
            if len(self._files) >= OPEN_FILES or self._files.setdefault(shard, descriptor) != descriptor:
                os.close(descriptor)

    def _path(self, shard: int) -> Path:
        return shard_path(self.folder, self.scale, shard, "tar")

    def close(self) -> None:
        while self._files:
            os.close(self._files.popitem()[1])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}}

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
