"""Other sets than that of the runs: built ones, and made-up predictions on one."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from sets import build, write_table

from cxrfast.runs.external import External, OtherSet, write_external
from cxrfast.runs.run import Run


def build_other(folder: Path, patients: list[str], scales: tuple[int, ...] = (32,), **columns: list) -> Path:
    """A set of noise images in `folder`/hospital-b, one per entry of `patients`; `columns`: labels, with _ for blanks."""
    named = {name.replace("_", " "): values for name, values in columns.items()}
    tree = write_table(folder / "tree", patients, **named)
    build(
        tree,
        folder / "hospital-b",
        list(scales),
        source="table",
        source_options={"table": "t.csv", "label": list(named)},
    )
    return folder / "hospital-b"


OTHER_LABELS = ("Pneumonia", "Edema", "Mass")
"""Two findings of `runs.LABELS`, in another order, and one that the runs do not have."""


def other_rows(n: int = 120, first_patient: int = 10_000) -> pd.DataFrame:
    """Rows of another set: ids and raw labels; row 7 is labelled in Mass only, row 8 nowhere."""
    rng, i = np.random.default_rng(5), np.arange(n)
    raw = rng.choice([1.0, 0.0, -1.0, np.nan], size=(n, 3), p=[0.3, 0.4, 0.1, 0.2]).astype(np.float32)
    raw[7], raw[8] = (np.nan, np.nan, 1.0), np.nan
    ids = {"row": i, "image_id": [f"b{j}" for j in i], "study_id": [f"b{j}" for j in i]}
    patients = {"patient_id": [f"p{first_patient + j}" for j in i]}
    return pd.DataFrame({**ids, **patients, **dict(zip(OTHER_LABELS, raw.T, strict=True))})


def predict_other(
    run: Run, name: str = "hospital-b", rows: pd.DataFrame | None = None, set_id: str = "b" * 32, **described: Any
) -> External:
    """Store made-up logits of a run on another set that know its findings a little. `described`: of OtherSet."""
    rows = other_rows() if rows is None else rows
    labels = tuple(column for column in rows if column not in ("row", "image_id", "study_id", "patient_id"))
    rng = np.random.default_rng(run.config.scale + 7 * run.config.fold)
    logits = rng.normal(size=(len(rows), len(run.config.labels)))
    for j, label in enumerate(run.config.labels):
        if label in labels:
            logits[:, j] += run.config.scale / 256 * (rows[label] == 1)
    other = OtherSet(name=name, set_id=set_id, labels=labels, **described)
    external = External(
        other=other, rows=rows, logits=logits.astype(np.float32), copy_of=np.full(len(rows), -1, np.int64)
    )
    write_external(run, external)
    return external
