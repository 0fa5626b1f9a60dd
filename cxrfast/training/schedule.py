"""The learning rate over a training: warm-up, then torch's plateau rule or a cosine."""

import math
from typing import Any

import torch

from cxrfast.config import TrainConfig


class Schedule:
    """Sets the learning rate of an optimiser before each step, and after each epoch.

    `steps`: optimiser steps per epoch. Warm-up and cosine follow from the position alone; what the plateau rule knows of
    past epochs is the state, which checkpoints hold.
    """

    def __init__(self, config: TrainConfig, optimizer: torch.optim.Optimizer, steps: int) -> None:
        self.config, self.optimizer, self.steps = config, optimizer, steps
        self.plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimizer, factor=config.factor, patience=config.patience
        )

    def start_step(self, epoch: int, step: int) -> None:
        """Set the rate of an epoch's step; both count from 0."""
        factor = rate_factor(self.config, self.steps, epoch * self.steps + step)
        if factor is not None:
            for group in self.optimizer.param_groups:
                group["lr"] = self.config.learning_rate * factor

    def end_epoch(self, epoch: int, val_loss: float) -> None:
        """Lower the rate if the validation loss has not fallen for `patience` epochs; those of the warm-up do not count."""
        if self.config.schedule == "plateau" and epoch >= self.config.warmup:
            self.plateau.step(val_loss)

    def state_dict(self) -> dict[str, Any]:
        return self.plateau.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.plateau.load_state_dict(state)


def rate_factor(config: TrainConfig, steps: int, step: int) -> float | None:
    """What a step's learning rate is multiplied by; None where the plateau rule alone decides it.

    `steps`: per epoch; `step`: of the whole training, from 0. Warm-up grows linearly and reaches 1 with its last step. The
    cosine is half a period from there to 0 at the end of the last epoch (Loshchilov and Hutter 2017, "SGDR", equation 5,
    without restarts).
    """
    warm, whole = config.warmup * steps, config.epochs * steps
    if step < warm:
        return min(1.0, (step + 1) / warm)
    if config.schedule == "cosine":
        return (1 + math.cos(math.pi * (step - warm) / (whole - warm))) / 2
    return None
