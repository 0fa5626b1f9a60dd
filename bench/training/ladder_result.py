"""The results of `cxrfast bench ladder`: rates and memory come in, tables and a plot go out."""

from dataclasses import dataclass, field
from typing import Any

from matplotlib.figure import Figure

from cxrfast.bench.harness import (
    Measured,
)
from cxrfast.bench.training.ladder_measure import ARCH, KINDS, RUNGS
from cxrfast.tables import Table

H200_BANDWIDTH = 4.8e12
"""Bytes/s, NVIDIA's data sheet."""


MOVED = {256: (841, 585), 512: (3_364, 2_340), 1024: (13_457, 9_362), 2048: (53_828, 37_447)}
"""MB that a step of densenet121 in bf16 moves an image, eager and at best compiled; computed, by scale."""


@dataclass(frozen=True, kw_only=True)
class LadderLine:
    """One rung at one scale; None for what was not, or could not be, measured."""

    scale: int
    rung: str
    """Its name."""
    micro_batch: int
    rounds: list[float] | None = None
    """Training, images/s."""
    ratio: float | None = None
    """To the first rung, round by round where they were timed in turn."""
    peak_bytes: int | None = None
    """During a step: of torch's allocator on a GPU, of the whole process on a CPU."""
    gpu_used_bytes: int | None = None
    """GPU memory in use after a step, as the driver reports it: all of the process, and other processes; None on a CPU."""
    saved_bytes: int | None = None
    """That autograd keeps between forward and backward for each image; of rungs that are not compiled."""
    largest: int | None = None
    """Micro-batch that fits, its double does not; on a GPU, of rungs that are not compiled."""
    bound: float | None = None
    """Rate / what an H200's memory bandwidth allows (MOVED); on an H200."""
    kinds: dict[str, float] | None = None
    """Device time of an image by kind of kernel, µs; at the largest scale, if asked for."""
    failed: str | None = None

    @property
    def rate(self) -> float | None:
        """Median of the rounds, images/s."""
        return Measured(self.rounds).median if self.rounds else None


@dataclass(frozen=True)
class LadderResult:
    lines: list[LadderLine]
    provenance: dict[str, Any]
    what: dict[str, str]
    """The rungs by name."""
    left_out: dict[str, str] = field(default_factory=dict)
    """What there was no time for, and what to do."""


def bound(line: LadderLine, gpu: str | None) -> float | None:
    """The rate as a share of what an H200's bandwidth allows for an eager or a compiled step in bf16."""
    if line.rate is None or "H200" not in (gpu or "") or line.scale not in MOVED:
        return None
    eager, compiled = MOVED[line.scale]
    is_compiled = any(rung.compile for rung in RUNGS if rung.name == line.rung)
    moved = compiled if is_compiled else eager
    return line.rate * moved * 1e6 / H200_BANDWIDTH


ABSENT = "-"
"""Cell of a figure that was not, or could not be, measured."""


NOTES = {
    "images/s": "a training step of a batch that is on the device already: median of the rounds",
    "× first": "ratio to the first rung, round by round",
    "peak GiB": "of a step, in a process of its own: torch's allocator on a GPU, the whole process on a CPU",
    "GPU GiB": "in use after a step, as the driver reports it: the whole process, and other ones",
    "saved MiB": "an image: what autograd keeps between forward and backward",
    "largest": "micro-batch that fits, and its double does not",
    "of H200": f"rate / {H200_BANDWIDTH / 1e12} TB/s over the bytes that an eager or a compiled step in bf16 moves",
}


def tables(result: LadderResult) -> list[Table]:
    """Rates and memory of every rung; what the rungs are; time by kind of kernel where it was taken."""
    found = [
        _rates_and_memory(result),
        Table(
            "The rungs",
            ["rung", "what it does"],
            [[rung, what] for rung, what in result.what.items()],
            text=["what it does"],
        ),
    ]
    profiled = {line.rung: line.kinds for line in result.lines if line.kinds}
    if profiled:
        found.append(_time_by_kind(profiled, result.lines[-1].scale))
    return found


def _rates_and_memory(result: LadderResult) -> Table:
    """One line per rung and scale. A column that no line has a figure for is left out, and so is its note."""
    lines = result.lines
    columns = {
        "rung": [line.rung for line in lines],
        "px": [str(line.scale) for line in lines],
        "micro-batch": [str(line.micro_batch) for line in lines],
        "images/s": [_cell(line.rate, ",.1f") for line in lines],
        "× first": [_cell(line.ratio, ".2f") for line in lines],
        "peak GiB": [_cell(line.peak_bytes, ".2f", 2**30) for line in lines],
        "GPU GiB": [_cell(line.gpu_used_bytes, ".2f", 2**30) for line in lines],
        "saved MiB": [_cell(line.saved_bytes, ",.1f", 2**20) for line in lines],
        "largest": [_cell(line.largest, ".0f") for line in lines],
        "of H200": [_cell(line.bound, ".2f") for line in lines],
    }
    columns = {name: cells for name, cells in columns.items() if set(cells) != {ABSENT}}
    notes = [
        *(f"{name}: {note}." for name, note in NOTES.items() if name in columns),
        *(f"{line.rung}, {line.scale} px: {line.failed}" for line in lines if line.failed),
        *(f"Left out: {what} ({why})." for what, why in result.left_out.items()),
    ]
    where = result.provenance["gpu"] or f"{result.provenance['processor']}, {result.provenance['cores']} cores"
    return Table(
        f"Ladder of training {ARCH} ({where})",
        list(columns),
        [list(cells) for cells in zip(*columns.values(), strict=True)],
        "\n".join(notes),
    )


def _cell(value: float | None, form: str, unit: int = 1) -> str:
    return ABSENT if value is None else format(value / unit, form)


def _time_by_kind(profiled: dict[str, dict[str, float]], scale: int) -> Table:
    """`profiled`: rung → kind of kernel → µs an image."""
    kinds = [*KINDS, "other"]
    return Table(
        f"Time by kind of kernel, µs an image, at {scale} px",
        ["rung", *kinds],
        [[rung, *(f"{times[kind]:,.0f}" for kind in kinds)] for rung, times in profiled.items()],
        "Summed over kernels, which may overlap; Triton's: see KINDS.",
    )


def plot(result: LadderResult) -> Figure:
    """Rates as ratios to the first rung's, one line per scale."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots()
    rungs = list(dict.fromkeys(line.rung for line in result.lines))
    for scale in dict.fromkeys(line.scale for line in result.lines):
        ratios = [line.ratio for line in result.lines if line.scale == scale]
        axes.plot(range(len(rungs)), [float("nan") if r is None else r for r in ratios], "o-", label=f"{scale} px")
    axes.set_xticks(range(len(rungs)), rungs, fontsize=8)
    axes.set(ylabel="training, images/s,\n× the first rung's", ylim=(0, None))
    axes.legend(frameon=False)
    return figure
