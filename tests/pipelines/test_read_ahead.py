import ctypes
import mmap
import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from batches import plain, threads_of_ours
from damage import where
from hypothesis import given, settings
from hypothesis import strategies as st

from cxrfast.pipelines import read_ahead as module
from cxrfast.pipelines.decoder import Pixels
from cxrfast.pipelines.order import Work
from cxrfast.pipelines.read_ahead import read_ahead
from cxrfast.pipelines.reader import GAP, PIECE, Reader
from cxrfast.shards.build import build
from cxrfast.shards.format.names import shard_path
from cxrfast.shards.format.recipe import ImageRecipe


class Recorded:
    """Stands for Pixels and its reader: every row has `size` bytes; records the rows asked for."""

    def __init__(self, size: int) -> None:
        self.size, self.reader = size, self
        self.asked: list[int] = []

    def bytes_of(self, rows: np.ndarray) -> int:
        return len(rows) * self.size

    def advise(self, rows: np.ndarray) -> None:
        self.asked += rows.tolist()


def numbered(counts: list[int]) -> list[Work]:
    starts = np.cumsum([0, *counts])
    return [Work(np.arange(start, start + n)) for start, n in zip(starts, counts, strict=False)]


class AtOnce:
    """Stands for the helper thread: runs each task before it returns."""

    def __init__(self, *arguments, **options) -> None: ...

    def submit(self, do, *arguments) -> None:
        do(*arguments)

    def shutdown(self, **options) -> None: ...


@settings(max_examples=100)
@given(st.lists(st.integers(0, 40), max_size=40), st.sampled_from([0, 1, 10, 30, 1000]))
def test_work_passes_unchanged_and_in_order_every_row_is_asked_for_once_and_no_more_is_held_than_set_aside(
    counts, size
):
    pixels, work, passed = Recorded(size), numbered(counts), []

    def taken() -> Iterator[Work]:
        for n, item in enumerate(work):
            assert sum(map(len, (item.rows for item in work[len(passed) : n]))) * size <= 500
            yield item

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "AHEAD_BYTES", 500)
        patch.setattr(module, "ThreadPoolExecutor", AtOnce)
        for item in read_ahead(pixels, taken()):
            passed.append(item)
    assert len(passed) == len(work)
    assert all(a is b for a, b in zip(passed, work, strict=True))
    assert pixels.asked == list(range(sum(counts)))


def test_all_of_a_small_epoch_is_asked_for_before_its_second_half_is_used():
    pixels, work = Recorded(1), numbered([5] * 8)
    passing = read_ahead(pixels, work)
    next(passing)
    deadline = time.monotonic() + 60
    while len(pixels.asked) < 40 and time.monotonic() < deadline:
        time.sleep(0.001)
    assert pixels.asked == list(range(40))
    passing.close()


def test_stopping_half_way_leaves_no_thread(reader, monkeypatch):
    monkeypatch.setattr(module, "AHEAD_BYTES", 20_000)
    passing = read_ahead(Pixels(reader, 64), plain(reader.rows, 5))
    for _ in range(15):
        next(passing)
    assert threads_of_ours() == ["cxrfast-readahead_0"]
    passing.close()
    assert threads_of_ours() == []
    assert len(list(read_ahead(Pixels(reader, 64), plain(reader.rows, 5)))) == 30
    assert threads_of_ours() == []


def test_tars_that_are_missing_and_rows_that_this_scale_does_not_have_are_left_to_the_reader(folder):
    shard_path(folder, 64, 1, "json").unlink()
    with Reader(folder, 64) as reader:
        for shard in (0, 2):
            shard_path(folder, 64, shard, "tar").unlink()
        for rows in (np.arange(150), np.array([140]), np.array([], np.int64)):
            reader.advise(rows)
        assert len(list(read_ahead(Pixels(reader, 64), plain(np.arange(150), 5)))) == 30


# The page cache


def in_memory(path: Path) -> np.ndarray:
    """bool (pages,): which are in the page cache. By mincore: to try to read a page would bring it in."""
    with path.open("rb+") as file, mmap.mmap(file.fileno(), 0) as mapped:
        data = np.frombuffer(mapped, np.uint8)
        pages = np.zeros(-(-len(data) // mmap.PAGESIZE), np.uint8)
        arguments = ctypes.c_void_p(data.ctypes.data), ctypes.c_size_t(len(data)), ctypes.c_void_p(pages.ctypes.data)
        assert ctypes.CDLL(None, use_errno=True).mincore(*arguments) == 0
        del data
    return pages & 1 == 1


def drop(path: Path) -> None:
    """Out of the page cache; skips where that cannot be done, as on tmpfs."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if in_memory(path).any():
        pytest.skip("this file system keeps its pages")


def never_came(path: Path, pages: np.ndarray) -> list[int]:
    """Those of the pages that are not in memory after half a minute; returns as soon as all are."""
    deadline = time.monotonic() + 30
    while (missing := pages[~in_memory(path)[pages]].tolist()) and time.monotonic() < deadline:
        time.sleep(0.01)
    return missing


def pages_of(reader: Reader, rows: list[int]) -> np.ndarray:
    places = zip(reader._offset[rows].tolist(), reader._size[rows].tolist(), strict=True)
    return np.concatenate([np.arange(a // mmap.PAGESIZE, (a + n - 1) // mmap.PAGESIZE + 1) for a, n in places])


@pytest.fixture(scope="module")
def large_set(phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 phantoms at 512 px, raw: one tar of 17 MB, more than a device reads ahead at a time."""
    out = tmp_path_factory.mktemp("large") / "set"
    build(phantoms, out, [512], recipe=ImageRecipe(codec="raw"), limit=1, workers=1)
    return out


needs_advice = pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="no posix_fadvise")


@needs_advice
def test_advice_brings_rows_into_memory_not_those_far_from_them_and_all_of_a_tar_if_asked(large_set):
    tar = shard_path(large_set, 512, 0, "tar")
    drop(tar)
    with Reader(large_set, 512) as reader:
        rows = [3, 4, 40]
        reader.advise(np.array(rows))
        assert never_came(tar, pages_of(reader, rows)) == []
        assert reader.bytes_of(np.array([10])) > GAP
        assert not in_memory(tar)[pages_of(reader, [10, 20, 60])].any()
        reader.advise(np.random.default_rng(0).permutation(reader.rows))
        assert never_came(tar, pages_of(reader, reader.rows.tolist())) == []


@needs_advice
@settings(max_examples=30)
@given(st.lists(st.integers(0, 149), min_size=1, max_size=60, unique=True), st.sampled_from([0, 5_000, GAP]))
def test_advice_is_about_the_bytes_of_the_rows_and_of_small_gaps_between_them(tiny_set, rows, gap):
    asked: dict[str, np.ndarray] = {}

    def note(file: int, start: int, length: int, advice: int) -> None:
        assert advice == os.POSIX_FADV_WILLNEED
        assert 0 < length <= PIECE
        path = os.readlink(f"/proc/self/fd/{file}")
        asked.setdefault(path, np.zeros(os.stat(path).st_size, bool))[start : start + length] = True

    with Reader(tiny_set, 64) as reader, pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "posix_fadvise", note)
        patch.setattr(Reader, "_in_memory", lambda self, rows: False)
        patch.setattr("cxrfast.pipelines.reader.GAP", gap)
        reader.advise(np.array(rows))
    wanted: dict[str, list[tuple[int, int]]] = {}
    for row in rows:
        shard, offset, size = where(tiny_set, 64, row)
        wanted.setdefault(str(shard_path(tiny_set, 64, shard, "tar")), []).append((offset, offset + size))
    assert asked.keys() == wanted.keys()
    for path, spans in wanted.items():
        expected = np.zeros(len(asked[path]), bool)
        end = None
        for start, stop in sorted(spans):
            expected[end if end is not None and start - end <= gap else start : stop] = True
            end = stop
        np.testing.assert_array_equal(asked[path], expected)


def test_no_advice_is_given_about_rows_that_are_in_memory(reader, monkeypatch):
    given: list[tuple[int, ...]] = []
    for row in reader.rows.tolist():
        reader.read(row)
    if not hasattr(os, "RWF_NOWAIT") or not reader._in_memory(reader.rows):
        pytest.skip("this system cannot tell")
    monkeypatch.setattr(os, "posix_fadvise", lambda *arguments: given.append(arguments))
    reader.advise(reader.rows)
    assert given == []
