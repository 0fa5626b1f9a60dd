"""A recipe in words: how the optimisation of a run differs from the study's."""

from dataclasses import fields

from cxrfast.config.training import TrainConfig
from cxrfast.units import counted


def recipe_in_words(config: TrainConfig) -> str:
    """`adamw, weight decay 0.01, cosine schedule over 30 epochs, flip 0`: what differs from the study's recipe; "" if nothing."""
    study = {f.name: f.default for f in fields(TrainConfig)}
    told = []
    if config.optimizer != study["optimizer"]:
        told.append(config.optimizer)
    if config.decay:
        told.append(f"weight decay {config.decay:g}")
    if config.schedule == "cosine":
        told.append(f"cosine schedule over {counted(config.epochs, 'epoch')} without early stopping")
    if config.warmup:
        told.append(f"warm-up over {config.warmup:g} {'epoch' if config.warmup == 1 else 'epochs'}")
    told += [
        f"{name} {getattr(config, name):g}" for name in ("flip", "degrees") if getattr(config, name) != study[name]
    ]
    return ", ".join(told)
