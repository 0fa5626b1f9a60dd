import json
import multiprocessing
import os
import pickle
import shutil
import sys
import tarfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import numpy as np
import pytest
import torch
from batches import ENGINES, assert_agree, equal, threads_of_ours
from damage import flip_bit, replace_image, where

from cxrfast.errors import LoadError
from cxrfast.pipelines import reader as module
from cxrfast.pipelines.loader import Loader
from cxrfast.pipelines.order import Augment, EvalOrder
from cxrfast.pipelines.reader import Reader
from cxrfast.shards.format.names import shard_path


def by_tarfile(folder: Path, scale: int) -> dict[int, bytes]:
    images = {}
    for path in sorted((folder / str(scale)).glob("*.tar")):
        with tarfile.open(path) as tar:
            images.update({int(m.name[:9]): tar.extractfile(m).read() for m in tar if not m.name.endswith(".json")})
    return images


def read_all(reader: Reader) -> dict[int, bytes]:
    """Runs in other processes too."""
    return {int(row): bytes(reader.read(int(row))) for row in reader.rows}


@pytest.mark.parametrize("scale", [32, 64])
def test_rows_are_the_bytes_that_tarfile_reads_in_a_buffer_that_is_large_enough(either_set, scale):
    with Reader(str(either_set), scale) as reader:
        assert reader.rows.dtype == np.int64
        assert reader.rows.tolist() == list(range(150))
        expected = by_tarfile(either_set, scale)
        assert read_all(reader) == expected
        assert reader.largest == max(map(len, expected.values()))
        large, small = bytearray(reader.largest), bytearray(4)
        view = reader.read(3, large)
        assert view.obj is large
        assert bytes(view) == bytes(reader.read(3)) == bytes(reader.read(3, small)) == bytes(large[: len(view)])


def test_many_threads_read_the_right_rows(tiny_set, monkeypatch):
    monkeypatch.setattr(module, "OPEN_FILES", 2)  # of three tars: one is opened for every read
    expected = by_tarfile(tiny_set, 64)
    files = Path("/proc/self/fd")
    before = len(os.listdir(files)) if files.exists() else 0
    rows = np.random.default_rng(0).integers(150, size=3000).tolist()
    with Reader(tiny_set, 64) as reader, ThreadPoolExecutor(8) as pool:
        assert all(pool.map(lambda row: bytes(reader.read(row)) == expected[row], rows))
    assert len(os.listdir(files) if before else []) == before, "every tar is closed again"


def read_after_fork(reader: Reader, expected: dict[int, bytes], seed: int, begin: Barrier) -> None:
    begin.wait()
    for row in np.random.default_rng(seed).integers(len(expected), size=600).tolist():
        if bytes(reader.read(row)) != expected[row]:
            sys.exit(1)


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_reader_in_use_goes_through_a_fork_and_all_processes_read_the_right_rows_at_once(either_reader):
    fork = multiprocessing.get_context("fork")
    begin = fork.Barrier(4)
    expected = read_all(either_reader)  # its tars are open, shared with the children
    children = [fork.Process(target=read_after_fork, args=(either_reader, expected, seed, begin)) for seed in range(3)]
    for child in children:
        child.start()
    read_after_fork(either_reader, expected, 3, begin)
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0, 0, 0]
    assert read_all(either_reader) == expected, "the children's files were theirs to close"


def test_a_copy_does_not_share_open_files(tiny_set):
    with Reader(tiny_set, 32) as reader:
        first = bytes(reader.read(0))
        copy = pickle.loads(pickle.dumps(reader))
    assert bytes(copy.read(0)) == first
    copy.close()


@pytest.mark.slow
def test_a_reader_goes_to_a_spawned_process(tiny_set):
    with Reader(tiny_set, 32) as reader:
        reader.read(0)
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            assert pool.submit(read_all, reader).result() == by_tarfile(tiny_set, 32)


def test_any_single_flipped_bit_in_an_image_is_refused_and_row_and_tar_are_named(folder):
    rng = np.random.default_rng(0)
    with Reader(folder, 64) as reader:
        for row in rng.choice(150, 20, replace=False).tolist():
            shard, offset, size = where(folder, 64, row)
            tar = shard_path(folder, 64, shard, "tar")
            flip_bit(tar, offset + int(rng.integers(size)), 1 << int(rng.integers(8)))
            with pytest.raises(LoadError, match=rf"{tar}, row {row}: the image's bytes have changed"):
                reader.read(row)


def test_a_scale_that_is_not_there_is_refused_and_those_there_are_named(tiny_set):
    with pytest.raises(LoadError, match=r"no shards at 128 px \(scales there: 32, 64\).*cxrfast shard --scale 128"):
        Reader(tiny_set, 128)


def resize(by: int) -> Callable[[Path], None]:
    return lambda path: os.truncate(path, path.stat().st_size + by)


def take_index_of_another(path: Path) -> None:
    shutil.copy(path.with_name("000000.idx"), path)


def take_another_set(path: Path) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), "set": "0" * 32}))


@pytest.mark.parametrize(
    ("kind", "spoil", "says"),
    [
        ("tar", Path.unlink, "000001.tar is missing: `cxrfast verify"),
        ("tar", resize(-1), r"000001.tar has [\d,]+ bytes, its manifest says [\d,]+: `cxrfast verify"),
        ("tar", resize(1), r"000001.tar has [\d,]+ bytes, its manifest says [\d,]+"),
        ("idx", Path.unlink, "000001.idx is missing"),
        ("idx", lambda path: path.write_text("v1.2 1\n"), "000001.idx is damaged"),
        ("idx", take_index_of_another, "the index of .*64/000001.tar belongs to another tar"),
        ("json", take_another_set, "64/000001.tar belongs to another set"),
        ("json", lambda path: path.write_text("{"), "000001.json is damaged"),
    ],
)
def test_a_file_that_does_not_fit_is_named_when_the_set_is_opened(folder, kind, spoil, says):
    spoil(shard_path(folder, 64, 1, kind))
    with pytest.raises(LoadError, match=says):
        Reader(folder, 64)


def test_with_the_index_of_another_set_no_row_is_taken_for_another(either_set, either_copy):
    """One that has the same rows, so that it is not noticed before they are read."""
    shutil.copy(shard_path(either_copy, 32, 1, "idx"), shard_path(either_copy, 64, 1, "idx"))
    with Reader(either_copy, 64) as reader, Reader(either_set, 64) as whole:
        out = np.zeros((64, 64), np.uint8)
        for row in range(64, 128):
            with pytest.raises(LoadError, match=rf"64/000001.tar, row {row}: the image's bytes have changed"):
                reader.read(row)
            if reader.is_raw:
                with pytest.raises(LoadError, match=rf"64/000001.tar, row {row} is not a raw image of 64 px"):
                    reader.read_pixels(row, out)
        assert all(reader.read(row) == whole.read(row) for row in [*range(64), *range(128, 150)])


def test_a_row_of_a_shard_that_is_not_built_yet_is_refused(folder):
    shard_path(folder, 64, 1, "json").unlink()
    with Reader(folder, 64) as reader:
        assert reader.rows.tolist() == [*range(64), *range(128, 150)]
        with pytest.raises(LoadError, match=r"row 70 is not in .* at 64 px: quarantined, or not built yet"):
            reader.read(70)


# Damage while a loader runs: a named LoadError, whole batches before it, other rows unaffected


ROW = 110
"""In the second of three tars, of 64 rows each; further ahead than an engine reads. The first row of a batch."""


def truncate(tar: Path, offset: int) -> None:
    os.truncate(tar, offset + 3)


def write_at(tar: Path, offset: int, data: bytes) -> None:
    with tar.open("rb+") as file:
        file.seek(offset)
        file.write(data)


def flip(tar: Path, offset: int) -> None:
    write_at(tar, offset + 40, bytes([tar.read_bytes()[offset + 40] ^ 0x10]))


def overwrite(tar: Path, offset: int) -> None:
    """In place, by another of the same length, from `offset` on."""
    write_at(tar, offset, np.random.default_rng(0).bytes(tar.stat().st_size - offset))


def replace(tar: Path, offset: int) -> None:
    """By rename, by another of the same length."""
    other = tar.with_suffix(".other")
    other.write_bytes(np.random.default_rng(0).bytes(tar.stat().st_size))
    other.rename(tar)


def delete(tar: Path, offset: int) -> None:
    tar.unlink()


def loader(reader: Reader, engine: str, rows: np.ndarray, augment: Augment | None = None) -> Loader:
    return Loader(reader, EvalOrder(rows=rows, micro_batch=5), engine=engine, threads=1, augment=augment)


def images(reader: Reader, engine: str, rows: np.ndarray, augment: Augment | None = None) -> list[torch.Tensor]:
    return [batch.image for batch in loader(reader, engine, rows, augment)]


@pytest.fixture
def unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is read ahead, which would open tars at some time."""
    monkeypatch.setattr(Reader, "advise", lambda self, rows: None)


def run_into(folder: Path, engine: str, damage: Callable[[Path, int], None], augment: Augment | None, is_open: bool):
    """Images until the first error, and that error; the tar of ROW is damaged after the first batch."""
    shard, offset, _ = where(folder, 64, ROW)
    got = []
    with Reader(folder, 64) as reader:
        if is_open:
            reader.read(ROW)
        try:
            for batch in loader(reader, engine, reader.rows, augment):
                if not got:
                    damage(shard_path(folder, 64, shard, "tar"), offset)
                got.append(batch.image)
        except LoadError as error:
            return got, str(error)
    return got, None


@pytest.mark.usefixtures("unasked")
@pytest.mark.parametrize(
    ("damage", "is_open", "augment", "row", "says"),
    [
        (truncate, False, None, ROW, f"ends inside row {ROW}"),
        (truncate, True, Augment(), ROW, f"ends inside row {ROW}"),
        (flip, False, None, ROW, f"row {ROW}: the image's bytes have changed"),
        (flip, True, Augment(), ROW, f"row {ROW}: the image's bytes have changed"),
        (overwrite, True, None, ROW, f"row {ROW}: the image's bytes have changed"),
        (replace, False, Augment(), 64, "row 64: the image's bytes have changed"),
        (delete, False, None, 64, "row 64: No such file"),
    ],
)
@pytest.mark.parametrize("engine", ENGINES)
def test_damage_names_row_and_tar_and_costs_no_batch_before_it(
    either_copy, either_set, engine, damage, is_open, row, says, augment
):
    got, error = run_into(either_copy, engine, damage, augment, is_open)
    assert str(shard_path(either_copy, 64, 1, "tar")) in error
    assert says in error
    assert threads_of_ours() == []
    with Reader(either_set, 64) as whole:
        expected = images(whole, engine, whole.rows, augment)
        assert len(got) == row // 5
        # the batches that DALI held ahead of the damage are turned by the host engine
        assert_agree(got, expected[: len(got)])
        assert equal(got, expected[: len(got)]) or (engine == "dali" and augment)


@pytest.mark.usefixtures("unasked")
@pytest.mark.parametrize("damage", [replace, delete])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_tar_that_is_open_is_read_to_its_end_though_it_was_replaced_or_deleted(
    either_copy, either_set, engine, damage
):
    got, error = run_into(either_copy, engine, damage, None, is_open=True)
    assert error is None
    with Reader(either_set, 64) as whole:
        assert equal(got, images(whole, engine, whole.rows))


@pytest.mark.parametrize("engine", ENGINES)
def test_after_an_error_other_rows_are_loaded_by_the_same_loader_as_if_nothing_had_happened(
    either_copy, either_set, engine
):
    replace_image(either_copy, 64, ROW, b"no picture")
    with Reader(either_copy, 64) as reader, Reader(either_set, 64) as whole:
        running = loader(reader, engine, reader.rows, Augment())
        for _ in range(2):
            with pytest.raises(LoadError, match=rf"row {ROW}( of .* does not decode| is not a raw image)"):
                list(running.epoch(3))
            assert threads_of_ours() == []
        others = np.delete(np.arange(150), ROW)
        running.order = EvalOrder(rows=others, micro_batch=5)
        assert equal((batch.image for batch in running.epoch(0)), images(whole, engine, others, Augment()))


@pytest.mark.parametrize("engine", ENGINES)
def test_a_row_that_was_repaired_is_loaded_in_the_next_epoch_of_the_same_loader(either_copy, either_set, engine):
    shard, offset, size = where(either_copy, 64, ROW)
    tar = shard_path(either_copy, 64, shard, "tar")
    with Reader(either_copy, 64) as reader, Reader(either_set, 64) as whole:
        running = loader(reader, engine, reader.rows)
        flip_bit(tar, offset + size // 2)
        with pytest.raises(LoadError, match=f"row {ROW}: the image's bytes have changed"):
            list(running)
        flip_bit(tar, offset + size // 2)
        assert equal((batch.image for batch in running), images(whole, engine, whole.rows))
