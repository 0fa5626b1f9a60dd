"""A study's runs: which scales and folds of which set are trained, how and where, and the commands that train them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cxrfast.config import TrainConfig
from cxrfast.errors import RunError
from cxrfast.runs import run_folder
from cxrfast.shards.manifest import read_set, scales_in
from cxrfast.splits import FOLDS
from cxrfast.train import Place, make_config

SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2"
"""That torchrun has to pass on to its workers; by default it dies of the last two and leaves the workers behind."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Every scale × fold of a set, with the options of all of them."""

    place: Place
    scales: list[int]
    """px, ascending."""
    folds: list[int]
    recipe: dict[str, Any]
    """Fields of TrainConfig that were given; the others are the preset's."""
    nproc: int = 1
    """Processes a node."""
    nodes: int = 1
    """Of one training; more than one by SLURM only."""

    @property
    def ranks(self) -> int:
        return self.nproc * self.nodes

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """(scale, fold) of every run."""
        return [(scale, fold) for scale in self.scales for fold in self.folds]

    def config(self, scale: int, fold: int, device: str) -> TrainConfig:
        """Raises RunError or DeviceError for options that make no sense."""
        return make_config(self.place.shards, scale, device=device, fold=fold, **self.recipe)

    def folder(self, scale: int, fold: int) -> Path:
        return run_folder(self.place.runs, self.config(scale, fold, "cpu"))

    def differences(self, config: TrainConfig, other: TrainConfig) -> list[str]:
        """What sets a run on disk apart; its precision does not where none was asked for, since machines choose it."""
        chosen = self.recipe.get("precision", "auto") == "auto"
        return [text for text in config.differences(other) if not (chosen and text.startswith("precision: "))]

    def options(self) -> list[str]:
        """Options that `train` and `study` share, as they were given."""
        values = {
            **{name: getattr(self.place, name) for name in ("device", "engine", "threads", "cache")},
            **self.recipe,
        }
        views = values.pop("views", ())
        given = {name: value for name, value in values.items() if value not in (None, "auto")}
        options = [text for name, value in given.items() for text in (f"--{name.replace('_', '-')}", str(value))]
        return options + [text for view in views for text in ("--view", view)]

    def train_options(self, scale: int, fold: int) -> list[str]:
        """Options of `cxrfast train` for one run."""
        place = self.place
        where = ["--shards", str(place.shards), "--runs", str(place.runs)]
        return [*where, "--scale", str(scale), "--fold", str(fold), *self.options()]

    def study_arguments(self) -> list[str]:
        """Arguments of `cxrfast study` for all runs in single processes."""
        scales = [text for scale in self.scales for text in ("--scale", str(scale))]
        folds = [text for fold in self.folds for text in ("--fold", str(fold))]
        return [str(self.place.shards), str(self.place.runs), *scales, *folds, *self.options()]


def make_plan(
    shards: Path,
    runs: Path,
    scales: list[int] | None = None,
    folds: list[int] | None = None,
    *,
    nproc: int = 1,
    nodes: int = 1,
    recipe: dict[str, Any] | None = None,
    **place: Any,
) -> Plan:
    """All `scales` of the set and all five folds where none are given; `place`: further fields of Place.

    Raises ShardError if `shards` is no set, RunError if nothing is in it.
    """
    read_set(shards)
    recipe = {name: value for name, value in (recipe or {}).items() if value is not None}
    scales = sorted(set(scales or scales_in(shards)))
    if not scales:
        raise RunError(f"{shards} holds no shards yet: build them with `cxrfast shard --out {shards}`")
    folds = sorted(set(folds or ([0] if recipe.get("split") == "official" else range(FOLDS))))
    return Plan(
        place=Place(shards=shards, runs=runs, **place),
        scales=scales,
        folds=folds,
        recipe=recipe,
        nproc=nproc,
        nodes=nodes,
    )
