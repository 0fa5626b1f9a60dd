"""Chapters of a report about single runs: learning curves, maps, time and memory, configuration; and what chapters share.

A chapter names no folder of the machine. Figures are saved next to the report, too.
"""

import base64
import errno
import logging
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from cxrfast.analysis.curves import learning_figure, origins_of, values_of
from cxrfast.analysis.receptive_field import erf_figure, has_erf, read_erf
from cxrfast.errors import RunError
from cxrfast.files import make_own_folder, read_file, write_figure
from cxrfast.runs.lineage import marked_name, origin_footnote, origin_of
from cxrfast.runs.run import Run
from cxrfast.shards.images.bad_image import BadImage
from cxrfast.shards.images.png import bare_png
from cxrfast.tables import Cell, Table

log = logging.getLogger(__name__)

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


def shareable(text: str, runs: Path) -> str:
    """A message without folders of the machine, which may name a user or a project; that of the runs is RUNS."""
    for folder in sorted({str(runs), str(runs.absolute()), str(runs.resolve())}, key=len, reverse=True):
        if len(folder) > 1 and os.sep in folder:
            text = text.replace(folder, RUNS)
    return PATH.sub("…/", text)


def command(name: str, run: Run, more: str = "") -> str:
    return f"cxrfast {name} {RUNS}/{run.name}{more}"


def saved(figure: Figure, runs: Path, name: str) -> str:
    """Save the figure, for slides and papers, and return it as a data URL."""
    make_own_folder(runs / FIGURES)
    write_figure(runs / FIGURES / name, figure, dpi=110)
    return _data_url((runs / FIGURES / name).read_bytes())


def _data_url(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def table_of(records: Sequence[Mapping[str, str | Cell]], note: str = "", text: Sequence[str] = ()) -> Table:
    return Table("", list(records[0]), [list(record.values()) for record in records], note.strip(), text)


def origins_note(runs: list[Run]) -> str:
    return origin_footnote(origins_of(runs))


def shown(value: float, form: str, unknown: str = "-") -> str:
    return unknown if np.isnan(value) else format(value, form)


# Chapters


def learning(folder: Path, found: list[Run]) -> Chapter:
    runs = [run for run in found if run.metrics()]
    if not runs:
        return Chapter("Learning curves", "No epoch has ended yet.")
    caption = f"One line per fold, one colour per scale; a tick marks a drop of the learning rate. {origins_note(runs)}".strip()
    return Chapter("Learning curves", figures=[(caption, saved(learning_figure(runs), folder, "learning.png"))])


def erf(folder: Path, runs: list[Run]) -> Chapter:
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
        return Chapter(title, f"{text}Not measured yet:", command("erf", runs[0]))
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
    figures = [(caption, saved(erf_figure(measured), folder, "erf.png"))]
    return Chapter(title, text, tables=[table_of(records, note)], figures=figures)


def gradcam(runs: list[Run]) -> Chapter:
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
            "Grad-CAM", f"{text} Not made yet:".strip(), command("gradcam", runs[0], f" --label {shlex.quote(label)}")
        )
    return Chapter("Grad-CAM", text, figures=figures)


def _why(error: OSError | BadImage) -> str:
    """Without the path."""
    if isinstance(error, OSError):
        return "is a link" if error.errno == errno.ELOOP else error.strerror or "cannot be read"
    return str(error)


def resources(runs: list[Run]) -> Chapter:
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
                "Training images/s": shown(median("images_per_s"), ",.1f"),
                "Waiting for data": "-" if np.isnan(waiting) else f"{100 * waiting:.1f} %",
                "Seconds per epoch": shown(median("seconds"), ",.1f"),
                "Process GiB": shown(memory, ".1f"),
                "torch peak GiB": shown(gpu, ".1f"),
            }
        )
    if not records:
        return Chapter("Time and memory", "No epoch has ended yet.")
    return Chapter(
        "Time and memory", tables=[table_of(records, f"Medians over epochs. {origins_note(runs)}", ["Precision"])]
    )


def configuration(runs: list[Run]) -> Chapter:
    """What all runs share, then where they differ."""
    configs = [
        {name: _words(value) for name, value in (asdict(run.config) | {"weights": origin_of(run)}).items()}
        for run in runs
    ]
    first = configs[0]
    differing = [name for name in first if any(config[name] != first[name] for config in configs)]
    shared = [{"Shared by all runs": name, "Value": first[name]} for name in first if name not in differing]
    tables = [table_of(shared, text=["Value"])]
    if differing:
        own = [{"Run": r.name, **{name: c[name] for name in differing}} for r, c in zip(runs, configs, strict=True)]
        tables.append(table_of(own, text=differing))
    return Chapter("Configuration", tables=tables)


def _words(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
