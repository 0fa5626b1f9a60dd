"""How scores are written in tables: mean ± sd over folds, best values bold, undefined ones dim or folded into a line."""

from collections.abc import Sequence

import numpy as np

from cxrfast import metrics
from cxrfast.tables import Cell


def plus_minus(mean: float, sd: float = np.nan, sign: str = "") -> str:
    """`0.912 ± 0.004`; the mean alone without a deviation; `undefined` for NaN. `sign`: "+" for gains."""
    if np.isnan(mean):
        return "undefined"
    return f"{mean:{sign}.3f}" + ("" if np.isnan(sd) else f" ± {sd:.3f}")


def cells(values: np.ndarray, sign: str = "") -> list[str]:
    """The cell of each finding from float64 (K, L), with the folds it is defined in if those are not all."""
    defined = (~np.isnan(values)).sum(axis=0)
    return [
        plus_minus(mean, sd, sign) + (f" ({n} of {len(values)} folds)" if 0 < n < len(values) else "")
        for mean, sd, n in zip(*metrics.mean_sd(values), defined, strict=True)
    ]


def best_bold(entries: Sequence[str], values: np.ndarray) -> list[Cell]:
    """`entries`, of which the one with the highest value is bold if there are two; those of NaN are dim."""
    known = ~np.isnan(values)
    best = values[known].max() if known.sum() > 1 else np.inf
    styles = ["bold" if value == best else "" if k else "dim" for value, k in zip(values, known, strict=True)]
    return [Cell(*entry) for entry in zip(entries, styles, strict=True)]


def folds_text(folds: Sequence[int]) -> str:
    """`5 folds (0, 1, 2, 3, 4)`."""
    return f"{len(folds)} fold{'s' if len(folds) != 1 else ''} ({', '.join(map(str, folds))})"


def undefined_note(labels: Sequence[str], columns: Sequence[np.ndarray], part: str) -> tuple[list[int], str]:
    """Indices of the findings that some column (K, L) defines, and a line that names the others; "" if there are none."""
    known = ~np.isnan(np.concatenate(columns)).all(axis=0)
    others = ", ".join(label for label, k in zip(labels, known, strict=True) if not k)
    note = f"Undefined everywhere: {others} (no positive or no negative {part} row)." if others else ""
    return np.flatnonzero(known).tolist(), note
