"""A plan of a study: the scales and folds to train, how and where, and the commands that train them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cxrfast.config import Runtime, TrainConfig, as_arguments, options_of
from cxrfast.errors import RunError
from cxrfast.runs.folder import RunFolder
from cxrfast.shards.parts import resolve_split
from cxrfast.shards.shard_set import ShardSet
from cxrfast.splits import FOLDS
from cxrfast.training.resume import kept
from cxrfast.training.setup import check_labelled, make_config


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Every scale × fold of a set, with the options they share."""

    runtime: Runtime
    scales: list[int]
    """px, ascending."""
    folds: list[int]
    options: dict[str, Any]
    """Fields of TrainConfig that were given; the others come from the preset."""
    nproc: int = 1
    """Processes per node."""
    nodes: int = 1
    """Nodes per training; more than one with SLURM only."""

    @property
    def ranks(self) -> int:
        return self.nproc * self.nodes

    def config(self, scale: int, fold: int, device: str) -> TrainConfig:
        """Configuration of one run. Raises RunError or DeviceError for impossible options."""
        where = self.runtime
        return make_config(where.shards, scale, device=device, subset=where.subset, fold=fold, **self.options)

    def run_name(self, scale: int, fold: int) -> str:
        """`densenet121-2048/fold-0`, even if the options are impossible."""
        return RunFolder.of(self.runtime.runs, self.options.get("arch", TrainConfig.arch), scale, fold).name

    def differences(self, config: TrainConfig, other: TrainConfig) -> list[str]:
        """Differences from the configuration of a run on disk, except in what such a run keeps."""
        return kept(config, other).differences(other)

    @property
    def shared_arguments(self) -> list[str]:
        """Arguments that `cxrfast train` and `cxrfast study` have in common, as given."""
        where = {name: getattr(self.runtime, name) for name in options_of(Runtime)}
        return as_arguments({**where, **self.options})

    @property
    def train_arguments(self) -> list[str]:
        """Arguments of `cxrfast train` that all runs have in common."""
        return [f"--shards={self.runtime.shards}", f"--runs={self.runtime.runs}", *self.shared_arguments]

    def study_arguments(self) -> list[str]:
        """Arguments of `cxrfast study` for all runs, one process each."""
        runs = [f"--scale={scale}" for scale in self.scales] + [f"--fold={fold}" for fold in self.folds]
        return [*runs, *self.shared_arguments, "--", str(self.runtime.shards), str(self.runtime.runs)]


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
    """Plan `scales` (default: all of the set) × `folds` (default: all five, or 0 with an official split).

    `runtime`: further fields of Runtime.

    `options`: fields of TrainConfig, None for the preset's. Raises ShardError if `shards` is not a set, RunError if it is
    empty.
    """
    shard_set = ShardSet(shards)
    check_labelled(shards, shard_set.info)
    built = shard_set.scales
    options = {name: value for name, value in (options or {}).items() if value is not None}
    scales = sorted(set(scales or built))
    if not scales:
        raise RunError(f"{shards} holds no shards yet: build them with `cxrfast shard --out {shards}`")
    is_official = resolve_split(shard_set.info, options.get("split", "auto")) == "official"
    folds = sorted(set(folds or ([0] if is_official else range(FOLDS))))
    where = Runtime(shards=shards, runs=runs, **runtime)
    return Plan(runtime=where, scales=scales, folds=folds, options=options, nproc=nproc, nodes=nodes)
