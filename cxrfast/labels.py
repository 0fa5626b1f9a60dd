"""Findings and what their raw values mean for training. Pure numpy; raw values are 1, 0, -1 (uncertain) or NaN (blank)."""

from collections.abc import Sequence

import numpy as np

from cxrfast.errors import RunError

MIMIC = (
    "Atelectasis",
    "Cardiomegaly",
    "Consolidation",
    "Edema",
    "Enlarged Cardiomediastinum",
    "Fracture",
    "Lung Lesion",
    "Lung Opacity",
    "No Finding",
    "Pleural Effusion",
    "Pleural Other",
    "Pneumonia",
    "Pneumothorax",
    "Support Devices",
)
"""The fourteen columns of mimic-cxr-2.0.0-chexpert.csv, in their order there."""

EARLIER = {"Airspace Opacity": "Lung Opacity"}
"""Earlier names of findings in `MIMIC`; the radiologist's table of MIMIC-CXR-JPG 2.1.0 uses them, too."""

POLICIES = ("u_zeros", "u_ones", "u_ignore")
"""What an uncertain label becomes."""

BLANKS = ("negative", "ignore")
"""What a blank label becomes."""

UNLABELLED = ("drop", "negative")
"""What an image without any label becomes."""


def targets(
    raw: np.ndarray,
    policy: str | Sequence[str] = "u_zeros",
    blank: str | Sequence[str] = "negative",
    unlabelled: str = "drop",
) -> tuple[np.ndarray, np.ndarray]:
    """Raw values (N, L) → targets float32 (N, L) in {0, 1}, and mask bool (N, L): which entries count.

    Blank means the report does not mention the finding: negative (CheXpert, Irvin et al. 2019, section 3), unless `blank` is
    `ignore`: then it does not count. Uncertain becomes 0 (`u_zeros`, the study's choice), 1 (`u_ones`) or does not count
    (`u_ignore`). A row that is blank in every column was never labelled and does not count, unless `unlabelled` is
    `negative`: then its blanks are like any others. `policy`, `blank`: one for all columns, or one per column.

    Raises RunError for an unknown policy or for values other than 1, 0, -1 and NaN.
    """
    raw = np.asarray(raw, np.float32)
    policies = _per_column(policy, raw.shape[1], POLICIES, "label policy")
    blanks = _per_column(blank, raw.shape[1], BLANKS, "policy for blank labels")
    _per_column(unlabelled, 1, UNLABELLED, "policy for images without any label")
    if not (np.isnan(raw) | np.isin(raw, (1.0, 0.0, -1.0))).all():
        wrong = np.unique(raw[~(np.isnan(raw) | np.isin(raw, (1.0, 0.0, -1.0)))])[:3]
        raise RunError(f"labels hold the values {wrong.tolist()}: only 1, 0, -1 and blank are known")
    uncertain = raw == -1.0
    target = np.nan_to_num(raw, nan=0.0)
    target[uncertain] = 0.0
    target[uncertain & (policies == "u_ones")] = 1.0
    mask = ~(uncertain & (policies == "u_ignore")) & ~(np.isnan(raw) & (blanks == "ignore"))
    if unlabelled == "drop":
        mask &= ~np.isnan(raw).all(axis=1, keepdims=True)
    return target, mask


def _per_column(value: str | Sequence[str], columns: int, known: tuple[str, ...], what: str) -> np.ndarray:
    """One value per column, (L,). Raises RunError for an unknown one."""
    values = [value] * columns if isinstance(value, str) else list(value)
    for name in values:
        if name not in known:
            raise RunError(f"{what} {name!r} is unknown: use one of {', '.join(known)}")
    return np.array(values, dtype=str)


def positive_weights(target: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Negatives / positives of each column of `target` and `mask` (N, L), float32 (L,); 1 where either is absent."""
    positives, negatives = (target * mask).sum(axis=0), ((1 - target) * mask).sum(axis=0)
    return np.where((positives > 0) & (negatives > 0), negatives / np.maximum(positives, 1), 1).astype(np.float32)
