"""Scores of films as a table: one line per film, with the columns of `cxrfast predict`'s CSV and Parquet."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from cxrfast.inference.film import Film
from cxrfast.thresholds import in_words

if TYPE_CHECKING:
    from cxrfast.inference.ensemble import ScaleEnsemble, Scores


def table_of(ensemble: "ScaleEnsemble", names: Sequence[str], films: Sequence[Film], scores: "Scores") -> pd.DataFrame:
    """One line per film, in the order given; see docs/predict.md for the columns."""
    columns: dict[str, object] = {
        "film": list(names),
        "unlike": ["" if f.unlike is None else "yes" if f.unlike else "no" for f in films],
        "reasons": ["; ".join(f.unlike or ()) for f in films],
        "remarks": ["; ".join(f.remarks) for f in films],
        "height": np.array([f.height for f in films], np.int64),
        "width": np.array([f.width for f in films], np.int64),
    }
    probabilities = scores.ensemble.cpu().numpy()
    verdicts = in_words(ensemble.thresholds.verdicts(log_odds(probabilities))) if ensemble.thresholds else None
    for j, label in enumerate(ensemble.labels):
        columns[f"{label}: probability"] = probabilities[:, j]
        columns[f"{label}: verdict"] = "" if verdicts is None else verdicts[:, j]
    for scale, own in scores.scales.items():
        for j, label in enumerate(ensemble.labels):
            columns[f"{label}: probability {scale} px"] = own[:, j].cpu().numpy()
    for member in ensemble.members:
        for j, label in enumerate(ensemble.labels):
            name = f"{label}: logit {member.scale} px fold {member.fold}"
            columns[name] = scores.logits[member.name][:, j].cpu().numpy()
    return pd.DataFrame(columns)


def log_odds(probabilities: np.ndarray) -> np.ndarray:
    """log p - log(1 - p), same shape; infinite for 0 and 1."""
    with np.errstate(divide="ignore"):
        return np.log(probabilities) - np.log1p(-probabilities)
