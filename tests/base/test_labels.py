import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cxrfast.errors import RunError
from cxrfast.labels import BLANKS, POLICIES, UNLABELLED, targets

NAN = float("nan")
RAW = hnp.arrays(
    np.float32, hnp.array_shapes(min_dims=2, max_dims=2, max_side=12), elements=st.sampled_from([1.0, 0.0, -1.0, NAN])
)
UNCERTAIN = {"u_zeros": (0.0, True), "u_ones": (1.0, True), "u_ignore": (None, False)}


def expected(value: float, policy: str, labelled: bool) -> tuple[float | None, bool]:
    """Target (None: it does not matter) and whether it counts, for one entry."""
    if not labelled:
        return None, False
    if math.isnan(value):
        return 0.0, True
    return UNCERTAIN[policy] if value == -1 else (value, True)


@settings(max_examples=60)
@given(RAW, st.sampled_from(POLICIES))
def test_every_entry_becomes_what_its_policy_says(raw, policy):
    before = raw.copy()
    target, mask = targets(raw, policy)
    assert target.dtype == np.float32
    assert mask.dtype == bool
    assert target.shape == mask.shape == raw.shape
    assert np.isin(target, (0.0, 1.0)).all()
    np.testing.assert_array_equal(raw, before)
    for i, j in np.ndindex(raw.shape):
        value, counts = expected(float(raw[i, j]), policy, labelled=not np.isnan(raw[i]).all())
        assert mask[i, j] == counts
        assert value is None or target[i, j] == value


@settings(max_examples=100)
@given(st.data(), RAW, st.sampled_from(UNLABELLED))
def test_an_entry_counts_unless_a_policy_leaves_it_out(data, raw, unlabelled):
    """Against a plain implementation, entry by entry, with another policy for each column."""
    columns = raw.shape[1]
    policy, blank = (
        data.draw(st.lists(st.sampled_from(k), min_size=columns, max_size=columns)) for k in (POLICIES, BLANKS)
    )
    target, mask = targets(raw, policy, blank, unlabelled)
    assert np.isin(target, (0.0, 1.0)).all()
    for i, j in np.ndindex(raw.shape):
        left_out = False
        if all(math.isnan(value) for value in raw[i]) and unlabelled == "drop":
            left_out = True
        if math.isnan(raw[i, j]) and blank[j] == "ignore":
            left_out = True
        if raw[i, j] == -1 and policy[j] == "u_ignore":
            left_out = True
        assert mask[i, j] != left_out
        if not left_out:
            assert target[i, j] == (raw[i, j] == 1 or (raw[i, j] == -1 and policy[j] == "u_ones"))


def test_without_a_policy_for_blanks_they_are_negative_and_unlabelled_rows_do_not_count():
    raw = np.array([[1.0, NAN], [NAN, NAN], [-1.0, 0.0]])
    target, mask = targets(raw)
    assert mask.tolist() == [[True, True], [False, False], [True, True]]
    assert target.tolist() == [[1, 0], [0, 0], [0, 0]]
    assert targets(raw, blank="ignore")[1].tolist() == [[True, False], [False, False], [True, True]]
    assert targets(raw, unlabelled="negative")[1].all()
    assert targets(raw, blank=("negative", "ignore"), unlabelled="negative")[1].tolist() == [
        [True, False],
        [True, False],
        [True, True],
    ]
    with pytest.raises(RunError, match="policy for blank labels 'drop' is unknown: use one of negative, ignore"):
        targets(raw, blank="drop")
    with pytest.raises(RunError, match="policy for images without any label 'ignore' is unknown: use one of drop, neg"):
        targets(raw, unlabelled="ignore")


def test_uncertain_findings_are_negative_unless_said_otherwise_and_an_unknown_policy_is_refused():
    np.testing.assert_array_equal(targets(np.array([[-1.0, 1.0]]))[0], targets(np.array([[-1.0, 1.0]]), "u_zeros")[0])
    with pytest.raises(RunError, match="'u_maybe' is unknown: use one of u_zeros, u_ones, u_ignore"):
        targets(np.zeros((1, 1)), "u_maybe")


@pytest.mark.parametrize("value", [2.0, 0.5, -2.0, math.inf])
def test_a_value_that_means_nothing_is_refused_and_named(value):
    raw = np.array([[1.0, NAN], [0.0, value]])
    with pytest.raises(RunError, match=rf"{value}\].* only 1, 0, -1 and blank"):
        targets(raw)
