import hashlib
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cxrfast.errors import LoadError
from cxrfast.pipelines.order import WINDOW, Augment, EvalOrder, TrainOrder, balanced, in_blocks

SEEDS = st.integers(0, 2**63 - 1)
EPOCHS = st.integers(0, 10_000)


@st.composite
def train_orders(draw) -> dict:
    """Arguments of a TrainOrder on one rank, in blocks or not; rows are any distinct numbers."""
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
    return {
        "rows": rows,
        "global_batch": micro * accumulation,
        "micro_batch": micro,
        "seed": draw(SEEDS),
        "shard_rows": draw(st.sampled_from([None, 1, 2, 7, 64, 10**6])),
    }


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


@pytest.mark.parametrize("shard_rows", [None, 16, 1000])
def test_the_order_changes_with_seed_and_epoch_and_with_nothing_else(shard_rows):
    def order(seed: int, epoch: int) -> np.ndarray:
        made = TrainOrder(rows=np.arange(512), global_batch=32, micro_batch=8, seed=seed, shard_rows=shard_rows)
        return made.global_batches(epoch).ravel()

    np.testing.assert_array_equal(order(3, 4), order(3, 4))
    orders = [order(seed, epoch) for seed in (0, 1) for epoch in (0, 1, 2)]
    for i, one in enumerate(orders):
        assert (one == np.arange(512)).mean() < 0.03
        assert all((one == other).mean() < 0.03 for other in orders[:i])


@pytest.mark.parametrize("shard_rows", [None, 2, 100])
def test_over_many_epochs_every_row_is_dropped_about_equally_often(shard_rows):
    order = TrainOrder(rows=np.arange(40), global_batch=32, micro_batch=32, shard_rows=shard_rows)
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


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 80), st.integers(1, 9), st.integers(0, 9), st.integers(1, 5))
def test_an_evaluation_that_stopped_gives_the_rows_left_once(n, micro_batch, done, world):
    rows, consumed = np.arange(n) * 7, done * micro_batch
    ranks = [
        EvalOrder(rows=rows, micro_batch=micro_batch, rank=r, world=world).micro_batches(0, consumed)
        for r in range(world)
    ]
    left = np.concatenate([*(batch for rank in ranks for batch in rank), np.empty(0, np.int64)])
    assert sorted(left.tolist()) == rows[consumed:].tolist()


# Blocks


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 60), st.integers(1, 40), st.floats(0.05, 1), SEEDS, EPOCHS)
def test_in_a_block_order_each_tar_is_read_at_about_one_time(shards, shard_rows, share, seed, epoch):
    """Whatever share of its rows a split has: they are within two windows, and those next to each other."""
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


def test_a_block_order_is_another_order_than_the_global_one():
    order = TrainOrder(rows=np.arange(512), global_batch=32, micro_batch=8)
    for shard_rows in (1, 64, 512, 10**6):
        blocks = replace(order, shard_rows=shard_rows)
        assert (blocks.global_batches(0) == order.global_batches(0)).mean() < 0.03


def test_block_orders_are_the_same_in_every_version():
    order = TrainOrder(rows=np.arange(24), global_batch=12, micro_batch=6, seed=7, shard_rows=2)
    pinned = "22 9 8 12 23 13 20 21 18 1 16 4 5 0 19 17 7 6 11 10 2 3 14 15"
    assert " ".join(map(str, order.global_batches(3).ravel())) == pinned
    large = in_blocks(np.arange(0, 100_000, 3), 64, 5, 9)
    digest = "3026498dfc24cff278639619c72acf6f5d5f7e444f8a40e1d1e01cae24ec2f1c"
    assert hashlib.sha256(large.astype("<i8").tobytes()).hexdigest() == digest


@pytest.mark.parametrize("shard_rows", [0, -64])
def test_a_shard_without_rows_is_refused(shard_rows):
    with pytest.raises(LoadError, match=f"a shard cannot have {shard_rows} rows"):
        TrainOrder(rows=np.arange(100), global_batch=12, micro_batch=4, shard_rows=shard_rows)


# Balance


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(0, 10**6), max_size=120, unique=True), st.integers(1, 5), SEEDS, EPOCHS)
def test_each_group_gives_as_many_rows_as_the_smallest_has_and_they_keep_their_order(rows, groups, seed, epoch):
    rows = np.array(rows, np.int64)
    group = np.random.default_rng(seed).integers(groups, size=len(rows)) * 3 - 1
    chosen = balanced(rows, group, seed, epoch)
    assert chosen.dtype == np.int64
    places = [rows.tolist().index(row) for row in chosen.tolist()]
    assert places == sorted(set(places)), "every row once at most, in the order given"
    _, there = np.unique(group, return_counts=True)
    _, counts = np.unique(group[places], return_counts=True)
    assert counts.tolist() == [there.min()] * len(there) if len(rows) else len(chosen) == 0


def test_balance_is_drawn_anew_each_epoch_and_every_row_has_its_turn():
    rows, group = np.arange(200), np.arange(200) % 10 == 0
    counts = np.zeros(200, int)
    for epoch in range(400):
        chosen = balanced(rows, group, 5, epoch)
        np.testing.assert_array_equal(chosen, balanced(rows, group, 5, epoch))
        counts[chosen] += 1
    assert (counts[group] == 400).all()
    assert abs(counts[~group] / 400 - 20 / 180).max() < 0.07
    assert balanced(rows, group, 5, 0).tolist() != balanced(rows, group, 6, 0).tolist()


@pytest.mark.parametrize("shard_rows", [None, 16])
def test_an_order_may_be_made_of_balanced_rows_for_each_epoch(shard_rows):
    rows, positive = np.arange(150), np.arange(150) % 5 == 0
    order = TrainOrder(rows=rows, global_batch=20, micro_batch=5, shard_rows=shard_rows)
    seen = []
    for epoch in range(3):
        now = replace(order, rows=balanced(rows, positive, 0, epoch))
        used = np.concatenate(now.micro_batches(epoch))
        assert len(set(used.tolist())) == len(used) == 60
        assert positive[used].sum() == 30
        seen.append(set(used.tolist()))
    assert seen[0] != seen[1] != seen[2]


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
