"""Forecast of a study before anything is queued or written: every run, its rows, its cost, the reasons to refuse it.

Uses no GPU: a login node can answer for the machines that train.
"""

import math
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median

import numpy as np
import pandas as pd
import torch

from cxrfast.config import AUTO, TrainConfig
from cxrfast.distributed import World
from cxrfast.errors import CxrfastError, RunError
from cxrfast.models.classifier import Classifier
from cxrfast.models.networks.architecture import kind_of
from cxrfast.models.networks.factories import trusted
from cxrfast.models.weights import has_imagenet
from cxrfast.pipelines.reader import Reader
from cxrfast.runs.folder import RunFolder
from cxrfast.runs.remarks import LabelsNow
from cxrfast.runs.run import Run
from cxrfast.runs.status import SILENT_SECONDS, number, read_metrics
from cxrfast.shards.parts import division
from cxrfast.shards.shard_set import ShardSet
from cxrfast.splits import PARTS
from cxrfast.study.plan import Plan
from cxrfast.tables import Cell, Table
from cxrfast.training.first_weights import FirstWeights
from cxrfast.training.resume import kept, why_over
from cxrfast.training.setup import is_partial, read_subset, select_rows, train_order
from cxrfast.units import duration, size

CHECKPOINT_COPIES = 7
"""Copies of the weights on disk: last.pt with Adam's two moments (3), the next one while it is written (3), the best (1)."""


NOTICE_SECONDS = 120
"""Seconds before its end at which a job is asked to save; forecasts leave them out."""


@dataclass(kw_only=True)
class Outlook:
    """What the training command of one run would do."""

    name: str
    scale: int
    fold: int
    what: str = "refused"
    """done, start, `resume in epoch 3` or refused."""
    refusals: list[str] = field(default_factory=list)
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
    labels: LabelsNow
    """The set's labels, to compare runs with."""


class Pace:
    """Images/s of a run: as given for its scale, else its own so far, else of another run of its architecture and scale."""

    def __init__(self, runs: Path, given: Mapping[int, float] | None = None) -> None:
        self.given = given or {}
        self.by_folder: dict[Path, float] = {}
        self.by_scale: dict[tuple[str, int], float] = {}
        for folder in RunFolder.below(runs):
            try:
                config = Run.open(folder.folder).config
            except CxrfastError:
                continue
            lines = ((number(line.get("images_per_s")), number(line.get("epoch"))) for line in read_metrics(folder))
            if rates := [rate * config.area_at(int(epoch)) for rate, epoch in lines if rate and epoch is not None]:
                self.by_folder[folder.folder] = self.by_scale[config.arch, config.scale] = median(rates)

    def of(self, folder: Path, config: TrainConfig) -> float | None:
        known = self.by_folder.get(folder) or self.by_scale.get((config.arch, config.scale))
        return self.given.get(config.scale) or known


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """Every run of a plan, and the reasons why the plan cannot run."""

    outlooks: list[Outlook]
    room: int
    """Bytes that all checkpoints will take."""
    free: int
    """Bytes free on the disk of the runs."""
    refusals: list[str]
    """First of single runs, with their names, then of the study."""
    plan: Plan

    def check(self) -> None:
        """Raises RunError listing all refusals, if there are any."""
        if self.refusals:
            lines = "".join(f"\n  {text}" for text in self.refusals)
            raise RunError(f"this study cannot run; nothing was started or written:{lines}")


def forecast(plan: Plan, rates: Mapping[int, float] | None = None) -> Forecast:
    """Forecast every run of the plan. `rates`: images/s by scale; they take precedence over earlier runs.

    Raises ShardError if the set's table cannot be read; the reasons to refuse a run are in its `refusals`.
    """
    shards = ShardSet(plan.runtime.shards)
    table = shards.rows()
    labels = LabelsNow(shards, table)
    pace = Pace(plan.runtime.runs, rates)
    outlooks: list[Outlook] = []
    for scale in plan.scales:
        try:
            with trusted(plan.options.get("arch")):
                data = read_scale(plan, scale, labels)
        except CxrfastError as error:
            outlooks += [
                Outlook(name=plan.run_name(scale, fold), scale=scale, fold=fold, refusals=[str(error)])
                for fold in plan.folds
            ]
        else:
            outlooks += [look(plan, data, fold, pace) for fold in plan.folds]
    runs = plan.runtime.runs.absolute()
    disk = next(folder for folder in (runs, *runs.parents) if os.path.isdir(folder))
    room, free = sum(o.room for o in outlooks), shutil.disk_usage(disk).free
    refusals = [f"{o.name}: {text}" for o in outlooks for text in o.refusals]
    refusals += _other_runs(plan, labels, {o.name for o in outlooks})
    if room > free:
        refusals.append(f"checkpoints need {size(room)}, but {plan.runtime.runs} has {size(free)} free: make room")
    return Forecast(outlooks=outlooks, room=room, free=free, refusals=refusals, plan=plan)


def _other_runs(plan: Plan, labels: LabelsNow, names: set[str]) -> list[str]:
    """Refusals for runs in RUNS outside this study, which would end up in the same tables."""
    refusals, set_id = [], labels.shard_set.info.id
    for folder in RunFolder.below(plan.runtime.runs):
        if not folder.is_started:
            continue
        try:
            run = Run.open(folder.folder)
        except CxrfastError as error:
            if folder.name not in names:
                refusals.append(str(error))
            continue
        if run.name not in names and run.config.set_id != set_id:
            refusals.append(other_set(run, plan, set_id))
        elif run.name not in names:
            with _collected(refusals):
                check_labels(run, plan, labels)
    return refusals


# One run


def read_scale(plan: Plan, scale: int, labels: LabelsNow) -> ScaleData:
    """Raises LoadError if the set does not hold the scale, RunError if the model cannot be trained at it."""
    with Reader(plan.runtime.shards, scale) as reader:
        is_partial(reader, plan.options.get("allow_partial", False))
        held = reader.rows
    config, info = plan.config(scale, plan.folds[0], "cpu"), labels.shard_set.info
    # shapes only, no numbers: quick; a network of one's own may need numbers
    with nullcontext() if kind_of(config.arch) == "own" else torch.device("meta"):
        model = Classifier.of(config)
        for side in config.sides:
            model.check_size(side)
    weight_bytes = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    return ScaleData(scale, labels.table, info.rows_per_shard, held, weight_bytes, labels)


def look(plan: Plan, data: ScaleData, fold: int, pace: Pace) -> Outlook:
    """Outlook of one run."""
    outlook = Outlook(name=plan.run_name(data.scale, fold), scale=data.scale, fold=fold)
    with _collected(outlook.refusals):
        outlook.config = plan.config(data.scale, fold, "cpu")
    if (config := outlook.config) is None:
        return outlook
    folder, selected = RunFolder.of(plan.runtime.runs, config.arch, config.scale, config.fold), None
    with _collected(outlook.refusals):
        subset = plan.runtime.subset
        selected = select_rows(data.table, config, data.held, None if subset is None else read_subset(subset))
        outlook.rows = {part: int((selected["part"] == part).sum()) for part in PARTS}
        outlook.images = _images_per_epoch(plan, data, config, selected)
    what, epochs, weights = "refused", 0, ""
    with _collected(outlook.refusals):
        what, epochs = _find(plan, config, folder, data.labels)
    with _collected(outlook.refusals):
        if what not in ("refused", "start"):
            weights = folder.checkpoint_path.name
        elif selected is not None:
            weights = _first_weights(config, data.table, selected)
    if not outlook.refusals:
        outlook.what, outlook.weights, outlook.images_per_s = what, weights, pace.of(folder.folder, config)
        if not outlook.is_done:
            there = [path for path in (folder.checkpoint_path, folder.weights_path) if path.exists()]
            there_bytes = sum(path.stat().st_size for path in there)
            outlook.room = max(0, CHECKPOINT_COPIES * data.weight_bytes - there_bytes)
            outlook.work = config.work(epochs, outlook.images, outlook.rows["val"])
    return outlook


@contextmanager
def _collected(refusals: list[str]) -> Iterator[None]:
    """Turn an error into a refusal, so that the others are found too."""
    try:
        yield
    except CxrfastError as error:
        refusals.append(str(error))


def _images_per_epoch(plan: Plan, data: ScaleData, config: TrainConfig, rows: pd.DataFrame) -> int:
    """Raises LoadError if the rows do not fill a global batch, or if the ranks cannot share one."""
    if config.micro_batch == AUTO:
        config = replace(config, micro_batch=1)  # any other possible size takes as many images
    order = train_order(config, rows, World(torch.device("cpu"), 0, plan.ranks), data.rows_per_shard)
    return order.steps * order.global_batch


def _find(plan: Plan, config: TrainConfig, folder: RunFolder, labels: LabelsNow) -> tuple[str, int]:
    """What a run will do, as in Outlook, and its finished epochs. Raises RunError if it cannot be resumed, or if it has
    labels that its set no longer has."""
    if not folder.is_started:
        return "start", 0
    run = Run.open(folder.folder)
    if run.config.set_id != config.set_id:
        raise RunError(other_set(run, plan, config.set_id))
    check_labels(run, plan, labels)
    differences = plan.differences(config, run.config)
    if differences and run.has_nothing_to_lose:
        return "start", 0
    if differences:
        raise RunError(
            f"{run.folder} holds a run of another configuration ({'; '.join(differences)}): choose another RUNS, or give the "
            "same options to resume it"
        )
    state = run.state()
    epochs, written = int(number(state.get("epoch")) or 0), number(state.get("time")) or 0
    if state.get("state") == "done" and why_over(run, kept(config, run.config)):
        return "done", epochs
    if not folder.has_checkpoint:
        return "start", 0
    is_alive = state.get("state") == "running" and time.time() - written < SILENT_SECONDS
    return f"resume in epoch {epochs + 1}{', runs now' if is_alive else ''}", epochs


def check_labels(run: Run, plan: Plan, labels: LabelsNow) -> None:
    """Raises RunError if a run of the plan's set is done, or goes on, with labels that the set no longer has."""
    if not run.starts_over and (change := labels.compare(run)):
        raise RunError(
            f"{run.folder} was trained before {plan.runtime.shards} was relabelled: {change.in_words()}; choose another RUNS to "
            "train with the labels of now, or relabel the set with the former table to keep this run"
        )


def other_set(run: Run, plan: Plan, set_id: str) -> str:
    """Message about a run that was trained on another set than the plan's."""
    return (
        f"{run.folder} was trained on set {run.config.set_id}, {plan.runtime.shards} is {set_id}: choose another RUNS"
    )


def _first_weights(config: TrainConfig, table: pd.DataFrame, rows: pd.DataFrame) -> str:
    """Where the first weights come from. Raises RunError if they are missing or may not be used for this fold.

    `table`: all rows of the set; `rows`: those that the run uses.
    """
    if config.weights == "none":
        return "none"
    if config.weights == "imagenet":
        return "imagenet" if has_imagenet(config.arch) else "imagenet, to download"
    own_division = division(table, config.split, config.fold)
    FirstWeights.find(config).refuse_seen_patients(config, own_division, rows)
    return Path(config.weights).name


# Wall times


def parse_walltime(text: str) -> int:
    """`36:00:00` or `1-12:00:00` → seconds. Raises RunError for anything else, or if too short to save."""
    match = re.fullmatch(r"(?:(\d{1,6})-)?(\d{1,6}):([0-5]\d):([0-5]\d)", text)
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups()) if match else (0, 0, 0, 0)
    total = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    if total <= NOTICE_SECONDS:
        raise RunError(f"wall time {text!r} is not [DAYS-]HH:MM:SS of more than {NOTICE_SECONDS} s, such as 24:00:00")
    return total


def jobs(seconds: float, walltime: int) -> int:
    """Number of jobs of `walltime` seconds that a training of `seconds` takes; each saves before it ends."""
    return math.ceil(seconds / (walltime - NOTICE_SECONDS))


# Texts


def projection(plan: Plan, left: list[Outlook]) -> str:
    """One line about the time that the runs `left` will take, at the rates of the runs that are done."""
    runs, pace = plan.runtime.runs, Pace(plan.runtime.runs)
    left = [replace(o, images_per_s=pace.of(runs / o.name, o.config)) for o in left if o.config]
    known = [o.seconds for o in left if o.seconds is not None]
    unknown = ", ".join(map(str, sorted({o.scale for o in left if o.seconds is None})))
    hours = sum(known) / 3600 * plan.ranks
    whose = f"{len(known)} of them " if len(known) < len(left) else ""
    cost = [f"{whose}{duration(sum(known))} at most, {hours:,.2f} GPU-hours"] if known else []
    return "; ".join(
        [
            f"study: {len(left)} {'run' if len(left) == 1 else 'runs'} left",
            *cost,
            *([f"no rate is known yet at {unknown} px"] if unknown else []),
        ]
    )


def forecast_table(result: Forecast, walltime: int | None = None) -> Table:
    """One line per run. Hours are upper limits, since early stopping may end a run before its last epoch."""
    plan, ranks = result.plan, result.plan.ranks
    head = [
        "run",
        "what",
        "rows: train\nval\ntest",
        "batch: global\nmicro\nlearning rate",
        "weights",
        "images per epoch\nimages/s",
        "hours\nGPU-hours",
        *(["jobs"] if walltime else []),
    ]
    rows = [
        [Cell(text, "bold red" if o.refusals else "") for text in _cells(o, ranks, walltime)] for o in result.outlooks
    ]
    known = [o.seconds for o in result.outlooks if o.seconds is not None]
    if len(known) > 1:
        whole = "" if len(known) == len(result.outlooks) else " (of known rates)"
        hours = sum(known) / 3600
        count = [f"{sum(jobs(s, walltime) for s in known)}"] if walltime else []
        total = [f"all{whole}", *[""] * 5, f"{hours:,.1f}\n{hours * ranks:,.1f}", *count]
        rows.append([Cell(text) for text in total])
    return Table(
        f"{plan.runtime.shards} → {plan.runtime.runs}: {len(result.outlooks)} runs, {ranks} processes each",
        head,
        rows,
        f"checkpoints need {size(result.room)}, {size(result.free)} are free; hours are at most",
        text=["what", "weights"],
        total=len(known) > 1,
    )


def _cells(o: Outlook, ranks: int, walltime: int | None) -> list[str]:
    config, hours = o.config, None if o.seconds is None else o.seconds / 3600
    micro_batch = "auto" if config and config.micro_batch == AUTO else config and config.micro_batch
    cells = [
        o.name,
        o.what,
        "\n".join(f"{n:,}" for n in o.rows.values()),
        f"{config.global_batch}\n{micro_batch}\n{config.learning_rate:g}" if config else "",
        o.weights,
        f"{o.images:,}\n{f'{o.images_per_s:.3g}' if o.images_per_s else '?'}" if o.images else "",
        "?" if hours is None else f"{hours:,.1f}\n{hours * ranks:,.1f}",
    ]
    if walltime:
        cells.append("?" if o.seconds is None else str(jobs(o.seconds, walltime)))
    return cells
