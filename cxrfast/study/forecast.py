"""What a study would do, looked at before anything is queued or written: every run, its rows, its cost, what stands against it.

Needs no GPU and looks at none: a login node can answer for the machines that train.
"""

import math
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import TypeVar

import numpy as np
import pandas as pd
import torch
from rich.table import Table

from cxrfast.config import TrainConfig
from cxrfast.distributed import World
from cxrfast.errors import CxrfastError, RunError
from cxrfast.models.classifier import Classifier
from cxrfast.models.weights import imagenet_file
from cxrfast.pipelines.reader import Reader
from cxrfast.runs.folder import RunFolder
from cxrfast.runs.run import Run
from cxrfast.runs.status import SILENT_SECONDS, read_metrics
from cxrfast.shards.format.info import SetInfo
from cxrfast.shards.shard_set import ShardSet
from cxrfast.splits import PARTS
from cxrfast.study.plan import Plan
from cxrfast.training.setup import read_subset, refuse_other_fold, select_rows, train_order, weights_file
from cxrfast.units import size

NOTICE_SECONDS = 120
"""Before the end of a job at which it is told to save: that much of each job's time is not counted on."""

CHECKPOINT_COPIES = 7
"""Weights a run needs room for: last.pt with Adam's two moments (3), its successor while that is written (3), the best (1)."""

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Outlook:
    """One run, as its training command would find it."""

    name: str
    scale: int
    fold: int
    what: str = "refused"
    """done, start, `resume in epoch 3` or refused."""
    refusals: tuple[str, ...] = ()
    config: TrainConfig | None = None
    rows: Mapping[str, int] = field(default_factory=dict)
    """By part."""
    images: int = 0
    """Trained on in an epoch."""
    weights: str = ""
    """Where the first weights come from."""
    work: float = 0.0
    """Training images at its scale that take as long as all epochs that are left; see `TrainConfig.work`."""
    images_per_s: float | None = None
    """Of all ranks."""
    room: int = 0
    """Bytes that its checkpoints will take beside what is there."""

    @property
    def is_done(self) -> bool:
        return self.what == "done"

    @property
    def seconds(self) -> float | None:
        """For all epochs that are left, at most: patience may end a run earlier. None if the rate is not known."""
        if not self.work:
            return 0.0
        return self.work / self.images_per_s if self.images_per_s else None


@dataclass(frozen=True, kw_only=True)
class Forecast:
    outlooks: list[Outlook]
    room: int
    """Bytes that all checkpoints need."""
    free: int
    """Bytes where the runs shall lie."""
    refusals: list[str]
    """Of the runs by their names, then of the whole."""
    plan: Plan

    def check(self) -> None:
        """Raises RunError with all refusals if there is one."""
        if self.refusals:
            lines = "".join(f"\n  {text}" for text in self.refusals)
            raise RunError(f"this study cannot be carried out, nothing was started or written:{lines}")


def forecast(plan: Plan, rates: Mapping[int, float] | None = None) -> Forecast:
    """Look at every run of the plan. `rates`: images/s by scale, where they are known better than from earlier runs.

    Raises ShardError if the set's table cannot be read; what stands against a run is in its `refusals`.
    """
    shards = ShardSet(plan.runtime.shards)
    info, table = shards.info, shards.rows()
    pace = Pace(plan.runtime.runs, rates or {})
    outlooks = []
    for scale in plan.scales:
        try:
            reader = Reader(plan.runtime.shards, scale)
            held = reader.rows
            reader.close()
        except CxrfastError as error:
            outlooks += [_refused(plan, scale, fold, [str(error)]) for fold in plan.folds]
            continue
        try:
            weight_bytes = _weight_bytes(plan, info, scale)
        except CxrfastError as error:
            outlooks += [_refused(plan, scale, fold, [str(error)]) for fold in plan.folds]
            continue
        for fold in plan.folds:
            outlooks.append(_look(plan, scale, fold, info, table, held, weight_bytes, pace))
    room, free = sum(o.room for o in outlooks), shutil.disk_usage(_existing_parent(plan.runtime.runs)).free
    refusals = [f"{o.name}: {text}" for o in outlooks for text in o.refusals]
    refusals += _strangers(plan, info, {o.name for o in outlooks})
    if room > free:
        refusals.append(f"checkpoints need {size(room)}, and {plan.runtime.runs} has {size(free)} free: make room")
    return Forecast(outlooks=outlooks, room=room, free=free, refusals=refusals, plan=plan)


def _look(
    plan: Plan,
    scale: int,
    fold: int,
    info: SetInfo,
    table: pd.DataFrame,
    held: np.ndarray,
    weight_bytes: int,
    pace: "Pace",
) -> Outlook:
    """One run of a scale that the set holds."""
    refusals: list[str] = []

    def attempt(action: Callable[[], T]) -> T | None:
        try:
            return action()
        except CxrfastError as error:
            refusals.append(str(error))
            return None

    config = attempt(lambda: plan.config(scale, fold, "cpu"))
    if config is None:
        return _refused(plan, scale, fold, refusals)
    folder = RunFolder.of(plan.runtime.runs, config.arch, scale, fold)
    outlook = replace(_refused(plan, scale, fold, refusals), config=config)
    subset = plan.runtime.subset
    rows = attempt(lambda: select_rows(table, config, held, None if subset is None else read_subset(subset)))
    if rows is not None:
        counts = rows["part"].value_counts()
        ranks = World(torch.device("cpu"), 0, plan.ranks)
        order = attempt(lambda: train_order(config, rows, ranks, info.rows_per_shard))
        images = order.steps * order.global_batch if order else 0
        outlook = replace(outlook, rows={part: int(counts.get(part, 0)) for part in PARTS}, images=images)
    found = attempt(lambda: _found(plan, config, folder))
    is_resumed = found is not None and found[0] != "start"
    weights = folder.checkpoint_path.name if is_resumed else attempt(lambda: _weights(config))
    if refusals:
        return replace(outlook, refusals=tuple(refusals))
    assert found is not None
    what, finished = found
    return replace(
        outlook,
        what=what,
        weights=weights or "",
        work=0.0 if what == "done" else config.work(finished, outlook.images, outlook.rows["val"]),
        images_per_s=pace.of(folder.folder, config),
        room=0 if what == "done" else max(0, CHECKPOINT_COPIES * weight_bytes - folder.checkpoint_bytes),
    )


def _refused(plan: Plan, scale: int, fold: int, refusals: list[str]) -> Outlook:
    name = f"{plan.recipe.get('arch', 'densenet121')}-{scale}/fold-{fold}"
    return Outlook(name=name, scale=scale, fold=fold, refusals=tuple(refusals))


def _weight_bytes(plan: Plan, info: SetInfo, scale: int) -> int:
    """Of one copy of the model's weights, float32. Raises RunError if it cannot be trained at this scale."""
    config = plan.config(scale, plan.folds[0], "cpu")
    model = Classifier(config.arch, len(info.labels))
    for side in {scale, *(side for side, _ in config.sizes)}:
        model.check_size(side)
    return sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())


def _found(plan: Plan, config: TrainConfig, place: RunFolder) -> tuple[str, int]:
    """What the training command would do with the run's folder, and the epochs that are finished.

    Raises RunError where it would refuse.
    """
    if not place.is_started:
        return "start", 0
    run = Run.open(place.folder)
    if run.config.set_id != config.set_id:
        raise RunError(_other_set(run, plan, config.set_id))
    differences = plan.differences(config, run.config)
    if differences and run.has_nothing_to_lose:
        return "start", 0
    if differences:
        raise RunError(
            f"{run.folder} holds a run of another configuration ({'; '.join(differences)}): choose another RUNS, or give the "
            "same options to resume it"
        )
    state = run.state()
    epoch = int(state.get("epoch") or 0)
    if state.get("state") == "done":
        return "done", epoch
    if not run.has_checkpoint:
        return "start", 0
    alive = state.get("state") == "running" and time.time() - state.get("time", 0) < SILENT_SECONDS
    return f"resume in epoch {epoch + 1}{', runs now' if alive else ''}", epoch


def _other_set(run: Run, plan: Plan, set_id: str) -> str:
    return (
        f"{run.folder} was trained on set {run.config.set_id}, {plan.runtime.shards} is {set_id}: choose another RUNS"
    )


def _strangers(plan: Plan, info: SetInfo, names: set[str]) -> list[str]:
    """What stands against the runs in RUNS that are not of this study: they end up in the same tables."""
    refusals = []
    for place in RunFolder.below(plan.runtime.runs):
        if not place.is_started:
            continue
        try:
            run = Run.open(place.folder)
        except CxrfastError as error:
            if place.name not in names:
                refusals.append(str(error))
            continue
        if run.name not in names and run.config.set_id != info.id:
            refusals.append(_other_set(run, plan, info.id))
    return refusals


def _weights(config: TrainConfig) -> str:
    """Where the first weights come from. Raises RunError if they cannot be had, or may not be used for this fold."""
    if config.weights == "none":
        return "none"
    if config.weights == "imagenet":
        return "imagenet" if imagenet_file(config.arch)[1].exists() else "imagenet, to download"
    refuse_other_fold(config)
    weights_file(config)
    return Path(config.weights).name


class Pace:
    """Images/s of a run: as told, else its own so far, else that of another run of its architecture and scale."""

    def __init__(self, runs: Path, told: Mapping[int, float]) -> None:
        self.told = told
        self.by_folder: dict[Path, float] = {}
        self.by_scale: dict[tuple[str, int], float] = {}
        for place in RunFolder.below(runs):
            try:
                config = Run.open(place.folder).config
            except CxrfastError:
                continue
            lines = [line for line in read_metrics(place) if line.get("images_per_s")]
            if rates := [line["images_per_s"] * config.area_at(line["epoch"]) for line in lines]:
                self.by_folder[place.folder] = self.by_scale[config.arch, config.scale] = median(rates)

    def of(self, folder: Path, config: TrainConfig) -> float | None:
        known = self.by_folder.get(folder) or self.by_scale.get((config.arch, config.scale))
        return self.told.get(config.scale) or known


def _existing_parent(path: Path) -> Path:
    path = path.absolute()
    while not os.path.isdir(path):
        path = path.parent
    return path


# For people


def projection(left: list[Outlook], ranks: int, rate: float) -> str:
    """One line on the runs that are `left`, now that the first of them is known to train `rate` images/s at its scale."""
    scale = left[0].scale
    runs = [replace(o, images_per_s=rate) if o.scale == scale else o for o in left]
    hours = sum(o.seconds or 0.0 for o in runs) / 3600
    unknown = [o for o in runs if o.seconds is None]
    known = f"{len(runs) - len(unknown)} of {len(runs)} runs left"
    scales = ", ".join(f"{side}" for side in sorted({o.scale for o in unknown}))
    return (
        f"study: {rate:,.3g} images/s at {scale} px; {known}: {hours:,.2f} h at most, {hours * ranks:,.2f} GPU-hours"
        + (f"; the rate at {scales} px is not known yet" if unknown else "")
    )


def parse_walltime(text: str) -> int:
    """`36:00:00` or `1-12:00:00` → seconds. Raises RunError for anything else, and for no time at all."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+):([0-5]\d):([0-5]\d)", text)
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups()) if match else (0, 0, 0, 0)
    total = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    if total <= NOTICE_SECONDS:
        raise RunError(f"wall time {text!r} is not [DAYS-]HH:MM:SS of more than {NOTICE_SECONDS} s, such as 24:00:00")
    return total


def jobs(seconds: float, walltime: int) -> int:
    """How many jobs of `walltime` seconds a training of `seconds` takes, each of which saves before it ends."""
    return math.ceil(seconds / (walltime - NOTICE_SECONDS))


def to_table(result: Forecast, walltime: int | None = None) -> Table:
    """A line a run; hours are at most, since patience may end a run before its last epoch."""
    plan, ranks = result.plan, result.plan.ranks
    table = Table(
        title=f"{plan.runtime.shards} → {plan.runtime.runs}: {len(result.outlooks)} runs, {ranks} processes each",
        caption=f"checkpoints need {size(result.room)}, {size(result.free)} are free; hours are at most",
    )
    table.add_column("run", no_wrap=True)
    table.add_column("what", overflow="fold")
    table.add_column("rows: train\nval\ntest", justify="right")
    table.add_column("batch: global\nmicro\nlearning rate", justify="right")
    table.add_column("weights", overflow="fold")
    for head in ("images an epoch\nimages/s", "hours\nGPU-hours", *(["jobs"] if walltime else [])):
        table.add_column(head, justify="right")
    for o in result.outlooks:
        table.add_row(*_cells(o, ranks, walltime), style="bold red" if o.refusals else None)
    known = [o.seconds for o in result.outlooks if o.seconds is not None]
    if len(known) > 1:
        whole = "" if len(known) == len(result.outlooks) else " (of known rates)"
        hours = sum(known) / 3600
        count = [f"{sum(jobs(s, walltime) for s in known)}"] if walltime else []
        table.add_section()
        table.add_row(f"all{whole}", *[""] * 5, f"{hours:,.1f}\n{hours * ranks:,.1f}", *count)
    return table


def _cells(o: Outlook, ranks: int, walltime: int | None) -> list[str]:
    config, hours = o.config, None if o.seconds is None else o.seconds / 3600
    cells = [
        o.name,
        o.what,
        "\n".join(f"{n:,}" for n in o.rows.values()),
        f"{config.global_batch}\n{config.micro_batch}\n{config.learning_rate:g}" if config else "",
        o.weights,
        f"{o.images:,}\n{f'{o.images_per_s:.3g}' if o.images_per_s else '?'}" if o.images else "",
        "?" if hours is None else f"{hours:,.1f}\n{hours * ranks:,.1f}",
    ]
    if walltime:
        cells.append("?" if o.seconds is None else str(jobs(o.seconds, walltime)))
    return cells
