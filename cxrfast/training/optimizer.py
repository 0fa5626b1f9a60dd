"""The optimiser of a training: the study's Adam, or AdamW."""

from collections.abc import Collection

import torch
from torch import nn

from cxrfast.config import TrainConfig
from cxrfast.models.classifier import Classifier


def make_optimizer(config: TrainConfig, model: Classifier) -> torch.optim.Optimizer:
    """The optimiser of `config` for the weights of `model`.

    Decayed are weights with two or more dimensions, those of convolutions and linear layers; biases and the scales of norms
    are not, nor what the network itself exempts, as timm's do (`no_weight_decay`). Adam adds the decay to the gradient,
    AdamW takes it from the weights. Without decay there is one group of weights, as in checkpoints of earlier versions.
    """
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.optimizer]
    # fused: one kernel for all weights, on GPUs and CPUs
    return kind(decay_groups(model, config.decay), lr=config.learning_rate, weight_decay=0.0, fused=True)


def decay_groups(model: Classifier, decay: float) -> list[dict[str, object]]:
    """The weights of `model` in groups of one decay each, as an optimiser takes them."""
    if not decay:
        return [{"params": list(model.parameters())}]
    named = getattr(model.net, "no_weight_decay", None)
    exempt: Collection[str] = named() if callable(named) else ()
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, weight in model.named_parameters():
        is_decayed = weight.ndim > 1 and name.removeprefix("net.") not in exempt
        (decayed if is_decayed else others).append(weight)
    return [{"params": decayed, "weight_decay": decay}, {"params": others}]
