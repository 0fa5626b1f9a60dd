"""What a training is: its configuration, its presets by scale, its command-line options, and default folders.

Each field that can be set on the command line says so once, in its type: `cxrfast.cli.options` makes the options of `train`
and `study` from it, and `as_arguments` turns values back into arguments.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, get_args

from cxrfast.errors import RunError

DATA = os.environ.get("CXRFAST_DATA") or "data/mimic-cxr-jpg"  # text: it may be a URL
SHARDS = Path(os.environ.get("CXRFAST_SHARDS") or "data/shards")
RUNS = Path("runs")

PRECISIONS = ("auto", "bf16", "fp16", "tf32", "fp32")
COMPILE_MODES = ("default", "max-autotune-no-cudagraphs")
"""Modes of torch.compile that work with gradient accumulation; see `Runtime.compile`."""
SPLITS = ("folds", "official", "auto")
ORDERS = ("global", "block")
ENGINES = ("auto", "dali", "host")

LATER = ("allow_partial", "allow_shared_patients", "blank", "unlabelled", "weighted_validation")
"""Fields of TrainConfig that earlier versions lack: at their defaults they leave the hash, and so earlier runs, as they are."""

LARGEST = 2**31 - 1
"""Upper limit of the learning rate and of all numbers of images, pixels and epochs."""

AUTO = -1
"""Micro-batch that `train` replaces by the largest that fits, before the run starts."""

YEAR = 365 * 24 * 60
"""Minutes; the longest time that may be waited for something."""

MOST_THREADS = 1024
"""Decoding threads per process."""

VALIDATION_COST = 1 / 3
"""Cost of a validation image in training images: a forward pass without the backward pass."""


@dataclass(frozen=True)
class Preset:
    """Batch sizes; they do not depend on the number of GPUs. Ours: the study's own table was not available to us."""

    global_batch: int
    micro_batch: int


PRESETS = {128: Preset(32, 16), 256: Preset(384, 32), 512: Preset(192, 16), 1024: Preset(96, 8), 2048: Preset(48, 4)}
"""By largest scale. From 256 px on, 1, 2, 3, 4, 6 or 12 ranks can share a global batch."""

LEARNING_RATE, LEARNING_RATE_BATCH = 1e-4, 32
"""Adam's learning rate for a global batch of 32; it grows in proportion to the global batch, as in the study."""


def preset(scale: int) -> Preset:
    """Preset of the next scale in PRESETS at or above `scale`; above 2048 px, the preset of 2048 px."""
    return PRESETS[min((s for s in PRESETS if s >= scale), default=max(PRESETS))]


def learning_rate(global_batch: int) -> float:
    return LEARNING_RATE * global_batch / LEARNING_RATE_BATCH


@dataclass(frozen=True)
class Option:
    """Describes the command-line option of a field. Its default is the field's."""

    help: str
    name: str = ""
    """Default: the field's, with dashes."""
    minimum: int | None = None
    choices: tuple[str, ...] | None = None
    metavar: str | None = None
    multiple: bool = False
    """The option is given once per item of a tuple."""
    write: Callable[[Any], str] = str
    """Turns a value, or an item of a `multiple` one, into the option's text."""

    def flag(self, field: str) -> str:
        return f"--{self.name or field.replace('_', '-')}"


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that decides the weights of a run. Raises RunError for impossible values."""

    set_id: str
    """Id of the shard set."""
    scale: int
    """Side of the images, px."""
    labels: tuple[str, ...]
    """Findings, in the order of the logits."""
    fold: int = 0
    arch: Annotated[str, Option("A torchvision classifier.")] = "densenet121"
    weights: Annotated[str, Option("imagenet, none, a .pth or .safetensors file, or a run.")] = "imagenet"
    policy: Annotated[str, Option("Uncertain labels: u_zeros, u_ones or u_ignore.")] = "u_zeros"
    label_policies: Annotated[
        tuple[tuple[str, str], ...],
        Option("Another policy for one label; repeatable.", name="label-policy", multiple=True, write="=".join),
    ] = ()
    blank: Annotated[
        tuple[tuple[str, str], ...],
        Option(
            "Blank labels: negative (the default) or ignore; LABEL=ignore for one label; repeatable.",
            multiple=True,
            metavar="[LABEL=]POLICY",
            write=lambda item: "=".join(filter(None, item)),
        ),
    ] = ()
    """Label and policy; label "" is all those that are not named."""
    unlabelled: Annotated[
        str, Option("Images without any label: left out, or negative for every label.", choices=("drop", "negative"))
    ] = "drop"
    positive_weights: Annotated[
        bool, Option("Weight the positives of each label by its negatives / positives in the training rows.")
    ] = False
    weighted_validation: bool = False
    """Whether `positive_weights` weigh the validation loss as they do the training loss; not in runs of earlier versions."""
    split: Annotated[
        str,
        Option(
            "folds; official: the data set's train, validate and test; auto: official if the set was built with "
            "--split-column."
        ),
    ] = "auto"
    """`make_config` resolves auto, so that runs store what they used."""
    allow_shared_patients: Annotated[
        bool,
        Option(
            "Train even if a patient is in two parts of the split, or the first weights may have seen test patients."
        ),
    ] = False
    allow_partial: Annotated[bool, Option("Train on the rows that are there of a set whose build is not finished.")] = (
        False
    )
    """In a run: whether rows were missing when it started."""
    views: Annotated[
        tuple[str, ...], Option("Use only this view position, such as PA; repeatable.", name="view", multiple=True)
    ] = ()
    limit: Annotated[int | None, Option("Use only the first N rows of each part.", minimum=1, metavar="N")] = None
    subset: str | None = None
    """Hash of the row numbers in `Runtime.subset`; None: all rows."""
    global_batch: Annotated[int, Option("Images per optimiser step. [default: by scale]", minimum=1)]
    micro_batch: Annotated[
        int, Option("Images per forward pass; auto: as many as fit. [default: by scale]", minimum=1, metavar="N|auto")
    ]
    learning_rate: Annotated[float, Option("[default: 1e-4 · global batch / 32]")]
    epochs: Annotated[int, Option("Maximum number of epochs.")] = 100
    factor: float = 0.5
    """Multiplies the learning rate after more than `patience` epochs without a lower validation loss."""
    patience: int = 3
    """For the learning rate; early stopping has `stop_after`."""
    stop_after: int = 10
    """Epochs without a lower validation loss after which training stops early."""
    degrees: float = 15.0
    """Rotation, uniform in ±degrees."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    sizes: Annotated[
        tuple[tuple[int, int], ...],
        Option(
            "Train on smaller images first (side x epochs), such as 64x2,96x2.",
            write=lambda sizes: ",".join(f"{side}x{epochs}" for side, epochs in sizes),
        ),
    ] = ()
    precision: Annotated[str, Option("auto, bf16, fp16, tf32 or fp32; auto is resolved when the run starts.")] = "auto"
    sync_bn: Annotated[
        bool, Option("BatchNorm over the micro-batches of all ranks; GPUs only. Weights then depend on their number.")
    ] = False
    order: Annotated[
        str,
        Option(
            "Row order within an epoch; block: a few shards at a time, for storage that seeks slowly.", choices=ORDERS
        ),
    ] = "global"
    seed: Annotated[int, Option("Seed of the weights, the order and the augmentation.")] = 0

    def __post_init__(self) -> None:
        # not at the top: numpy would slow down `cxrfast --help`
        from cxrfast.labels import BLANKS, POLICIES, UNLABELLED
        from cxrfast.splits import check_fold

        if not self.labels or len(set(self.labels)) < len(self.labels):
            raise RunError("findings must be one or more different names")
        if taken := {"row", "image_id", "patient_id", "part"} & set(self.labels):
            raise RunError(
                f"a finding cannot be called {min(taken)!r}, as a column of a run's rows is: rename it with `cxrfast relabel`"
            )
        known = {"policy": POLICIES, "unlabelled": UNLABELLED}
        known |= {"precision": PRECISIONS, "split": SPLITS, "order": ORDERS}
        for name, allowed in known.items():
            if getattr(self, name) not in allowed:
                raise RunError(f"{name} {getattr(self, name)!r} is unknown: use one of {', '.join(allowed)}")
        check_fold(self.split, self.fold)
        if not 0 <= self.seed < 2**63:
            raise RunError(f"--seed {self.seed} is not between 0 and 2^63 - 1")
        numbers = "global_batch micro_batch epochs learning_rate scale patience stop_after limit"
        for name in numbers.split():
            value = getattr(self, name)
            if value is None or (name, value) == ("micro_batch", AUTO):
                continue
            if not 0 < value < math.inf:
                raise RunError(f"{name.replace('_', ' ')} must be above 0, not {value}")
            if value > LARGEST:
                raise RunError(f"{name.replace('_', ' ')} must be at most {LARGEST:,}")
        if not 0 <= self.flip <= 1:
            raise RunError(f"flip must be between 0 and 1, not {self.flip}")
        for label, policy in self.label_policies:
            if label not in self.labels or policy not in POLICIES:
                raise RunError(
                    f"--label-policy {label}={policy}: give LABEL=POLICY with a label of the set "
                    f"({', '.join(self.labels)}) and one of {', '.join(POLICIES)}"
                )
        for label, policy in self.blank:
            if label not in ("", *self.labels) or policy not in BLANKS:
                raise RunError(
                    f"--blank {'='.join(filter(None, (label, policy)))}: give {' or '.join(BLANKS)}, or LABEL=ignore with a "
                    f"label of the set ({', '.join(self.labels)})"
                )
        if not all(0 < n <= LARGEST for size in self.sizes for n in size):
            raise RunError(
                f"--sizes {self.sizes}: sides and epochs must be above 0 and at most {LARGEST:,}, as in --sizes 64x2,96x2"
            )

    @property
    def policies(self) -> tuple[str, ...]:
        """The policy of each label, in the order of `labels`."""
        return tuple(dict(self.label_policies).get(label, self.policy) for label in self.labels)

    @property
    def blanks(self) -> tuple[str, ...]:
        """What a blank value of each label becomes, in the order of `labels`."""
        given = dict(self.blank)
        return tuple(given.get(label, given.get("", "negative")) for label in self.labels)

    @property
    def sides(self) -> set[int]:
        """Sides of the training images over all epochs, px."""
        return {self.scale, *(side for side, _ in self.sizes)}

    def size_at(self, epoch: int) -> int:
        """Side of the training images in this epoch (from 0), px."""
        for side, epochs in self.sizes:
            if epoch < epochs:
                return side
            epoch -= epochs
        return self.scale

    def area_at(self, epoch: int) -> float:
        """Area of a training image in this epoch as a fraction of the area at `scale`: its cost."""
        return (self.size_at(epoch) / self.scale) ** 2

    def work(self, done: int, images: int, validated: int) -> float:
        """Cost of all epochs after the first `done`, at most, in training images at `scale`.

        `images`, `validated`: number of images that an epoch trains on and validates on.
        """
        total, start = 0.0, 0
        for side, epochs in (*self.sizes, (self.scale, self.epochs)):
            end = min(start + epochs, self.epochs)
            area = (side / self.scale) ** 2
            total += max(0, end - max(start, done)) * (images * area + VALIDATION_COST * validated)
            start = end
        return total

    @property
    def hash(self) -> str:
        """Hash of all fields. Equal hashes train equal runs. A run keeps that of its start, see `Run.hash`."""
        later = {f.name: f.default for f in fields(self) if f.name in LATER}
        values = {name: value for name, value in asdict(self).items() if name not in later or value != later[name]}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]

    def differences(self, other: "TrainConfig") -> list[str]:
        """`name: mine, not theirs` for every field that differs, except `epochs`, which a run may have more of later.

        Labels that differ are named, see `label_differences`.
        """
        found = []
        for name in (f.name for f in fields(self) if f.name != "epochs"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                told = label_differences(mine, theirs) if name == "labels" else f"{mine}, not {theirs}"
                found.append(f"{name}: {told}")
        return found

    @classmethod
    def from_json(cls, value: Any) -> "TrainConfig":
        """The configuration that `asdict` gave as `value`. Raises RunError naming the field that is wrong or unknown."""
        import msgspec  # here, since the command line loads this module

        try:
            msgspec.convert(value, cls)  # a check only: it makes floats of ints, which changes the hash
            return cls(**{name: _frozen(given) for name, given in value.items()})
        except (msgspec.ValidationError, TypeError) as error:
            raise RunError(f"not a configuration of this version of cxrfast: {error}") from error


def label_differences(these: Sequence[str], others: Sequence[str]) -> str:
    """How labels differ from others, such as `without Edema, with Tube`."""
    told = []
    for word, names in (
        ("without", [name for name in others if name not in these]),
        ("with", [name for name in these if name not in others]),
    ):
        if names:
            more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
            told.append(f"{word} {', '.join(names[:MOST_NAMED])}{more}")
    return ", ".join(told) or "in another order"


MOST_NAMED = 5
"""Labels that a message names."""


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """Where and how a training runs. Nothing here changes the rows, their order or the training options."""

    shards: Path
    runs: Path
    name: Annotated[str | None, Option("Folder of this run's folds. [default: ARCH-SCALE]")] = None
    subset: Annotated[
        Path | None,
        Option("Use only the rows in this file: one row number per line.", name="rows", metavar="FILE"),
    ] = None
    device: Annotated[str, Option("auto, cpu or cuda.")] = "auto"
    engine: Annotated[str, Option("Decoder of the images.", choices=ENGINES)] = "auto"
    threads: Annotated[
        int | None, Option("Decoding threads per process. [default: usable cores / processes]", minimum=1)
    ] = None
    cache: Annotated[
        Path | None,
        Option("Keep decoded pixels here, on a local disk; may be deleted at any time.", metavar="DIR"),
    ] = None
    stage: Annotated[
        Path | None, Option("Copy the scale to this local disk first, once per machine.", metavar="DIR")
    ] = None
    checkpoint_minutes: Annotated[float, Option("Minutes between checkpoints, at most.")] = 10.0
    checkpoint_steps: Annotated[int | None, Option("Optimiser steps between checkpoints, at most.", minimum=1)] = None
    recompute: Annotated[
        bool, Option("Recompute activations in the backward pass: the same result, slower, in less memory.")
    ] = False
    compile: Annotated[str | None, Option(f"torch.compile: {' or '.join(COMPILE_MODES)}.", metavar="MODE")] = None
    tensorboard: Annotated[bool, Option("Also write TensorBoard events into the run.")] = False
    profile: Annotated[bool, Option("Write a trace of a few steps: profile.json in the run.")] = False
    dist_timeout: Annotated[float, Option("Minutes a rank waits for the others before it gives up.")] = 10.0
    deterministic: Annotated[bool, Option("Bitwise repeatable on a GPU, slower; a CPU always is.")] = False

    def __post_init__(self) -> None:
        for name in ("checkpoint_minutes", "dist_timeout"):
            if not 0 < getattr(self, name) <= YEAR:
                raise RunError(
                    f"--{name.replace('_', '-')} {getattr(self, name):g} must be above 0 and at most {YEAR:,} minutes"
                )
        from cxrfast.text import name_fault

        if self.name is not None and (fault := name_fault(self.name) or _folder_fault(self.name)):
            raise RunError(f"--name {self.name!r} {fault}: give the name of one folder, such as densenet121-256-warm")
        if self.threads is not None and self.threads > MOST_THREADS:
            raise RunError(f"--threads must be at most {MOST_THREADS:,}, not {self.threads:,}")
        if self.compile in ("reduce-overhead", "max-autotune"):
            raise RunError(
                f"--compile {self.compile} captures CUDA graphs, which fail when gradients are accumulated over "
                f"micro-batches or DALI frees memory during the capture: use {' or '.join(COMPILE_MODES)}"
            )
        if self.compile is not None and self.compile not in COMPILE_MODES:
            raise RunError(f"--compile {self.compile} is unknown: use {' or '.join(COMPILE_MODES)}")


def _folder_fault(name: str) -> str | None:
    """Why this cannot be the name of a folder; None if it can."""
    if not name.strip():
        return "is empty"
    return "leads to another folder" if "/" in name or name in (".", "..") else None


def options_of(kind: type) -> dict[str, tuple[Option, Any, Any]]:
    """Option, type and default (None if there is none) of each field of TrainConfig or Runtime that has an option."""
    return {
        f.name: (option, type_, None if f.default is MISSING else f.default)
        for f in fields(kind)
        for type_, option in [get_args(f.type)[:2] or (None, None)]
        if isinstance(option, Option)
    }


def as_arguments(values: Mapping[str, Any]) -> list[str]:
    """Command-line arguments that set fields of TrainConfig and Runtime to these values. Defaults are left out.

    Raises RunError for a field that has no option.
    """
    options = options_of(TrainConfig) | options_of(Runtime)
    arguments = []
    for name, value in values.items():
        if name not in options:
            raise RunError(f"{name} has no command-line option: to set it, train from Python in a single process")
        option, _, default = options[name]
        if value is not None and value != default:
            items = value if option.multiple else [value]
            arguments += [option.flag(name) + ("" if one is True else f"={option.write(one)}") for one in items]
    return arguments


def _frozen(value: Any) -> Any:
    """JSON lists as tuples."""
    return tuple(map(_frozen, value)) if isinstance(value, list) else value
