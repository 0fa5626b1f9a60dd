import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from batches import CPU, assert_agree, cut, decoded, turned
from damage import copy_set, flip_bit, replace_image, where
from torchvision.transforms.functional import resize

from cxrfast.errors import LoadError
from cxrfast.pipelines.dali import DaliEngine, available
from cxrfast.pipelines.host import HostEngine
from cxrfast.pipelines.order import Work
from cxrfast.pipelines.reader import Reader
from cxrfast.shards.format.names import shard_path

pytestmark = pytest.mark.skipif(not available(), reason="NVIDIA DALI is not installed")


def engine(reader: Reader, size: int | None = None) -> DaliEngine:
    return DaliEngine(reader, size or reader.scale, CPU, 2)


def run(reader: Reader, work: list[Work], size: int | None = None) -> list[torch.Tensor]:
    return list(engine(reader, size).batches(work))


def on_host(reader: Reader, work: list[Work]) -> list[torch.Tensor]:
    return list(HostEngine(reader, reader.scale, CPU, 2).batches(work))


@pytest.fixture
def tiny(tiny_set: Path):
    with Reader(tiny_set, 64) as reader:
        yield reader


def test_without_draws_batches_are_plain_decodes_in_the_order_asked_for(tiny):
    rows = np.random.default_rng(0).permutation(150)
    batches = run(tiny, [Work(part) for part in cut(rows, 16)])
    assert [len(batch) for batch in batches] == [16] * 9 + [6]
    for part, batch in zip(cut(rows, 16), batches, strict=True):
        assert batch.dtype == torch.uint8
        assert batch.shape == (len(part), 1, 64, 64)
        assert batch.is_contiguous(memory_format=torch.channels_last)
        np.testing.assert_array_equal(batch[:, 0].numpy(), [decoded(tiny, row) for row in part])


@pytest.mark.parametrize("scale", [64, 256])
def test_real_radiographs_are_turned_and_flipped_as_the_host_does(real_set, scale):
    with Reader(real_set, scale) as reader:
        work = turned(reader.rows, 32)
        assert_agree(run(reader, work), on_host(reader, work))


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("angle", [15.0, -15.0])
def test_phantoms_at_the_largest_angles_agree_with_the_host(tiny, angle, flip):
    work = [Work(part, np.full(len(part), angle, np.float32), np.full(len(part), flip)) for part in cut(tiny.rows, 50)]
    assert_agree(run(tiny, work), on_host(tiny, work))


def test_a_batch_that_was_handed_out_is_not_written_to_again(tiny):
    held, copies = [], []
    for batch in engine(tiny).batches(turned(tiny.rows, 5)):
        held.append(batch)
        copies.append(batch.clone())
    assert all(torch.equal(batch, copy) for batch, copy in zip(held, copies, strict=True))


def test_an_engine_runs_one_epoch_after_the_other(tiny):
    dali = engine(tiny)
    first, second = (list(dali.batches(turned(tiny.rows, 40, seed))) for seed in (0, 1))
    assert_agree(first, on_host(tiny, turned(tiny.rows, 40, 0)))
    assert_agree(second, on_host(tiny, turned(tiny.rows, 40, 1)))
    assert list(dali.batches([])) == []


def test_dali_decodes_every_batch_itself_where_nothing_is_damaged(tiny, monkeypatch):
    def refuse(self, work):
        raise AssertionError("the host engine was asked")

    monkeypatch.setattr(HostEngine, "batches", refuse)
    assert len(run(tiny, turned(tiny.rows, 16))) == 10


@pytest.mark.parametrize("size", [32, 48, 100])
def test_another_size_is_within_three_levels_of_torchvision(tiny, size):
    (batch,) = run(tiny, [Work(np.arange(40))], size)
    assert batch.shape == (40, 1, size, size)
    images = torch.tensor(np.array([decoded(tiny, row) for row in range(40)]))[:, None].float()
    difference = (batch - resize(images, [size, size], antialias=True)).abs()
    assert difference[..., 2:-2, 2:-2].max() <= 3, "at the very edge DALI repeats pixels"


def test_a_damaged_image_names_its_row_and_other_batches_are_unaffected(tiny_set, tmp_path, tiny):
    folder = copy_set(tiny_set, tmp_path / "set")
    replace_image(folder, 64, 70, b"no picture")
    expected = run(tiny, [Work(part) for part in cut(np.arange(150), 10)])
    with Reader(folder, 64) as reader:
        got: list[torch.Tensor] = []
        dali = engine(reader)
        with pytest.raises(LoadError, match=rf"row 70 of {folder} at 64 px does not decode"):
            for batch in dali.batches([Work(part) for part in cut(np.arange(150), 10)]):
                got.append(batch)
        rest = list(dali.batches([Work(part) for part in cut(np.arange(80, 150), 10)]))
    assert len(got) == 7
    assert all(torch.equal(a, b) for a, b in zip([*got, *rest], [*expected[:7], *expected[8:]], strict=True))


def test_changed_bytes_name_row_and_tar(tiny_set, tmp_path):
    folder = copy_set(tiny_set, tmp_path / "set")
    shard, offset, size = where(folder, 64, 70)
    flip_bit(shard_path(folder, 64, shard, "tar"), offset + size // 2)
    with (
        Reader(folder, 64) as reader,
        pytest.raises(LoadError, match=r"000001.tar, row 70: the image's bytes have changed"),
    ):
        run(reader, [Work(part) for part in cut(np.arange(60, 80), 5)])


def test_a_batch_that_dali_refuses_and_the_host_decodes_changes_nothing(tiny):
    class Faltering(Reader):
        """Hands out nonsense for some rows once."""

        falters = {12, 75, 149}  # noqa: RUF012

        def read(self, row, buffer=None):
            if row in self.falters:
                self.falters.discard(row)
                return memoryview(b"\xff\xd8 no picture")
            return super().read(row, buffer)

    work = turned(tiny.rows, 10)
    with Faltering(tiny.folder, 64) as reader:
        got = run(reader, work)
    assert Faltering.falters == set()
    assert_agree(got, on_host(tiny, work))


def test_stopping_early_or_failing_leaves_no_thread(tiny_set, tmp_path, tiny):
    folder = copy_set(tiny_set, tmp_path / "set")
    replace_image(folder, 64, 70, b"no picture")
    before = threading.enumerate()
    for batch in engine(tiny).batches(turned(tiny.rows, 5)):
        assert len(batch) == 5
        break
    assert threading.enumerate() == before
    with Reader(folder, 64) as reader, pytest.raises(LoadError):
        run(reader, turned(reader.rows, 50))
    assert threading.enumerate() == before
