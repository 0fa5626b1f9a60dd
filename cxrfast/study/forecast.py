"""Forecast of a study before anything is queued or written: every run, its rows, its cost, the reasons to refuse it.

Uses no GPU: a login node can answer for the machines that train.
"""

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from cxrfast.config import AUTO
from cxrfast.errors import CxrfastError, RunError
from cxrfast.runs.folder import RunFolder
from cxrfast.runs.run import Run
from cxrfast.shards.shard_set import ShardSet
from cxrfast.study.pace import Pace, jobs
from cxrfast.study.plan import Plan
from cxrfast.study.run_forecast import Outlook, look, other_set, read_scale, refused
from cxrfast.tables import Cell, Table
from cxrfast.units import duration, size


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
    pace = Pace(plan.runtime.runs, rates)
    outlooks: list[Outlook] = []
    for scale in plan.scales:
        try:
            data = read_scale(plan, scale, shards, table)
        except CxrfastError as error:
            outlooks += [refused(plan, scale, fold, str(error)) for fold in plan.folds]
        else:
            outlooks += [look(plan, data, fold, pace) for fold in plan.folds]
    room, free = sum(o.room for o in outlooks), shutil.disk_usage(_existing_parent(plan.runtime.runs)).free
    refusals = [f"{o.name}: {text}" for o in outlooks for text in o.refusals]
    refusals += _other_runs(plan, shards.info.id, {o.name for o in outlooks})
    if room > free:
        refusals.append(f"checkpoints need {size(room)}, but {plan.runtime.runs} has {size(free)} free: make room")
    return Forecast(outlooks=outlooks, room=room, free=free, refusals=refusals, plan=plan)


def _other_runs(plan: Plan, set_id: str, names: set[str]) -> list[str]:
    """Refusals for runs in RUNS outside this study, which would end up in the same tables."""
    refusals = []
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
    return refusals


def _existing_parent(path: Path) -> Path:
    path = path.absolute()
    while not os.path.isdir(path):
        path = path.parent
    return path


def projection(plan: Plan, left: list[Outlook]) -> str:
    """One line about the time that the runs `left` will take, at the rates of the runs that are done."""
    runs, pace = plan.runtime.runs, Pace(plan.runtime.runs)
    left = [replace(o, images_per_s=pace.of(runs / o.name, o.config)) for o in left if o.config]
    known = [o.seconds for o in left if o.seconds is not None]
    unknown = ", ".join(map(str, sorted({o.scale for o in left if o.seconds is None})))
    hours = sum(known) / 3600 * plan.ranks
    whose = f"{len(known)} of them " if len(known) < len(left) else ""
    time = [f"{whose}{duration(sum(known))} at most, {hours:,.2f} GPU-hours"] if known else []
    return "; ".join(
        [
            f"study: {len(left)} {'run' if len(left) == 1 else 'runs'} left",
            *time,
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
