"""Progress of the runs in a folder: one line per run, from the small files that a training keeps up to date.

Read-only; imports neither torch nor pandas; takes what it can from files that are old, unfinished or damaged.
"""

import json
import re
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cxrfast.errors import RunError
from cxrfast.files import read_file
from cxrfast.runs.folder import LARGEST_TEXT, RunFolder
from cxrfast.tables import Cell, Table
from cxrfast.units import duration

SILENT_SECONDS = 300
"""Age of the last heartbeat above which a run is not called running; a training writes one every minute."""

STYLES = {"running": "green", "silent": "bold red", "failed": "bold red", "damaged": "bold red", "preempted": "yellow"}


@dataclass(frozen=True, kw_only=True)
class Status:
    """One run according to its files; None for what they do not contain."""

    name: str
    """`densenet121-2048/fold-0`"""
    folder: str
    state: str
    """not started, running, silent, preempted, done, failed or damaged."""
    epoch: int | None = None
    """Finished epochs."""
    epochs: int | None = None
    """Maximum number of epochs."""
    val_auroc: float | None = None
    """Mean over findings on the validation rows, in the epoch of the lowest validation loss; another may have a higher one."""
    images_per_s: float | None = None
    eta_seconds: float | None = None
    """Until `epochs` are done, from the last heartbeat."""
    heartbeat_seconds: float | None = None
    """Age of the last heartbeat."""
    job: str | None = None
    """SLURM's job number."""
    note: str = ""
    """Why it failed, or which file is damaged."""


def status(runs: Path, now: float | None = None) -> list[Status]:
    """The status of every run below `runs`, by name, scale and fold; `now`: unix seconds, default the clock's.

    Raises RunError if there is no run. A damaged file marks its run as damaged and is never an error.
    """
    found = RunFolder.below(runs)
    if not found:
        raise RunError(RunFolder.none_below(runs))
    return [read_status(run, time.time() if now is None else now) for run in sorted(found, key=_natural)]


def _natural(run: RunFolder) -> list[Any]:
    """Sorts 256 before 1024."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", str(run.folder))]


def read_status(run: RunFolder, now: float) -> Status:
    """The status of a run at `now`, unix seconds."""
    damaged: list[str] = []

    def read(path: Path) -> dict[str, Any]:
        try:
            value = _json_object(read_file(path, LARGEST_TEXT))
        except FileNotFoundError:
            return {}
        except OSError:
            value = None
        if value is None:
            damaged.append(f"{path.name} is damaged")
        return value or {}

    config, state, lines = read(run.config_path).get("config"), read(run.state_path), read_metrics(run)
    heartbeat = number(state.get("time"))
    age = None if heartbeat is None else max(0.0, now - heartbeat)  # clocks of two machines differ
    shown = "damaged" if damaged else str(state.get("state") or "not started")
    if shown == "running" and (age is None or age > SILENT_SECONDS):
        shown = "silent"
    rate, epoch, epochs = (number(state.get(name)) for name in ("images_per_s", "epoch", "epochs"))
    if epochs is None and isinstance(config, dict):
        epochs = number(config.get("epochs"))
    return Status(
        name=run.name,
        folder=str(run.folder),
        state=shown,
        epoch=len(lines) if epoch is None else int(epoch),
        epochs=None if epochs is None else int(epochs),
        val_auroc=auroc_at_lowest_loss(lines),
        images_per_s=number(lines[-1].get("images_per_s")) if rate is None and lines else rate,
        eta_seconds=None if shown == "done" else number(state.get("eta_seconds")),
        heartbeat_seconds=age,
        job=None if state.get("job") is None else str(state["job"]),
        note="; ".join([*damaged, *([str(state["error"])] if state.get("error") else [])]),
    )


def _json_object(text: bytes) -> dict[str, Any] | None:
    """None if the text is not a JSON object."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):  # the latter of brackets by the thousand
        return None
    return value if isinstance(value, dict) else None


def read_metrics(run: RunFolder) -> list[dict[str, Any]]:
    """The readable lines of a run's metrics, one dict per epoch, oldest first."""
    try:
        texts = read_file(run.metrics_path, LARGEST_TEXT).splitlines()
    except OSError:
        return []
    return [line for line in map(_json_object, texts) if line is not None]


def auroc_at_lowest_loss(lines: list[dict[str, Any]]) -> float | None:
    """`val_auroc` of the line with the lowest `val_loss`, which may not be the highest; None if there is none or it is
    undefined."""
    scored = [line for line in lines if number(line.get("val_loss")) is not None]
    return number(min(scored, key=lambda line: line["val_loss"]).get("val_auroc")) if scored else None


LARGEST = 1e300
"""Largest number that is taken for one: whole numbers in JSON have no end, and arithmetic with larger ones overflows."""


def number(value: Any) -> float | None:
    """`value` if it is a finite number, else None."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST
    return value if is_number else None


def to_json(lines: list[Status]) -> str:
    """A JSON list of objects with the fields of Status."""
    return json.dumps([asdict(line) for line in lines], indent=2)


def status_table(lines: list[Status], runs: Path) -> Table:
    counts = {state: sum(line.state == state for line in lines) for state in dict.fromkeys(s.state for s in lines)}
    noted = any(line.note for line in lines)
    head = ["run", "state", "epoch", "AUROC at\nlowest loss", "images/s", "time\nleft", "heart-\nbeat", "job"]
    rows: list[list[str | Cell]] = [
        [
            line.name,
            Cell(line.state, STYLES.get(line.state, "")),
            "" if line.epoch is None else f"{line.epoch}/{'?' if line.epochs is None else line.epochs}",
            "" if line.val_auroc is None else f"{line.val_auroc:.4f}",
            "" if line.images_per_s is None else f"{line.images_per_s:,.0f}",
            "" if line.eta_seconds is None else duration(line.eta_seconds),
            "" if line.heartbeat_seconds is None else duration(line.heartbeat_seconds),
            line.job or "",
            *([line.note] if noted else []),
        ]
        for line in lines
    ]
    title = f"{runs}: {', '.join(f'{n} {state}' for state, n in counts.items())}"
    return Table(title, [*head, *(["note"] if noted else [])], rows, text=["state", "note"])
