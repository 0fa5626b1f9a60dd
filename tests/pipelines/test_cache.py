import gc
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from batches import CPU, ENGINES, engine, equal, plain, turned
from cache_jobs import fill_together, killed_while_filling, pixels_of
from damage import copy_set, flip_bit, mounted, replace_image

from cxrfast.errors import LoadError
from cxrfast.pipelines.cache import PixelCache
from cxrfast.pipelines.decoder import Pixels
from cxrfast.pipelines.host import HostEngine
from cxrfast.pipelines.loader import Loader
from cxrfast.pipelines.order import EvalOrder, Work
from cxrfast.pipelines.reader import Reader
from cxrfast.shards.images.decode import encode

ROWS = np.arange(150)
SPAWN = multiprocessing.get_context("spawn")


class Unread(Reader):
    """One whose rows must not be read."""

    def read(self, row, buffer=None):
        raise AssertionError(f"row {row} was read")

    read_pixels = read


def run(reader: Reader, work: list[Work], cache: Path | None, size: int = 64, name: str = "host") -> list[torch.Tensor]:
    made = engine(name, reader, size, cache=cache)
    try:
        return list(made.batches(work))
    finally:
        made.close()


def only(folder: Path, kind: str) -> Path:
    """The only file of that kind in a cache."""
    (path,) = folder.glob(f"*.{kind}")
    return path


@pytest.fixture
def expected(tiny_set: Path) -> np.ndarray:
    return pixels_of(tiny_set, 64, 48)


@pytest.fixture
def filled(tiny_set: Path, tmp_path: Path) -> Path:
    """A cache that holds all of the tiny set of 64 px at 48."""
    pixels_of(tiny_set, 64, 48, tmp_path / "cache")
    return tmp_path / "cache"


# The same pixels


@pytest.mark.parametrize(("size", "draw"), [(64, plain), (48, plain), (64, turned), (16, turned)])
def test_pixels_are_the_same_without_a_cache_and_with_a_cold_a_half_full_and_a_full_one(
    either_set, tmp_path, size, draw
):
    work = draw(ROWS, 16)
    with Reader(either_set, 64) as reader, Unread(either_set, 64) as unread:
        without = run(reader, work, None, size)
        cold = run(reader, work, tmp_path / "cold", size)
        full = run(unread, work, tmp_path / "cold", size)
        run(reader, work[::2], tmp_path / "half", size)
        half = run(reader, work, tmp_path / "half", size)
    assert all(equal(without, other) for other in (cold, full, half))


@pytest.mark.parametrize("size", [64, 48])
def test_of_a_batch_that_is_there_in_part_only_the_rest_is_read_and_read_ahead(either_set, tmp_path, size):
    found, asked = [], []

    class Noted(Reader):
        def _find(self, row):
            found.append(row)
            return super()._find(row)

        def advise(self, rows):
            asked.extend(rows.tolist())

    with Reader(either_set, 64) as reader, Noted(either_set, 64) as noted:
        run(reader, plain(ROWS[::3], 10), tmp_path, size)
        out = np.zeros((150, size, size), np.uint8)
        pixels = Pixels(noted, size, PixelCache(tmp_path, noted, size))
        pixels.advise(ROWS)
        pixels.put_all(ROWS, out)
        np.testing.assert_array_equal(out, pixels_of(either_set, 64, size))
    assert found == asked == [row for row in range(150) if row % 3]


@pytest.mark.parametrize("name", ENGINES)
def test_a_full_cache_is_used_whatever_engine_filled_it(either_set, tmp_path, name):
    other = {"dali": "host", "host": "dali"}[name]
    with Reader(either_set, 64) as reader, Unread(either_set, 64) as unread:
        run(reader, plain(ROWS, 40), tmp_path, name=other)
        assert equal(run(unread, plain(ROWS, 40), tmp_path, name=name), run(reader, plain(ROWS, 40), None))


# Other sizes, scales and sets


def test_every_set_scale_and_size_has_a_file_of_its_own(tiny_set, raw_set, tmp_path):
    wanted = [(folder, scale, size) for folder in (tiny_set, raw_set) for scale in (32, 64) for size in (16, 32)]
    for _ in ("cold", "full"):
        for folder, scale, size in wanted:
            np.testing.assert_array_equal(pixels_of(folder, scale, size, tmp_path), pixels_of(folder, scale, size))
    names = [f"{Reader(folder, 64).info.id}-{scale}-{size}" for folder, scale, size in wanted]
    assert {path.name for path in tmp_path.iterdir()} == {f"{n}.{kind}" for n in names for kind in ("pixels", "sums")}


def test_another_image_under_the_same_row_is_decoded_again(tiny_set, tmp_path, filled, expected):
    """As after a repair: the id of the set is the same, the checksum of the row is not."""
    changed = copy_set(tiny_set, tmp_path / "set")
    replace_image(changed, 64, 70, encode(np.full((64, 64), 99, np.uint8), 95))
    other = pixels_of(changed, 64, 48)
    assert (other[70] == 99).all()
    np.testing.assert_array_equal(pixels_of(changed, 64, 48, filled), other)
    np.testing.assert_array_equal(pixels_of(tiny_set, 64, 48, filled), expected)


# Damage


def flipped(path: Path) -> None:
    for row in (0, 70, 149):
        flip_bit(path, row * path.stat().st_size // 150 + 5, 0x80)


def truncated(length: int) -> Callable[[Path], None]:
    return lambda path: os.truncate(path, length)


def nonsense(path: Path) -> None:
    path.write_bytes(np.random.default_rng(0).bytes(path.stat().st_size))


def half_written(path: Path) -> None:
    """Zeros in every second word: checksums that a crash left without their second half, and without their pixels."""
    data = np.fromfile(path, np.uint32)
    data[1::4] = 0
    data.tofile(path)
    if path.suffix == ".sums":
        os.truncate(path.with_suffix(".pixels"), 0)


@pytest.mark.parametrize("kind", ["pixels", "sums"])
@pytest.mark.parametrize(
    "damage", [flipped, half_written, *map(truncated, (0, 1, 600, 1199, 10**6)), Path.unlink, nonsense]
)
def test_a_file_that_is_damaged_cut_short_or_gone_costs_only_time_and_is_filled_again(
    tiny_set, filled, expected, kind, damage
):
    damage(only(filled, kind))
    np.testing.assert_array_equal(pixels_of(tiny_set, 64, 48, filled), expected)
    with Unread(tiny_set, 64) as reader:
        cache = PixelCache(filled, reader, 48)
        assert all(np.array_equal(cache.get(row), expected[row]) for row in range(150))


@pytest.mark.parametrize("draw", [plain, turned])
@pytest.mark.parametrize("name", ENGINES)
def test_both_files_may_be_deleted_while_an_engine_runs(reader, tmp_path, name, draw):
    work = draw(ROWS, 10)
    expected = run(reader, work, tmp_path / "other", name=name)
    used = engine(name, reader, cache=tmp_path / "cache")
    running = used.batches(work)
    got = [next(running)]
    shutil.rmtree(tmp_path / "cache")
    assert equal([*got, *running], expected)
    assert equal(used.batches(work), expected), "and in the next epoch"
    assert equal(run(reader, work, tmp_path / "cache", name=name), expected), "and by another engine"
    used.close()


def test_a_row_that_cannot_be_read_is_named_and_not_kept(folder, tmp_path):
    replace_image(folder, 64, 70, b"no picture")
    with Reader(folder, 64) as reader:
        for _ in ("cold", "others are there"):
            with pytest.raises(LoadError, match=f"row 70 of {folder} at 64 px does not decode"):
                run(reader, plain(ROWS, 10), tmp_path / "cache")
        assert PixelCache(tmp_path / "cache", reader, 64).get(70) is None


# Processes


@pytest.mark.slow
def test_two_processes_fill_one_cache_at_once_and_both_have_the_right_pixels(tiny_set, tmp_path, expected):
    begin = SPAWN.Barrier(2)
    jobs = [SPAWN.Process(target=fill_together, args=(tiny_set, tmp_path, seed, begin)) for seed in (1, 2)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    assert [job.exitcode for job in jobs] == [0, 0]
    with Unread(tiny_set, 64) as reader:
        cache = PixelCache(tmp_path, reader, 48)
        assert all(np.array_equal(cache.get(row), expected[row]) for row in range(150))


@pytest.mark.slow
@pytest.mark.parametrize("written", [0.5, 1])
def test_after_a_kill_in_the_middle_of_a_row_what_was_whole_is_used_and_the_rest_is_decoded(
    tiny_set, tmp_path, expected, written
):
    job = SPAWN.Process(target=killed_while_filling, args=(tiny_set, tmp_path, 70, written))
    job.start()
    job.join()
    assert job.exitcode == -signal.SIGKILL
    with Unread(tiny_set, 64) as reader:
        there = [row for row in range(150) if PixelCache(tmp_path, reader, 48).get(row) is not None]
    assert there == list(range(70))
    np.testing.assert_array_equal(pixels_of(tiny_set, 64, 48, tmp_path), expected)


# Folders that cannot be used, disks that are full


def test_a_folder_that_cannot_be_written_to_is_named(tiny_set, tmp_path):
    (tmp_path / "file").touch()
    with Reader(tiny_set, 64) as reader, mounted(tmp_path / "disk", "ro,size=8m") as disk:
        for folder in (disk, disk / "below", tmp_path / "file"):
            with pytest.raises(LoadError, match=rf"the cache {folder}/.*cannot be used.*choose another folder"):
                PixelCache(folder, reader, 64)
            with pytest.raises(LoadError, match=str(folder)):
                Loader(reader, EvalOrder(rows=ROWS, micro_batch=10), cache=folder)


def test_a_disk_with_too_little_room_is_named_when_the_cache_is_opened(tiny_set, tmp_path):
    with Reader(tiny_set, 64) as reader, mounted(tmp_path / "disk", "size=256k") as disk:
        with pytest.raises(LoadError, match=rf"needs .* more and {disk} has .* free: choose another folder"):
            PixelCache(disk, reader, 64)
        assert PixelCache(disk, reader, 32).get(0) is None, "a smaller size fits"


def test_a_disk_that_has_no_room_for_the_checksums_is_named(tiny_set, tmp_path):
    with Reader(tiny_set, 64) as reader, mounted(tmp_path / "disk", "size=600k") as disk:
        (disk / f"{reader.info.id}-64-64.pixels").write_bytes(b"x" * 150 * 64 * 64)
        with pytest.raises(LoadError, match=rf"{disk}/.* cannot be used \(No space left on device\)"):
            PixelCache(disk, reader, 64)


@pytest.mark.parametrize("name", ENGINES)
def test_a_disk_that_fills_up_is_warned_of_once_and_the_pixels_are_right(tiny_set, tmp_path, name):
    work = plain(ROWS, 10)
    with (
        Reader(tiny_set, 64) as reader,
        Unread(tiny_set, 64) as unread,
        mounted(tmp_path / "disk", "size=1m") as disk,
    ):
        expected = run(reader, work, None)
        used = engine(name, reader, cache=disk)
        taken = disk / "of another program"
        taken.write_bytes(b"x" * 700 * 1024)
        with pytest.warns(UserWarning, match=rf"the disk of the cache {disk}/.* is full") as warned:
            assert equal(used.batches(work), expected)
        assert len(warned) == 1
        assert equal(used.batches(work), expected), "without a warning, which would be an error, in the next epoch"
        used.close()
        taken.unlink()
        assert equal(run(reader, work, disk), expected), "and then there is room"
        assert equal(run(unread, work, disk), expected)


# Other users


@pytest.mark.parametrize("kind", ["pixels", "sums"])
def test_a_link_with_the_name_of_the_cache_is_refused_and_its_target_stays(tiny_set, tmp_path, kind):
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    with Reader(tiny_set, 64) as reader:
        name = f"{reader.info.id}-64-48.{kind}"
        shared = tmp_path / "shared"
        shared.mkdir()
        (shared / name).symlink_to(victim)
        with pytest.raises(
            LoadError, match=r"cannot be used .*is a link, which another user may have put there.*choose another"
        ):
            PixelCache(shared, reader, 48)
        (shared / name).unlink()
        os.mkfifo(shared / name)
        with pytest.raises(LoadError, match=r"cannot be used .*is not a regular file"):
            PixelCache(shared, reader, 48)
    assert victim.read_bytes() == b"precious"


def test_nobody_else_may_read_the_pixels_of_a_cache(filled):
    assert {path.stat().st_mode & 0o777 for path in filled.iterdir()} == {0o600}


# Closing


def open_files() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="no /proc")
def test_files_are_given_back_when_a_cache_is_closed_dropped_or_refused(reader, tmp_path):
    list(HostEngine(reader, 64, CPU, 1).batches(plain(ROWS, 50)))  # opens the tars
    before = open_files()
    cache = PixelCache(tmp_path, reader, 64)
    cache.close()
    cache.close()
    PixelCache(tmp_path, reader, 48)
    (tmp_path / f"{reader.info.id}-64-32.sums").mkdir()
    with pytest.raises(LoadError):
        PixelCache(tmp_path, reader, 32)
    del cache
    assert open_files() == before


def test_pixels_that_were_handed_out_outlive_the_cache_and_nothing_is_written_after_its_end(
    reader, filled, expected, tmp_path
):
    cache = PixelCache(filled, reader, 48)
    first = cache.get(0)
    cache.close()
    with (tmp_path / "other").open("wb+") as other:  # has the number of the closed file
        cache.put(1, np.zeros((48, 48), np.uint8))
        assert os.fstat(other.fileno()).st_size == 0
    np.testing.assert_array_equal(first, expected[0])
    np.testing.assert_array_equal(cache.get(1), expected[1])
    with pytest.raises(ValueError, match="read-only"):
        first[0, 0] = 1
