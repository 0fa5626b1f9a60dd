"""`cxrfast predict`: runs on their own set, on another set, or on new films. What each argument is decides which."""

import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cxrfast.cli import options as option
from cxrfast.cli.terminal import say
from cxrfast.errors import RunError
from cxrfast.launch import refuse_slurm_tasks

if TYPE_CHECKING:
    from cxrfast.distributed import World
    from cxrfast.runs.run import Run

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
        is_run = RunFolder(folder).is_started
        if not is_run and (folder / MODEL).is_file():
            found.exports.append(folder)
        elif not is_run and is_laid_out(folder):
            found.sets.append(folder)
        elif runs := RunFolder.within(folder):
            found.runs.extend(run.folder for run in runs)
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


@click.command()
@click.argument("targets", nargs=-1, required=True, metavar="RUN... [SET | FILM...]")
@option.MOVED_SHARDS
@click.option("--on", "name", metavar="NAME", help="SET: what to call it. [default: the name of its folder]")
@click.option("--view", "views", multiple=True, help="SET: only this view position, such as PA; repeatable.")
@option.flag("--allow-partial", "SET: predict the rows that are there if its build is not finished.")
@click.option(
    "--out", type=option.FILE, help="FILM: CSV of the answers, a Parquet file next to it. [default: predictions.csv]"
)
@option.runtime_options
@option.TRUST_ARCH
def predict(targets: tuple[str, ...], shards: Path | None, out: Path | None, device: str, **options: Any) -> None:
    """Compute the logits of each RUN for its validation and test rows, or for all rows of SET, or answer for new films.

    RUN may be the folder of all runs. SET is another shard set than the runs' own: external validation. FILM: a JPEG, PNG
    or DICOM file, a folder of them, or a quoted pattern such as 'films/*.dcm'.
    """
    refuse_slurm_tasks("cxrfast predict", "torchrun --nproc_per_node={n} -m cxrfast predict …")
    from cxrfast.distributed import world
    from cxrfast.runs.run import Run
    from cxrfast.training.predict import predict as predict_run

    found, of_set = sort_targets(targets), {name: options.pop(name) for name in OF_SET}
    if found.films:
        if any(of_set.values()):
            raise RunError("--on, --view and --allow-partial are about a set, not about films: leave them out")
        _predict_films(found, shards, out, device, **options)
        return
    if out:
        raise RunError("--out is for films: the logits of a set's rows go into the folders of the runs")
    if found.exports:
        raise RunError(
            f"{found.exports[0]} is an exported model, which predicts films: name some, such as film.png or a folder"
        )
    own, others = split_sets(found, of_set["name"])
    if any(of_set.values()) and not others:
        raise RunError(
            "--on, --view and --allow-partial are about a set that the runs were not trained on: give its folder, too"
        )
    with world(device) as ranks:
        for folder, where in own:
            run = Run.open(folder)
            predict_run(run, ranks, shards=where or shards, **options)
            say(run.predictions_path)
        for where, folders in others:
            _predict_other_set([Run.open(folder) for folder in folders], ranks, where, own=shards, **of_set, **options)


OF_SET = ("name", "views", "allow_partial")
"""Arguments that are about another set."""


def split_sets(
    found: Targets, name: str | None
) -> tuple[list[tuple[Path, Path | None]], list[tuple[Path, list[Path]]]]:
    """Runs to predict on their own set, each with the folder of the set, if given; and other sets, each with its runs.

    Raises RunError if several other sets would have the `name` that was given.
    """
    from cxrfast.runs.run import Run
    from cxrfast.shards.format.info import read_set

    if not found.sets:
        return [(folder, None) for folder in found.runs], []
    own: list[tuple[Path, Path | None]] = []
    others: list[tuple[Path, list[Path]]] = []
    trained_on = {folder: Run.open(folder).config.set_id for folder in found.runs}
    for shards in found.sets:
        set_id = read_set(shards).id
        own += [(folder, shards) for folder in found.runs if trained_on[folder] == set_id]
        if rest := [folder for folder in found.runs if trained_on[folder] != set_id]:
            others.append((shards, rest))
    if name and len(others) > 1:
        raise RunError(f"--on {name} with {len(others)} sets: predict them in commands of their own, or leave --on out")
    return own, others


def _predict_other_set(runs: "list[Run]", ranks: "World", shards: Path, **options: Any) -> None:
    from cxrfast.runs.external import store_path
    from cxrfast.training.external import predict_external

    name = predict_external(runs, ranks, shards, **options)
    if ranks.is_first:
        for run in runs:
            say(store_path(run, name))
        say(f"next: cxrfast evaluate {runs[0].folder.parents[1]} --on {shlex.quote(name)}")


def _predict_films(
    found: Targets, shards: Path | None, out: Path | None, device: str, engine: str, threads: int | None
) -> None:
    """Predict new films by all runs together, or by an export."""
    from cxrfast.distributed import world
    from cxrfast.exports.load import load
    from cxrfast.inference.ensemble import ScaleEnsemble
    from cxrfast.inference.predict import OUT, predict_films
    from cxrfast.runs.run import Run

    if engine == "dali":
        raise RunError("--engine dali reads shard sets, and films are decoded by CPU threads: leave it out")
    with world(device) as ranks:
        if ranks.size > 1:
            raise RunError(
                "films are predicted by one process: run it without torchrun, or give each process films of its own"
            )
        if found.exports:
            ensemble = load(found.exports[0], ranks.device)
        else:
            ensemble = ScaleEnsemble.from_runs([Run.open(run) for run in found.runs], ranks.device, shards=shards)
        say(predict_films(ensemble, found.films, out or OUT, threads=threads))
