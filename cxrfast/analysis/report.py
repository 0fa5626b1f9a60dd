"""report.html: the tables and figures of a folder of runs in one file that opens anywhere. Needs runs only, no shards.

The file is meant to be shared. It names no folder of the machine, images only by their row, and asks for nothing when it is
opened. A run that is damaged is one line of it; the chapters are about the others.
"""

import base64
import hashlib
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
from jinja2 import Environment, PackageLoader, select_autoescape

from cxrfast import __version__
from cxrfast.analysis import chapters, ensemble, evaluate, thresholds
from cxrfast.analysis.answers import read_answers
from cxrfast.analysis.chapters import RUNS, Chapter, saved, shareable
from cxrfast.analysis.curves import auroc_figure, values_of
from cxrfast.errors import RunError
from cxrfast.files import write_bytes
from cxrfast.runs import external
from cxrfast.runs.folder import RunFolder
from cxrfast.runs.lineage import marked_name, origin_of
from cxrfast.runs.run import Run
from cxrfast.tables import Cell

log = logging.getLogger(__name__)

Result = TypeVar("Result")


def report(
    runs: Path,
    evaluation: evaluate.Evaluation | None = None,
    stacked: ensemble.EnsembleResult | None = None,
    *,
    finished_only: bool = False,
) -> Path:
    """Write RUNS/report.html from what the runs hold; a chapter whose results are missing names the command for them.

    `evaluation`, `stacked`: of these runs' test rows, if they are known already. `finished_only`: leave runs whose training
    is not done out of the AUROCs and the ensemble; otherwise they are marked. Raises RunError if there is no run, or none
    that can be read.
    """
    found, damaged = _readable(runs)
    scores = _auroc(runs, found, damaged, evaluation, finished_only)  # first: this may find another run damaged
    known = len(damaged)
    stack = _ensemble(runs, found, damaged, stacked, finished_only)
    if len(damaged) > known:
        scores = _auroc(runs, found, damaged, None, finished_only)
    for name, why in damaged.items():
        log.warning(f"{name} is damaged and left out of the report: {why}")
    shown = [_summary(found, damaged), scores, stack, _thresholds(runs, found, damaged, finished_only)]
    shown += _other_sets(runs, found, damaged, finished_only)
    shown += [chapters.learning(runs, found), chapters.erf(runs, found), chapters.gradcam(found)]
    shown += [chapters.resources(found), chapters.configuration(found)]
    environment = Environment(loader=PackageLoader("cxrfast.analysis", "."), autoescape=select_autoescape(default=True))
    html = environment.get_template("report.html.j2").render(
        chapters=shown, version=__version__, style_hash=_style_hash(environment)
    )
    write_bytes(runs / "report.html", html.encode())
    return runs / "report.html"


def _style_hash(environment: Environment) -> str:
    """Hash of the template's style sheet, the only one that the report's policy lets a browser apply."""
    source, *_ = environment.loader.get_source(environment, "report.html.j2")  # type: ignore[union-attr]
    style = source.partition("<style>")[2].partition("</style>")[0]
    return "sha256-" + base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()


def _readable(runs: Path) -> tuple[list[Run], dict[str, str]]:
    """The runs below a folder, as `Run.find` sorts them, and why each of the others is damaged."""
    damaged: dict[str, str] = {}
    started = [folder for folder in RunFolder.below(runs) if _has_started(folder)]
    for folder in started:
        try:
            run = Run.open(folder.folder)
            run.rows(["part"]), run.metrics(), run.state()
        except RunError as error:
            damaged[folder.name] = shareable(str(error), runs)
    if started and len(damaged) == len(started):
        name, why = next(iter(damaged.items()))
        raise RunError(f"no run in {runs} can be read; {name}: {why}")
    return Run.find(runs, damaged), damaged


def _has_started(folder: RunFolder) -> bool:
    """False for a run that failed before it had a configuration."""
    results = folder.config_path, folder.weights_path, folder.checkpoint_path, folder.predictions_path
    return any(map(os.path.lexists, results))


def _unreadable(runs: Sequence[Run], parts: Sequence[str]) -> dict[str, str]:
    """By name: why the predictions of a run cannot be used."""
    found = {}
    for run in runs:
        try:
            for part in parts if run.has_predictions else ():
                read_answers(run, part)
        except RunError as error:
            found[run.name] = str(error)
    return found


# Chapters


def _summary(runs: list[Run], damaged: Mapping[str, str]) -> Chapter:
    records: list[dict[str, str | Cell]] = []
    for run in runs:
        parts, epochs = run.rows(["part"])["part"].value_counts(), run.metrics()
        losses = values_of(epochs, "val_loss")
        best = None if np.isnan(losses).all() else int(np.nanargmin(losses))
        auroc = np.nan if best is None else values_of(epochs, "val_auroc")[best]
        records.append(
            {
                "Run": marked_name(run.name, origin_of(run)),
                "State": str(run.state().get("state", "not started")),
                "Split": run.config.split,
                "Train": f"{parts.get('train', 0):,}",
                "Validation": f"{parts.get('val', 0):,}",
                "Test": f"{parts.get('test', 0):,}",
                "Epochs": str(len(epochs)),
                "Epoch of lowest loss": "-" if best is None else str(epochs[best]["epoch"] + 1),
                "Its validation AUROC": chapters.shown(auroc, ".4f", "undefined"),
            }
        )
    heads = list(records[0]) if records else ["Run", "State"]
    for name in damaged:
        records.append({**dict.fromkeys(heads, ""), "Run": name, "State": Cell("damaged", "bold")})
    notes = [
        "Rows by part. The weights used are those of the epoch with the lowest validation loss; another may have a higher AUROC.",
        chapters.origins_note(runs),
        *(f"{name} is damaged and left out of all chapters: {why}" for name, why in damaged.items()),
    ]
    return Chapter("Runs", tables=[chapters.table_of(records, "\n".join(filter(None, notes)), ["State", "Split"])])


def _auroc(
    runs: Path, found: list[Run], damaged: dict[str, str], evaluation: evaluate.Evaluation | None, finished_only: bool
) -> Chapter:
    """Damaged runs move from `found` to `damaged`."""
    title = "AUROC on the test rows"
    try:
        join = partial(evaluate.evaluate, finished_only=finished_only)
        evaluation = evaluation or _without_damaged(join, runs, found, damaged, ["test"])
    except RunError as error:
        log.warning(f"the report has no AUROC: {error}")
        return Chapter(title, shareable(str(error), runs))
    if evaluation is None:
        return Chapter(title, "Nothing predicted yet:", chapters.command("predict", found[0]))
    chapter = Chapter(title, tables=[evaluate.auroc_table(evaluation)])
    if len(evaluation.names) > 1 and evaluation.is_compared:
        caption = f"AUROC by resolution, mean ± sd over folds. {evaluation.footnotes}".strip()
        chapter.figures.append((caption, saved(auroc_figure(evaluation), runs, "auroc.png")))
    return chapter


def _without_damaged(
    join: Callable[..., Result], runs: Path, found: list[Run], damaged: dict[str, str], parts: Sequence[str]
) -> Result | None:
    """What `join` makes of the runs that can be read; None if none of them has predictions.

    Runs whose predictions of `parts` cannot be read move from `found` to `damaged`. Raises RunError as `join` does.
    """
    if not any(run.has_predictions for run in found):
        return None
    try:
        return join(runs, damaged=damaged)
    except RunError:
        unreadable = _unreadable(found, parts)
        if not unreadable:
            raise
    damaged |= {name: shareable(why, runs) for name, why in unreadable.items()}
    readable = [run for run in found if run.name not in damaged]
    if not readable:
        raise RunError(f"no run in {runs} can be read; {'; '.join(unreadable.values())}")
    found[:] = readable
    return join(runs, damaged=damaged) if any(run.has_predictions for run in found) else None


def _ensemble(
    runs: Path, found: list[Run], damaged: dict[str, str], result: ensemble.EnsembleResult | None, finished_only: bool
) -> Chapter:
    """Damaged runs move from `found` to `damaged`."""
    title = "Ensemble of scales"
    if len({run.config.scale for run in found if run.has_predictions}) < 2:
        return Chapter(title, "Needs predictions at two scales or more.")
    try:
        join = partial(ensemble.ensemble, finished_only=finished_only)
        result = result or _without_damaged(join, runs, found, damaged, ["val", "test"])
    except RunError as error:
        return Chapter(title, shareable(str(error), runs))
    if result is None:
        return Chapter(title, "Needs predictions at two scales or more.")
    tables = [ensemble.ensemble_table(result, brief=False), ensemble.weights_table(result)]
    figure = saved(ensemble.weights_figure(result), runs, "weights.png")
    return Chapter(title, tables=tables, figures=[("Weights of the scales, mean over folds", figure)])


def _other_sets(runs: Path, found: list[Run], damaged: Mapping[str, str], finished_only: bool) -> list[Chapter]:
    """One chapter with a table for each other set, under the rules of the runs; none if the runs were tried on no other set."""
    names = sorted({name for run in found for name in external.names(run)})
    chapter = Chapter("External validation")
    for name in names:
        try:
            scores = evaluate.evaluate_on(runs, name, finished_only=finished_only, damaged=damaged)
            chapter.tables.append(evaluate.auroc_table(scores))
        except RunError as error:
            chapter.text += f"{shareable(str(error), runs)}. "
    return [chapter] if names else []


def _thresholds(runs: Path, found: list[Run], damaged: Mapping[str, str], finished_only: bool) -> Chapter:
    title = "Thresholds"
    predicted = [run for run in found if run.has_predictions]
    if not predicted:
        return Chapter(title, "Needs predictions.")
    try:
        if any(run.read_thresholds() is None for run in predicted):
            return Chapter(title, "Not chosen yet:", f"cxrfast thresholds {RUNS}")
        result = thresholds.evaluate_thresholds(runs, finished_only=finished_only, damaged=damaged)
    except RunError as error:
        return Chapter(title, shareable(str(error), runs))
    return Chapter(title, tables=[thresholds.thresholds_table(result, brief=False)])
