"""Scores of multi-label predictions: arrays in, numbers out; pure numpy, no files.

A finding without positives or without negatives has no AUROC: it is NaN here, "undefined" in every table, and
never 0.5.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LARGEST = np.float32(1e30)
"""Scores beyond it, such as infinite ones, are compared as if they were it."""


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """Probabilities 1 / (1 + exp(-l)), float64 in [0, 1], same shape; no logit overflows."""
    return np.exp(log_sigmoid(logits))


def log_sigmoid(logits: np.ndarray) -> np.ndarray:
    """log σ(l) = -log(1 + exp(-l)), float64, at most 0, finite for every finite logit.

    log(1 - σ(l)) is log_sigmoid(-l).
    """
    return -np.logaddexp(0.0, -np.asarray(logits, np.float64))


def counts(targets: np.ndarray, mask: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Number of positives and of negatives among the unmasked entries of each finding, int64 (L,) each.

    targets: (N, L) in {0, 1}. mask: bool (N, L), True where an entry counts; None counts all.
    """
    positive = np.asarray(targets) > 0.5
    mask = np.ones(positive.shape, bool) if mask is None else mask
    return (positive & mask).sum(axis=0, dtype=np.int64), (~positive & mask).sum(axis=0, dtype=np.int64)


def auroc(scores: np.ndarray, targets: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    """Area under the ROC curve of each finding, float64 (L,) in [0, 1]; NaN where it is undefined.

    The probability that a positive scores above a negative, ties counting a half: U of Mann and Whitney over
    positives · negatives (Hanley & McNeil 1982, Radiology 143:29-36). Logits and probabilities score alike.

    scores: (N, L). targets: (N, L) in {0, 1}. mask: bool (N, L), True where an entry counts; None: all do.
    Undefined: no positive or no negative among the unmasked entries, or a NaN score among them.
    """
    scores, positive = np.asarray(scores), np.asarray(targets) > 0.5
    mask = np.ones(scores.shape, bool) if mask is None else mask
    columns = zip(scores.T, positive.T, mask.T, strict=True)
    return np.array([_auroc(s[m], p[m]) for s, p, m in columns], np.float64)


def _auroc(scores: np.ndarray, positive: np.ndarray) -> float:
    above, below = np.sort(scores[positive]), np.sort(scores[~positive])
    if not len(above) or not len(below) or np.isnan(scores).any():
        return float("nan")
    # Pairs won and pairs tied are counted in whole numbers, so ties are exact. Sorted queries halve the time.
    won = np.searchsorted(below, above, side="left").sum(dtype=np.int64)
    won_or_tied = np.searchsorted(below, above, side="right").sum(dtype=np.int64)
    return float(won + won_or_tied) / (2.0 * len(above) * len(below))


def compared(scores: np.ndarray) -> np.ndarray:
    """Scores as they are compared with a threshold: float32, at most LARGEST in size, NaN kept; same shape."""
    return np.clip(scores, -LARGEST, LARGEST).astype(np.float32)


def is_positive(scores: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """bool (N, L): the score (N, L) is at or above its finding's threshold (L,); False where either is NaN.

    The one place where scores meet thresholds. Both are rounded to float32, as logits are stored: numpy, torch and a file
    give the same verdict.
    """
    bounds = np.clip(thresholds, -2 * LARGEST, 2 * LARGEST).astype(np.float32)  # one above LARGEST: no score reaches it
    return compared(scores) >= bounds


@dataclass(frozen=True)
class AtThresholds:
    """How the verdicts of L findings compare with the targets: counts int64 (L,), ratios float64 (L,), NaN where undefined."""

    tp: np.ndarray
    """True positives."""
    fp: np.ndarray
    tn: np.ndarray
    fn: np.ndarray

    @property
    def sensitivity(self) -> np.ndarray:
        """TP / (TP + FN); undefined without positives."""
        return _ratio(self.tp, self.fn)

    @property
    def specificity(self) -> np.ndarray:
        """TN / (TN + FP); undefined without negatives."""
        return _ratio(self.tn, self.fp)

    @property
    def ppv(self) -> np.ndarray:
        """Positive predictive value TP / (TP + FP), at these rows' prevalence; undefined if no verdict is positive."""
        return _ratio(self.tp, self.fp)

    @property
    def npv(self) -> np.ndarray:
        """Negative predictive value TN / (TN + FN), at these rows' prevalence; undefined if no verdict is negative."""
        return _ratio(self.tn, self.fn)


def at_thresholds(
    scores: np.ndarray, targets: np.ndarray, mask: np.ndarray | None, thresholds: np.ndarray
) -> AtThresholds:
    """Counts of right and wrong verdicts of each finding, and sensitivity, specificity, PPV and NPV.

    Definitions as in Altman & Bland 1994, BMJ 308:1552 and 309:102. A score at or above the threshold is positive.

    scores: (N, L), logits or probabilities. targets: (N, L) in {0, 1}. mask: bool (N, L), True where an entry counts; None
    counts all. thresholds: (L,), on the scale of the scores; NaN: no verdict, all counts are 0 and all ratios undefined. A
    NaN score that counts gets no verdict, as in `Thresholds.verdicts`, and is in no count.
    """
    scores, actual, thresholds = np.asarray(scores), np.asarray(targets) > 0.5, np.asarray(thresholds, np.float64)
    counted = ~np.isnan(scores) & ~np.isnan(thresholds)
    if mask is not None:
        counted &= mask
    verdict = is_positive(scores, thresholds)
    cells = (verdict & actual, verdict & ~actual, ~verdict & ~actual, ~verdict & actual)
    return AtThresholds(*((cell & counted).sum(axis=0, dtype=np.int64) for cell in cells))


def _ratio(part: np.ndarray, rest: np.ndarray) -> np.ndarray:
    whole = part + rest
    return np.where(whole > 0, part / np.maximum(whole, 1), np.nan)


def bce(logits: np.ndarray, targets: np.ndarray, mask: np.ndarray | None = None) -> float:
    """Binary cross-entropy in nats, mean over the unmasked entries of all findings; NaN if there are none.

    logits: (N, L). targets: (N, L) in {0, 1}. mask: bool (N, L), True where an entry counts; None counts all.
    Each entry costs log(1 + exp(∓l)), so that no probability is rounded to 0 or 1.
    """
    logits = np.asarray(logits, np.float64)
    against = np.where(np.asarray(targets) > 0.5, -logits, logits)
    against = against.ravel() if mask is None else against[mask]  # first, so that a masked NaN stays unread
    with np.errstate(invalid="ignore"):  # an unmasked one gives NaN, as it should
        return float(np.logaddexp(0.0, against).mean()) if against.size else float("nan")


def mean_sd(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and sample standard deviation (n - 1 in the denominator) over K folds, float64 (L,) each.

    values: (K, L); NaN entries do not count. The mean is NaN without any entry, the deviation with fewer than two.
    """
    known = np.ma.masked_array(values, np.isnan(values), np.float64)
    return known.mean(axis=0).filled(np.nan), known.std(axis=0, ddof=1).filled(np.nan)


def over_findings(columns: Sequence[np.ndarray]) -> tuple[list[np.ndarray], int]:
    """Mean over findings of each column (K, L), as (K, 1); and how many findings it is over.

    Only findings that are defined in every fold of every column count: all columns average the same ones.
    """
    shared = ~np.isnan(np.concatenate(columns)).any(axis=0)
    if not shared.any():
        return [np.full((len(values), 1), np.nan) for values in columns], 0
    return [values[:, shared].mean(axis=1, keepdims=True) for values in columns], int(shared.sum())
