"""Scores against scikit-learn and torch, and at their edges."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn.metrics import roc_auc_score

from cxrfast import metrics


@st.composite
def scored(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores (N, L) full of ties, targets and a mask."""
    shape = draw(st.tuples(st.integers(1, 40), st.integers(1, 3)))
    levels = draw(st.integers(1, 8))
    scores = draw(hnp.arrays(np.int64, shape, elements=st.integers(-levels, levels)))
    dtype = draw(st.sampled_from((np.float32, np.float64)))
    return (
        scores.astype(dtype) / 3,
        draw(hnp.arrays(np.float32, shape, elements=st.sampled_from((0.0, 1.0)))),
        draw(hnp.arrays(bool, shape)),
    )


@given(scored())
@settings(max_examples=60)
def test_auroc_is_sklearns_and_undefined_without_both_classes(case):
    scores, targets, mask = case
    for used, m in ((mask, mask), (None, np.ones_like(mask))):
        for j, value in enumerate(metrics.auroc(scores, targets, used)):
            target, score = targets[m[:, j], j], scores[m[:, j], j]
            if len(np.unique(target)) < 2:
                assert np.isnan(value)
            else:
                assert value == pytest.approx(roc_auc_score(target, score), abs=1e-12)


@given(scored())
@settings(max_examples=30)
def test_masked_entries_change_nothing(case):
    scores, targets, mask = case
    other = np.where(mask, scores, np.nan), np.where(mask, targets, 1 - targets)
    np.testing.assert_array_equal(metrics.auroc(*other, mask), metrics.auroc(scores, targets, mask))
    assert metrics.bce(*other, mask) == pytest.approx(metrics.bce(scores, targets, mask), nan_ok=True)


def test_auroc_takes_infinite_scores_and_perfect_ranks_and_never_hides_a_nan():
    targets = np.array([[0], [0], [1], [1]])
    assert np.isnan(metrics.auroc(np.array([[0.1], [0.2], [np.nan], [0.3]]), targets)).all()
    assert metrics.auroc(np.array([[-np.inf], [0], [1], [np.inf]]), targets)[0] == 1.0
    assert metrics.auroc(np.array([[np.inf], [1], [0], [-np.inf]]), targets)[0] == 0.0
    assert metrics.auroc(np.zeros((4, 1)), targets)[0] == 0.5


def test_auroc_of_a_full_fold_is_what_theory_says():
    rng = np.random.default_rng(0)
    targets = rng.random((75_000, 14)) < 0.1
    value = metrics.auroc((rng.normal(size=targets.shape) + targets).astype(np.float32), targets)
    assert (abs(value - 0.76) < 0.02).all()  # Φ(1 / √2)


def test_bce_is_torchs_on_the_unmasked_entries():
    rng = np.random.default_rng(1)
    logits, targets, mask = rng.normal(0, 5, (50, 4)), rng.integers(0, 2, (50, 4)), rng.random((50, 4)) < 0.7
    ours = metrics.bce(logits, targets, mask)
    theirs = torch.nn.functional.binary_cross_entropy_with_logits(
        torch.from_numpy(logits[mask]), torch.from_numpy(targets[mask]).double()
    )
    assert ours == pytest.approx(float(theirs), rel=1e-12)
    assert metrics.bce(logits, targets) == metrics.bce(logits, targets, np.ones_like(mask))


def test_bce_stays_finite_and_is_nan_without_entries():
    extreme = np.array([[1000.0, -1000.0]])
    assert metrics.bce(extreme, np.array([[0, 1]])) == 1000.0
    assert metrics.bce(extreme, np.array([[1, 0]])) == 0.0
    assert np.isnan(metrics.bce(extreme, np.zeros((1, 2)), np.zeros((1, 2), bool)))


def test_sigmoid_and_its_logarithm_at_extremes():
    logits = np.array([-1000.0, -100.0, 0.0, 100.0, 1000.0])
    assert metrics.sigmoid(logits)[2] == pytest.approx(0.5)
    assert metrics.sigmoid(logits)[[0, 4]].tolist() == [0.0, 1.0]
    assert metrics.log_sigmoid(logits)[:2].tolist() == [-1000.0, -100.0]
    assert metrics.log_sigmoid(logits)[3] == pytest.approx(-np.exp(-100.0))


def test_mean_and_deviation_leave_out_the_undefined():
    values = np.array([[0.5, np.nan, np.nan], [0.7, 0.9, np.nan], [0.9, np.nan, np.nan]])
    mean, sd = metrics.mean_sd(values)
    np.testing.assert_allclose(mean, [0.7, 0.9, np.nan])
    np.testing.assert_allclose(sd, np.array([np.std([0.5, 0.7, 0.9], ddof=1), np.nan, np.nan]))


def test_counts_leave_out_the_masked():
    targets, mask = np.array([[1, 0], [1, 1], [0, 0]]), np.array([[True, True], [False, True], [True, True]])
    positives, negatives = metrics.counts(targets, mask)
    assert (positives.tolist(), negatives.tolist()) == ([1, 1], [1, 2])
