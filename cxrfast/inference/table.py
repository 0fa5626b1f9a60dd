"""Scores of films as a table: one line per film, with the columns of `cxrfast predict`'s CSV and Parquet."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch

from cxrfast.inference.film import Film
from cxrfast.thresholds import in_words

if TYPE_CHECKING:
    from cxrfast.inference.ensemble import ScaleEnsemble


@dataclass(frozen=True, kw_only=True)
class Line:
    """What a line says besides the scores."""

    film: str
    error: str = ""
    """Why the film could not be used; "" if it could."""
    height: int | None = None
    width: int | None = None
    remarks: Sequence[str] = ()
    unlike: Sequence[str] | None = None

    @classmethod
    def of(cls, name: str, film: Film) -> "Line":
        return cls(film=name, height=film.height, width=film.width, remarks=film.remarks, unlike=film.unlike)


def table_of(ensemble: "ScaleEnsemble", lines: Sequence[Line], logits: np.ndarray) -> pd.DataFrame:
    """One row per line; see docs/predict.md for the columns.

    logits: float32 (N, M, L) of the members in their order, NaN where there are none.
    """
    scores = ensemble.combine({m.name: torch.from_numpy(logits[:, i]) for i, m in enumerate(ensemble.members)})
    mixed = scores.ensemble.numpy()
    verdicts = in_words(ensemble.thresholds.verdicts(scores.log_odds.numpy())) if ensemble.thresholds else None
    columns: dict[str, object] = {
        "film": [os.fsencode(line.film).decode("utf-8", "backslashreplace") for line in lines],
        "error": [line.error for line in lines],
        "unlike": ["" if line.unlike is None else "yes" if line.unlike else "no" for line in lines],
        "reasons": ["; ".join(line.unlike or ()) for line in lines],
        "remarks": ["; ".join(line.remarks) for line in lines],
        "height": pd.array([line.height for line in lines], "Int64"),
        "width": pd.array([line.width for line in lines], "Int64"),
    }
    for j, label in enumerate(ensemble.labels):
        columns[f"{label}: probability"] = mixed[:, j].astype(np.float32)
        columns[f"{label}: verdict"] = [""] * len(lines) if verdicts is None else verdicts[:, j]
    for scale, own in scores.scales.items():
        for j, label in enumerate(ensemble.labels):
            columns[f"{label}: probability {scale} px"] = own[:, j].numpy().astype(np.float32)
    for i, member in enumerate(ensemble.members):
        for j, label in enumerate(ensemble.labels):
            columns[f"{label}: logit {member.scale} px fold {member.fold}"] = logits[:, i, j]
    return pd.DataFrame(columns)
