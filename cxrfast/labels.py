"""Findings and what their raw values mean for training. Pure numpy; raw values are 1, 0, -1 (uncertain) or NaN (blank)."""

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
"""What tables from before it was renamed, and the radiologist's of MIMIC-CXR-JPG 2.1.0, call one of `MIMIC`."""

POLICIES = ("u_zeros", "u_ones", "u_ignore")


def targets(raw: np.ndarray, policy: str = "u_zeros") -> tuple[np.ndarray, np.ndarray]:
    """Raw values (N, L) → targets float32 (N, L) in {0, 1}, and mask bool (N, L): which entries count.

    Blank means the report does not mention the finding: negative (CheXpert, Irvin et al. 2019, section 3). Uncertain
    becomes 0 (`u_zeros`, the study's choice), 1 (`u_ones`) or does not count (`u_ignore`). A row that is blank in every
    column was never labelled: none of it counts.

    Raises RunError for an unknown policy or for values other than 1, 0, -1 and NaN.
    """
    if policy not in POLICIES:
        raise RunError(f"label policy {policy!r} is unknown: use one of {', '.join(POLICIES)}")
    raw = np.asarray(raw, np.float32)
    if not (np.isnan(raw) | np.isin(raw, (1.0, 0.0, -1.0))).all():
        wrong = np.unique(raw[~(np.isnan(raw) | np.isin(raw, (1.0, 0.0, -1.0)))])[:3]
        raise RunError(f"labels hold the values {wrong.tolist()}: only 1, 0, -1 and blank are known")
    uncertain = raw == -1.0
    target = np.nan_to_num(raw, nan=0.0)
    target[uncertain] = 1.0 if policy == "u_ones" else 0.0
    mask = np.repeat(~np.isnan(raw).all(axis=1, keepdims=True), raw.shape[1], axis=1)
    if policy == "u_ignore":
        mask &= ~uncertain
    return target, mask
