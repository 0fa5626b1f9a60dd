"""Damage to a shard set while a loader runs over it: a named LoadError, whole batches before it, other rows unaffected."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from batches import ENGINES, assert_agree, equal, threads_of_ours
from damage import copy_set, flip_bit, replace_image, where

from cxrfast.errors import LoadError
from cxrfast.pipelines.loader import Loader
from cxrfast.pipelines.order import Augment, EvalOrder
from cxrfast.pipelines.reader import Reader
from cxrfast.shards.format.names import shard_path

ROW = 110
"""In the second of three tars, of 64 rows each; further ahead than an engine reads. The first row of a batch."""


def truncate(tar: Path, offset: int) -> None:
    os.truncate(tar, offset + 3)


def flip(tar: Path, offset: int) -> None:
    with tar.open("rb+") as file:
        file.seek(offset + 40)
        byte = file.read(1)[0]
        file.seek(offset + 40)
        file.write(bytes([byte ^ 0x10]))


def overwrite(tar: Path, offset: int) -> None:
    """In place, by another of the same length, from `offset` on."""
    with tar.open("rb+") as file:
        file.seek(offset)
        file.write(np.random.default_rng(0).bytes(tar.stat().st_size - offset))


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
def folder(either_set: Path, tmp_path: Path) -> Path:
    return copy_set(either_set, tmp_path / "set")


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
@pytest.mark.parametrize("augment", [None, Augment()], ids=["plain", "turned"])
@pytest.mark.parametrize(
    ("damage", "is_open", "row", "says"),
    [
        (truncate, False, ROW, f"ends inside row {ROW}"),
        (truncate, True, ROW, f"ends inside row {ROW}"),
        (flip, False, ROW, f"row {ROW}: the image's bytes have changed"),
        (overwrite, True, ROW, f"row {ROW}: the image's bytes have changed"),
        (replace, False, 64, "row 64: the image's bytes have changed"),
        (delete, False, 64, "row 64: No such file"),
    ],
)
@pytest.mark.parametrize("engine", ENGINES)
def test_damage_names_row_and_tar_and_costs_no_batch_before_it(
    folder, either_set, engine, damage, is_open, row, says, augment
):
    got, error = run_into(folder, engine, damage, augment, is_open)
    assert str(shard_path(folder, 64, 1, "tar")) in error
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
def test_a_tar_that_is_open_is_read_to_its_end_though_it_was_replaced_or_deleted(folder, either_set, engine, damage):
    got, error = run_into(folder, engine, damage, None, is_open=True)
    assert error is None
    with Reader(either_set, 64) as whole:
        assert equal(got, images(whole, engine, whole.rows))


@pytest.mark.parametrize("damage", [truncate, flip, overwrite])
@pytest.mark.parametrize("engine", ENGINES)
def test_other_rows_than_the_damaged_are_loaded_as_if_nothing_had_happened(folder, either_set, engine, damage):
    with Reader(folder, 64) as reader, Reader(either_set, 64) as whole:
        shard, offset, _ = where(folder, 64, ROW)
        damage(shard_path(folder, 64, shard, "tar"), offset)
        others = np.array([row for row in range(150) if row < ROW or row > 127])
        assert equal(images(reader, engine, others), images(whole, engine, others))


@pytest.mark.parametrize("codec", ["tiny_set", "raw_set"])
@pytest.mark.parametrize("engine", ENGINES)
def test_after_an_error_the_next_epoch_of_the_same_loader_works(request, tmp_path, engine, codec):
    original = request.getfixturevalue(codec)
    folder = copy_set(original, tmp_path / "set")
    replace_image(folder, 64, ROW, b"no picture")
    with Reader(folder, 64) as reader, Reader(original, 64) as whole:
        running = loader(reader, engine, reader.rows, Augment())
        for _ in range(2):
            with pytest.raises(LoadError, match=f"row {ROW}"):
                list(running.epoch(3))
            assert threads_of_ours() == []
        others = np.delete(np.arange(150), ROW)
        running.order = EvalOrder(rows=others, micro_batch=5)
        assert equal((batch.image for batch in running.epoch(0)), images(whole, engine, others, Augment()))


@pytest.mark.parametrize("engine", ENGINES)
def test_a_row_that_was_mended_is_loaded_in_the_next_epoch_of_the_same_loader(folder, either_set, engine):
    shard, offset, size = where(folder, 64, ROW)
    tar = shard_path(folder, 64, shard, "tar")
    with Reader(folder, 64) as reader, Reader(either_set, 64) as whole:
        running = loader(reader, engine, reader.rows)
        flip_bit(tar, offset + size // 2)
        with pytest.raises(LoadError, match=f"row {ROW}: the image's bytes have changed"):
            list(running)
        flip_bit(tar, offset + size // 2)
        assert equal((batch.image for batch in running), images(whole, engine, whole.rows))


@pytest.mark.parametrize("engine", ENGINES)
def test_a_row_left_out_of_this_scale_is_named(folder, engine):
    shard_path(folder, 64, 1, "json").unlink()
    with Reader(folder, 64) as reader, pytest.raises(LoadError, match=r"row 64 is not in .* at 64 px: quarantined"):
        images(reader, engine, np.arange(150))
