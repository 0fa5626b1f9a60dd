"""External validation for a model card: the exported model itself, folds averaged, on other sets that its runs have predicted.

In: what `cxrfast predict RUNS SET` left in the runs. Rows of patients and images that the runs know never count.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from cxrfast import metrics
from cxrfast.analysis.other_set import AS_TRAINED, OtherTest
from cxrfast.errors import RunError
from cxrfast.inference.ensemble import ScaleEnsemble
from cxrfast.runs.external import names, read_external
from cxrfast.runs.run import Run
from cxrfast.tables import Table

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Validation:
    """The model on one other set; L findings that both have."""

    name: str
    labels: tuple[str, ...]
    positives: np.ndarray
    """int64 (L,)"""
    negatives: np.ndarray
    scales: dict[int, np.ndarray]
    """By scale: AUROC, float64 (L,), NaN where undefined."""
    ensemble: np.ndarray
    at: metrics.AtThresholds
    """Verdicts by the model's thresholds."""
    note: str
    """Which rows and findings count, as paragraphs."""


def validations(ensemble: ScaleEnsemble, runs: Mapping[str, Run]) -> list[Validation]:
    """Every other set that all runs have predicted, by name. One that cannot be evaluated is left out, and the log says why."""
    found = []
    for name in sorted(set.intersection(*(set(names(run)) for run in runs.values()))):
        try:
            found.append(validate(ensemble, runs, name))
        except RunError as error:
            log.warning(f"the model card leaves out the external validation on {name}: {error}")
    return found


def validate(ensemble: ScaleEnsemble, runs: Mapping[str, Run], name: str) -> Validation:
    """The model on the set called `name`. Raises RunError if the runs have no usable predictions on it."""
    members = list(runs.values())
    test = OtherTest.of(members, name, AS_TRAINED, without_shared=True)
    targets, mask = test.read(members[0]).targets()
    kept = slice(None) if test.leave_out is None else ~test.leave_out
    logits = {
        member: torch.from_numpy(read_external(run, name, ids=False).logits[kept]) for member, run in runs.items()
    }
    scores = ensemble.combine(logits)
    columns = [ensemble.labels.index(label) for label in test.labels]
    log_odds = scores.log_odds.numpy()[:, columns]
    positives, negatives = metrics.counts(targets, mask)
    known = ensemble.thresholds
    thresholds = np.full(len(columns), np.nan) if known is None else np.array([known.array[j] for j in columns])
    return Validation(
        name=name,
        labels=test.labels,
        positives=positives,
        negatives=negatives,
        scales={
            scale: metrics.auroc(one.numpy()[:, columns], targets, mask) for scale, one in scores.scale_log_odds.items()
        },
        ensemble=metrics.auroc(log_odds, targets, mask),
        at=metrics.at_thresholds(log_odds, targets, mask, thresholds),
        note=test.note,
    )


def validation_table(found: Validation) -> Table:
    """AUROC by scale and of the ensemble, and what the thresholds do."""
    columns = {f"{scale} px": values for scale, values in found.scales.items()}
    if len(columns) > 1:
        columns["Ensemble"] = found.ensemble
    ratios = {"Sensitivity": found.at.sensitivity, "Specificity": found.at.specificity}
    ratios |= {"PPV": found.at.ppv, "NPV": found.at.npv}
    rows = [
        [
            label,
            f"{found.positives[j]:,}",
            f"{found.negatives[j]:,}",
            *(_shown(values[j], "{:.3f}") for values in columns.values()),
            *(_shown(100 * values[j], "{:.1f} %") for values in ratios.values()),
        ]
        for j, label in enumerate(found.labels)
    ]
    heads = ["Finding", "Positives", "Negatives", *(f"AUROC, {name}" for name in columns), *ratios]
    return Table("", heads, rows, found.note)


def _shown(value: float, form: str) -> str:
    return "–" if np.isnan(value) else form.format(value)
