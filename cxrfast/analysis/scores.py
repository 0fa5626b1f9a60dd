"""Scores of findings by fold, and the rows of tables that show them: mean ± sd over folds, the best value bold."""

from collections.abc import Collection, Mapping, Sequence

import numpy as np
import pandas as pd

from cxrfast import metrics
from cxrfast.tables import Cell
from cxrfast.units import counted

UNDEFINED = "undefined"


def by_fold(lines: pd.DataFrame, labels: Sequence[str], column: str) -> np.ndarray:
    """float64 (K, L): `column` of lines with the columns fold and label, folds ascending; NaN where undefined."""
    return lines.pivot(index="fold", columns="label", values=column)[list(labels)].to_numpy(np.float64)


def score_rows(
    labels: Sequence[str],
    columns: Sequence[np.ndarray],
    gains: Sequence[np.ndarray] = (),
    deviations: bool = True,
    compared: bool = True,
) -> list[tuple[str, list[Cell]]]:
    """Each finding that some column defines, then the mean over findings, with a cell for each column and gain.

    columns, gains: float64 (K, L) each, NaN where undefined. Gains have a sign and are not compared; nor are columns unless
    `compared`: then none is bold.
    """
    shown = np.flatnonzero(is_defined(columns))
    overall, _ = metrics.over_findings([*columns, *gains])
    both = [np.hstack(pair) for pair in zip([*columns, *gains], overall, strict=True)]  # findings, then their mean
    rows = []
    for j in (*shown, len(labels)):
        means = np.array([metrics.mean_sd(values[:, [j]])[0][0] for values in both[: len(columns)]])
        best = np.nanmax(means) if compared and (~np.isnan(means)).sum() > 1 else np.inf
        cells = [score_cell(v[:, j], "", deviations, mean == best) for v, mean in zip(both, means, strict=False)]
        cells += [score_cell(v[:, j], "+", deviations) for v in both[len(columns) :]]
        rows.append(([*labels, "Mean"][j], cells))
    return rows


def score_cell(values: np.ndarray, sign: str, deviations: bool, is_best: bool = False) -> Cell:
    """`0.912 ± 0.004` from the values of K folds (K,), with the number of folds that define it if not all do."""
    (mean,), (sd,) = metrics.mean_sd(values[:, None])
    if np.isnan(mean):
        return Cell(UNDEFINED, "dim")
    defined, text = (~np.isnan(values)).sum(), f"{mean:{sign}.3f}"
    if deviations:
        text += "" if np.isnan(sd) else f" ± {sd:.3f}"
        text += "" if defined == len(values) else f" ({defined} of {len(values)} folds)"
    return Cell(text, "bold" if is_best else "")


def is_defined(columns: Sequence[np.ndarray]) -> np.ndarray:
    """bool (L,): findings that some column (K, L) defines."""
    return ~np.isnan(np.concatenate(columns)).all(axis=0)


def undefined_note(labels: Sequence[str], columns: Sequence[np.ndarray], part: str) -> str:
    """Names the findings that no column defines; empty if there are none."""
    others = [label for label, known in zip(labels, is_defined(columns), strict=True) if not known]
    return f"Undefined everywhere: {', '.join(others)} (no positive or no negative {part} row)." if others else ""


def mean_note(labels: Sequence[str], columns: Sequence[np.ndarray]) -> str:
    shared = metrics.over_findings(columns)[1]
    return f"Mean: over the {shared} of {len(labels)} findings that every fold of every column defines."


def folds_text(folds: Collection[int]) -> str:
    """`5 folds (0, 1, 2, 3, 4)`."""
    return f"{counted(len(folds), 'fold')} ({', '.join(map(str, sorted(folds)))})"


def fold_numbers(folds: Collection[int]) -> str:
    """`fold 3`, `folds 0, 1`."""
    return f"fold{'s' if len(folds) != 1 else ''} {', '.join(map(str, sorted(folds)))}"


def shared_folds(folds: Mapping[str, Collection[int]]) -> list[int]:
    """Folds that all groups have, ascending, from the folds of each group by name."""
    return sorted(set.intersection(*(set(those) for those in folds.values())))


def left_out_note(left_out: Mapping[str, Collection[int]], what: str) -> str:
    """Names the folds of each group that are left out since not every group, called `what`, has them; empty if there are
    none."""
    held = "; ".join(f"{name}: {folds_text(folds)}" for name, folds in left_out.items())
    return f"Left out, since not every {what} has them: {held}." if held else ""
