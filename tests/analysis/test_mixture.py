"""Weights of a mixture: its arithmetic and its optimum."""

import decimal
from decimal import Decimal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cxrfast import metrics
from cxrfast.analysis import mixture
from cxrfast.analysis.mixture import fit_weights, fit_weights_by_em, log_odds, mixture_bce, uniform, vote


def planted(
    quality: tuple[float, ...], n: int = 600, findings: int = 3, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Logits (S, N, L) that know the targets (N, L) by `quality`, calibrated: l = q (2t - 1) + noise of sd √(2q)."""
    rng = np.random.default_rng(seed)
    targets = (rng.random((n, findings)) < 0.3).astype(np.float32)
    noise = rng.normal(size=(len(quality), n, findings))
    q = np.array(quality)[:, None, None]
    return q * (2 * targets - 1) + np.sqrt(2 * q) * noise + np.log(0.3 / 0.7), targets


cases = st.tuples(st.integers(2, 4), st.integers(0, 1000), st.sampled_from((0.5, 2.0, 20.0)))


@given(cases)
@settings(max_examples=8)
def test_weights_are_probabilities_and_em_is_never_worse_than_the_schedule(case):
    scales, seed, spread = case
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(scales, 120, 4)) * spread
    targets, mask = rng.integers(0, 2, (120, 4)), rng.random((120, 4)) < 0.9
    fitted, optimum = fit_weights(logits, targets, mask), fit_weights_by_em(logits, targets, mask)
    for weights in (fitted, optimum):
        assert weights.shape == (4, scales)
        assert (weights >= 0).all()
        np.testing.assert_allclose(weights.sum(axis=1), 1, atol=1e-12)
    losses = [mixture_bce(logits, targets, mask, w) for w in (uniform(logits), fitted, optimum)]
    assert (losses[2] <= losses[1] + 1e-6).all()  # what EM promises
    assert (losses[1] <= losses[0] + 1e-6).all()  # a fit is not worse than its start


def test_the_schedule_comes_within_two_hundredths_of_the_optimum():
    logits, targets = planted((0.3, 0.8, 1.5, 2.0), n=2000)
    fitted, optimum = (solve(logits, targets) for solve in (fit_weights, fit_weights_by_em))
    gap = mixture_bce(logits, targets, None, fitted) - mixture_bce(logits, targets, None, optimum)
    assert (gap >= -1e-6).all()
    assert (gap < 0.02).all()


def test_em_finds_what_a_grid_finds():
    logits, targets = planted((1.0, 1.4), n=400, findings=1)
    grid = np.linspace(0, 1, 401)
    losses = [mixture_bce(logits, targets, None, np.array([[w, 1 - w]]))[0] for w in grid]
    optimum = fit_weights_by_em(logits, targets)
    assert 0.05 < optimum[0, 0] < 0.95
    assert optimum[0, 0] == pytest.approx(grid[np.argmin(losses)], abs=0.02)
    assert mixture_bce(logits, targets, None, optimum)[0] <= min(losses) + 1e-6


def test_the_start_of_the_fit_is_voting_exactly():
    logits, targets = planted((0.5, 1.0, 2.0))
    start = fit_weights(logits, targets, epochs=0)
    np.testing.assert_array_equal(start, uniform(logits))
    np.testing.assert_allclose(metrics.sigmoid(vote(logits)), metrics.sigmoid(logits).mean(axis=0), rtol=1e-12)


def test_a_planted_better_scale_gets_the_largest_weight():
    for best in range(3):
        quality = [0.3, 0.3, 0.3]
        quality[best] = 3.0
        logits, targets = planted(tuple(quality))
        assert (fit_weights(logits, targets).argmax(axis=1) == best).all()
        assert (fit_weights_by_em(logits, targets).argmax(axis=1) == best).all()


def test_permuting_scales_permutes_weights_and_findings_do_not_influence_each_other():
    logits, targets = planted((0.4, 0.9, 1.8))
    order = [2, 0, 1]
    for solve in (fit_weights, fit_weights_by_em):
        weights = solve(logits, targets)
        np.testing.assert_allclose(solve(logits[order], targets), weights[:, order], atol=1e-6)
        np.testing.assert_allclose(solve(logits[:, :, [1]], targets[:, [1]]), weights[[1]], atol=1e-9)


def test_masked_rows_change_nothing():
    logits, targets = planted((0.4, 1.5))
    mask = np.arange(len(targets))[:, None] % 3 + np.zeros(targets.shape, int) > 0
    other, kept = np.where(mask, targets, 1 - targets), mask[:, 0]
    for solve in (fit_weights, fit_weights_by_em):
        weights = solve(logits, targets, mask)
        np.testing.assert_array_equal(weights, solve(logits, other, mask))
        np.testing.assert_allclose(weights, solve(logits[:, kept], targets[kept]), atol=1e-8)


def test_findings_without_both_classes_keep_equal_weights():
    logits, targets = planted((0.4, 1.5), findings=4)
    targets[:, 0], targets[:, 1] = 0, 1
    mask = np.ones(targets.shape, bool)
    mask[targets[:, 2] == 1, 2] = False
    for solve in (fit_weights, fit_weights_by_em):
        weights = solve(logits, targets, mask)
        np.testing.assert_array_equal(weights[:3], 0.5)
        assert weights[3, 0] != 0.5
        np.testing.assert_array_equal(solve(logits[:, :, :1], targets[:, :1]), 0.5)


def test_extreme_logits_give_finite_values():
    rng = np.random.default_rng(0)
    logits = rng.choice([-100.0, 100.0, -1000.0, 1000.0], size=(3, 200, 2))
    targets = rng.integers(0, 2, (200, 2))
    for solve in (fit_weights, fit_weights_by_em):
        weights = solve(logits, targets)
        assert np.isfinite(weights).all()
        assert np.isfinite(mixture_bce(logits, targets, None, weights)).all()
        assert np.isfinite(log_odds(logits, weights)).all()
    np.testing.assert_array_equal(mixture_bce(logits[:1], np.ones((200, 2)), None, np.ones((2, 1))) > 0, True)


def test_the_loss_is_that_of_the_combined_probabilities():
    logits, targets = planted((0.4, 1.5))
    weights = np.array([[0.2, 0.8], [1.0, 0.0], [0.5, 0.5]])
    p = metrics.sigmoid(log_odds(logits, weights))
    np.testing.assert_allclose(p, np.einsum("snl,ls->nl", metrics.sigmoid(logits), weights), rtol=1e-12)
    np.testing.assert_allclose(
        mixture_bce(logits, targets, None, weights),
        -np.where(targets > 0, np.log(p), np.log1p(-p)).mean(axis=0),
        rtol=1e-10,
    )
    assert np.isnan(mixture_bce(logits, targets, np.zeros(targets.shape, bool), weights)).all()


def exact_log_odds(logits: np.ndarray, weights: np.ndarray) -> list[Decimal]:
    """Log-odds of a mixture to 80 digits, from logits (S, N) and weights (S,)."""
    with decimal.localcontext() as context:
        context.prec = 80
        found = []
        for row in logits.T:
            terms = [(Decimal(float(w)), Decimal(float(x))) for w, x in zip(weights, row, strict=True)]
            p, q = (sum(w / (1 + (sign * x).exp()) for w, x in terms) for sign in (-1, 1))
            found.append(p.ln() - q.ln())
        return found


@pytest.mark.parametrize("around", [(40, 80), (-80, -40), (-3, 3), (300, 900)])
@pytest.mark.parametrize("weights", [(1 / 3, 1 / 3, 1 / 3), (0.7, 0.3, 0.0)])
def test_log_odds_and_their_order_are_those_of_exact_arithmetic(around, weights):
    logits = np.random.default_rng(0).uniform(*around, (3, 100, 1)).astype(np.float32)
    found = log_odds(logits, np.array([weights]))[:, 0]
    expected = exact_log_odds(logits[:, :, 0], np.array(weights))
    np.testing.assert_allclose(found, np.array(expected, np.float64), rtol=1e-14, atol=1e-15)
    assert np.argsort(found).tolist() == sorted(range(100), key=expected.__getitem__)


@pytest.mark.parametrize("sign", [1, -1])
def test_very_sure_scales_are_not_tied_by_voting_or_stacking(sign):
    """Each scale ranks all positives above all negatives, from 40 to 80: so must their mixture."""
    targets = np.repeat([0, 1], 50)[:, None]
    logits = np.sort(sign * np.random.default_rng(1).uniform(40, 80, (3, 100, 1)), axis=1)
    assert metrics.auroc(metrics.sigmoid(logits[0]), targets)[0] == (0.5 if sign > 0 else 1.0)
    for scores in (vote(logits), log_odds(logits, np.array([[0.6, 0.3, 0.1]]))):
        assert metrics.auroc(scores, targets)[0] == 1.0
        assert len(np.unique(scores)) == 100


def test_a_vote_does_not_depend_on_which_scale_gave_which_logit():
    logits = np.random.default_rng(2).normal(size=(5, 200, 2)) * 20
    np.testing.assert_array_equal(vote(logits), vote(logits[[3, 0, 4, 2, 1]]))


def test_scales_that_are_all_but_equal_leave_em_no_curvature_and_it_ends():
    for seed in range(300):
        rng = np.random.default_rng(seed)
        targets = (rng.random((rng.integers(4, 40), 1)) < 0.5).astype(float)
        targets[0], targets[1] = 1, 0
        one = rng.normal(0, 1e-3, targets.shape)
        other = one + rng.choice([1, -1]) * 10.0 ** -rng.uniform(3, 7) * (2 * targets - 1)
        logits = np.stack([one, other]).astype(np.float32)
        best = fit_weights_by_em(logits, targets)
        np.testing.assert_allclose(best.sum(axis=1), 1)
        assert best.min() >= 0
        loss = mixture_bce(logits, targets, None, best)
        assert (loss <= mixture_bce(logits, targets, None, uniform(logits)) + 1e-12).all()


@pytest.mark.parametrize("seed", range(40))
def test_no_weights_are_better_than_the_optimum_by_more_than_the_gap(seed):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(rng.integers(2, 6), rng.integers(9, 400), 1)) * rng.choice([0.1, 1.0, 5.0, 40.0])
    targets = (rng.random(logits.shape[1:]) < rng.choice([0.05, 0.5])).astype(np.float64)
    targets[:2, 0] = 0, 1
    if seed % 2:
        logits[0] += 3 * (2 * targets - 1)  # one scale that knows more
    if seed % 3 == 0:
        logits[1] = logits[0]
    bce = mixture_bce(logits, targets, None, fit_weights_by_em(logits, targets))
    others = rng.dirichlet(np.full(len(logits), 0.3), size=300)
    assert min(mixture_bce(logits, targets, None, w[None])[0] for w in others) >= bce[0] - mixture.GAP
    assert mixture_bce(logits, targets, None, fit_weights(logits, targets))[0] >= bce[0] - mixture.GAP


@pytest.mark.parametrize("spread", [1.0, 5.0])
def test_the_fit_is_that_of_torch_with_adam_and_exponential_decay(spread):
    rng = np.random.default_rng(4)
    logits, targets = spread * rng.normal(size=(3, 400, 2)), (rng.random((400, 2)) < 0.3).astype(np.float32)
    mask = rng.random((400, 2)) < 0.8
    probabilities, target = torch.from_numpy(logits).sigmoid(), torch.from_numpy(targets).double()
    share = torch.from_numpy(mask / mask.sum(axis=0))
    v = torch.zeros((2, 3), dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.Adam([v], lr=mixture.LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimiser, mixture.DECAY)
    for _ in range(mixture.EPOCHS):
        optimiser.zero_grad()
        mixed = torch.einsum("snl,ls->nl", probabilities, torch.softmax(v, dim=1))
        (share * torch.nn.functional.binary_cross_entropy(mixed, target, reduction="none")).sum().backward()
        optimiser.step()
        schedule.step()
    np.testing.assert_allclose(fit_weights(logits, targets, mask), torch.softmax(v.detach(), dim=1).numpy(), rtol=1e-9)


def test_log_odds_do_not_depend_on_how_many_rows_are_computed_at_a_time(monkeypatch):
    rng = np.random.default_rng(5)
    logits, weights = rng.normal(size=(3, 50, 2)).astype(np.float32), np.full((2, 3), 1 / 3)
    whole = log_odds(logits, weights)
    monkeypatch.setattr(mixture, "BLOCK", 7)
    np.testing.assert_array_equal(log_odds(logits, weights), whole)
    assert log_odds(logits[:, :0], weights).shape == (0, 2)
