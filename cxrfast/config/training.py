"""Everything that decides the weights of a run, and how two configurations differ."""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Annotated, Any

from cxrfast.config.option import Option
from cxrfast.errors import RunError

PRECISIONS = ("auto", "bf16", "fp16", "tf32", "fp32")
SPLITS = ("folds", "official", "auto")
ORDERS = ("global", "block")

DECAY = {"adam": 0.0, "adamw": 0.01}
"""Default weight decay by optimiser: none in the study's Adam, torch's own in AdamW."""

OPTIMIZERS = tuple(DECAY)
SCHEDULES = ("plateau", "cosine")

LATER = (
    *("allow_partial", "allow_shared_patients", "blank", "unlabelled", "weighted_validation"),
    *("optimizer", "weight_decay", "schedule", "warmup"),
)
"""Fields of TrainConfig that earlier versions lack: at their defaults they leave the hash, and so earlier runs, as they are."""

LARGEST = 2**31 - 1
"""Upper limit of the learning rate and of all numbers of images, pixels and epochs."""

AUTO = -1
"""Micro-batch that `train` replaces by the largest that fits, before the run starts."""

VALIDATION_COST = 1 / 3
"""Cost of a validation image in training images: a forward pass without the backward pass."""


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
    arch: Annotated[str, Option("A torchvision classifier, timm/NAME, or your own package.module:factory.")] = (
        "densenet121"
    )
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
    optimizer: Annotated[
        str, Option("adam, the study's, or adamw, whose weight decay is decoupled.", choices=OPTIMIZERS)
    ] = "adam"
    weight_decay: Annotated[
        float | None,
        Option("Of weights with two or more dimensions, not of biases and norms. [default: adam 0, adamw 0.01]"),
    ] = None
    """None: the optimiser's default, see `decay`."""
    schedule: Annotated[
        str,
        Option(
            "plateau: halve the learning rate when the validation loss no longer falls, as in the study; cosine: lower it "
            "towards 0 over --epochs.",
            choices=SCHEDULES,
        ),
    ] = "plateau"
    warmup: Annotated[float, Option("Epochs in which the learning rate first grows linearly.", metavar="EPOCHS")] = 0.0
    epochs: Annotated[int, Option("Maximum number of epochs.")] = 100
    factor: float = 0.5
    """Multiplies the learning rate after more than `patience` epochs without a lower validation loss."""
    patience: int = 3
    """For the learning rate; early stopping has `stop_after`."""
    stop_after: int = 10
    """Epochs without a lower validation loss after which training stops early."""
    degrees: Annotated[float, Option("Rotation in training, uniform in ±D degrees.", metavar="D")] = 15.0
    flip: Annotated[
        float, Option("Probability of a horizontal flip in training; docs/runs.md says what it costs.", metavar="P")
    ] = 0.5
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
        known |= {"optimizer": OPTIMIZERS, "schedule": SCHEDULES}
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
        self._check_recipe()
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

    def _check_recipe(self) -> None:
        if not 0 <= self.flip <= 1:
            raise RunError(f"flip must be between 0 and 1, not {self.flip}")
        if not 0 <= self.degrees <= 180:
            raise RunError(f"degrees must be between 0 and 180, not {self.degrees}")
        if self.weight_decay is not None and not 0 <= self.weight_decay < 1:
            raise RunError(f"weight decay must be at least 0 and below 1, not {self.weight_decay}")
        if not 0 <= self.warmup < self.epochs:
            raise RunError(
                f"warmup must be at least 0 and below the number of epochs, {self.epochs}, not {self.warmup}: give fewer "
                "--warmup epochs, or more --epochs"
            )

    @property
    def decay(self) -> float:
        """Weight decay: as given, else the optimiser's default."""
        return self.weight_decay if self.weight_decay is not None else DECAY[self.optimizer]

    @property
    def stops_early(self) -> bool:
        """Whether `stop_after` ends the training. A cosine schedule is not cut short: its last epochs have the low rates."""
        return self.schedule != "cosine"

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

        A cosine schedule is laid out over its epochs, which therefore count. Labels that differ are named, see
        `label_differences`.
        """
        found = []
        is_cosine = self.schedule == other.schedule == "cosine"
        for name in (f.name for f in fields(self) if f.name != "epochs" or is_cosine):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                told = label_differences(mine, theirs) if name == "labels" else f"{mine}, not {theirs}"
                why = ", over which its cosine schedule is laid out" if name == "epochs" else ""
                found.append(f"{name}: {told}{why}")
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


def _frozen(value: Any) -> Any:
    """JSON lists as tuples."""
    return tuple(map(_frozen, value)) if isinstance(value, list) else value
