import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from cxrfast.errors import LoadError
from cxrfast.pipelines import dali
from cxrfast.pipelines.host import HostEngine
from cxrfast.pipelines.loader import ENGINES, Loader
from cxrfast.pipelines.order import Augment, EvalOrder, TrainOrder, Work
from cxrfast.pipelines.reader import Reader

CPU = torch.device("cpu")
REAL_ENGINES = [
    pytest.param("dali", marks=pytest.mark.skipif(not dali.available(), reason="DALI is not installed")),
    "host",
]


@pytest.fixture
def reader(tiny_set: Path):
    with Reader(tiny_set, 64) as reader:
        yield reader


def plain(reader: Reader, rows: np.ndarray, size: int = 64) -> torch.Tensor:
    (batch,) = HostEngine(reader, size, CPU, 2).batches([Work(rows)])
    return batch


def test_ten_lines_train_on_a_set(tiny_set):
    labels = torch.rand(150, 3)
    reader = Reader(tiny_set, scale=64)
    order = TrainOrder(rows=reader.rows, global_batch=48, micro_batch=8, seed=0)
    loader = Loader(reader, order, scale=64, augment=Augment(), device="cpu")
    model = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(4), torch.nn.Flatten(), torch.nn.Linear(16, 3))
    losses = []
    for epoch in range(2):
        for batch in loader.epoch(epoch):
            target = labels[batch.row]
            losses.append(torch.nn.functional.mse_loss(model(batch.image / 255), target).item())
    reader.close()
    assert len(losses) == 2 * 3 * 6
    assert np.isfinite(losses).all()


@pytest.mark.parametrize("engine", REAL_ENGINES)
def test_batches_hold_the_rows_of_the_order_and_the_images_of_those_rows(reader, engine):
    order = TrainOrder(rows=reader.rows[::2], global_batch=20, micro_batch=5, seed=4, rank=1, world=2)
    loader = Loader(reader, order, engine=engine, threads=2)
    for epoch in (0, 3):
        batches = list(loader.epoch(epoch))
        assert [batch.row.tolist() for batch in batches] == [rows.tolist() for rows in order.micro_batches(epoch)]
        for batch in batches:
            assert batch.row.dtype == torch.int64
            assert batch.image.dtype == torch.uint8
            assert batch.image.is_contiguous(memory_format=torch.channels_last)
            assert torch.equal(batch.image, plain(reader, batch.row.numpy()))


@pytest.mark.parametrize("engine", REAL_ENGINES)
def test_images_are_drawn_by_seed_epoch_and_row_alone(reader, engine):
    def images(epoch: int, **sizes) -> dict[int, torch.Tensor]:
        order = TrainOrder(rows=reader.rows, seed=9, **sizes)
        loader = Loader(reader, order, augment=Augment(), engine=engine, threads=2)
        return {
            int(row): image for batch in loader.epoch(epoch) for row, image in zip(batch.row, batch.image, strict=True)
        }

    one, other = images(2, global_batch=50, micro_batch=10), images(2, global_batch=30, micro_batch=30)
    assert one.keys() == other.keys() == set(range(150))
    assert all(torch.equal(one[row], other[row]) for row in one)
    later = images(3, global_batch=50, micro_batch=10)
    assert sum(torch.equal(one[row], later[row]) for row in one) < 5


@pytest.mark.parametrize("engine", REAL_ENGINES)
def test_a_run_that_stopped_goes_on_with_the_same_images(reader, engine):
    order = TrainOrder(rows=reader.rows, global_batch=40, micro_batch=10)
    loader = Loader(reader, order, augment=Augment(), engine=engine, threads=2)
    whole, resumed = list(loader.epoch(1)), list(loader.epoch(1, consumed=80))
    assert len(resumed) == 4
    for a, b in zip(whole[8:], resumed, strict=True):
        assert torch.equal(a.row, b.row)
        assert torch.equal(a.image, b.image)


@pytest.mark.parametrize("engine", REAL_ENGINES)
def test_evaluation_passes_every_row_once_and_unchanged(reader, engine):
    loader = Loader(reader, EvalOrder(rows=reader.rows, micro_batch=32), engine=engine, threads=2)
    batches = list(loader)
    assert torch.cat([batch.row for batch in batches]).tolist() == list(range(150))
    assert torch.equal(torch.cat([batch.image for batch in batches]), plain(reader, reader.rows))


@pytest.mark.parametrize("engine", REAL_ENGINES)
@pytest.mark.parametrize("scale", [48, 80])
def test_another_scale_than_the_stored_one_is_handed_out(reader, engine, scale):
    loader = Loader(reader, EvalOrder(rows=reader.rows[:20], micro_batch=20), scale=scale, engine=engine, threads=2)
    (batch,) = loader
    assert batch.image.shape == (20, 1, scale, scale)
    expected = plain(reader, reader.rows[:20], scale)
    # area averaging against antialiased bilinear: the same picture, not the same pixels
    assert (batch.image.float() - expected.float()).abs().mean() < 4
    if engine == "host":
        assert torch.equal(batch.image, expected)


def test_an_unknown_engine_is_refused_and_the_known_ones_are_named(reader):
    with pytest.raises(LoadError, match=f"engine 'spdl' is unknown: use one of {', '.join(ENGINES)}"):
        Loader(reader, EvalOrder(rows=reader.rows, micro_batch=4), engine="spdl")


def test_auto_takes_the_host_on_a_cpu(reader):
    assert Loader(reader, EvalOrder(rows=reader.rows, micro_batch=4)).engine == "host"


@pytest.mark.parametrize("engine", REAL_ENGINES)
def test_leaving_the_loop_early_leaves_no_thread(reader, engine):
    before = threading.enumerate()
    for _ in Loader(reader, EvalOrder(rows=reader.rows, micro_batch=4), engine=engine, threads=2):
        break
    assert threading.enumerate() == before
