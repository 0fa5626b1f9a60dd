import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cxrfast.errors import RunError
from cxrfast.labels import POLICIES, targets

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


def test_uncertain_findings_are_negative_unless_said_otherwise_and_an_unknown_policy_is_refused():
    np.testing.assert_array_equal(targets(np.array([[-1.0, 1.0]]))[0], targets(np.array([[-1.0, 1.0]]), "u_zeros")[0])
    with pytest.raises(RunError, match="'u_maybe' is unknown: use one of u_zeros, u_ones, u_ignore"):
        targets(np.zeros((1, 1)), "u_maybe")


@pytest.mark.parametrize("value", [2.0, 0.5, -2.0, math.inf])
def test_a_value_that_means_nothing_is_refused_and_named(value):
    raw = np.array([[1.0, NAN], [0.0, value]])
    with pytest.raises(RunError, match=rf"{value}\].* only 1, 0, -1 and blank"):
        targets(raw)
