import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cxrfast.errors import LoadError
from cxrfast.pipelines.order import Augment, EvalOrder, TrainOrder

SEEDS = st.integers(0, 2**63 - 1)
EPOCHS = st.integers(0, 10_000)


@st.composite
def train_orders(draw) -> dict:
    """Arguments of a TrainOrder on one rank; rows are any distinct numbers."""
    micro, accumulation, steps = (
        draw(st.integers(1, 8)),
        draw(st.sampled_from([1, 2, 3, 4, 6, 8, 12])),
        draw(st.integers(1, 5)),
    )
    n = micro * accumulation * steps + draw(st.integers(0, micro * accumulation - 1))
    rows = (
        np.array(draw(st.lists(st.integers(0, 400_000), min_size=n, max_size=n, unique=True)), np.int64)
        if n < 60
        else np.arange(n, dtype=np.int64) * 3 + draw(st.integers(0, 9))
    )
    return {"rows": rows, "global_batch": micro * accumulation, "micro_batch": micro, "seed": draw(SEEDS)}


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


@settings(max_examples=80, deadline=None)
@given(train_orders(), EPOCHS)
def test_training_uses_no_row_twice_and_drops_less_than_a_global_batch(arguments, epoch):
    order, rows = TrainOrder(**arguments), arguments["rows"]
    batches = order.micro_batches(epoch)
    used = np.concatenate(batches)
    assert {batch.shape for batch in batches} == {(order.micro_batch,)}
    assert used.dtype == np.int64
    assert len(np.unique(used)) == len(used) == len(rows) - len(rows) % order.global_batch
    assert np.isin(used, rows).all()
    assert len(batches) == order.steps * order.accumulation


@settings(max_examples=80, deadline=None)
@given(train_orders(), EPOCHS, st.data())
def test_any_number_of_ranks_sees_the_micro_batches_of_one(arguments, epoch, data):
    alone = TrainOrder(**arguments).micro_batches(epoch)
    world = data.draw(st.sampled_from(divisors(arguments["global_batch"] // arguments["micro_batch"])))
    ranks = [TrainOrder(**arguments, rank=r, world=world).micro_batches(epoch) for r in range(world)]
    interleaved = [batch for together in zip(*ranks, strict=True) for batch in together]
    np.testing.assert_array_equal(interleaved, alone)


@settings(max_examples=50, deadline=None)
@given(train_orders(), EPOCHS)
def test_a_micro_batch_is_every_mth_row_of_its_global_batch(arguments, epoch):
    order = TrainOrder(**arguments)
    batches = order.micro_batches(epoch)
    for step, rows in enumerate(order.global_batches(epoch)):
        for j in range(order.accumulation):
            np.testing.assert_array_equal(batches[step * order.accumulation + j], rows[j :: order.accumulation])


@settings(max_examples=80, deadline=None)
@given(train_orders(), EPOCHS, st.data())
def test_a_run_that_stopped_goes_on_with_exactly_the_batches_left_on_any_number_of_ranks(arguments, epoch, data):
    order = TrainOrder(**arguments)
    done = data.draw(st.integers(0, order.steps))
    world = data.draw(st.sampled_from(divisors(order.accumulation)))
    rank = data.draw(st.integers(0, world - 1))
    resumed = TrainOrder(**arguments, rank=rank, world=world).micro_batches(epoch, consumed=done * order.global_batch)
    whole = TrainOrder(**arguments, rank=rank, world=world).micro_batches(epoch)
    assert len(resumed) == (order.steps - done) * order.accumulation // world
    for got, expected in zip(resumed, whole[len(whole) - len(resumed) :], strict=True):
        np.testing.assert_array_equal(got, expected)


def test_a_position_inside_a_global_batch_is_refused():
    order = TrainOrder(rows=np.arange(100), global_batch=12, micro_batch=4)
    with pytest.raises(LoadError, match="position 16 is not at the start of a global batch of 12"):
        order.micro_batches(0, consumed=16)


def test_the_order_changes_with_seed_and_epoch_and_with_nothing_else():
    def order(seed: int, epoch: int) -> np.ndarray:
        return TrainOrder(rows=np.arange(512), global_batch=32, micro_batch=8, seed=seed).global_batches(epoch).ravel()

    np.testing.assert_array_equal(order(3, 4), order(3, 4))
    orders = [order(seed, epoch) for seed in (0, 1) for epoch in (0, 1, 2)]
    for i, one in enumerate(orders):
        assert (one == np.arange(512)).mean() < 0.03
        assert all((one == other).mean() < 0.03 for other in orders[:i])


def test_over_many_epochs_every_row_is_dropped_about_equally_often():
    order = TrainOrder(rows=np.arange(40), global_batch=32, micro_batch=32)
    used = np.bincount(np.concatenate([order.global_batches(epoch).ravel() for epoch in range(1000)]), minlength=40)
    assert abs(used / 1000 - 0.8).max() < 0.06


@pytest.mark.parametrize(
    ("world", "divide"), [(5, "1, 2, 3, 4, 6, 12"), (8, "1, 2, 3, 4, 6, 12"), (24, "1, 2, 3, 4, 6, 12")]
)
def test_ranks_that_cannot_share_a_global_batch_are_refused_and_told_which_numbers_can(world, divide):
    with pytest.raises(LoadError, match=rf"{world} ranks cannot share the 12 micro-batches.*start {divide} ranks"):
        TrainOrder(rows=np.arange(100), global_batch=96, micro_batch=8, world=world)


@pytest.mark.parametrize("micro_batch", [0, -1, 5, 24])
def test_a_micro_batch_that_does_not_divide_the_global_batch_is_refused(micro_batch):
    with pytest.raises(LoadError, match=rf"micro-batch {micro_batch}: micro-batches that fit are 1, 2, 3, 4, 6, 12"):
        TrainOrder(rows=np.arange(100), global_batch=12, micro_batch=micro_batch)


def test_too_few_rows_for_one_global_batch_are_refused():
    with pytest.raises(LoadError, match="11 training rows do not fill one global batch of 12"):
        TrainOrder(rows=np.arange(11), global_batch=12, micro_batch=4)


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(0, 10**6), max_size=80, unique=True), st.integers(1, 20), st.integers(1, 8))
def test_evaluation_gives_every_row_once_to_one_rank(rows, micro_batch, world):
    rows = np.array(rows, np.int64)
    ranks = [EvalOrder(rows=rows, micro_batch=micro_batch, rank=r, world=world).micro_batches() for r in range(world)]
    batches = [batch for rank in ranks for batch in rank]
    assert sorted(np.concatenate([*batches, []]).tolist()) == sorted(rows.tolist())
    assert all(0 < len(batch) <= micro_batch for batch in batches)
    assert sum(len(batch) < micro_batch for batch in batches) <= 1
    assert max(map(len, ranks)) - min(map(len, ranks)) <= 1
    np.testing.assert_array_equal(
        np.concatenate([*EvalOrder(rows=rows, micro_batch=micro_batch).micro_batches(), np.empty(0, np.int64)]), rows
    )


# Draws


@settings(max_examples=50, deadline=None)
@given(SEEDS, EPOCHS, st.lists(st.integers(0, 400_000), min_size=1, max_size=60, unique=True), st.data())
def test_a_row_is_drawn_the_same_whatever_batch_it_is_in(seed, epoch, rows, data):
    augment = Augment()
    angles, flips = augment.draw(seed, epoch, np.array(rows))
    assert (angles.dtype, flips.dtype) == (np.float32, bool)
    i = data.draw(st.integers(0, len(rows) - 1))
    angle, flip = augment.draw(seed, epoch, np.array(rows[i : i + 1]))
    assert (angle[0], flip[0]) == (angles[i], flips[i])


@pytest.mark.parametrize(("seed", "epoch"), [(0, 0), (0, 1), (1, 0), (2**63 - 1, 99)])
def test_angles_are_uniform_flips_are_half_and_neither_tells_of_the_other(seed, epoch):
    angles, flips = Augment(degrees=15).draw(seed, epoch, np.arange(50_000))
    counts = np.histogram(angles, bins=20, range=(-15, 15))[0]
    assert counts.sum() == 50_000, "within ±15°"
    assert abs(counts / 2500 - 1).max() < 0.08
    assert flips.mean() == pytest.approx(0.5, abs=0.01)
    assert abs(np.corrcoef(angles, flips)[0, 1]) < 0.02
    assert abs(np.corrcoef(angles[1:], angles[:-1])[0, 1]) < 0.02, "neighbouring rows"


@pytest.mark.parametrize("other", [(1, 0), (0, 1), (1, 1)])
def test_another_seed_or_epoch_draws_otherwise(other):
    rows = np.arange(20_000)
    one, two = Augment().draw(0, 0, rows), Augment().draw(*other, rows)
    assert abs(np.corrcoef(one[0], two[0])[0, 1]) < 0.03
    assert (one[1] == two[1]).mean() == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize(("flip", "share"), [(0.0, 0.0), (1.0, 1.0), (0.25, 0.25)])
def test_degrees_and_probability_are_those_asked_for(flip, share):
    angles, flips = Augment(degrees=3, flip=flip).draw(0, 0, np.arange(20_000))
    assert 2.99 < abs(angles).max() <= 3
    assert flips.mean() == pytest.approx(share, abs=0.02 if 0 < flip < 1 else 0)


def test_draws_are_the_same_in_every_version():
    angles, flips = Augment().draw(7, 3, np.array([0, 1, 377_109]))
    assert angles.tolist() == pytest.approx([9.45382, 13.01172, 1.42971], abs=1e-5)
    assert flips.tolist() == [False, True, False]
