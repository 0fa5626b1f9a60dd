"""The origin of a run's first weights: its record, as text, and the sign and footnote that tables mark it with.

Reads no files: `training.first_weights` finds out where weights come from, and a run's config.json records it.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, Literal, Optional

import msgspec

from cxrfast.config import TrainConfig
from cxrfast.errors import RunError
from cxrfast.runs.folder import WEIGHTS
from cxrfast.text import find_fault, name_fault

if TYPE_CHECKING:
    from cxrfast.runs.run import Run

SIGN = "†"
"""Follows the name of a run, or of a group of runs, whose first weights came from another run."""

OTHER_FOLD = ", another fold"
"""Follows the name of a run of another fold in the text of an origin, and so stays in the text of a group."""

FROM_RUN = "from "
"""Start of the text of an origin that is another run."""

SUFFIXES = {".pth", ".pt", ".safetensors", ".tar", ".ckpt", ".bin", ".pkl", ".th"}
"""Ends of the names of files of weights."""

Difference = Literal["set", "split", "fold", "division", "unknown"]
"""What two runs differ in, so that one may have trained on patients that the other is tested on."""


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where weights come from. None: not known, or it does not apply."""

    kind: Literal["imagenet", "none", "run", "file"]
    file: str | None = None
    """Name of the file, without its folder."""
    sha256: str | None = None
    """Hash of the file."""
    run: str | None = None
    """The run that trained them, as `densenet121-64/fold-0`."""
    set_id: str | None = None
    """The run's shard set."""
    fold: int | None = None
    split: str | None = None
    labels: tuple[str, ...] | None = None
    """The run's findings, in the order of its logits."""
    division: str | None = None
    """Hash of the part of every row of the set: sets with one id may have split columns of their own."""
    shared_patients: bool | None = None
    """Whether the run was trained with --allow-shared-patients; None: it was not, or an earlier version did not record it."""
    config_hash: str | None = None
    """Hash of the run's configuration."""
    start: Optional["Origin"] = None
    """Origin of the first weights of that run."""

    @classmethod
    def of_path(cls, config: TrainConfig) -> "Origin":
        """What the value of --weights says by itself, for runs of earlier versions, which recorded nothing else."""
        if config.weights == "imagenet":
            return cls(kind="imagenet")
        if config.weights == "none":
            return cls(kind="none")
        path = PurePath(config.weights)
        if path.name == WEIGHTS:
            path = path.parent
        elif path.suffix in SUFFIXES:
            return cls(kind="file", file=path.name)
        fold = re.fullmatch(r"fold-(\d+)", path.name)
        if not fold:
            return cls(kind="run")  # the name of another folder may say more about the machine than about the run
        is_named = len(path.parts) > 1
        return cls(kind="run", run="/".join(path.parts[-2:]), fold=int(fold[1]) if is_named else None)

    @classmethod
    def from_json(cls, value: Any) -> "Origin":
        """The origin that `json` gave as `value`, which may come from elsewhere. Raises RunError for anything else."""
        try:
            origin = msgspec.convert(value, cls)
        except (msgspec.ValidationError, RecursionError) as error:
            raise RunError(f"not an origin of weights: {error}") from error
        names = (
            name
            for link in origin.links
            for name in (link.file, link.run, link.set_id, link.split, *(link.labels or ()))
        )
        if fault := find_fault(filter(None, names), name_fault):
            raise RunError(f"not an origin of weights: {fault}")
        return origin

    @property
    def links(self) -> Iterator["Origin"]:
        """This origin, that of the run that trained these weights, and so on."""
        link: Origin | None = self
        while link is not None:
            yield link
            link = link.start

    @property
    def runs(self) -> Iterator["Origin"]:
        """The runs that trained these weights, the last one first."""
        return (link for link in self.links if link.kind == "run")

    def json(self) -> dict[str, Any]:
        """The values that are known, for a JSON file."""
        values = {name: value for name, value in asdict(self).items() if value is not None}
        return values | ({"start": self.start.json()} if self.start else {})


def origin_of(run: "Run") -> str:
    """`ImageNet`, `none`, `from densenet121-64/fold-0` for another run, or the name of a file of weights.

    `from densenet121-64/fold-1, another fold` if it is not this run's: its training rows hold this run's test patients. A
    run further back is named only if it is of another fold, split or set.
    """
    origin = run.origin
    if origin.kind == "file":
        return origin.file or "a file"
    if origin.kind != "run":
        return {"imagenet": "ImageNet", "none": "none"}[origin.kind]
    own = run.as_origin()
    first, *earlier = ((link.run or "a run of an earlier version", _difference_text(link, own)) for link in origin.runs)
    shown = [first, *(one for one in earlier if one[1])]
    return FROM_RUN + ", which started from ".join(name + difference for name, difference in shown)


def differs_in(link: Origin, own: Origin) -> Difference | None:
    """Why the training rows of one run may hold patients that another is tested on; None if nothing says so."""
    if link.run is None and link.set_id is None:
        return "unknown"
    compared: dict[Difference, tuple[str | int | None, str | int | None]] = {
        "set": (link.set_id, own.set_id),
        "split": (link.split, own.split),
        "fold": (link.fold, own.fold),
        "division": (link.division, own.division),
    }
    return next((what for what, pair in compared.items() if None not in pair and pair[0] != pair[1]), None)


def _difference_text(link: Origin, own: Origin) -> str:
    match differs_in(link, own):
        case "set":
            return f", another set ({(link.set_id or '')[:8]})"
        case "split":
            return f", another split ({link.split})"
        case "fold":
            is_named = (link.run or "").endswith(f"/fold-{link.fold}")
            return OTHER_FOLD if is_named else f"{OTHER_FOLD} ({link.fold})"
        case "division":
            return ", the same set split otherwise"
        case "unknown":
            return f" ({link.file}), set and fold unknown" if link.file else ", set and fold unknown"
    return ""


def shared_origin(origins: Iterable[str]) -> str:
    """Origin of a group of runs, without their fold: `from densenet121-64`. Several are joined by `; `."""
    return "; ".join(dict.fromkeys(re.sub(r"/fold-\d+$", "", origin) for origin in origins))


def group_origins(origins: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Shared origin of each group, from the name of the group and the origin of each of its runs."""
    groups: dict[str, list[str]] = {}
    for name, origin in origins:
        groups.setdefault(name, []).append(origin)
    return {name: shared_origin(group) for name, group in groups.items()}


def marked_name(name: str, origin: str) -> str:
    """`name`, with the sign if the first weights came from another run."""
    return name + SIGN if origin.startswith(FROM_RUN) else name


def origin_footnote(origins: Mapping[str, str]) -> str:
    """Explanation of the sign, from the origin of each name; empty if no name has the sign."""
    marked = {name: origin for name, origin in origins.items() if origin.startswith(FROM_RUN)}
    if not marked:
        return ""
    smaller = all(0 < _scale(origin) < _scale(name) for name, origin in marked.items())
    which = "the run of a smaller scale" if smaller else "another run"
    return f"{SIGN} weights started from {which}: {', '.join(f'{n} {o}' for n, o in marked.items())}."


def _scale(name: str) -> int:
    """The number at the end of a group's name, as `densenet121-64`; 0 if there is none."""
    found = re.match(r"[^,;]*-(\d+)(?:/fold-\d+)?(?:,|$)", name)
    return int(found[1]) if found else 0
