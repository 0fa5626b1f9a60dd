"""`cxrfast predict`: runs on their own set, on another set, or on new films. What each argument is decides which."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from cxrfast.cli import options as option
from cxrfast.cli.terminal import say
from cxrfast.errors import RunError
from cxrfast.launch import refuse_slurm_tasks

MODEL = "model.json"
"""Describes the model in a folder that `cxrfast export` wrote."""


@dataclass(frozen=True)
class Targets:
    """The arguments of `predict`, sorted by what they name; each list in the order given."""

    runs: list[Path] = field(default_factory=list)
    """Folders of runs; a folder that holds several is replaced by all of them."""
    exports: list[Path] = field(default_factory=list)
    sets: list[Path] = field(default_factory=list)
    films: list[str] = field(default_factory=list)
    """Films, folders of films and patterns, as given."""


def sort_targets(given: tuple[str, ...]) -> Targets:
    """Raises RunError if there is neither a run nor an export among them, or if sets, films and exports are mixed."""
    from cxrfast.runs.folder import RunFolder
    from cxrfast.shards.format.info import is_laid_out

    found = Targets()
    for name in given:
        folder = Path(name)
        if RunFolder(folder).is_started:
            found.runs.append(folder)
        elif (folder / MODEL).is_file():
            found.exports.append(folder)
        elif is_laid_out(folder):
            found.sets.append(folder)
        elif below := runs_below(folder):
            found.runs.extend(below)
        else:
            found.films.append(name)
    if not found.runs and not found.exports:
        raise RunError(
            f"{given[0]} is not a run (no config.json) and holds none: give a folder like runs/densenet121-256/fold-0, or the "
            "folder of all runs"
        )
    if found.exports and (found.runs or found.sets or len(found.exports) > 1):
        raise RunError("an exported model predicts films, by itself: give one export and films, or runs")
    if found.sets and found.films:
        raise RunError(
            f"{found.sets[0]} is a shard set and {found.films[0]} is not: give a set or films, in commands of their own"
        )
    return found


def runs_below(folder: Path) -> list[Path]:
    """Run folders in a folder of all runs, such as runs, or of one scale's folds, such as runs/densenet121-256; sorted."""
    from cxrfast.runs.folder import RunFolder

    found = RunFolder.below(folder) or [run for run in RunFolder.below(folder.parent) if run.folder.parent == folder]
    return [run.folder for run in found if run.is_started]


@click.command()
@click.argument("targets", nargs=-1, required=True, metavar="RUN... [SET | FILM...]")
@option.MOVED_SHARDS
@option.runtime_options
def predict(targets: tuple[str, ...], shards: Path | None, device: str, **options: Any) -> None:
    """Compute the logits of each RUN for its validation and test rows.

    RUN may be the folder of all runs.
    """
    refuse_slurm_tasks("cxrfast predict", "torchrun --nproc_per_node={n} -m cxrfast predict …")
    from cxrfast.distributed import world
    from cxrfast.runs.run import Run
    from cxrfast.training.predict import predict as predict_run

    found = sort_targets(targets)
    if found.exports or found.sets or found.films:
        other = next(iter([*found.films, *map(str, found.sets), *map(str, found.exports)]))
        raise RunError(f"{other} is not a run (no config.json): give a folder like runs/densenet121-256/fold-0")
    with world(device) as ranks:
        for folder in found.runs:
            run = Run.open(folder)
            predict_run(run, ranks, shards=shards, **options)
            say(run.predictions_path)
