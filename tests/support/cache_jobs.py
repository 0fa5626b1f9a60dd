"""Jobs of other processes on a cache. Light to import, since each process imports it."""

import os
import signal
from pathlib import Path
from threading import Barrier

import numpy as np

from cxrfast.pipelines.cache import PixelCache
from cxrfast.pipelines.decoder import Pixels
from cxrfast.pipelines.reader import Reader


def pixels_of(folder: Path, scale: int, size: int, cache: Path | None = None, rows: np.ndarray | None = None):
    """uint8 (N, size, size): pixels of `rows` (default: all), read twice: decoded, then from the cache if there is one."""
    with Reader(folder, scale) as reader:
        rows = reader.rows if rows is None else rows
        pixels = Pixels(reader, size, PixelCache(cache, reader, size) if cache else None)
        first, second = np.zeros((2, len(rows), size, size), np.uint8)
        pixels.put_all(rows, first)
        pixels.put_all(rows, second)
    assert np.array_equal(first, second)
    return first


def fill_together(folder: Path, cache: Path, seed: int, begin: Barrier) -> None:
    """Fill the cache in random order; fails unless every pixel is right."""
    expected = pixels_of(folder, 64, 48)
    begin.wait()
    for part in np.array_split(np.random.default_rng(seed).permutation(len(expected)), 10):
        assert np.array_equal(pixels_of(folder, 64, 48, cache, part), expected[part])


def killed_while_filling(folder: Path, cache: Path, row: int, written: float) -> None:
    """Fill in order, and die by SIGKILL when that fraction of the pixels of `row` is written."""
    write = os.pwrite

    def last_write(file: int, data: memoryview, offset: int) -> int:
        if offset == row * len(data.cast("B")):
            write(file, data.cast("B")[: int(written * data.nbytes)], offset)
            os.kill(os.getpid(), signal.SIGKILL)
        return write(file, data, offset)

    os.pwrite = last_write
    pixels_of(folder, 64, 48, cache)
