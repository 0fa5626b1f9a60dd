"""How good a model is on its own test rows, for its card: AUROC by scale and of the ensemble, and what its thresholds do.

In: the runs' stored logits and labels. Each fold's networks answer for that fold's test rows only, so no row that a network was
trained on counts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from cxrfast import metrics
from cxrfast.analysis import mixture
from cxrfast.analysis.join import join_logits
from cxrfast.analysis.scores import folds_text, mean_note, score_rows, undefined_note
from cxrfast.analysis.thresholds import COUNTS, RATIOS
from cxrfast.runs.run import Run
from cxrfast.tables import Table
from cxrfast.thresholds import YOUDEN, Rule, Thresholds, choose, mean_over_folds

UNDEFINED = "–"


@dataclass(frozen=True)
class Scorecard:
    labels: tuple[str, ...]
    folds: tuple[int, ...]
    scales: dict[int, np.ndarray]
    """By scale: test AUROC, float64 (K, L), NaN where undefined."""
    ensemble: np.ndarray
    """Test AUROC of the ensemble of scales, float64 (K, L)."""
    thresholds: Thresholds
    """Mean of the folds' ensembles; chosen on validation rows."""
    at: tuple[metrics.AtThresholds, ...]
    """By fold: its verdicts on its test rows, by its own threshold."""


def score(runs: Mapping[int, Sequence[Run]], weights: Mapping[int, np.ndarray], rule: Rule = YOUDEN) -> Scorecard:
    """Scores of an ensemble. runs: by fold, those of each scale. weights: by fold, float64 (L, S)."""
    of_scales: list[np.ndarray] = []
    of_ensemble, thresholds, at = [], [], []
    for fold, members in runs.items():
        logits, targets, mask = join_logits(members, "val")
        thresholds.append(choose(mixture.log_odds(logits, weights[fold]), targets, mask, rule))
        logits, targets, mask = join_logits(members, "test")
        mixed = mixture.log_odds(logits, weights[fold])
        of_scales.append(np.stack([metrics.auroc(one, targets, mask) for one in logits]))
        of_ensemble.append(metrics.auroc(mixed, targets, mask))
        at.append(metrics.at_thresholds(mixed, targets, mask, thresholds[-1].array))
    by_scale = np.stack(of_scales)  # (K, S, L)
    config = next(iter(runs.values()))[0].config
    scales = [run.config.scale for run in next(iter(runs.values()))]
    return Scorecard(
        config.labels,
        tuple(runs),
        {scale: by_scale[:, s] for s, scale in enumerate(scales)},
        np.stack(of_ensemble),
        mean_over_folds(thresholds),
        tuple(at),
    )


def auroc_table(card: Scorecard, heads: Sequence[str]) -> Table:
    """AUROC of the test rows. heads: of the scales, with the signs of their footnotes."""
    columns = list(card.scales.values())
    if len(columns) > 1:
        columns, heads = [*columns, card.ensemble], [*heads, "Ensemble"]
    spread = "mean ± standard deviation over " if len(card.folds) > 1 else ""
    notes = [
        f"Area under the ROC curve on test rows, {spread}{folds_text(card.folds)}; the best of each finding is bold.",
        mean_note(card.labels, columns),
        undefined_note(card.labels, columns, "test"),
    ]
    return Table(
        "",
        ["Finding", *heads],
        [[label, *cells] for label, cells in score_rows(card.labels, columns)],
        "\n".join(filter(None, notes)),
        total=True,
    )


def thresholds_table(card: Scorecard) -> Table:
    """The ensemble's thresholds as probabilities, their sensitivity, specificity and predictive values as means over folds, and
    counts as sums over folds: what `cxrfast thresholds` prints for the ensemble."""
    known = card.thresholds
    means = [metrics.mean_sd(np.stack([getattr(one, name) for one in card.at]))[0] for name in RATIOS]
    sums = [np.sum([getattr(one, name) for one in card.at], axis=0) for name in COUNTS]
    heads = ["Threshold", "Val. sensitivity", "Val. specificity", "Test sensitivity", "Test specificity"]
    rows = []
    for j in (j for j, threshold in enumerate(known.logits) if threshold is not None):
        ratios = [known.sensitivity[j], known.specificity[j]]
        ratios += [values[j] for values in means]
        counts = " / ".join(f"{values[j]:,}" for values in sums)
        rows.append([card.labels[j], f"{metrics.sigmoid(known.array[j]):.3g}", *map(_percent, ratios), counts])
    without = [label for label, threshold in zip(card.labels, known.logits, strict=True) if threshold is None]
    note = f"No threshold, since validation rows allow none: {', '.join(without)}." if without else ""
    return Table("", ["Finding", *heads, "Test PPV", "Test NPV", "TP / FP / TN / FN"], rows, note)


def _percent(value: float | None) -> str:
    return UNDEFINED if value is None or np.isnan(value) else f"{100 * value:.1f} %"
