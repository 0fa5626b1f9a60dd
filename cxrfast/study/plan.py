"""A study's runs: which scales and folds of which set are trained, how and where, and the commands that train them."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from cxrfast.config import Runtime, TrainConfig
from cxrfast.errors import RunError
from cxrfast.runs.folder import RunFolder
from cxrfast.shards.shard_set import ShardSet
from cxrfast.splits import FOLDS
from cxrfast.training.setup import make_config

LEFT = {"precision": "auto", "micro_batch": None}
"""What a run gets whose option is not given."""

OPTION_NAMES = {"subset": "rows", "views": "view", "label_policies": "label-policy"}
"""Option names of fields that are called otherwise on the command line."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Every scale × fold of a set, with the options of all of them."""

    runtime: Runtime
    scales: list[int]
    """px, ascending."""
    folds: list[int]
    options: dict[str, Any]
    """Fields of TrainConfig that were given; the others are the preset's."""
    nproc: int = 1
    """Processes per node."""
    nodes: int = 1
    """Nodes per training; more than one with SLURM only."""

    @property
    def ranks(self) -> int:
        return self.nproc * self.nodes

    def config(self, scale: int, fold: int, device: str) -> TrainConfig:
        """Raises RunError or DeviceError for options that make no sense."""
        where = self.runtime
        return make_config(where.shards, scale, device=device, subset=where.subset, fold=fold, **self.options)

    def run_name(self, scale: int, fold: int) -> str:
        """`densenet121-2048/fold-0`, whether or not the options make sense."""
        return f"{self.options.get('arch', 'densenet121')}-{scale}/fold-{fold}"

    def folder(self, scale: int, fold: int) -> Path:
        return RunFolder.of(self.runtime.runs, self.config(scale, fold, "cpu").arch, scale, fold).folder

    def differences(self, config: TrainConfig, other: TrainConfig) -> list[str]:
        """What sets a run on disk apart, but for what was left to the machine to choose."""
        left = [name for name in ("precision", "micro_batch") if self.options.get(name, LEFT[name]) == "auto"]
        return [text for text in config.differences(other) if text.partition(":")[0] not in left]

    def _common_options(self) -> list[str]:
        """Options that `train` and `study` share, as they were given."""
        where = {f.name: getattr(self.runtime, f.name) for f in fields(Runtime) if f.name not in ("shards", "runs")}
        usual = {f.name: f.default for f in fields(Runtime)}
        given = {name: value for name, value in where.items() if value != usual[name]}
        return as_options({**given, **self.options})

    def train_options(self, scale: int, fold: int) -> list[str]:
        """Options of `cxrfast train` for one run."""
        where = [f"--shards={self.runtime.shards}", f"--runs={self.runtime.runs}"]
        return [*where, f"--scale={scale}", f"--fold={fold}", *self._common_options()]

    def study_arguments(self) -> list[str]:
        """Arguments of `cxrfast study` for all runs in single processes."""
        runs = [f"--scale={scale}" for scale in self.scales] + [f"--fold={fold}" for fold in self.folds]
        return [str(self.runtime.shards), str(self.runtime.runs), *runs, *self._common_options()]


def as_options(values: Mapping[str, Any]) -> list[str]:
    """Fields of TrainConfig and Runtime as options of `cxrfast train`; None, False and what is `auto` anyway are left out."""
    options = []
    for name, value in values.items():
        option = f"--{OPTION_NAMES.get(name, name.replace('_', '-'))}"
        if name == "sizes" and value:
            value = ",".join(f"{side}x{epochs}" for side, epochs in value)
        for one in value if isinstance(value, tuple) else [value]:
            if one is True:
                options.append(option)
            elif one not in (None, False) and (one != "auto" or name == "micro_batch"):
                options.append(f"{option}={'='.join(one) if isinstance(one, tuple) else one}")
    return options


def make_plan(
    shards: Path,
    runs: Path,
    scales: list[int] | None = None,
    folds: list[int] | None = None,
    *,
    nproc: int = 1,
    nodes: int = 1,
    options: dict[str, Any] | None = None,
    **runtime: Any,
) -> Plan:
    """All `scales` of the set and all five folds where none are given; `runtime`: further fields of Runtime.

    `options`: fields of TrainConfig, None for the preset's. Raises ShardError if `shards` is not a set, RunError if
    nothing is in it.
    """
    built = ShardSet(shards).scales
    options = {name: value for name, value in (options or {}).items() if value is not None}
    runtime.setdefault("subset", options.pop("subset", None))
    scales = sorted(set(scales or built))
    if not scales:
        raise RunError(f"{shards} holds no shards yet: build them with `cxrfast shard --out {shards}`")
    folds = sorted(set(folds or ([0] if options.get("split") == "official" else range(FOLDS))))
    return Plan(
        runtime=Runtime(shards=shards, runs=runs, **runtime),
        scales=scales,
        folds=folds,
        options=options,
        nproc=nproc,
        nodes=nodes,
    )
