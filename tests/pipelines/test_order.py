import hashlib
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cxrfast.errors import LoadError
from cxrfast.pipelines.order import WINDOW, Augment, EvalOrder, TrainOrder, in_blocks

SEEDS = st.integers(0, 2**63 - 1)
EPOCHS = st.integers(0, 10_000)


@st.composite
def train_orders(draw) -> dict:
    """Arguments of a TrainOrder on one rank, in blocks or not; rows are any distinct numbers."""
    micro, accumulation = draw(st.integers(1, 8)), draw(st.sampled_from([1, 2, 3, 4, 6, 8, 12]))
    n = micro * accumulation * draw(st.integers(1, 5)) + draw(st.integers(0, micro * accumulation - 1))
    return {
        "rows": np.random.default_rng(draw(SEEDS)).choice(400_000, n, replace=False),
        "global_batch": micro * accumulation,
        "micro_batch": micro,
        "seed": draw(SEEDS),
        "shard_rows": draw(st.sampled_from([None, 1, 2, 7, 64, 10**6])),
    }


@settings(max_examples=80)
@given(train_orders(), EPOCHS)
def test_training_uses_no_row_twice_and_drops_less_than_a_global_batch(arguments, epoch):
    order, rows = TrainOrder(**arguments), arguments["rows"]
    batches = order.micro_batches(epoch)
    used = np.concatenate(batches)
    assert {batch.shape for batch in batches} == {(order.micro_batch,)}
    assert used.dtype == np.int64
    assert len(np.unique(used)) == len(used) == len(rows) - len(rows) % order.global_batch
    assert np.isin(used, rows).all()
    assert len(batches) == order.steps * order.accumulation == len(order)
    for step, rows in enumerate(order.global_batches(epoch)):
        for j in range(order.accumulation):
            np.testing.assert_array_equal(batches[step * order.accumulation + j], rows[j :: order.accumulation])


@settings(max_examples=80)
@given(train_orders(), EPOCHS, st.data())
def test_any_number_of_ranks_sees_the_micro_batches_of_one_also_when_a_run_resumes(arguments, epoch, data):
    alone = TrainOrder(**arguments)
    done = data.draw(st.integers(0, alone.steps))
    world = data.draw(st.sampled_from([d for d in range(1, alone.accumulation + 1) if alone.accumulation % d == 0]))
    position = epoch, done * alone.global_batch
    ranks = [TrainOrder(**arguments, rank=r, world=world).micro_batches(*position) for r in range(world)]
    assert {len(TrainOrder(**arguments, rank=r, world=world)) for r in range(world)} == {len(alone) // world}
    interleaved = [batch for together in zip(*ranks, strict=True) for batch in together]
    whole = alone.micro_batches(epoch)
    assert len(interleaved) == (alone.steps - done) * alone.accumulation
    for got, expected in zip(interleaved, whole[len(whole) - len(interleaved) :], strict=True):
        np.testing.assert_array_equal(got, expected)


def test_the_order_changes_with_seed_epoch_and_blocks_and_with_nothing_else():
    def order(seed: int, epoch: int, shard_rows: int | None) -> np.ndarray:
        made = TrainOrder(rows=np.arange(512), global_batch=32, micro_batch=8, seed=seed, shard_rows=shard_rows)
        return made.global_batches(epoch).ravel()

    given = list(itertools.product((0, 1), (0, 1, 2), (None, 1, 16, 512)))
    orders = [order(*one) for one in given]
    for i, one in enumerate(orders):
        np.testing.assert_array_equal(one, order(*given[i]))
        assert all((one == other).mean() < 0.03 for other in [*orders[:i], np.arange(512)])


@pytest.mark.parametrize("shard_rows", [None, 2, 100])
def test_over_many_epochs_every_row_is_dropped_about_equally_often(shard_rows):
    order = TrainOrder(rows=np.arange(40), global_batch=32, micro_batch=32, shard_rows=shard_rows)
    used = np.bincount(np.concatenate([order.global_batches(epoch).ravel() for epoch in range(1000)]), minlength=40)
    assert abs(used / 1000 - 0.8).max() < 0.06


FITTING = {"rows": np.arange(100), "global_batch": 96, "micro_batch": 8}


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"world": 5}, "5 ranks cannot share the 12 micro-batches.*start 1, 2, 3, 4, 6, 12 ranks"),
        ({"world": 24}, "24 ranks cannot share the 12 micro-batches.*start 1, 2, 3, 4, 6, 12 ranks"),
        ({"world": 2, "rank": 2}, "rank 2 does not exist: 2 ranks"),
        ({"world": 2, "rank": -1}, "rank -1 does not exist"),
        ({"global_batch": 12, "micro_batch": 0}, "micro-batch 0: micro-batches that fit are 1, 2, 3, 4, 6, 12"),
        ({"global_batch": 12, "micro_batch": -1}, "micro-batch -1: micro-batches that fit"),
        ({"global_batch": 2**62, "micro_batch": 3}, "micro-batches that fit are 1, 2, 4, 8, .*, 4096$"),
        ({"global_batch": 12, "micro_batch": 5}, "global batch 12 is not a multiple of micro-batch 5"),
        ({"global_batch": 12, "micro_batch": 24}, "micro-batch 24: micro-batches that fit"),
        ({"rows": np.arange(95)}, "95 training rows do not fill one global batch of 96"),
        ({"shard_rows": 0}, "a shard cannot have 0 rows"),
        ({"shard_rows": -64}, "a shard cannot have -64 rows"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_and_those_that_do_are_named(wrong, says):
    with pytest.raises(LoadError, match=says):
        TrainOrder(**{**FITTING, **wrong})


def test_a_position_inside_a_global_batch_is_refused():
    with pytest.raises(LoadError, match="position 16 is not at the start of a global batch of 96"):
        TrainOrder(**FITTING).micro_batches(0, consumed=16)


@settings(max_examples=80)
@given(
    st.lists(st.integers(0, 10**6), max_size=80, unique=True), st.integers(1, 20), st.integers(0, 9), st.integers(1, 8)
)
def test_evaluation_gives_every_row_left_once_to_one_rank(rows, micro_batch, done, world):
    rows, consumed = np.array(rows, np.int64), done * micro_batch
    ranks = [
        EvalOrder(rows=rows, micro_batch=micro_batch, rank=r, world=world).micro_batches(0, consumed)
        for r in range(world)
    ]
    batches = [batch for rank in ranks for batch in rank]
    assert sorted(np.concatenate([*batches, []]).tolist()) == sorted(rows[consumed:].tolist())
    assert all(0 < len(batch) <= micro_batch for batch in batches)
    assert sum(len(batch) < micro_batch for batch in batches) <= 1
    assert max(map(len, ranks)) - min(map(len, ranks)) <= 1
    alone = EvalOrder(rows=rows, micro_batch=micro_batch).micro_batches()
    assert sum(len(EvalOrder(rows=rows, micro_batch=micro_batch, rank=r, world=world)) for r in range(world)) == len(
        alone
    )
    np.testing.assert_array_equal(np.concatenate([*alone, np.empty(0, np.int64)]), rows)


# Blocks


@settings(max_examples=60)
@given(st.integers(1, 60), st.integers(1, 40), st.floats(0.05, 1), SEEDS, EPOCHS)
def test_in_a_block_order_each_tar_is_read_in_one_short_stretch(shards, shard_rows, share, seed, epoch):
    """Its rows lie within two neighbouring windows, whatever fraction of them a split has."""
    rows = np.flatnonzero(np.random.default_rng(seed).random(shards * shard_rows) < share)
    if not len(rows):
        return
    order = TrainOrder(rows=rows, global_batch=1, micro_batch=1, seed=seed, shard_rows=shard_rows)
    used = order.global_batches(epoch).ravel()
    assert sorted(used.tolist()) == rows.tolist()
    window = WINDOW * shard_rows
    for shard in np.unique(rows // shard_rows):
        places = np.flatnonzero(used // shard_rows == shard)
        assert places[-1] // window - places[0] // window <= 1


def test_a_block_order_mixes_the_rows_of_its_tars_and_takes_the_tars_in_another_order_each_epoch():
    order = TrainOrder(rows=np.arange(64 * 64), global_batch=64, micro_batch=64, shard_rows=64)
    firsts = []
    for epoch in range(4):
        used = order.global_batches(epoch).ravel()
        tars = used // 64
        assert (tars[1:] == tars[:-1]).mean() == pytest.approx(1 / WINDOW, abs=0.03), "as if drawn from a window"
        assert (used[1:] > used[:-1]).mean() == pytest.approx(0.5, abs=0.03)
        assert all(len(np.unique(batch // 64)) == WINDOW for batch in used.reshape(-1, 64))
        firsts.append(tuple(dict.fromkeys(tars.tolist())))
        assert abs(np.corrcoef(firsts[-1], np.arange(64))[0, 1]) < 0.4
    assert len(set(firsts)) == 4
    together = [{tuple(sorted(first[i : i + WINDOW])) for i in range(0, 64, WINDOW)} for first in firsts]
    assert len(together[0] & together[1]) < 3, "other tars are mixed with each other"


def test_block_orders_are_the_same_in_every_version():
    order = TrainOrder(rows=np.arange(24), global_batch=12, micro_batch=6, seed=7, shard_rows=2)
    pinned = "22 9 8 12 23 13 20 21 18 1 16 4 5 0 19 17 7 6 11 10 2 3 14 15"
    assert " ".join(map(str, order.global_batches(3).ravel())) == pinned
    large = in_blocks(np.arange(0, 100_000, 3), 64, 5, 9)
    digest = "3026498dfc24cff278639619c72acf6f5d5f7e444f8a40e1d1e01cae24ec2f1c"
    assert hashlib.sha256(large.astype("<i8").tobytes()).hexdigest() == digest


# Draws


@settings(max_examples=50)
@given(SEEDS, EPOCHS, st.lists(st.integers(0, 400_000), min_size=1, max_size=60, unique=True), st.data())
def test_a_row_is_drawn_the_same_whatever_batch_it_is_in(seed, epoch, rows, data):
    augment = Augment()
    angles, flips = augment.draw(seed, epoch, np.array(rows))
    assert (angles.dtype, flips.dtype) == (np.float32, bool)
    i = data.draw(st.integers(0, len(rows) - 1))
    angle, flip = augment.draw(seed, epoch, np.array(rows[i : i + 1]))
    assert (angle[0], flip[0]) == (angles[i], flips[i])


@pytest.mark.parametrize(("seed", "epoch"), [(0, 0), (0, 1), (1, 0), (2**63 - 1, 99)])
def test_angles_are_uniform_flips_are_half_and_both_are_independent_of_each_other_epoch_and_seed(seed, epoch):
    angles, flips = Augment(degrees=15).draw(seed, epoch, np.arange(50_000))
    counts = np.histogram(angles, bins=20, range=(-15, 15))[0]
    assert counts.sum() == 50_000, "within ±15°"
    assert abs(counts / 2500 - 1).max() < 0.08
    assert flips.mean() == pytest.approx(0.5, abs=0.01)
    assert abs(np.corrcoef(angles, flips)[0, 1]) < 0.02
    assert abs(np.corrcoef(angles[1:], angles[:-1])[0, 1]) < 0.02, "neighbouring rows"
    for other in ((seed, epoch + 1), (seed ^ 1, epoch)):
        other_angles, other_flips = Augment().draw(*other, np.arange(50_000))
        assert abs(np.corrcoef(angles, other_angles)[0, 1]) < 0.02
        assert (flips == other_flips).mean() == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize(("flip", "share"), [(0.0, 0.0), (1.0, 1.0), (0.25, 0.25)])
def test_degrees_and_probability_are_those_asked_for(flip, share):
    angles, flips = Augment(degrees=3, flip=flip).draw(0, 0, np.arange(20_000))
    assert 2.99 < abs(angles).max() <= 3
    assert flips.mean() == pytest.approx(share, abs=0.02 if 0 < flip < 1 else 0)


def test_draws_are_the_same_in_every_version():
    angles, flips = Augment().draw(7, 3, np.array([0, 1, 377_109]))
    assert angles.tolist() == pytest.approx([9.45382, 13.01172, 1.42971], abs=1e-5)
    assert flips.tolist() == [False, True, False]
