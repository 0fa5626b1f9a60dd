"""Figures of a report: AUROC by resolution, and learning curves. Metrics that are missing or damaged are left out."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import ScalarFormatter

from cxrfast.analysis.evaluate import Evaluation
from cxrfast.figures import add_legend, figure_text
from cxrfast.metrics import mean_sd
from cxrfast.runs.lineage import group_origins, marked_name, origin_of
from cxrfast.runs.run import Run
from cxrfast.runs.status import number


def auroc_figure(evaluation: Evaluation) -> Figure:
    """AUROC against the side of the images, one line per finding; findings that are undefined everywhere are left out."""
    scales = evaluation.table.groupby("name")["scale"].first()
    names = sorted(evaluation.names, key=lambda name: (int(scales[name]), name))
    mean, sd = np.array([mean_sd(evaluation.matrix(name)) for name in names]).swapaxes(0, 1)  # (names, L) each
    shown = sorted(np.flatnonzero(~np.isnan(mean).all(axis=0)), key=lambda j: -mean[-1, j])
    figure = Figure(
        figsize=(9, max(4.6, 0.6 + 0.2 * len(shown))), layout="constrained"
    )  # the legend has a line for each
    axes = figure.subplots()
    x, lines = np.arange(len(names)), []
    step = min(0.012 * len(names), 0.5 / max(1, len(shown)))  # error bars next to, not upon, each other
    for i, j in enumerate(shown):
        offset = (i - (len(shown) - 1) / 2) * step
        spread = np.nan_to_num(sd[:, j])
        line = axes.errorbar(
            x + offset,
            mean[:, j],
            (np.minimum(spread, mean[:, j]), np.minimum(spread, 1 - mean[:, j])),  # an AUROC lies between 0 and 1
            marker="os^Dv"[i // 20 % 5],  # there are 20 colours
            capsize=2,
            linewidth=1.5,
            linestyle=("-", "--", ":", "-.")[i // 20 % 4],
            color=colormaps["tab20"]((2 * i) % 20 + (2 * i) // 20 % 2),
            label=evaluation.labels[j],
        )
        lines.append(line)
    axes.axhline(0.5, color="grey", linewidth=0.8, linestyle=":")
    ticks = evaluation.marked({name: f"{scales[name]} px" if scales.is_unique else name for name in names})
    axes.set_xticks(x, [figure_text(tick) for tick in ticks.values()])
    axes.set_ylabel("AUROC")
    axes.spines[["top", "right"]].set_visible(False)
    add_legend(figure, lines, [evaluation.labels[j] for j in shown], loc="outside right center", fontsize="small")
    return figure


LEAST, MOST = 1e-9, 1e9
"""Smallest (except 0) and largest epoch, loss or number of seconds that a curve shows."""

CURVES = {"train_loss": "training loss", "val_loss": "validation loss", "val_auroc": "validation AUROC"}


def learning_figure(runs: list[Run]) -> Figure:
    """Training loss, validation loss and validation AUROC against the epoch, and below against the time since the start."""
    figure = Figure(figsize=(9, 5.6), layout="constrained")
    panels = figure.subplots(2, 3, sharey="col")
    origins = origins_of(runs)
    shades = colormaps["viridis"](np.linspace(0, 0.9, len(origins)))
    colours = dict(zip(origins, map(tuple, shades), strict=True))
    longest = max(np.nansum(_plausible(run.metrics(), "seconds")) for run in runs)
    positive = dict.fromkeys(CURVES, False)
    unit, seconds = ("hours", 3600) if longest > 3600 else ("minutes", 60)
    for run in runs:
        metrics, colour = run.metrics(), colours[run.folder.parent.name]
        rates = values_of(metrics, "learning_rate")
        drops = np.flatnonzero(rates[1:] < rates[:-1]) + 1
        epochs = _plausible(metrics, "epoch") + 1
        for line, x in zip(panels, (epochs, np.cumsum(_plausible(metrics, "seconds")) / seconds), strict=True):
            for axes, key in zip(line, CURVES, strict=True):
                values = _plausible(metrics, key)
                positive[key] |= bool((values > 0).any())
                axes.plot(x, values, ".-", markersize=3, linewidth=0.9, color=colour)
                axes.plot(x[drops], values[drops], "|", markersize=10, markeredgewidth=1.2, color=colour)
    for (above, below), key in zip(panels.T, CURVES, strict=True):
        above.set_title(CURVES[key], fontsize="medium")
        above.set_xlabel("epoch")
        above.xaxis.get_major_locator().set_params(integer=True)
        below.set_xlabel(unit)
        below.set_xlim(left=0)
        if "loss" in key and positive[key]:
            above.set_yscale("log")  # an early validation loss may be ten times the later ones
            above.yaxis.set_major_formatter(ScalarFormatter())
            above.yaxis.set_minor_formatter(ScalarFormatter())
    for axes in panels.flat:
        axes.spines[["top", "right"]].set_visible(False)
    handles = [Line2D([], [], color=colours[name]) for name in origins]
    names = [marked_name(name, start) for name, start in origins.items()]
    columns = min(4, len(handles))
    add_legend(figure, handles, names, loc="outside lower center", ncols=columns, fontsize="small")
    return figure


def values_of(lines: Sequence[Mapping[str, Any]], key: str) -> np.ndarray:
    """float64, one per epoch: a value of the metrics; NaN where it is missing or not a number."""
    found = (number(line.get(key)) for line in lines)
    return np.array([np.nan if value is None else value for value in found], np.float64)


def _plausible(lines: Sequence[Mapping[str, Any]], key: str) -> np.ndarray:
    """As `values_of`, and NaN for what no epoch can have and no axis can show."""
    values = values_of(lines, key)
    return np.where((values == 0) | ((values > LEAST) & (values < MOST)), values, np.nan)


def origins_of(runs: Sequence[Run]) -> dict[str, str]:
    """By group: where the first weights came from."""
    return group_origins((run.folder.parent.name, origin_of(run)) for run in runs)
