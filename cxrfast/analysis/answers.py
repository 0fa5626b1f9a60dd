"""Logits of one run with the raw labels of the same rows: of a part of its own set, or of another set.

In: run folders; no shard set, no GPU. What a raw label means is decided here, in memory, by a rule that tables state.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from cxrfast.config import TrainConfig
from cxrfast.errors import RunError
from cxrfast.labels import targets
from cxrfast.runs.run import Run


@dataclass(frozen=True, kw_only=True)
class LabelRules:
    """What uncertain and blank labels of each finding become, and images without any label."""

    policies: tuple[str, ...]
    """(L,)"""
    blanks: tuple[str, ...]
    """(L,)"""
    unlabelled: str

    @classmethod
    def of(cls, config: TrainConfig, labels: Sequence[str]) -> "LabelRules":
        """The rules of a run for some of its findings."""
        at = [config.labels.index(label) for label in labels]
        return cls(
            policies=tuple(config.policies[j] for j in at),
            blanks=tuple(config.blanks[j] for j in at),
            unlabelled=config.unlabelled,
        )

    def targets(self, raw: np.ndarray, is_labelled: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Targets float32 (n, L) in {0, 1} and mask bool (n, L) of raw labels (n, L); `is_labelled`: bool (n,)."""
        target, mask = targets(raw, self.policies, self.blanks, "negative")
        return target, mask if self.unlabelled == "negative" else mask & is_labelled[:, None]

    def in_words(self, labels: Sequence[str]) -> str:
        """`Uncertain labels: u_zeros, Edema u_ones; blank labels: negative; images without any label: left out.`"""
        left = {"drop": "left out", "negative": "negative"}[self.unlabelled]
        return (
            f"Uncertain labels: {_most_and_others(labels, self.policies)}; blank labels: {_most_and_others(labels, self.blanks)}; "
            f"images without any label: {left}."
        )


def _most_and_others(labels: Sequence[str], values: Sequence[str]) -> str:
    """The most frequent value, then each label that has another one."""
    most = max(dict.fromkeys(values), key=list(values).count)
    return ", ".join(
        [most, *(f"{label} {value}" for label, value in zip(labels, values, strict=True) if value != most)]
    )


@dataclass(frozen=True)
class Answers:
    """Logits of one run for one part of its rows, or for another set, with their raw labels."""

    run: Run
    part: str
    """train, val, test, or the name of another set."""
    row: np.ndarray
    """int64 (n,), ascending, unique."""
    raw: np.ndarray
    """float32 (n, L): 1, 0, -1 (uncertain) or NaN (blank)."""
    logits: np.ndarray
    """float32 (n, L), finite."""
    labels: tuple[str, ...]
    """(L,): findings of the run; of another set, those that it has labels of."""
    rules: LabelRules
    is_labelled: np.ndarray
    """bool (n,): the row has a label in some column of its set."""

    def targets(self) -> tuple[np.ndarray, np.ndarray]:
        """Targets float32 (n, L) in {0, 1} and mask bool (n, L), by the label policies."""
        return self.rules.targets(self.raw, self.is_labelled)

    def without(self, leave_out: np.ndarray) -> "Answers":
        """The same without the rows where `leave_out`, bool (n,), is true."""
        kept = ~leave_out
        return replace(
            self,
            row=self.row[kept],
            raw=self.raw[kept],
            logits=self.logits[kept],
            is_labelled=self.is_labelled[kept],
        )


def read_answers(run: Run, part: str) -> Answers:
    """Join a run's logits with its own raw labels, by row.

    Raises RunError if the rows predicted are not exactly the part's, or if a logit is not finite.
    """
    again = f"run `cxrfast predict {run.folder}` again"
    labels, predictions = list(run.config.labels), run.read_predictions(part)
    rows = run.rows(["row", "part", *labels])
    rows = rows.loc[rows["part"] == part, ["row", *labels]].sort_values("row")
    row = rows["row"].to_numpy(np.int64)
    if not np.array_equal(row, predictions.row):
        missing, extra = len(np.setdiff1d(row, predictions.row)), len(np.setdiff1d(predictions.row, row))
        raise RunError(
            f"{run.name}: of the {len(row):,} {part} rows {missing:,} have no prediction, "
            f"and {extra:,} other rows have one: {again}"
        )
    shape = len(row), len(labels)
    if predictions.logits.shape != shape:
        raise RunError(f"{run.name}: logits of {part} are {predictions.logits.shape}, not {shape}: {again}")
    check_finite(run, predictions.logits, part)
    raw = rows[labels].to_numpy(np.float32)
    rules = LabelRules.of(run.config, labels)
    return Answers(run, part, row, raw, predictions.logits, tuple(labels), rules, labelled_rows(raw))


def check_finite(run: Run, logits: np.ndarray, part: str) -> None:
    """Raises RunError if a logit of the part, or of another set's rows, is not finite."""
    if not np.isfinite(logits).all():
        raise RunError(f"{run.name}: some {part} logits are not finite, its weights diverged: retrain it")


def labelled_rows(raw: np.ndarray) -> np.ndarray:
    """bool (n,): rows of raw labels (n, L) that are not blank everywhere."""
    return ~np.isnan(raw).all(axis=1) if raw.shape[1] else np.zeros(len(raw), bool)
