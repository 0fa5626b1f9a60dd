"""Patients and images that another set has in common with the rows of runs, by part. Ids go in; only counts come out.

Ids are compared as they are spelt, and source files byte for byte where both sets are at hand. Data sets may number their
patients alike by chance, or one patient in two ways: what is counted here is what can be known.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

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
    patient, image = external.rows["patient_id"], external.rows["image_id"]
    found, mask = {}, np.zeros(len(patient), bool)
    for part in PARTS:
        mine = own[own["part"] == part]
        by_patient = patient.isin(mine["patient_id"]).to_numpy()
        by_image = image.isin(mine["image_id"]).to_numpy() | np.isin(external.copy_of, mine["row"].to_numpy())
        found[part] = Counts(
            patients=int(patient[by_patient].nunique()), rows=int(by_patient.sum()), images=int(by_image.sum())
        )
        mask |= by_patient | by_image
    return Overlap(parts=found, mask=mask)


def overlap_note(name: str, found: Sequence[Overlap], knows_files: bool) -> str:
    """A sentence on what the set called `name` shares with one run or several; a range where they differ, as folds do."""
    if not any(one.mask.any() for one in found):
        files = ", image id or source file" if knows_files else " or image id"
        return f"No patient id{files} of {name} is among the rows of the runs."
    counts = {part: [one.parts[part] for one in found] for part in PARTS}
    patients = [
        f"{part} {_range([c.patients for c in those])} ({_range([c.rows for c in those])} rows of {name})"
        for part, those in counts.items()
    ]
    images = [f"{part} {_range([c.images for c in those])}" for part, those in counts.items()]
    return f"In common with the runs' own rows: patients: {', '.join(patients)}; images: {', '.join(images)}."


def _range(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"
