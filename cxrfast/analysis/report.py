"""report.html: the tables and figures of a folder of runs in one file that opens anywhere. Needs runs only, no shards.

Images are named by their id alone.
"""

import base64
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
from cxrfast.analysis.evaluate import Evaluation
from cxrfast.analysis.receptive_field import erf_figure, has_erf, read_erf
from cxrfast.errors import RunError
from cxrfast.files import write_bytes, write_figure
from cxrfast.metrics import mean_sd
from cxrfast.runs.lineage import marked_name, origin_footnote, origin_of, shared_origin
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


def report(runs: Path) -> Path:
    """Write RUNS/report.html from what the runs hold; a chapter whose results are missing names the command for them."""
    found = Run.find(runs)
    chapters = [_summary(found)]
    if any(run.has_predictions for run in found):
        chapters += [_auroc(runs), _ensemble(runs, found)]
    else:
        chapters.append(Chapter("AUROC", "Nothing predicted yet:", f"cxrfast predict {found[0].folder}"))
    chapters += [_learning(runs, found), _erf(runs, found), _gradcam(found), _resources(found), _configuration(found)]
    environment = Environment(loader=PackageLoader("cxrfast.analysis", "."), autoescape=select_autoescape(default=True))
    html = environment.get_template("report.html.j2").render(chapters=chapters, version=__version__)
    write_bytes(runs / "report.html", html.encode())
    return runs / "report.html"


def _png(figure: Figure, path: Path) -> str:
    """Save the figure, for slides and papers, and return it as a data URL."""
    path.parent.mkdir(exist_ok=True)
    write_figure(path, figure, dpi=110)
    return _data_url(path)


def _data_url(png: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(png.read_bytes()).decode()


def _origins(runs: list[Run]) -> dict[str, str]:
    """By name of a group of runs: where the first weights came from."""
    names = dict.fromkeys(run.folder.parent.name for run in runs)
    return {n: shared_origin(origin_of(r.config) for r in runs if r.folder.parent.name == n) for n in names}


def _footnote(runs: list[Run]) -> str:
    return origin_footnote(_origins(runs))


# Chapters


def _summary(runs: list[Run]) -> Chapter:
    lines = []
    for run in runs:
        parts = run.rows()["part"].value_counts()
        epochs = run.metrics()
        best = min(epochs, key=lambda m: m["val_loss"], default=None)
        lines.append(
            [
                marked_name(run.name, origin_of(run.config)),
                run.state().get("state", "not started"),
                *(f"{parts.get(p, 0):,}" for p in ("train", "val", "test")),
                str(len(epochs)),
                f"{best['epoch'] + 1}" if best else "-",
                f"{best['val_auroc']:.4f}" if best and best["val_auroc"] is not None else "undefined",
            ]
        )
    head = ["Run", "State", "Train", "Validation", "Test", "Epochs", "Best epoch", "Validation AUROC"]
    note = "Rows by part. The best epoch has the lowest validation loss; its weights are used."
    return Chapter("Runs", tables=[Table("", head, lines, f"{note} {_footnote(runs)}", text=["State"])])


def _auroc(runs: Path) -> Chapter:
    evaluation = evaluate.evaluate(runs)
    chapter = Chapter("AUROC on the test rows", tables=[evaluate.auroc_table(evaluation)])
    if len(evaluation.names) > 1:
        caption = f"AUROC by resolution, mean ± sd over folds. {origin_footnote(evaluation.origins)}".strip()
        chapter.figures.append((caption, _png(auroc_figure(evaluation), runs / FIGURES / "auroc.png")))
    return chapter


def auroc_figure(evaluation: Evaluation) -> Figure:
    """AUROC against the side of the images, one line per finding; findings that are undefined everywhere are left out."""
    scales = evaluation.table.groupby("name")["scale"].first()
    names = sorted(evaluation.names, key=lambda name: (int(scales[name]), name))
    statistics = [mean_sd(evaluation.matrix(name)) for name in names]
    mean, sd = (np.array([s[i] for s in statistics]) for i in (0, 1))
    shown = [j for j in range(len(evaluation.labels)) if not np.isnan(mean[:, j]).all()]
    shown.sort(key=lambda j: -mean[-1, j])
    figure = Figure(figsize=(9, 4.6), layout="constrained")
    axes = figure.subplots()
    colours = colormaps["tab20"]
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
            color=colours((2 * i) % 20 + (2 * i) // 20),
            label=evaluation.labels[j],
        )
    axes.axhline(0.5, color="grey", linewidth=0.8, linestyle=":")
    ticks = [f"{scales[name]} px" if scales.is_unique else name for name in names]
    axes.set_xticks(x, [marked_name(tick, evaluation.origins[name]) for tick, name in zip(ticks, names, strict=True)])
    axes.set_ylabel("AUROC")
    figure.legend(loc="outside right center", frameon=False, fontsize="small")
    return figure


def _ensemble(runs: Path, found: list[Run]) -> Chapter:
    if len({run.config.scale for run in found if run.has_predictions}) < 2:
        return Chapter("Ensemble of scales", "Needs predictions at two scales or more.")
    try:
        result = ensemble.ensemble(runs)
    except RunError as error:
        return Chapter("Ensemble of scales", str(error))
    picture = _png(ensemble.weights_figure(result), runs / FIGURES / "weights.png")
    return Chapter(
        "Ensemble of scales",
        tables=[ensemble.ensemble_table(result, brief=False), ensemble.weights_table(result)],
        figures=[("Weights of the scales, mean over folds", picture)],
    )


def _learning(folder: Path, runs: list[Run]) -> Chapter:
    trained = [run for run in runs if run.metrics()]
    if not trained:
        return Chapter("Learning curves", "No epoch has ended yet.")
    caption = f"One line per fold, one colour per scale; a tick marks a drop of the learning rate. {_footnote(trained)}"
    return Chapter(
        "Learning curves",
        figures=[(caption.strip(), _png(learning_figure(trained), folder / FIGURES / "learning.png"))],
    )


CURVES = {"train_loss": "training loss", "val_loss": "validation loss", "val_auroc": "validation AUROC"}


def learning_figure(runs: list[Run]) -> Figure:
    """Training loss, validation loss and validation AUROC against the epoch, and below against the time since the start."""
    figure = Figure(figsize=(9, 5.6), layout="constrained")
    panels = figure.subplots(2, 3, sharey="col")
    origins = _origins(runs)
    shades = np.linspace(0, 0.9, len(origins))
    colours = {name: colormaps["viridis"](shade) for name, shade in zip(origins, shades, strict=True)}
    unit, seconds = (
        ("hours", 3600) if max(sum(m["seconds"] for m in r.metrics()) for r in runs) > 3600 else ("minutes", 60)
    )
    for run in runs:
        metrics, colour = run.metrics(), colours[run.folder.parent.name]
        rates = np.array([m["learning_rate"] for m in metrics])
        drops = np.flatnonzero(rates[1:] < rates[:-1]) + 1
        epochs = np.array([m["epoch"] + 1 for m in metrics])
        for line, x in zip(panels, (epochs, np.cumsum([m["seconds"] for m in metrics]) / seconds), strict=True):
            for axes, key in zip(line, CURVES, strict=True):
                values = np.array([np.nan if m[key] is None else m[key] for m in metrics])
                axes.plot(x, values, ".-", markersize=3, linewidth=0.9, color=colour)
                axes.plot(x[drops], values[drops], "|", markersize=10, markeredgewidth=1.2, color=colour)
    for axes, title in zip(panels[0], CURVES.values(), strict=True):
        axes.set_title(title, fontsize="medium")
        axes.set_xlabel("epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        if "loss" in title:
            axes.set_yscale("log")  # an early validation loss may be ten times the later ones
            axes.yaxis.set_major_formatter(ScalarFormatter())
            axes.yaxis.set_minor_formatter(ScalarFormatter())
    for axes in panels[1]:
        axes.set_xlabel(unit)
        axes.set_xlim(left=0)
    handles = [Line2D([], [], color=colours[name], label=marked_name(name, start)) for name, start in origins.items()]
    figure.legend(
        handles=handles, loc="outside lower center", ncols=min(4, len(handles)), frameon=False, fontsize="small"
    )
    return figure


def _erf(folder: Path, runs: list[Run]) -> Chapter:
    measured = [run for run in runs if has_erf(run)]
    if not measured:
        return Chapter("Effective receptive fields", "Not measured yet:", f"cxrfast erf {runs[0].folder}")
    head = ["Run", "ERF, px", "% of the side", "Theoretical, px", "50 % within, px", "95 % within, px", "Images"]
    rows = [
        [
            e.run,
            f"{e.size:.0f}",
            f"{100 * e.fraction:.0f}",
            str(e.theoretical or "unknown"),
            f"{e.radius_50:.0f}",
            f"{e.radius_95:.0f}",
            str(e.images),
        ]
        for e in map(read_erf, measured)
    ]
    note = "ERF: side of the square with the field's area. Within: radius around the centre that holds half, or 95 %, of the energy."
    caption = "Squared gradient of the centre of the last feature map; the square has the field's area"
    figure = _png(erf_figure(measured), folder / FIGURES / "erf.png")
    return Chapter("Effective receptive fields", tables=[Table("", head, rows, note)], figures=[(caption, figure)])


def _gradcam(runs: list[Run]) -> Chapter:
    """The figures that `cxrfast gradcam` left in the runs: they show images, which the runs themselves do not hold."""
    figures = [(f"{label}, {run.name}", _data_url(path)) for run in runs for label, path in run.gradcam_paths().items()]
    if not figures:
        return Chapter("Grad-CAM", "Not made yet:", f"cxrfast gradcam {runs[0].folder} --label …")
    return Chapter("Grad-CAM", figures=figures)


def _resources(runs: list[Run]) -> Chapter:
    lines = []
    for run in runs:
        metrics = run.metrics()
        if metrics:

            def median(key: str, metrics: list[dict[str, Any]] = metrics) -> float:  # None: a stop left no step to time
                return float(np.median([m[key] for m in metrics if m[key] is not None] or [np.nan]))

            gpu = metrics[-1]["gpu_peak_bytes"]
            lines.append(
                [
                    marked_name(run.name, origin_of(run.config)),
                    str(run.config.global_batch),
                    str(run.config.micro_batch),
                    run.config.precision,
                    f"{median('images_per_s'):,.1f}",
                    f"{100 * median('waiting_share'):.1f} %",
                    f"{median('seconds'):,.1f}",
                    f"{metrics[-1]['resident_bytes'] / 2**30:.1f}",
                    "-" if gpu is None else f"{gpu / 2**30:.1f}",
                ]
            )
    head = [
        "Run",
        "Global batch",
        "Micro-batch",
        "Precision",
        "Training images/s",
        "Waiting for data",
        "Seconds an epoch",
        "Process GiB",
        "torch peak GiB",
    ]
    note = f"Medians over epochs. {_footnote(runs)}"
    return Chapter("Time and memory", tables=[Table("", head, lines, note, text=["Precision"])])


def _configuration(runs: list[Run]) -> Chapter:
    """What all runs share, then what tells them apart."""
    configs = [asdict(run.config) for run in runs]
    shared = [[name, str(value)] for name, value in configs[0].items() if all(c[name] == value for c in configs)]
    differing = [name for name in configs[0] if name not in dict(shared)]
    tables = [Table("", ["Shared by all runs", "value"], shared, text=["value"])]
    if differing:
        rows = [
            [run.name, *(str(config[name]) for name in differing)] for run, config in zip(runs, configs, strict=True)
        ]
        tables.append(Table("", ["Run", *differing], rows, text=differing))
    return Chapter("Configuration", tables=tables)
