"""The result of `cxrfast bench ladder`: rates and memory come in, tables and a plot go out."""

from dataclasses import dataclass, field
from typing import Any

from matplotlib.figure import Figure

from cxrfast.bench.harness import Measured
from cxrfast.bench.report import Column, left_out_notes, table, where
from cxrfast.bench.training.ladder_measure import ARCH, KINDS, RUNGS
from cxrfast.tables import Table

H200_BANDWIDTH = 4.8e12
"""Bytes/s, NVIDIA's data sheet."""


MOVED = {256: (841, 585), 512: (3_364, 2_340), 1024: (13_457, 9_362), 2048: (53_828, 37_447)}
"""MB per image that a step of densenet121 in bf16 moves, eager and at best compiled; computed, by scale."""


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
    """Rate / the first rung's, round by round where they took turns."""
    peak_bytes: int | None = None
    """During a step: torch's allocator on a GPU, the whole process on a CPU."""
    gpu_used_bytes: int | None = None
    """GPU memory in use after a step by all processes, as the driver reports it; None on a CPU."""
    saved_bytes: int | None = None
    """Kept by autograd per image between forward and backward; only of rungs that are not compiled."""
    largest: int | None = None
    """Micro-batch that fits while its double does not; on a GPU, of rungs that are not compiled."""
    bound: float | None = None
    """Rate / what an H200's memory bandwidth allows (MOVED); on an H200."""
    kinds: dict[str, float] | None = None
    """Device time by kind of kernel, µs per image; at the largest scale, with --profile."""
    failed: str | None = None

    @property
    def rate(self) -> float | None:
        """Median of the rounds, images/s."""
        return Measured(self.rounds).median if self.rounds else None


def bound(line: LadderLine, gpu: str | None) -> float | None:
    """The rate as a fraction of what an H200's bandwidth allows for an eager or a compiled step in bf16."""
    if line.rate is None or "H200" not in (gpu or "") or line.scale not in MOVED:
        return None
    eager, compiled = MOVED[line.scale]
    is_compiled = any(rung.compile for rung in RUNGS if rung.name == line.rung)
    moved = compiled if is_compiled else eager
    return line.rate * moved * 1e6 / H200_BANDWIDTH


COLUMNS = {
    "rung": Column("rung"),
    "px": Column("scale"),
    "micro-batch": Column("micro_batch"),
    "images/s": Column(
        "rate", ",.1f", note="a training step of a batch that is on the device already: median of the rounds"
    ),
    "× first": Column("ratio", ".2f", note="ratio to the first rung, round by round"),
    "peak GiB": Column(
        "peak_bytes",
        ".2f",
        2**30,
        "of a step, in its own process: torch's allocator on a GPU, the whole process on a CPU",
    ),
    "GPU GiB": Column(
        "gpu_used_bytes",
        ".2f",
        2**30,
        "in use after a step, as the driver reports it: the whole process, and other ones",
    ),
    "saved MiB": Column("saved_bytes", ",.1f", 2**20, "per image: what autograd keeps between forward and backward"),
    "largest": Column("largest", note="micro-batch that fits, while its double does not"),
    "of H200": Column(
        "bound",
        ".2f",
        note=f"rate / {H200_BANDWIDTH / 1e12} TB/s over the bytes that an eager or a compiled step in bf16 moves",
    ),
}


@dataclass(frozen=True)
class LadderResult:
    lines: list[LadderLine]
    provenance: dict[str, Any]
    what: dict[str, str]
    """The rungs by name."""
    left_out: dict[str, str] = field(default_factory=dict)
    """What there was no time for, and what to do."""

    def tables(self) -> list[Table]:
        """Rates and memory of every rung; what the rungs are; time by kind of kernel where it was measured."""
        failed = [f"{line.rung}, {line.scale} px: {line.failed}" for line in self.lines if line.failed]
        notes = "\n".join(failed + left_out_notes(self.left_out))
        found = [
            table(f"Ladder of training {ARCH} ({where(self.provenance)})", COLUMNS, self.lines, notes),
            Table("The rungs", ["rung", "what it does"], list(self.what.items()), text=["what it does"]),
        ]
        if profiled := {line.rung: line.kinds for line in self.lines if line.kinds}:
            title = f"Time by kind of kernel, µs per image, at {self.lines[-1].scale} px"
            kinds = [*KINDS, "other"]
            rows = [[rung, *(f"{times[kind]:,.0f}" for kind in kinds)] for rung, times in profiled.items()]
            note = "Summed over kernels, which may overlap; Triton's: see KINDS."
            found.append(Table(title, ["rung", *kinds], rows, note))
        return found

    def plot(self) -> Figure:
        """Rates as ratios to the first rung's, one line per scale."""
        figure = Figure(figsize=(9, 4), layout="constrained")
        axes = figure.subplots()
        rungs = list(dict.fromkeys(line.rung for line in self.lines))
        for scale in dict.fromkeys(line.scale for line in self.lines):
            ratios = [line.ratio for line in self.lines if line.scale == scale]
            axes.plot(range(len(rungs)), [float("nan") if r is None else r for r in ratios], "o-", label=f"{scale} px")
        axes.set_xticks(range(len(rungs)), rungs, fontsize=8)
        highest = max((line.ratio for line in self.lines if line.ratio), default=1.0)
        axes.set(ylabel="training, images/s,\n× the first rung's", ylim=(0, 1.1 * highest))
        axes.legend(frameon=False)
        return figure
