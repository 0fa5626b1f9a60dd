"""Thresholds against scikit-learn's roc_curve and against trying every one; rules, verdicts and the stored form."""

import json
import re

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn.metrics import roc_curve

from cxrfast import metrics
from cxrfast.errors import RunError
from cxrfast.thresholds import MARGIN, YOUDEN, Rule, Thresholds, choose, in_words, mean_over_folds

RULES = [YOUDEN, *(Rule(kind=kind, value=v) for kind in ("sensitivity", "specificity") for v in (0.1, 0.5, 0.9, 1.0))]

scores = st.one_of(
    st.integers(-4, 4).map(float),
    st.floats(width=32, allow_nan=False),
    st.sampled_from([1.0, float(np.nextafter(np.float32(1), np.float32(2)))]),
)


@st.composite
def scored(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits (N, L) with ties, neighbours, extremes and infinities; targets; a mask."""
    shape = draw(st.tuples(st.integers(1, 25), st.integers(1, 3)))
    return (
        draw(hnp.arrays(draw(st.sampled_from((np.float32, np.float64))), shape, elements=scores)),
        draw(hnp.arrays(np.float32, shape, elements=st.sampled_from((0.0, 1.0)))),
        draw(hnp.arrays(bool, shape)),
    )


def every_split(scores: np.ndarray, positive: np.ndarray) -> list[tuple[float, float, np.ndarray]]:
    """(sensitivity, specificity, verdicts) of each way to split the scores by a threshold, thresholds descending."""
    bounds = [np.inf, *sorted(set(scores.tolist()), reverse=True)]
    verdicts = [np.isin(scores, [s for s in set(scores.tolist()) if s >= bound]) for bound in bounds]
    return [
        (float((v & positive).sum() / positive.sum()), float((~v & ~positive).sum() / (~positive).sum()), v)
        for v in verdicts
    ]


@given(scored(), st.sampled_from(RULES))
@settings(max_examples=150)
def test_the_threshold_is_the_one_that_trying_all_of_them_finds(case, rule):
    logits, targets, mask = case
    found = choose(logits, targets, mask, rule)
    verdicts = found.verdicts(logits)
    for j, threshold in enumerate(found.logits):
        seen, positive = metrics.compared(logits[mask[:, j], j]), targets[mask[:, j], j] > 0.5
        assert (found.positives[j], found.negatives[j]) == (positive.sum(), (~positive).sum())
        if not positive.any() or positive.all():
            assert threshold is None
            continue
        splits = every_split(seen, positive)
        match rule.kind:
            case "youden":
                best = max(round(se + sp - 1, 12) for se, sp, _ in splits)
                wanted = next(s for s in splits if round(s[0] + s[1] - 1, 12) == best) if best > 0 else None
            case "sensitivity":
                wanted = next(s for s in splits if s[0] >= rule.value)
            case "specificity":
                wanted = [s for s in splits if s[1] >= rule.value][-1]
        if wanted is None:
            assert threshold is None
            assert found.sensitivity[j] is None
            assert np.isnan(verdicts[:, j]).all()
            continue
        np.testing.assert_array_equal(verdicts[mask[:, j], j] == 1, wanted[2])
        assert (found.sensitivity[j], found.specificity[j]) == wanted[:2]
        assert np.float32(threshold) == threshold


@given(scored())
@settings(max_examples=60)
def test_youdens_threshold_is_the_first_maximum_of_sklearns_curve(case):
    logits, targets, mask = case
    logits = np.clip(logits, -100, 100)  # scikit-learn takes no infinite score
    found = choose(logits, targets, mask)
    for j, threshold in enumerate(found.logits):
        seen, positive = metrics.compared(logits[mask[:, j], j]), targets[mask[:, j], j] > 0.5
        if threshold is None:
            continue
        fpr, tpr, bounds = roc_curve(positive, seen, drop_intermediate=False)
        best = np.argmax(np.round(tpr - fpr, 12))
        np.testing.assert_array_equal(seen >= threshold, seen >= bounds[best])


@given(scored(), st.sampled_from(RULES))
@settings(max_examples=60)
def test_masked_entries_and_the_order_of_rows_change_no_threshold(case, rule):
    logits, targets, mask = case
    other = np.where(mask, logits, np.nan), np.where(mask, targets, 1 - targets)
    order = np.random.default_rng(len(logits)).permutation(len(logits))
    assert choose(*other, mask, rule) == choose(logits, targets, mask, rule)
    assert choose(logits[order], targets[order], mask[order], rule) == choose(logits, targets, mask, rule)


@given(scored(), st.sampled_from(RULES))
@settings(max_examples=60)
@example(
    (np.array([[1.0], [np.nextafter(np.float32(1), np.float32(2))]]), np.array([[0.0], [1]]), np.ones((2, 1), bool)),
    YOUDEN,
)
def test_numpy_torch_and_either_precision_give_the_same_verdict(case, rule):
    logits, targets, mask = case
    found = choose(logits, targets, mask, rule)
    verdicts = found.verdicts(logits)
    single = np.clip(logits, -1e30, 1e30).astype(np.float32)
    for j, threshold in enumerate(found.logits):
        if threshold is not None:
            for dtype in (np.float32, np.float64):
                np.testing.assert_array_equal(single[:, j].astype(dtype) >= dtype(threshold), verdicts[:, j] == 1)
            compared = torch.from_numpy(single[:, j]) >= threshold
            np.testing.assert_array_equal(compared.numpy(), verdicts[:, j] == 1)


def test_a_threshold_is_halfway_so_that_noise_changes_no_verdict():
    logits, targets = np.array([[-2.0], [-1], [3], [4]]), np.array([[0], [0], [1], [1]])
    found = choose(logits, targets, None)
    assert found.logits == (1.0,)
    assert (found.sensitivity, found.specificity) == ((1.0,), (1.0,))
    np.testing.assert_array_equal(found.verdicts(logits), targets)
    np.testing.assert_array_equal(found.verdicts(np.array([[1.0]])), [[1.0]])  # at the threshold: positive


def test_beyond_the_last_row_a_threshold_keeps_a_margin():
    logits, targets = np.array([[0.0], [1], [2]]), np.array([[1], [0], [0]])
    every = choose(logits, targets, None, Rule(kind="sensitivity", value=1.0))
    none = choose(logits, targets, None, Rule(kind="specificity", value=1.0))
    assert every.logits == (pytest.approx(-MARGIN),)
    assert none.logits == (pytest.approx(2 + MARGIN),)
    assert (every.specificity, none.sensitivity) == ((0.0,), (0.0,))


def test_findings_without_both_classes_or_without_any_information_get_no_verdict():
    logits = np.array([[0.0, 0, 0, 1, 5], [1, 1, 1, 0, 5], [2, 2, 2, 0, 5]])
    targets = np.array([[0, 1, 0, 0, 0], [0, 1, 1, 1, 1], [0, 1, 1, 1, 1]])
    mask = np.array([[1, 1, 1, 1, 1], [1, 1, 0, 1, 1], [1, 1, 0, 1, 1]], bool)  # masks both positives of the third
    found = choose(logits, targets, mask)
    assert found.logits == (None,) * 5  # the fourth ranks backwards, the fifth not at all
    assert (found.positives, found.negatives) == ((0, 3, 0, 2, 2), (3, 0, 1, 1, 1))
    assert np.isnan(found.verdicts(logits)).all()
    assert in_words(found.verdicts(logits)).tolist() == [[""] * 5] * 3
    wanted = choose(logits, targets, mask, Rule(kind="sensitivity", value=0.9))
    assert [threshold is None for threshold in wanted.logits] == [True, True, True, False, False]


def test_infinite_logits_are_ranked_and_a_nan_is_refused():
    logits, targets = np.array([[-np.inf], [0], [np.inf]]), np.array([[0], [0], [1]])
    found = choose(logits, targets, None)
    np.testing.assert_array_equal(found.verdicts(logits), targets)
    backwards = choose(-logits, targets, None, Rule(kind="specificity", value=1.0))
    np.testing.assert_array_equal(backwards.verdicts(-logits), np.zeros((3, 1)))
    with pytest.raises(RunError, match="NaN"):
        choose(np.array([[np.nan], [1]]), np.array([[0], [1]]), None)
    np.testing.assert_array_equal(found.verdicts(np.array([[np.nan]])), [[np.nan]])


def test_a_wanted_value_is_met_exactly_where_a_fraction_equals_it():
    logits, targets = np.arange(20.0)[:, None], np.array([0] * 10 + [1] * 10)[:, None]
    assert choose(logits, targets, None, Rule(kind="sensitivity", value=0.9)).logits == (10.5,)
    assert choose(logits, targets, None, Rule(kind="specificity", value=0.3)).logits == (2.5,)


@given(scored(), hnp.arrays(np.float64, 3, elements=st.one_of(scores, st.just(np.nan))))
@settings(max_examples=80)
def test_counts_and_ratios_at_thresholds_are_those_of_counting_by_hand(case, thresholds):
    logits, targets, mask = case
    thresholds = thresholds[: logits.shape[1]]
    found = metrics.at_thresholds(logits, targets, mask, thresholds)
    for j in range(logits.shape[1]):
        counts = dict.fromkeys(("tp", "fp", "tn", "fn"), 0)
        for score, target, counted in zip(metrics.compared(logits[:, j]), targets[:, j], mask[:, j], strict=True):
            if counted and not np.isnan(thresholds[j]):
                is_positive = float(score) >= float(np.float32(np.clip(thresholds[j], -2e30, 2e30)))
                counts[f"{'t' if is_positive == bool(target) else 'f'}{'p' if is_positive else 'n'}"] += 1
        assert {name: getattr(found, name)[j] for name in counts} == counts
        tp, fp, tn, fn = counts.values()
        ratios = {"sensitivity": (tp, fn), "specificity": (tn, fp), "ppv": (tp, fp), "npv": (tn, fn)}
        for name, (part, rest) in ratios.items():
            expected = part / (part + rest) if part + rest else np.nan
            assert getattr(found, name)[j] == pytest.approx(expected, nan_ok=True)


def test_a_score_that_is_nan_has_no_verdict_and_is_in_no_count():
    found = metrics.at_thresholds(np.array([[np.nan], [1.0]]), np.array([[0], [1]]), None, np.array([0.0]))
    assert [int(n[0]) for n in (found.tp, found.fp, found.tn, found.fn)] == [1, 0, 0, 0]
    assert np.isnan(found.specificity[0])
    assert np.isnan(found.npv[0])


# Rules


@pytest.mark.parametrize("text", ["youden", "sensitivity=0.9", "specificity=0.95", "sensitivity=1.0"])
def test_a_rule_is_written_as_it_is_read(text):
    assert str(Rule.parse(text)) == text


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "use youden, sensitivity=VALUE or specificity=VALUE"),
        ("Youden", "'Youden' is not a rule"),
        ("youden=0.5", "takes no value"),
        ("sensitivity", "needs a value"),
        ("sensitivity=", "'' is not a number"),
        ("sensitivity=90%", "'90%' is not a number"),
        ("sensitivity=90", "above 0 and at most 1, such as sensitivity=0.9, not 90.0"),
        ("specificity=0", "above 0"),
        ("specificity=-0.5", "above 0"),
        ("specificity=nan", "above 0"),
        ("ppv=0.9", "'ppv=0.9' is not a rule"),
    ],
)
def test_other_text_is_no_rule(text, why):
    with pytest.raises(RunError, match=re.escape(why)):
        Rule.parse(text)


# The stored form


@given(scored(), st.sampled_from(RULES))
@settings(max_examples=60)
def test_thresholds_are_the_same_after_json(case, rule):
    found = choose(*case, rule)
    assert Thresholds.from_json(json.loads(json.dumps(found.json(), allow_nan=False))) == found


GOOD = choose(np.array([[0.0, 0], [1, 1]]), np.array([[0, 0], [1, 0]]), None).json()


@pytest.mark.parametrize(
    "change",
    [
        {"rule": "none"},
        {"rule": 1},
        {"logits": [0.5]},
        {"logits": [0.5, "1"]},
        {"logits": [float("nan"), None]},
        {"logits": [float("inf"), None]},
        {"positives": [1, -1]},
        {"positives": [1, 0.5]},
        {"sensitivity": [1.5, None]},
        {"specificity": None},
    ],
)
def test_damaged_json_is_refused(change):
    assert Thresholds.from_json(GOOD).logits == (0.5, None)
    with pytest.raises((ValueError, RunError)):
        Thresholds.from_json({**GOOD, **change})


@pytest.mark.parametrize("value", [None, [], "youden", {}, {"rule": "youden"}])
def test_json_of_another_kind_is_refused(value):
    with pytest.raises(ValueError, match=r"Expected|missing"):
        Thresholds.from_json(value)


# Folds


def test_the_mean_over_folds_takes_the_folds_that_have_a_threshold():
    one = choose(np.array([[0.0, 0], [1, 1]]), np.array([[0, 0], [1, 0]]), None)
    two = choose(np.array([[2.0, 0], [3, 1]]), np.array([[0, 0], [1, 1]]), None)
    mean = mean_over_folds([one, two])
    assert mean.logits == (1.5, 0.5)
    assert (mean.positives, mean.negatives) == ((2, 1), (2, 3))
    assert (mean.sensitivity, mean.specificity) == ((1.0, 1.0), (1.0, 1.0))
    assert mean_over_folds([one]) == one
    assert mean_over_folds([one, one]).logits == (0.5, None)
    with pytest.raises(RunError, match=re.escape("sensitivity=0.9, youden")):
        mean_over_folds([one, choose(np.zeros((2, 2)), np.eye(2), None, Rule.parse("sensitivity=0.9"))])
