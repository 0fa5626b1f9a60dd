"""Forecast of one run: what its training command would do, or every reason why it would refuse.

Writes nothing and uses no GPU.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch

from cxrfast.config import AUTO, TrainConfig
from cxrfast.distributed import World
from cxrfast.errors import CxrfastError, RunError
from cxrfast.models.classifier import Classifier
from cxrfast.models.weights import imagenet_file
from cxrfast.pipelines.reader import Reader
from cxrfast.runs.folder import RunFolder
from cxrfast.runs.run import Run
from cxrfast.runs.status import SILENT_SECONDS
from cxrfast.shards.shard_set import ShardSet
from cxrfast.splits import PARTS
from cxrfast.study.pace import Pace
from cxrfast.study.plan import Plan
from cxrfast.training.setup import read_subset, refuse_other_fold, select_rows, train_order, weights_file

CHECKPOINT_COPIES = 7
"""Copies of the weights on disk: last.pt with Adam's two moments (3), the next one while it is written (3), the best (1)."""


@dataclass(frozen=True, kw_only=True)
class Outlook:
    """What the training command of one run would do."""

    name: str
    scale: int
    fold: int
    what: str = "refused"
    """done, start, `resume in epoch 3` or refused."""
    refusals: tuple[str, ...] = ()
    config: TrainConfig | None = None
    rows: Mapping[str, int] = field(default_factory=dict)
    """Number of rows in each part."""
    images: int = 0
    """Training images per epoch."""
    weights: str = ""
    """Where the first weights come from."""
    work: float = 0.0
    """Cost of the epochs that are left, in training images; see `TrainConfig.work`."""
    images_per_s: float | None = None
    """Images/s of all ranks together."""
    room: int = 0
    """Bytes that its checkpoints will take on top of those on disk."""

    @property
    def is_done(self) -> bool:
        return self.what == "done"

    @property
    def seconds(self) -> float | None:
        """Time for the epochs that are left, at most, since early stopping may end it before. None if the rate is not known."""
        if not self.work:
            return 0.0
        return self.work / self.images_per_s if self.images_per_s else None


@dataclass(frozen=True)
class ScaleData:
    """Data that all runs of one scale share."""

    scale: int
    table: pd.DataFrame
    """rows.parquet of the set."""
    rows_per_shard: int
    held: np.ndarray
    """int64: rows in the set at this scale."""
    weight_bytes: int
    """Size of the model's weights, float32."""


class Found(NamedTuple):
    """What the training command would find in a run's folder."""

    what: str
    """As in Outlook."""
    epochs: int
    """Finished epochs."""


def read_scale(plan: Plan, scale: int, shards: ShardSet, table: pd.DataFrame) -> ScaleData:
    """Raises LoadError if the set does not hold the scale, RunError if the model cannot be trained at it."""
    with Reader(plan.runtime.shards, scale) as reader:
        held = reader.rows
    config = plan.config(scale, plan.folds[0], "cpu")
    with torch.device("meta"):  # shapes only, no numbers: quick
        model = Classifier(config.arch, len(shards.info.labels))
        for side in {scale, *(side for side, _ in config.sizes)}:
            model.check_size(side)
    weight_bytes = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    return ScaleData(scale, table, shards.info.rows_per_shard, held, weight_bytes)


def refused(plan: Plan, scale: int, fold: int, reason: str) -> Outlook:
    """Outlook of a run that is refused for this reason; nothing else is known."""
    return Outlook(name=plan.run_name(scale, fold), scale=scale, fold=fold, refusals=(reason,))


def look(plan: Plan, data: ScaleData, fold: int, pace: Pace) -> Outlook:
    """Outlook of one run."""
    try:
        config = plan.config(data.scale, fold, "cpu")
    except CxrfastError as error:
        return refused(plan, data.scale, fold, str(error))
    folder = RunFolder.of(plan.runtime.runs, config.arch, config.scale, config.fold)
    refusals: list[str] = []

    rows: dict[str, int] = {}
    images = 0
    with _collected(refusals):
        selected = _selected_rows(plan, data, config)
        rows = {part: int((selected["part"] == part).sum()) for part in PARTS}
        images = _images_per_epoch(plan, data, config, selected)
    found = Found("refused", 0)
    with _collected(refusals):
        found = _find(plan, config, folder)
    weights = ""
    with _collected(refusals):
        weights = folder.checkpoint_path.name if found.what not in ("refused", "start") else _first_weights(config)

    outlook = Outlook(
        name=plan.run_name(data.scale, fold),
        scale=data.scale,
        fold=fold,
        refusals=tuple(refusals),
        config=config,
        rows=rows,
        images=images,
    )
    if refusals:
        return outlook
    outlook = replace(outlook, what=found.what, weights=weights, images_per_s=pace.of(folder.folder, config))
    if outlook.is_done:
        return outlook
    return replace(outlook, work=config.work(found.epochs, images, rows["val"]), room=_room(data, folder))


@contextmanager
def _collected(refusals: list[str]) -> Iterator[None]:
    """Turn an error into a refusal, so that the others are found too."""
    try:
        yield
    except CxrfastError as error:
        refusals.append(str(error))


def _selected_rows(plan: Plan, data: ScaleData, config: TrainConfig) -> pd.DataFrame:
    subset = plan.runtime.subset
    return select_rows(data.table, config, data.held, None if subset is None else read_subset(subset))


def _images_per_epoch(plan: Plan, data: ScaleData, config: TrainConfig, rows: pd.DataFrame) -> int:
    """Raises LoadError if the rows do not fill a global batch, or if the ranks cannot share one."""
    if config.micro_batch == AUTO:
        config = replace(config, micro_batch=1)  # any other possible size takes as many images
    order = train_order(config, rows, World(torch.device("cpu"), 0, plan.ranks), data.rows_per_shard)
    return order.steps * order.global_batch


def _find(plan: Plan, config: TrainConfig, folder: RunFolder) -> Found:
    """Raises RunError if the training command would refuse to resume the run in the folder."""
    if not folder.is_started:
        return Found("start", 0)
    run = Run.open(folder.folder)
    if run.config.set_id != config.set_id:
        raise RunError(other_set(run, plan, config.set_id))
    differences = plan.differences(config, run.config)
    if differences and run.has_nothing_to_lose:
        return Found("start", 0)
    if differences:
        raise RunError(
            f"{run.folder} holds a run of another configuration ({'; '.join(differences)}): choose another RUNS, or give the "
            "same options to resume it"
        )
    state = run.state()
    epochs = int(state.get("epoch") or 0)
    if state.get("state") == "done":
        return Found("done", epochs)
    if not folder.has_checkpoint:
        return Found("start", 0)
    is_alive = state.get("state") == "running" and time.time() - state.get("time", 0) < SILENT_SECONDS
    return Found(f"resume in epoch {epochs + 1}{', runs now' if is_alive else ''}", epochs)


def other_set(run: Run, plan: Plan, set_id: str) -> str:
    """Message about a run that was trained on another set than the plan's."""
    return (
        f"{run.folder} was trained on set {run.config.set_id}, {plan.runtime.shards} is {set_id}: choose another RUNS"
    )


def _first_weights(config: TrainConfig) -> str:
    """Where the first weights come from. Raises RunError if they are missing or may not be used for this fold."""
    if config.weights == "none":
        return "none"
    if config.weights == "imagenet":
        return "imagenet" if imagenet_file(config.arch)[1].exists() else "imagenet, to download"
    refuse_other_fold(config)
    weights_file(config)
    return Path(config.weights).name


def _room(data: ScaleData, folder: RunFolder) -> int:
    """Bytes that checkpoints will take on top of those in the folder."""
    return max(0, CHECKPOINT_COPIES * data.weight_bytes - folder.checkpoint_bytes)
