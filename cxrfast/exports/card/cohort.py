"""The rows that a model was trained, validated and tested on, counted for its card: no ids, only numbers.

In: the runs' own rows, and their shard set where it is at hand. What is not known is said to be unknown.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from cxrfast.errors import ShardError
from cxrfast.labels import targets
from cxrfast.runs.run import Run
from cxrfast.shards.format.info import SetInfo
from cxrfast.shards.shard_set import ShardSet
from cxrfast.splits import PARTS
from cxrfast.tables import Table

UNKNOWN = "unknown"

NAMES = {"train": "Training", "val": "Validation", "test": "Test"}


@dataclass(frozen=True)
class Cohort:
    """Rows of one run per fold: row, patient_id, part and raw labels, and study_id and view where the set tells them."""

    rows: dict[int, pd.DataFrame]
    """By fold."""
    run: Run
    """One of them; all have the same label policies."""
    info: SetInfo | None
    """Description of the shard set; None if it is gone from where it was."""

    @property
    def labels(self) -> tuple[str, ...]:
        return self.run.config.labels


def read_cohort(runs: Mapping[int, Run]) -> Cohort:
    """The rows of one run per fold. Raises RunError if they are damaged."""
    first = next(iter(runs.values()))
    labels = list(first.config.labels)
    info, more = _set_of(first)
    rows = {}
    for fold, run in runs.items():
        mine = run.rows(["row", "patient_id", "part", *labels])
        rows[fold] = mine if more is None else mine.merge(more, on="row", how="left")
    return Cohort(rows, first, info)


def _set_of(run: Run) -> tuple[SetInfo | None, pd.DataFrame | None]:
    """Description of the run's set, and the study and view of its rows."""
    try:
        shard_set = ShardSet(run.shards)
        if shard_set.info.id != run.config.set_id:
            return None, None
        return shard_set.info, shard_set.rows(["row", "study_id", "view"])
    except (ShardError, OSError, ValueError):  # the path comes from the run's folder, and may be anything
        return None, None


def parts_table(cohort: Cohort) -> Table:
    """Images, studies and patients of each part in each fold, and over all folds."""
    lines = []
    for fold, rows in cohort.rows.items():
        for part in PARTS:
            lines.append([str(fold), NAMES[part], *_counts(rows[rows["part"] == part])])
    everything = pd.concat(cohort.rows.values()).drop_duplicates("row")
    lines.append(["All", "All", *_counts(everything)])
    return Table("", ["Fold", "Part", "Images", "Studies", "Patients"], lines, text=["Part"])


def _counts(rows: pd.DataFrame) -> list[str]:
    studies = f"{rows['study_id'].nunique():,}" if "study_id" in rows else UNKNOWN
    return [f"{len(rows):,}", studies, f"{rows['patient_id'].nunique():,}"]


def findings_table(cohort: Cohort) -> Table:
    """Positives of each finding by part, and what its raw labels are over all rows."""
    config = cohort.run.config
    labels = list(cohort.labels)
    positives: dict[str, list[np.ndarray]] = {part: [] for part in PARTS}
    for rows in cohort.rows.values():
        for part, found in positives.items():
            raw = rows.loc[rows["part"] == part, labels].to_numpy(np.float32)
            target, mask = targets(raw, config.policies, config.blanks, config.unlabelled)
            found.append(((target > 0.5) & mask).sum(axis=0))
    raw = pd.concat(cohort.rows.values()).drop_duplicates("row")[labels].to_numpy(np.float32)
    kinds = [(raw == 1).sum(0), (raw == 0).sum(0), (raw == -1).sum(0), np.isnan(raw).sum(0)]
    several = len(cohort.rows) > 1
    return Table(
        "",
        ["Finding", *(f"{NAMES[part]} positives" for part in PARTS), "Label 1", "Label 0", "Label −1", "Blank"],
        [
            [
                label,
                *(_range([int(counts[j]) for counts in positives[part]]) for part in PARTS),
                *(f"{int(of_kind[j]):,}" for of_kind in kinds),
            ]
            for j, label in enumerate(labels)
        ],
        "Positives are counted after the label policies"
        + (", as a range over the folds" if several else "")
        + "; labels 1 (positive), 0 (negative), −1 (uncertain) and blank are those of the source, over all rows.",
    )


def _range(counts: Sequence[int]) -> str:
    low, high = min(counts), max(counts)
    return f"{low:,}" if low == high else f"{low:,}–{high:,}"


def views_text(cohort: Cohort) -> str:
    """`AP 60.1 %, PA 30.2 %, unknown 9.7 %` of all rows; "unknown" if the set is not at hand or has none."""
    rows = pd.concat(cohort.rows.values()).drop_duplicates("row")
    if "view" not in rows or rows["view"].isna().all():
        return UNKNOWN
    shares = rows["view"].fillna(UNKNOWN).value_counts(normalize=True)
    return ", ".join(f"{view} {100 * share:.1f} %" for view, share in shares.items())
