"""What a training is: one frozen configuration, its presets by scale, and default folders."""

import hashlib
import json
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from cxrfast.errors import RunError
from cxrfast.labels import POLICIES
from cxrfast.splits import FOLDS

DATA = os.environ.get("CXRFAST_DATA", "data/mimic-cxr-jpg")  # text: it may be a URL
SHARDS = Path(os.environ.get("CXRFAST_SHARDS", "data/shards"))
RUNS = Path("runs")

PRECISIONS = ("auto", "bf16", "fp16", "tf32", "fp32")
COMPILE_MODES = ("default", "max-autotune-no-cudagraphs")
"""Modes of torch.compile that are right with gradient accumulation; see `Runtime.compile`."""
SPLITS = ("folds", "official")
ORDERS = ("global", "block")

AUTO = -1
"""Micro-batch that `train` replaces by the largest that fits, before the run starts."""

VALIDATION_COST = 1 / 3
"""What a validation image costs, in training images: a forward pass without the backward one."""


@dataclass(frozen=True)
class Preset:
    """Batch sizes that do not change with the number of GPUs. Ours: the study's own table was not available to us."""

    global_batch: int
    micro_batch: int


PRESETS = {128: Preset(32, 16), 256: Preset(384, 32), 512: Preset(192, 16), 1024: Preset(96, 8), 2048: Preset(48, 4)}
"""By the largest scale they are meant for. From 256 px on, 1, 2, 3, 4, 6 or 12 ranks share a global batch."""

LEARNING_RATE, LEARNING_RATE_BATCH = 1e-4, 32
"""Adam's learning rate for a global batch of 32; it grows in proportion to the global batch, as in the study."""


def preset(scale: int) -> Preset:
    """The preset of the smallest scale that is not below `scale`; that of 2048 px above."""
    return PRESETS[min((s for s in PRESETS if s >= scale), default=max(PRESETS))]


def learning_rate(global_batch: int) -> float:
    return LEARNING_RATE * global_batch / LEARNING_RATE_BATCH


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that decides the weights of a run. Raises RunError for values that make no sense."""

    set_id: str
    """Id of the shard set."""
    scale: int
    """Side of the images, px."""
    labels: tuple[str, ...]
    """Findings, in the order of the logits."""
    fold: int = 0
    split: str = "folds"
    """`folds`: the set's own five; `official`: the data set's train, validate and test."""
    views: tuple[str, ...] = ()
    """View positions to keep (AP, PA, LATERAL, …); empty keeps all, as the study does."""
    limit: int | None = None
    """Use the first `limit` rows of each part only: a rehearsal."""
    subset: str | None = None
    """Hash of the list of rows that the parts are cut down to; None for all."""
    policy: str = "u_zeros"
    """What an uncertain label becomes."""
    label_policies: tuple[tuple[str, str], ...] = ()
    """(label, policy) where it differs from `policy`."""
    positive_weights: bool = False
    """Weigh positives of each label by negatives / positives of the training rows."""
    arch: str = "densenet121"
    """A torchvision classifier."""
    weights: str = "imagenet"
    """imagenet, none, or the path of a checkpoint or run."""
    global_batch: int
    micro_batch: int
    """Images in a forward pass, or AUTO."""
    learning_rate: float
    epochs: int = 100
    """Most epochs that are trained."""
    factor: float = 0.5
    """What the learning rate is multiplied by after more than `patience` epochs without a lower validation loss."""
    patience: int = 3
    """The learning rate's; early stopping has `stop_after`."""
    stop_after: int = 10
    """Early stopping: epochs without a lower validation loss after which training ends."""
    degrees: float = 15.0
    """Rotation, uniform in ±degrees."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    precision: str = "auto"
    """bf16 or fp16 autocast, or float32 with (tf32, GPUs only) or without (fp32) TF32; resolved before the run starts."""
    sync_bn: bool = False
    """BatchNorm over the micro-batches of all ranks (GPUs only); the weights then depend on the number of ranks."""
    sizes: tuple[tuple[int, int], ...] = ()
    """(side in px, epochs): train on smaller images first, and at `scale` after them (progressive resizing)."""
    order: str = "global"
    """Order of the rows in an epoch: one permutation of all, or `block`, which keeps shards together; see `pipelines.order`."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name, allowed in (("policy", POLICIES), ("precision", PRECISIONS), ("split", SPLITS), ("order", ORDERS)):
            if getattr(self, name) not in allowed:
                raise RunError(f"{name} {getattr(self, name)!r} is unknown: use one of {', '.join(allowed)}")
        if not 0 <= self.fold < FOLDS:
            raise RunError(f"--fold {self.fold} does not exist: folds are 0 to {FOLDS - 1}")
        if self.split == "official" and self.fold:
            raise RunError(f"--fold {self.fold} with --split official: the official split is one, give --fold 0")
        if not 0 <= self.seed < 2**63:
            raise RunError(f"--seed {self.seed} is not between 0 and 2^63 - 1")
        for name in ("global_batch", "micro_batch", "epochs", "learning_rate", "scale", "patience", "stop_after"):
            if getattr(self, name) <= 0 and (name, getattr(self, name)) != ("micro_batch", AUTO):
                raise RunError(f"{name.replace('_', ' ')} {getattr(self, name)} is not above 0")
        if not 0 <= self.flip <= 1:
            raise RunError(f"flip must be between 0 and 1, not {self.flip}")
        for label, policy in self.label_policies:
            if label not in self.labels or policy not in POLICIES:
                raise RunError(
                    f"--label-policy {label}={policy}: give LABEL=POLICY with a label of the set "
                    f"({', '.join(self.labels)}) and one of {', '.join(POLICIES)}"
                )
        if any(side <= 0 or epochs <= 0 for side, epochs in self.sizes):
            raise RunError(f"--sizes {self.sizes}: sides and epochs are above 0, as in --sizes 64x2,96x2")

    @property
    def policies(self) -> tuple[str, ...]:
        """One for each of `labels`."""
        return tuple(dict(self.label_policies).get(label, self.policy) for label in self.labels)

    def size_at(self, epoch: int) -> int:
        """Side of the training images of an epoch (from 0), px."""
        for side, epochs in self.sizes:
            if epoch < epochs:
                return side
            epoch -= epochs
        return self.scale

    def area_at(self, epoch: int) -> float:
        """Area of a training image of an epoch, as a share of that at `scale`: what it costs."""
        return (self.size_at(epoch) / self.scale) ** 2

    def work(self, done: int, images: int, validated: int) -> float:
        """Training images at `scale` that take as long as all epochs but the first `done`, at most.

        `images`: trained on in an epoch; `validated`: rows of the validation part.
        """
        return sum(images * self.area_at(epoch) + VALIDATION_COST * validated for epoch in range(done, self.epochs))

    @property
    def hash(self) -> str:
        """Hash of all fields: equal hashes train equal runs."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]

    def differences(self, other: "TrainConfig") -> list[str]:
        """`name: mine, not theirs` for every field that differs."""
        return [
            f"{f.name}: {getattr(self, f.name)}, not {getattr(other, f.name)}"
            for f in fields(self)
            if getattr(self, f.name) != getattr(other, f.name)
        ]

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "TrainConfig":
        """Raises RunError if `value` is not what `asdict` gave."""
        try:
            return cls(**{name: _frozen(given) for name, given in value.items()})
        except TypeError as error:
            raise RunError(f"the configuration is of another version of cxrfast ({error})") from error


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """Where and how a training runs: none of it changes the rows, their order or the training options."""

    shards: Path
    runs: Path
    name: str | None = None
    """Name of the folder that holds the folds; default `<arch>-<scale>`."""
    device: str = "auto"
    engine: str = "auto"
    threads: int | None = None
    """Decoding threads a rank; default: the usable cores divided by the ranks of this machine."""
    cache: Path | None = None
    """Folder on a local disk in which decoded pixels are kept; see `pipelines.cache`."""
    stage: Path | None = None
    """Folder on a local disk into which the scale is copied first, once a machine."""
    subset: Path | None = None
    """File of row numbers that the parts are cut down to; its hash is part of the configuration."""
    checkpoint_minutes: float = 10.0
    """Minutes between checkpoints, at most."""
    checkpoint_steps: int | None = None
    """Optimiser steps between checkpoints, at most; one is also written every `checkpoint_minutes` and after every epoch."""
    dist_timeout: float = 10.0
    """Minutes that a rank waits for the others before it gives up."""
    compile: str | None = None
    """torch.compile's mode, one of COMPILE_MODES."""
    recompute: bool = False
    """Recompute activations in the backward pass (activation checkpointing): the same function, less memory."""
    tensorboard: bool = False
    """Also write events for TensorBoard."""
    profile: bool = False
    """Write a trace of a few steps into the run's folder."""
    deterministic: bool = False
    """Bitwise the same on a GPU, at some cost; a CPU is so anyway."""

    def __post_init__(self) -> None:
        if self.compile in ("reduce-overhead", "max-autotune"):
            raise RunError(
                f"--compile {self.compile} captures CUDA graphs, which fail when gradients are accumulated over "
                f"micro-batches and when DALI frees memory during the capture: use {' or '.join(COMPILE_MODES)}"
            )
        if self.compile is not None and self.compile not in COMPILE_MODES:
            raise RunError(f"--compile {self.compile} is unknown: use {' or '.join(COMPILE_MODES)}")


def _frozen(value: Any) -> Any:
    """Lists of JSON as tuples."""
    return tuple(map(_frozen, value)) if isinstance(value, list) else value
