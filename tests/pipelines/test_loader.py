import itertools
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from batches import CPU, ENGINES, assert_agree, by_row, equal, threads_of_ours

from cxrfast.errors import LoadError
from cxrfast.pipelines import dali
from cxrfast.pipelines import loader as module
from cxrfast.pipelines.host import HostEngine
from cxrfast.pipelines.loader import HEADROOM, Loader, Rates, choose
from cxrfast.pipelines.order import Augment, EvalOrder, TrainOrder, Work
from cxrfast.pipelines.reader import Reader


def plain(reader: Reader, rows: np.ndarray, size: int = 64) -> torch.Tensor:
    (batch,) = HostEngine(reader, size, CPU, 2).batches([Work(rows)])
    return batch


@pytest.fixture
def order(reader):
    return TrainOrder(rows=reader.rows, global_batch=40, micro_batch=10)


@pytest.mark.parametrize("engine", ENGINES)
def test_batches_hold_the_rows_of_the_order_and_the_images_of_those_rows(reader, engine):
    training = TrainOrder(rows=reader.rows[::2], global_batch=20, micro_batch=5, seed=4, rank=1, world=2)
    for order in (training, EvalOrder(rows=reader.rows, micro_batch=32)):
        loader = Loader(reader, order, engine=engine, threads=2)
        for epoch in (0, 3):
            batches = list(loader.epoch(epoch))
            assert [batch.row.tolist() for batch in batches] == [rows.tolist() for rows in order.micro_batches(epoch)]
            assert len(batches) == len(loader)
            for batch in batches:
                assert batch.row.dtype == torch.int64
                assert batch.image.dtype == torch.uint8
                assert batch.image.is_contiguous(memory_format=torch.channels_last)
                assert torch.equal(batch.image, plain(reader, batch.row.numpy()))


@pytest.mark.parametrize("engine", ENGINES)
def test_images_are_drawn_by_seed_epoch_and_row_alone(reader, engine):
    def drawn(epoch: int, **sizes) -> dict[int, torch.Tensor]:
        order = TrainOrder(rows=reader.rows, seed=9, **sizes)
        return by_row(Loader(reader, order, augment=Augment(), engine=engine, threads=2).epoch(epoch))

    one, other = drawn(2, global_batch=50, micro_batch=10), drawn(2, global_batch=30, micro_batch=30)
    assert one.keys() == other.keys() == set(range(150))
    assert all(torch.equal(one[row], other[row]) for row in one)
    later = drawn(3, global_batch=50, micro_batch=10)
    assert sum(torch.equal(one[row], later[row]) for row in one) < 5


@pytest.mark.parametrize("engine", ENGINES)
def test_a_run_that_stopped_goes_on_with_the_same_images(reader, order, engine):
    loader = Loader(reader, order, augment=Augment(), engine=engine, threads=2)
    whole, resumed = list(loader.epoch(1)), list(loader.epoch(1, consumed=80))
    assert len(resumed) == 4
    assert equal((batch.row for batch in whole[8:]), (batch.row for batch in resumed))
    assert equal((batch.image for batch in whole[8:]), (batch.image for batch in resumed))


def test_auto_takes_the_host_on_a_cpu_and_an_unknown_engine_is_refused_and_the_known_ones_are_named(reader):
    assert Loader(reader, EvalOrder(rows=reader.rows, micro_batch=4)).engine == "host"
    with pytest.raises(LoadError, match=f"engine 'spdl' is unknown: use one of {', '.join(module.ENGINES)}"):
        Loader(reader, EvalOrder(rows=reader.rows, micro_batch=4), engine="spdl")


# Epochs of one loader


def images(loader: Loader, *arguments, **options) -> list[torch.Tensor]:
    return [batch.image for batch in loader.epoch(*arguments, **options)]


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_scale_changed_between_epochs_gives_the_images_of_a_loader_made_for_it(
    either_reader, tmp_path, engine, order, cached
):
    def loader(scale: int | None) -> Loader:
        cache = tmp_path if cached else None
        return Loader(either_reader, order, scale=scale, augment=Augment(), engine=engine, threads=2, cache=cache)

    growing = loader(32)
    for epoch, (given, used) in enumerate([(None, 32), (48, 48), (None, 48), (64, 64), (32, 32)]):
        got = images(growing, epoch, scale=given)
        assert got[0].shape == (10, 1, used, used)
        assert equal(got, images(loader(used), epoch))
    assert equal(images(growing, 1, 80, scale=48), images(loader(48), 1)[8:])


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("codec", ["tiny_set", "raw_set"])
@pytest.mark.parametrize("engine", ENGINES)
def test_draws_are_the_same_whatever_the_engine_the_codec_and_the_cache(
    request, reader, order, tmp_path, engine, codec, cached
):
    expected = images(Loader(reader, order, augment=Augment(), engine="host"), 5)
    with Reader(request.getfixturevalue(codec), 64) as other:
        cache = tmp_path if cached else None
        for _ in ("cold", "full"):
            got = images(Loader(other, order, augment=Augment(), engine=engine, threads=2, cache=cache), 5)
            if codec == "tiny_set":
                assert_agree(got, expected)
            difference = (torch.cat(got).float() - torch.cat(expected)).abs().mean(dim=(1, 2, 3))
            assert difference.max() < 3, "quality 95, and nothing more"


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("engine", ENGINES)
def test_an_epoch_that_was_left_in_the_middle_leaves_no_thread_and_may_be_begun_again(
    either_reader, order, tmp_path, engine, cached
):
    expected = images(Loader(either_reader, order, augment=Augment(), engine=engine, threads=2), 1)
    loader = Loader(
        either_reader, order, augment=Augment(), engine=engine, threads=3, cache=tmp_path if cached else None
    )
    for taken in (0, 1, 7, 12):
        left = loader.epoch(1)
        assert equal([batch.image for batch in itertools.islice(left, taken)], expected[:taken])
        assert bool(threads_of_ours()) == (taken > 0)
        left.close()
        assert threads_of_ours() == []
        assert equal(images(loader, 1), expected)
    loader.close()
    loader.close()


@pytest.mark.parametrize("engine", ENGINES)
def test_two_epochs_at_a_time_are_not_mixed(either_reader, order, engine):
    """As where one that was left in the middle is still held."""
    loader = Loader(either_reader, order, augment=Augment(), engine=engine, threads=2)
    expected = images(loader, 0), images(loader, 1)
    together = list(zip(loader.epoch(0), loader.epoch(1), strict=True))
    for epoch in (0, 1):
        assert equal([pair[epoch].image for pair in together], expected[epoch])


@pytest.mark.parametrize("engine", ENGINES)
def test_a_loader_closed_or_rescaled_in_the_middle_of_an_epoch_finishes_it_unchanged(
    either_reader, order, tmp_path, engine
):
    expected = images(Loader(either_reader, order, engine=engine, threads=2), 0)
    for n, disturb in enumerate([Loader.close, lambda loader: next(loader.epoch(0, scale=32))]):
        loader = Loader(either_reader, order, engine=engine, threads=2, cache=tmp_path / str(n))
        running = loader.epoch(0)
        got = [next(running).image]
        disturb(loader)
        got += [batch.image for batch in running]
        assert equal(got, expected)
        loader.close()


@pytest.mark.parametrize("engine", ENGINES)
def test_an_order_may_be_replaced_between_epochs_by_one_of_other_rows(reader, order, engine):
    loader = Loader(reader, order, augment=Augment(), engine=engine, threads=2)
    everything = by_row(Loader(reader, EvalOrder(rows=reader.rows, micro_batch=150), augment=Augment(), engine=engine))
    for rows in (np.arange(0, 150, 2), np.arange(110, 150)):
        loader.order = replace(order, global_batch=20, rows=rows)
        got = by_row(loader.epoch(0))
        assert got.keys() <= set(rows.tolist())
        assert len(got) == len(rows) // 20 * 20
        assert all(torch.equal(image, everything[row]) for row, image in got.items())


@pytest.mark.skipif(not dali.available(), reason="DALI is not installed")
def test_dali_keeps_its_pipeline_from_epoch_to_epoch_and_makes_another_where_the_batches_differ(
    either_reader, order, monkeypatch
):
    made = []
    make = dali.DaliEngine._graph

    monkeypatch.setattr(dali.DaliEngine, "_graph", lambda *given: made.append(given[1:3]) or make(*given))

    def assert_right(*position: int) -> None:
        expected = images(Loader(either_reader, loader.order, augment=loader.augment, engine="host"), *position)
        assert_agree(images(loader, *position), expected)

    loader = Loader(either_reader, order, augment=Augment(), engine="dali", threads=2)
    for position in [(0,), (1,), (1, 80), (2, 0)]:
        assert_right(*position)
    assert made == [(10, True)]
    loader.order = replace(order, micro_batch=20)
    assert_right(3)
    assert_right(4, 40)
    loader.augment = None
    assert_right(5)
    assert made == [(10, True), (20, True), (20, False)]
    next(loader.epoch(6))  # left in the middle
    assert_right(7)
    assert made[3:] == [(20, False)]


# The choice of an engine


MEASURED = {
    "Card": [
        Rates(scale=256, host=1_750, dali=20_000, step=5_700),
        Rates(scale=2048, host=60, dali=900, step=90),
    ],
    "Slow": [Rates(scale=256, host=100, dali=500, step=10_000)],
}
"""Made up: what decides is how they compare."""


@pytest.mark.parametrize(
    ("gpu", "has_dali", "scale", "threads", "engine", "says"),
    [
        (None, True, 256, 64, "host", "on a CPU"),
        (None, False, 256, 64, "host", "on a CPU"),
        ("Card", False, 256, 1, "host", "NVIDIA DALI is not installed"),
        ("Another card", True, 256, 16, "dali", "Another card has not been measured.*--engine host"),
        ("Card", True, 256, 3, "dali", "3 host threads give"),  # 5,250 a second do not feed 5,700
        ("Card", True, 256, 4, "host", "4 host threads give"),  # 7,000 do, with headroom
        ("Card", True, 2048, 1, "dali", "at 2048 px"),
        ("Card", True, 2048, 2, "host", "at 2048 px"),
        ("Card", True, 1800, 2, "host", "at 2048 px"),  # the nearest scale counts
        ("Card", True, 1024, 1, "dali", "at 2048 px"),  # half of 2048, four times 256
        ("Slow", True, 256, 4, "dali", "at 256 px"),  # neither feeds the step: the faster one decodes
        ("Slow", True, 256, 6, "host", "at 256 px"),
    ],
)
def test_the_host_decodes_on_a_cpu_and_where_its_threads_feed_the_step(gpu, has_dali, scale, threads, engine, says):
    chosen, why = choose(gpu, has_dali, scale, threads, MEASURED)
    assert chosen == engine
    assert re.search(says, why)
    assert HEADROOM > 1
