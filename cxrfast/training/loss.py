"""The training loss: binary cross-entropy against labels that are looked up by row; masked ones do not count."""

from typing import Any

import numpy as np
import pandas as pd
import torch
from torch.nn import functional as F

from cxrfast.config import TrainConfig
from cxrfast.labels import positive_weights, targets
from cxrfast.metrics import auroc, bce, log_sigmoid

EXPLODED = 100.0
"""Mean BCE of a step above which training ends; chance is 0.69."""

NEVER = 2**62
"""Placeholder for no step."""


class Targets:
    """Targets and masks by row, (images, L): on the device for the loss, on the host for counts and scores."""

    def __init__(self, rows: pd.DataFrame, config: TrainConfig, images: int, device: torch.device) -> None:
        """`rows`: the run's table; `images`: number of rows in the whole set."""
        self.labels = config.labels
        raw = rows[list(config.labels)].to_numpy()
        target, mask = targets(raw, config.policies, config.blanks, config.unlabelled)
        self.host_target = np.zeros((images, target.shape[1]), np.float32)
        self.host_mask = np.zeros((images, target.shape[1]), bool)
        self.host_target[rows["row"]], self.host_mask[rows["row"]] = target, mask
        self.target = torch.from_numpy(self.host_target).to(device)
        self.mask = torch.from_numpy(self.host_mask).to(device)
        self.is_validation_weighted = config.weighted_validation
        self.positive_weights: torch.Tensor | None = None
        if config.positive_weights:
            is_train = (rows["part"] == "train").to_numpy()
            self.positive_weights = torch.from_numpy(positive_weights(target[is_train], mask[is_train])).to(device)

    def entries(self, rows: np.ndarray) -> int:
        """Number of unmasked labels in these rows, at least 1."""
        return max(1, int(self.host_mask[rows].sum()))

    def loss_sum(self, logits: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
        """Loss of logits float32 (N, L) for the images `row` (N,), summed over unmasked labels."""
        return masked_bce_sum(logits, self.target[row], self.mask[row], self.positive_weights)

    def validate(self, logits: np.ndarray, row: np.ndarray) -> dict[str, Any]:
        """Loss, mean AUROC and AUROC by label for logits float32 (n, L); None where an AUROC is undefined.

        With positive weights, `val_loss` weighs positives as the training loss does, and `val_loss_unweighted` does not; in
        runs of earlier versions `val_loss` does not either.
        """
        target, mask = self.host_target[row], self.host_mask[row]
        per_label = auroc(logits, target, mask)
        defined = per_label[~np.isnan(per_label)]
        by_label = {
            name: None if np.isnan(value) else float(value) for name, value in zip(self.labels, per_label, strict=True)
        }
        losses = {"val_loss": bce(logits, target, mask)}
        if self.positive_weights is not None and self.is_validation_weighted:
            weights = self.positive_weights.cpu().numpy()
            losses = {
                "val_loss": weighted_bce(logits, target, mask, weights),
                "val_loss_unweighted": losses["val_loss"],
            }
        return {
            **losses,
            "val_auroc": float(defined.mean()) if len(defined) else None,
            "val_auroc_by_label": by_label,
        }


def weighted_bce(logits: np.ndarray, target: np.ndarray, mask: np.ndarray, weights: np.ndarray) -> float:
    """Mean over unmasked entries of the binary cross-entropy in which positives of a label count `weights` (L,) times.

    Logits, targets and mask: (n, L). NaN if everything is masked.
    """
    losses = -(weights * target * log_sigmoid(logits) + (1.0 - target) * log_sigmoid(-logits))[mask]
    return float(losses.mean()) if losses.size else float("nan")


class EpochLoss:
    """Sum of an epoch's losses on this rank, and the first bad step; both stay on the device."""

    def __init__(self, device: torch.device) -> None:
        self.total = torch.zeros((), dtype=torch.float64, device=device)
        """Sum of this rank's share of the steps' losses."""
        self.bad_step = torch.full((), NEVER, device=device)
        """The first step whose loss was not finite or above EXPLODED; NEVER if there is none."""

    def add(self, loss: torch.Tensor, step: int, world_size: int) -> None:
        """Add this rank's loss in a step; the losses of `world_size` ranks are averaged."""
        self.total += loss / world_size
        is_bad = ~(loss < EXPLODED)  # also NaN
        self.bad_step = torch.where(is_bad & (self.bad_step == NEVER), step, self.bad_step)


def masked_bce_sum(
    logits: torch.Tensor, target: torch.Tensor, mask: torch.Tensor, positive_weights: torch.Tensor | None = None
) -> torch.Tensor:
    """Binary cross-entropy with logits, (N, L) each, summed over unmasked entries; `positive_weights`: (L,)."""
    losses = F.binary_cross_entropy_with_logits(logits, target, reduction="none", pos_weight=positive_weights)
    return (losses * mask).sum()
