"""report.html: the tables and figures of a folder of runs in one file that opens anywhere. Needs runs only, no shards.

Images are named only by their id.
"""

import base64
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, select_autoescape
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import ScalarFormatter

from cxrfast import __version__
from cxrfast.analysis import ensemble, evaluate
from cxrfast.analysis.receptive_field import erf_figure, has_erf, read_erf
from cxrfast.errors import RunError
from cxrfast.files import write_bytes, write_figure
from cxrfast.metrics import mean_sd
from cxrfast.runs.lineage import group_origins, marked_name, origin_footnote, origin_of
from cxrfast.runs.run import Run
from cxrfast.tables import Table

FIGURES = "figures"
"""Folder of the report's figures, in the folder of the runs."""


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
    runs: Path, evaluation: evaluate.Evaluation | None = None, stacked: ensemble.EnsembleResult | None = None
) -> Path:
    """Write RUNS/report.html from what the runs hold; a chapter whose results are missing names the command for them.

    `evaluation`, `stacked`: of these runs' test rows, if they are known already.
    """
    found = Run.find(runs)
    chapters = [_summary(found)]
    if any(run.has_predictions for run in found):
        chapters += [_auroc(runs, evaluation or evaluate.evaluate(runs)), _ensemble(runs, found, stacked)]
    else:
        chapters.append(Chapter("AUROC", "Nothing predicted yet:", f"cxrfast predict {found[0].folder}"))
    chapters += [_learning(runs, found), _erf(runs, found), _gradcam(found), _resources(found), _configuration(found)]
    environment = Environment(loader=PackageLoader("cxrfast.analysis", "."), autoescape=select_autoescape(default=True))
    html = environment.get_template("report.html.j2").render(chapters=chapters, version=__version__)
    write_bytes(runs / "report.html", html.encode())
    return runs / "report.html"


def _saved(figure: Figure, runs: Path, name: str) -> str:
    """Save the figure, for slides and papers, and return it as a data URL."""
    (runs / FIGURES).mkdir(exist_ok=True)
    write_figure(runs / FIGURES / name, figure, dpi=110)
    return _data_url(runs / FIGURES / name)


def _data_url(png: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(png.read_bytes()).decode()


def _table(records: list[dict[str, str]], note: str = "", text: Sequence[str] = ()) -> Table:
    return Table("", list(records[0]), [list(record.values()) for record in records], note.strip(), text)


def _origins(runs: list[Run]) -> dict[str, str]:
    return group_origins((run.folder.parent.name, origin_of(run)) for run in runs)


def _footnote(runs: list[Run]) -> str:
    return origin_footnote(_origins(runs))


# Chapters


def _summary(runs: list[Run]) -> Chapter:
    records = []
    for run in runs:
        parts, epochs = run.rows(["part"])["part"].value_counts(), run.metrics()
        best: dict[str, Any] = min(epochs, key=lambda m: m["val_loss"], default={"val_auroc": None})
        records.append(
            {
                "Run": marked_name(run.name, origin_of(run)),
                "State": run.state().get("state", "not started"),
                "Split": run.config.split,
                "Train": f"{parts.get('train', 0):,}",
                "Validation": f"{parts.get('val', 0):,}",
                "Test": f"{parts.get('test', 0):,}",
                "Epochs": str(len(epochs)),
                "Epoch of lowest loss": f"{best['epoch'] + 1}" if epochs else "-",
                "Its validation AUROC": "undefined" if best["val_auroc"] is None else f"{best['val_auroc']:.4f}",
            }
        )
    note = "Rows by part. The weights used are those of the epoch with the lowest validation loss; another may have a higher AUROC."
    return Chapter("Runs", tables=[_table(records, f"{note} {_footnote(runs)}", ["State", "Split"])])


def _auroc(runs: Path, evaluation: evaluate.Evaluation) -> Chapter:
    chapter = Chapter("AUROC on the test rows", tables=[evaluate.auroc_table(evaluation)])
    if len(evaluation.names) > 1 and evaluation.is_compared:
        caption = f"AUROC by resolution, mean ± sd over folds. {evaluation.footnotes}".strip()
        chapter.figures.append((caption, _saved(auroc_figure(evaluation), runs, "auroc.png")))
    return chapter


def auroc_figure(evaluation: evaluate.Evaluation) -> Figure:
    """AUROC against the side of the images, one line per finding; findings that are undefined everywhere are left out."""
    scales = evaluation.table.groupby("name")["scale"].first()
    names = sorted(evaluation.names, key=lambda name: (int(scales[name]), name))
    mean, sd = np.array([mean_sd(evaluation.matrix(name)) for name in names]).swapaxes(0, 1)  # (names, L) each
    shown = sorted(np.flatnonzero(~np.isnan(mean).all(axis=0)), key=lambda j: -mean[-1, j])
    figure = Figure(figsize=(9, 4.6), layout="constrained")
    axes = figure.subplots()
    x = np.arange(len(names))
    for i, j in enumerate(shown):
        offset = (i - (len(shown) - 1) / 2) * 0.012 * len(names)  # error bars next to, not upon, each other
        spread = np.nan_to_num(sd[:, j])
        axes.errorbar(
            x + offset,
            mean[:, j],
            (np.minimum(spread, mean[:, j]), np.minimum(spread, 1 - mean[:, j])),  # an AUROC lies between 0 and 1
            marker="o",
            capsize=2,
            linewidth=1.5,
            color=colormaps["tab20"]((2 * i) % 20 + (2 * i) // 20),
            label=evaluation.labels[j],
        )
    axes.axhline(0.5, color="grey", linewidth=0.8, linestyle=":")
    ticks = evaluation.marked({name: f"{scales[name]} px" if scales.is_unique else name for name in names})
    axes.set_xticks(x, list(ticks.values()))
    axes.set_ylabel("AUROC")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right center", frameon=False, fontsize="small")
    return figure


def _ensemble(runs: Path, found: list[Run], result: ensemble.EnsembleResult | None) -> Chapter:
    title = "Ensemble of scales"
    if len({run.config.scale for run in found if run.has_predictions}) < 2:
        return Chapter(title, "Needs predictions at two scales or more.")
    try:
        result = result or ensemble.ensemble(runs)
    except RunError as error:
        return Chapter(title, str(error))
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


CURVES = {"train_loss": "training loss", "val_loss": "validation loss", "val_auroc": "validation AUROC"}


def learning_figure(runs: list[Run]) -> Figure:
    """Training loss, validation loss and validation AUROC against the epoch, and below against the time since the start."""
    figure = Figure(figsize=(9, 5.6), layout="constrained")
    panels = figure.subplots(2, 3, sharey="col")
    origins = _origins(runs)
    shades = colormaps["viridis"](np.linspace(0, 0.9, len(origins)))
    colours = dict(zip(origins, map(tuple, shades), strict=True))
    longest = max(sum(m["seconds"] for m in run.metrics()) for run in runs)
    unit, seconds = ("hours", 3600) if longest > 3600 else ("minutes", 60)
    for run in runs:
        metrics, colour = run.metrics(), colours[run.folder.parent.name]
        rates = np.array([m["learning_rate"] for m in metrics])
        drops = np.flatnonzero(rates[1:] < rates[:-1]) + 1
        epochs = np.array([m["epoch"] + 1 for m in metrics])
        for line, x in zip(panels, (epochs, np.cumsum([m["seconds"] for m in metrics]) / seconds), strict=True):
            for axes, key in zip(line, CURVES, strict=True):
                values = np.array([m[key] for m in metrics], np.float64)  # None is NaN
                axes.plot(x, values, ".-", markersize=3, linewidth=0.9, color=colour)
                axes.plot(x[drops], values[drops], "|", markersize=10, markeredgewidth=1.2, color=colour)
    for (above, below), title in zip(panels.T, CURVES.values(), strict=True):
        above.set_title(title, fontsize="medium")
        above.set_xlabel("epoch")
        above.xaxis.get_major_locator().set_params(integer=True)
        below.set_xlabel(unit)
        below.set_xlim(left=0)
        if "loss" in title:
            above.set_yscale("log")  # an early validation loss may be ten times the later ones
            above.yaxis.set_major_formatter(ScalarFormatter())
            above.yaxis.set_minor_formatter(ScalarFormatter())
    for axes in panels.flat:
        axes.spines[["top", "right"]].set_visible(False)
    handles = [Line2D([], [], color=colours[name], label=marked_name(name, start)) for name, start in origins.items()]
    columns = min(4, len(handles))
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize="small")
    return figure


def _erf(folder: Path, runs: list[Run]) -> Chapter:
    title = "Effective receptive fields"
    measured = [run for run in runs if has_erf(run)]
    if not measured:
        return Chapter(title, "Not measured yet:", f"cxrfast erf {runs[0].folder}")
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
        for e in map(read_erf, measured)
    ]
    note = (
        "ERF: side of the square with the field's area. Within: radius around the centre of that share of the energy."
    )
    caption = "Squared gradient of the centre of the last feature map; the square has the field's area"
    figures = [(caption, _saved(erf_figure(measured), folder, "erf.png"))]
    return Chapter(title, tables=[_table(records, note)], figures=figures)


def _gradcam(runs: list[Run]) -> Chapter:
    """The figures that `cxrfast gradcam` left in the runs: they show images, which the runs themselves do not hold."""
    figures = [(f"{label}, {run.name}", _data_url(path)) for run in runs for label, path in run.gradcam_paths().items()]
    if not figures:
        return Chapter("Grad-CAM", "Not made yet:", f"cxrfast gradcam {runs[0].folder} --label …")
    return Chapter("Grad-CAM", figures=figures)


def _resources(runs: list[Run]) -> Chapter:
    def median(metrics: list[dict[str, Any]], key: str) -> float:
        return float(np.median([m[key] for m in metrics if m[key] is not None] or [np.nan]))  # None: no step was timed

    records = []
    for run in filter(Run.metrics, runs):
        metrics, config = run.metrics(), run.config
        gpu = metrics[-1]["gpu_peak_bytes"]
        records.append(
            {
                "Run": marked_name(run.name, origin_of(run)),
                "Global batch": str(config.global_batch),
                "Micro-batch": str(config.micro_batch),
                "Precision": config.precision,
                "Training images/s": f"{median(metrics, 'images_per_s'):,.1f}",
                "Waiting for data": f"{100 * median(metrics, 'waiting_share'):.1f} %",
                "Seconds per epoch": f"{median(metrics, 'seconds'):,.1f}",
                "Process GiB": f"{metrics[-1]['resident_bytes'] / 2**30:.1f}",
                "torch peak GiB": "-" if gpu is None else f"{gpu / 2**30:.1f}",
            }
        )
    note = f"Medians over epochs. {_footnote(runs)}"
    return Chapter("Time and memory", tables=[_table(records, note, ["Precision"])] if records else [])


def _configuration(runs: list[Run]) -> Chapter:
    """What all runs share, then where they differ."""
    configs = [{name: _words(value) for name, value in asdict(run.config).items()} for run in runs]
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
