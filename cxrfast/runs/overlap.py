"""Patients and images that another set has in common with the rows of runs, by part. Ids go in; only counts come out.

Ids are compared as they are spelt, and source files byte for byte where both sets are at hand. Data sets may number their
patients alike by chance, or one patient in two ways: what is counted here is what can be known.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from cxrfast.runs.external import External
from cxrfast.runs.run import Run
from cxrfast.splits import PARTS


@dataclass(frozen=True, kw_only=True)
class Counts:
    """What another set shares with one part of a run's rows."""

    patients: int
    """Patient ids in common."""
    rows: int
    """Rows of the other set with such a patient id."""
    images: int
    """Rows of the other set whose image id or source file is one of the part, too."""


@dataclass(frozen=True, kw_only=True)
class Overlap:
    """What another set shares with a run."""

    parts: dict[str, Counts]
    """By part of the run's rows: train, val, test."""
    mask: np.ndarray
    """bool (n,): rows of the other set whose patient or image is among the run's rows, in any part."""


def overlap(run: Run, external: External) -> Overlap:
    """What the set of `external`, which has ids, shares with the run. Raises RunError if the run's rows cannot be read."""
    own = run.rows(["row", "image_id", "patient_id", "part"])
    bits = own["part"].map({part: 1 << n for n, part in enumerate(PARTS)}).fillna(0).astype(int).tolist()
    by_patient = _bits(own["patient_id"], bits, external.rows["patient_id"])
    by_image = _bits(own["image_id"], bits, external.rows["image_id"])
    by_image |= _bits(own["row"], bits, pd.Series(external.copy_of))
    found = {}
    for n, part in enumerate(PARTS):
        shared = by_patient & 1 << n > 0
        patients = external.rows["patient_id"].to_numpy(object)[shared]
        found[part] = Counts(
            patients=len(set(patients)), rows=int(shared.sum()), images=int((by_image & 1 << n > 0).sum())
        )
    return Overlap(parts=found, mask=(by_patient | by_image) > 0)


def _bits(own: pd.Series, bits: Sequence[int], others: pd.Series) -> np.ndarray:
    """int64 (n,): the bits of the parts that hold each of `others`. Dicts take a tenth of the time of pandas' `isin`."""
    known: dict[object, int] = {}
    for value, bit in zip(own.tolist(), bits, strict=True):
        known[value] = known.get(value, 0) | bit
    return np.array([known.get(value, 0) for value in others.tolist()], np.int64)


def overlap_note(name: str, found: Sequence[Overlap], knows_files: bool) -> str:
    """A sentence on what the set called `name` shares with one run or several; a range where they differ, as folds do."""
    if not any(one.mask.any() for one in found):
        files = ", image id or source file" if knows_files else " or image id"
        return f"No patient id{files} of {name} is among the rows of the runs."
    counts = {part: [one.parts[part] for one in found] for part in PARTS}
    patients = [
        f"{part} {_range([c.patients for c in those])} ({_range([c.rows for c in those], 'row')} of {name})"
        for part, those in counts.items()
    ]
    images = [f"{part} {_range([c.images for c in those])}" for part, those in counts.items()]
    return f"In common with the runs' own rows: patients: {', '.join(patients)}; images: {', '.join(images)}."


def _range(values: Sequence[int], what: str = "") -> str:
    """`3`, `3 to 5`, with the word for what is counted if one is given."""
    low, high = min(values), max(values)
    text = f"{low:,}" if low == high else f"{low:,} to {high:,}"
    plural = "" if high == 1 else "s"
    return f"{text} {what}{plural}" if what else text
