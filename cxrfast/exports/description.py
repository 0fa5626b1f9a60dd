"""model.json, which describes an exported model: its networks, how films are prepared for them and how they are combined.

An export may come from elsewhere: everything that is read here is checked, and no name in it is a path.
"""

import math
from dataclasses import asdict, dataclass
from typing import Annotated, Any

from msgspec import Meta

from cxrfast.config import LARGEST, PRECISIONS
from cxrfast.errors import CxrfastError, RunError
from cxrfast.files import json_bytes
from cxrfast.runs.folder import file_name
from cxrfast.runs.reference import Reference
from cxrfast.shards.building.layout import check_scales
from cxrfast.shards.format.info import parse_json, typed
from cxrfast.shards.format.recipe import ImageRecipe
from cxrfast.splits import FOLDS
from cxrfast.text import find_fault, label_fault, name_fault
from cxrfast.thresholds import Thresholds, ThresholdsJson

SCHEMA = 1

MODEL, CARD, SUMS = "model.json", "README.md", "SHA256SUMS"
"""Files of an export, next to the folders of its networks."""

AGAIN = "restore the folder from a copy, or export the model again"
"""What to do about an export that cannot be read."""

WEIGHTS = "weights"
"""Folder of the networks that `load` reads; those of other formats are in folders with their names."""

TOLERANCE = 1e-6
"""How far the weights of a finding may sum up to something else than 1."""

MOST_LABELS, MOST_MEMBERS = 10_000, 1_000

Scale = Annotated[int, Meta(ge=1, le=LARGEST)]
Fold = Annotated[int, Meta(ge=0, lt=FOLDS)]
Images = Annotated[int, Meta(ge=1, le=LARGEST)]


@dataclass(frozen=True, kw_only=True)
class MemberDescription:
    """One network: a scale and a fold."""

    name: str
    """Name of the run that trained it: `densenet121-256/fold-0`."""
    arch: str
    scale: Scale
    """px"""
    fold: Fold
    precision: str
    """Number format in which cxrfast computes its forward pass; see `models.precision`."""
    micro_batch: Images
    """Images per forward pass, at most."""
    config: dict[str, Any]
    """TrainConfig of its run, without the path of its first weights; for readers, nothing uses it."""
    origin: dict[str, Any]
    """Origin of its first weights; for readers."""
    thresholds: ThresholdsJson | None = None
    """As `Thresholds.json`, of its own logits."""

    @property
    def own_thresholds(self) -> Thresholds | None:
        return Thresholds.from_json(self.thresholds) if self.thresholds is not None else None

    @property
    def stem(self) -> str:
        """Name of its files, without their suffix: `densenet121-256-fold-0`."""
        return f"{file_name(self.name.rpartition('/')[0])}-fold-{self.fold}"


@dataclass(frozen=True, kw_only=True)
class Description:
    """What model.json holds. Raises ValueError or CxrfastError for values that no export has."""

    schema: int = SCHEMA
    labels: list[str]
    """Findings, in the order of the logits."""
    set_id: str
    """Id of the training set."""
    recipe: dict[str, Any]
    """ImageRecipe of the training set: films are prepared like its images."""
    members: list[MemberDescription]
    """By scale, then fold; each scale has the same folds."""
    weights: dict[str, list[list[float]]]
    """By fold: for each finding, the weight of each scale."""
    thresholds: ThresholdsJson | None = None
    """As `Thresholds.json`, of the ensemble's log-odds."""
    reference: dict[str, Any] | None = None
    """What the training films look like."""
    versions: dict[str, str]
    """Versions of cxrfast and of the libraries that wrote it."""

    def __post_init__(self) -> None:
        names = [member.name for member in self.members]
        told = [*names, *(m.arch for m in self.members), self.set_id, *self.versions, *self.versions.values()]
        if fault := find_fault(self.labels, label_fault) or find_fault(told, name_fault):
            raise ValueError(fault)
        if not 1 <= len(self.labels) <= MOST_LABELS or len(set(self.labels)) < len(self.labels):
            raise ValueError("its labels are not one or more different names")
        if not 1 <= len(self.members) <= MOST_MEMBERS:
            raise ValueError("it has no networks, or more than a thousand")
        for member in self.members:
            group, slash, fold = member.name.rpartition("/")
            if not slash or not group or "/" in group or fold != f"fold-{member.fold}":
                raise ValueError(f"{member.name!r} is not the name of a network of fold {member.fold}")
            if member.precision not in PRECISIONS:
                raise ValueError(f"precision {member.precision!r} of {member.name} is unknown")
        if [(m.scale, m.fold) for m in self.members] != [(s, f) for s in self.scales for f in self.folds]:
            raise ValueError("its networks are not every scale in every fold, in this order")
        if len({member.stem for member in self.members}) < len(self.members):
            raise ValueError("two of its networks have one name")
        check_scales(list(self.scales))
        self._check_weights()
        for known in (self.ensemble_thresholds, *(member.own_thresholds for member in self.members)):
            if known and len(known.logits) != len(self.labels):
                raise ValueError("its thresholds are not one for each label")
        self.image_recipe, self.films_reference  # noqa: B018 raise for values that are wrong

    def _check_weights(self) -> None:
        if sorted(self.weights) != sorted(map(str, self.folds)):
            raise ValueError("its weights are not those of its folds")
        for fold, of_labels in self.weights.items():
            if len(of_labels) != len(self.labels) or any(len(w) != len(self.scales) for w in of_labels):
                raise ValueError(f"weights of fold {fold} are not one for each finding and scale")
            for weights in of_labels:
                if min(weights) < 0 or abs(math.fsum(weights) - 1) > TOLERANCE:
                    raise ValueError(f"weights of fold {fold} are negative, or their sum is not 1")

    @property
    def scales(self) -> tuple[int, ...]:
        return tuple(sorted({member.scale for member in self.members}))

    @property
    def folds(self) -> tuple[int, ...]:
        return tuple(sorted({member.fold for member in self.members}))

    @property
    def image_recipe(self) -> ImageRecipe:
        return typed(self.recipe, ImageRecipe)

    @property
    def ensemble_thresholds(self) -> Thresholds | None:
        return Thresholds.from_json(self.thresholds) if self.thresholds is not None else None

    @property
    def films_reference(self) -> Reference | None:
        return Reference.from_json(self.reference) if self.reference is not None else None

    def to_bytes(self) -> bytes:
        return json_bytes(asdict(self))


def parse_description(data: bytes, path: object = MODEL) -> Description:
    """The contents of a model.json. Raises RunError naming `path`, if it is damaged or of another schema version."""
    try:
        value = parse_json(data)
        schema = value.get("schema")
        if not isinstance(schema, int) or schema == SCHEMA:
            if schema is None:
                raise ValueError("it has no schema version")
            return typed(value, Description)
    except (ValueError, CxrfastError) as error:
        raise RunError(f"{path} is damaged ({error}): {AGAIN}") from error
    raise RunError(f"{path} has schema version {schema}, this cxrfast reads {SCHEMA}: use the cxrfast that exported it")
