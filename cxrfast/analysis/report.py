"""report.html: the tables and figures of a folder of runs in one file that opens anywhere. Needs runs only, no shards.

The file is meant to be shared. It names no folder of the machine, images only by their row, and asks for nothing when it is
opened. A run that is damaged is one line of it; the chapters are about the others.
"""

import base64
import errno
import hashlib
import logging
import os
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from jinja2 import Environment, PackageLoader, select_autoescape
from matplotlib.figure import Figure

from cxrfast import __version__
from cxrfast.analysis import ensemble, evaluate
from cxrfast.analysis.curves import auroc_figure, learning_figure, origins_of, values_of
from cxrfast.analysis.join import read_answers
from cxrfast.analysis.receptive_field import erf_figure, has_erf, read_erf
from cxrfast.errors import RunError
from cxrfast.files import make_own_folder, read_file, write_bytes, write_figure
from cxrfast.runs.folder import RunFolder
from cxrfast.runs.lineage import marked_name, origin_footnote, origin_of
from cxrfast.runs.run import Run
from cxrfast.shards.images.bad_image import BadImage
from cxrfast.shards.images.png import bare_png
from cxrfast.tables import Cell, Table

log = logging.getLogger(__name__)

Result = TypeVar("Result")

FIGURES = "figures"
"""Folder of the report's figures, in the folder of the runs."""

RUNS = "RUNS"
"""What a report calls the folder of the runs."""

LARGEST_FIGURE = 2**25
"""Bytes of a Grad-CAM figure that is embedded."""

PATH = re.compile(r"(?<![\w.>/-])/(?:[^\s/'\"`:;,()]+/)+")
"""Folders of an absolute path."""


@dataclass
class Chapter:
    title: str
    text: str = ""
    command: str = ""
    """Makes what is missing."""
    tables: list[Table] = field(default_factory=list)
    figures: list[tuple[str, str]] = field(default_factory=list)
    """(caption, data URL)"""


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
    chapters = [_summary(found, damaged), scores, stack, _learning(runs, found), _erf(runs, found), _gradcam(found)]
    chapters += [_resources(found), _configuration(found)]
    environment = Environment(loader=PackageLoader("cxrfast.analysis", "."), autoescape=select_autoescape(default=True))
    html = environment.get_template("report.html.j2").render(
        chapters=chapters, version=__version__, style_hash=_style_hash(environment)
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


def shareable(text: str, runs: Path) -> str:
    """A message without folders of the machine, which may name a user or a project; that of the runs is RUNS."""
    for folder in sorted({str(runs), str(runs.absolute()), str(runs.resolve())}, key=len, reverse=True):
        if len(folder) > 1 and os.sep in folder:
            text = text.replace(folder, RUNS)
    return PATH.sub("…/", text)


def _command(name: str, run: Run, more: str = "") -> str:
    return f"cxrfast {name} {RUNS}/{run.name}{more}"


def _saved(figure: Figure, runs: Path, name: str) -> str:
    """Save the figure, for slides and papers, and return it as a data URL."""
    make_own_folder(runs / FIGURES)
    write_figure(runs / FIGURES / name, figure, dpi=110)
    return _data_url((runs / FIGURES / name).read_bytes())


def _data_url(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _table(records: Sequence[Mapping[str, str | Cell]], note: str = "", text: Sequence[str] = ()) -> Table:
    return Table("", list(records[0]), [list(record.values()) for record in records], note.strip(), text)


def _footnote(runs: list[Run]) -> str:
    return origin_footnote(origins_of(runs))


# Chapters


def _shown(value: float, form: str, unknown: str = "-") -> str:
    return unknown if np.isnan(value) else format(value, form)


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
                "Its validation AUROC": _shown(auroc, ".4f", "undefined"),
            }
        )
    heads = list(records[0]) if records else ["Run", "State"]
    for name in damaged:
        records.append({**dict.fromkeys(heads, ""), "Run": name, "State": Cell("damaged", "bold")})
    notes = [
        "Rows by part. The weights used are those of the epoch with the lowest validation loss; another may have a higher AUROC.",
        _footnote(runs),
        *(f"{name} is damaged and left out of all chapters: {why}" for name, why in damaged.items()),
    ]
    return Chapter("Runs", tables=[_table(records, "\n".join(filter(None, notes)), ["State", "Split"])])


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
        return Chapter(title, "Nothing predicted yet:", _command("predict", found[0]))
    chapter = Chapter(title, tables=[evaluate.auroc_table(evaluation)])
    if len(evaluation.names) > 1 and evaluation.is_compared:
        caption = f"AUROC by resolution, mean ± sd over folds. {evaluation.footnotes}".strip()
        chapter.figures.append((caption, _saved(auroc_figure(evaluation), runs, "auroc.png")))
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
    figure = _saved(ensemble.weights_figure(result), runs, "weights.png")
    return Chapter(title, tables=tables, figures=[("Weights of the scales, mean over folds", figure)])


def _learning(folder: Path, found: list[Run]) -> Chapter:
    runs = [run for run in found if run.metrics()]
    if not runs:
        return Chapter("Learning curves", "No epoch has ended yet.")
    caption = (
        f"One line per fold, one colour per scale; a tick marks a drop of the learning rate. {_footnote(runs)}".strip()
    )
    return Chapter("Learning curves", figures=[(caption, _saved(learning_figure(runs), folder, "learning.png"))])


def _erf(folder: Path, runs: list[Run]) -> Chapter:
    title = "Effective receptive fields"
    measured, found, text = [], [], ""
    for run in runs:
        try:
            if has_erf(run):
                found.append(read_erf(run))
                measured.append(run)
        except RunError as error:
            log.warning(f"the report leaves out a receptive field: {error}")
            text += f"{run.name} is left out: {shareable(str(error), folder)}. "
    if not measured:
        return Chapter(title, f"{text}Not measured yet:", _command("erf", runs[0]))
    records = [
        {
            "Run": e.run,
            "ERF, px": f"{e.size:.0f}",
            "% of the side": f"{100 * e.fraction:.0f}",
            "Theoretical, px": str(e.theoretical or "unknown"),
            "50 % within, px": f"{e.radius_50:.0f}",
            "95 % within, px": f"{e.radius_95:.0f}",
            "Images": str(e.images),
        }
        for e in found
    ]
    note = (
        "ERF: side of the square with the field's area. Within: radius around the centre of that share of the energy."
    )
    caption = "Squared gradient of the centre of the last feature map; the square has the field's area"
    figures = [(caption, _saved(erf_figure(measured), folder, "erf.png"))]
    return Chapter(title, text, tables=[_table(records, note)], figures=figures)


def _gradcam(runs: list[Run]) -> Chapter:
    """The figures that `cxrfast gradcam` left in the runs: they show images, which the runs themselves do not hold."""
    figures, left = [], []
    for run in runs:
        for label in run.config.labels:
            path, name = run.gradcam_path(label), f"{label}, {run.name}"
            if not os.path.lexists(path):
                continue
            try:
                figures.append((name, _data_url(bare_png(read_file(path, LARGEST_FIGURE, os.O_NOFOLLOW)))))
            except (OSError, BadImage) as error:
                log.warning(f"the report leaves out {path}: {_why(error)}")
                left.append(f"{name}: {_why(error)}")
    text = f"Left out: {'; '.join(left)}." if left else ""
    if not figures:
        label = next(iter(runs[0].config.labels), "LABEL")
        return Chapter(
            "Grad-CAM", f"{text} Not made yet:".strip(), _command("gradcam", runs[0], f" --label {shlex.quote(label)}")
        )
    return Chapter("Grad-CAM", text, figures=figures)


def _why(error: OSError | BadImage) -> str:
    """Without the path."""
    if isinstance(error, OSError):
        return "is a link" if error.errno == errno.ELOOP else error.strerror or "cannot be read"
    return str(error)


def _resources(runs: list[Run]) -> Chapter:
    records = []
    for run in filter(Run.metrics, runs):
        metrics, config = run.metrics(), run.config

        def median(key: str, metrics: list[dict[str, Any]] = metrics) -> float:
            values = values_of(metrics, key)
            return float(np.median(known)) if len(known := values[~np.isnan(values)]) else np.nan

        memory, gpu = (values_of(metrics, name)[-1] / 2**30 for name in ("resident_bytes", "gpu_peak_bytes"))
        waiting = median("waiting_share")
        records.append(
            {
                "Run": marked_name(run.name, origin_of(run)),
                "Global batch": str(config.global_batch),
                "Micro-batch": str(config.micro_batch),
                "Precision": config.precision,
                "Training images/s": _shown(median("images_per_s"), ",.1f"),
                "Waiting for data": "-" if np.isnan(waiting) else f"{100 * waiting:.1f} %",
                "Seconds per epoch": _shown(median("seconds"), ",.1f"),
                "Process GiB": _shown(memory, ".1f"),
                "torch peak GiB": _shown(gpu, ".1f"),
            }
        )
    if not records:
        return Chapter("Time and memory", "No epoch has ended yet.")
    return Chapter(
        "Time and memory", tables=[_table(records, f"Medians over epochs. {_footnote(runs)}", ["Precision"])]
    )


def _configuration(runs: list[Run]) -> Chapter:
    """What all runs share, then where they differ."""
    configs = [
        {name: _words(value) for name, value in (asdict(run.config) | {"weights": origin_of(run)}).items()}
        for run in runs
    ]
    first = configs[0]
    differing = [name for name in first if any(config[name] != first[name] for config in configs)]
    shared = [{"Shared by all runs": name, "Value": first[name]} for name in first if name not in differing]
    tables = [_table(shared, text=["Value"])]
    if differing:
        own = [{"Run": r.name, **{name: c[name] for name in differing}} for r, c in zip(runs, configs, strict=True)]
        tables.append(_table(own, text=differing))
    return Chapter("Configuration", tables=tables)


def _words(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
