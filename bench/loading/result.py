"""The result of `cxrfast bench load`: rates and memory come in, tables and a plot go out."""

from dataclasses import dataclass, field
from itertools import cycle
from typing import Any

from matplotlib import colormaps
from matplotlib.figure import Figure

from cxrfast.bench.loading.engines import Engines
from cxrfast.bench.loading.large import Large
from cxrfast.bench.loading.ways import CACHE, HOST, LIMIT
from cxrfast.bench.report import ABSENT, Column, left_out_notes, side_axis, table
from cxrfast.tables import Table

TASKS = {"A": "decode", "B": "decode, rotate by up to 15°, flip"}


@dataclass(frozen=True, kw_only=True)
class LoadingLine:
    """One way of loading, one task, one scale."""

    scale: int
    task: str
    way: str
    rate: float
    """Images/s, median of the rounds."""
    ratio: float
    """Ours / it: median over the rounds of the ratio in a round. Ours is `host`, or `host, cache` among pixels."""
    of_limit: float | None
    """It / the limit of the task."""
    pixels: bool
    """Whether it reads uncompressed pixels."""
    rounds: list[float]


@dataclass(frozen=True, kw_only=True)
class Cold:
    """Passes over all images of a scale, decoding only, images/s; medians of three."""

    scale: int
    images: int
    warm: float
    cold: float
    """Every page of the tars dropped before."""
    cold_block: float
    """The same in block order."""
    cold_unadvised: float
    """The same in the global order, without reading ahead."""


COLD = {
    "px": Column("scale"),
    "images": Column("images", ","),
    "warm": Column("warm", ",.0f"),
    "cold": Column("cold", ",.0f"),
    "cold, block order": Column("cold_block", ",.0f"),
    "cold, no readahead": Column("cold_unadvised", ",.0f"),
}


@dataclass(frozen=True, kw_only=True)
class LoadingResult:
    source: str
    images: dict[int, int]
    """Number of images measured on, by scale."""
    batch: dict[int, int]
    workers: int
    lines: list[LoadingLine]
    left_out: dict[str, str]
    """Ways that do not run here, and what there was no time for, with the reason."""
    what: dict[str, str]
    engines: list[Engines] = field(default_factory=list)
    cold: list[Cold] = field(default_factory=list)
    large: Large | None = None
    provenance: dict[str, Any]

    def tables(self) -> list[Table]:
        found = [self._rates(task, pixels) for pixels in (False, True) for task in TASKS]
        found = [table for table in found if table.rows]
        ways = dict.fromkeys(line.way for line in self.lines)
        notes = "\n".join(left_out_notes(self.left_out))
        found.append(
            Table(
                "The ways",
                ["way", "what it does"],
                [[way, self.what[way]] for way in ways],
                notes,
                text=["what it does"],
            )
        )
        if self.engines:
            found.append(_engines_table(self.engines))
        if self.cold:
            note = "Medians of three passes. Cold: every page of the tars was dropped from the page cache before."
            found.append(table("Cold storage: one pass, decoding only, images/s", COLD, self.cold, note))
        if self.large:
            found.append(_large_table(self.large))
        return found

    def _rates(self, task: str, pixels: bool) -> Table:
        lines = [line for line in self.lines if (line.task, line.pixels) == (task, pixels)]
        at = {(line.way, line.scale): f"{line.rate:,.0f} ({line.ratio:.2f})" for line in lines}
        scales = sorted({line.scale for line in lines})
        ways = dict.fromkeys(line.way for line in sorted(lines, key=lambda line: line.ratio))
        where = self.provenance["gpu"] or f"{self.provenance['processor']}, {self.workers} threads or workers"
        sizes = ", ".join(f"{s} px: {self.images[s]:,} images, batches of {self.batch[s]}" for s in scales)
        return Table(
            f"Task {task}, {TASKS[task]}{', without JPEG' if pixels else ''}: images/s ({CACHE if pixels else HOST} / it), on {where}",
            ["way", *(f"{s} px" for s in scales)],
            [[way, *(at.get((way, s), ABSENT) for s in scales)] for way in ways],
            f"Medians of the rounds; ratios are taken round by round. {sizes}. All in the page cache.",
        )

    def plot(self) -> Figure | None:
        """Share of the limit by scale, one line per way with JPEGs, one panel per task; None where it was not measured."""
        if all(line.of_limit is None for line in self.lines):
            return None
        figure = Figure(figsize=(10, 4), layout="constrained")
        panels = figure.subplots(1, len(TASKS), sharey=True)
        colours = dict(zip(dict.fromkeys(line.way for line in self.lines), cycle(colormaps["tab20"](range(20)))))
        for axes, task in zip(panels, TASKS, strict=True):
            lines = [line for line in self.lines if line.task == task and line.of_limit and line.way != LIMIT]
            for way in dict.fromkeys(line.way for line in lines):
                mine = [line for line in lines if line.way == way]
                style = {"color": "black", "linewidth": 2.5} if way == HOST else {"color": colours[way]}
                axes.plot([line.scale for line in mine], [line.of_limit for line in mine], "o-", label=way, **style)
            axes.axhline(1, color="0.6", linestyle=":")
            axes.set(title=f"{task}: {TASKS[task]}", ylim=(0, None))
            side_axis(axes, sorted({line.scale for line in self.lines}))
        panels[0].set_ylabel("images/s / bare kernels' images/s")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
        return figure


def _engines_table(engines: list[Engines]) -> Table:
    """What differs between machines with a GPU; see `compare_engines`."""
    return Table(
        "The engines side by side",
        [
            "px",
            "task",
            "host/s",
            *(f"dali/s, hardware {name}" for name in engines[0].dali["A"]),
            "within 1",
            "within 4",
            "largest",
            "GPU GiB",
        ],
        [
            [
                str(e.scale),
                task,
                f"{e.host[task]:,.0f}",
                *(f"{rate:,.0f}" for rate in e.dali[task].values()),
                f"{e.within_1:.5%}",
                f"{e.within_4:.5%}",
                str(e.largest),
                "-" if e.gpu_bytes is None else f"{e.gpu_bytes / 2**30:.2f}",
            ]
            for e in engines
            for task in TASKS
        ],
        "hardware: hw_decoder_load, the share of a batch that a GPU's JPEG engines get. within: share of the pixels that stay in "
        "the image whose grey levels differ by at most 1 or 4 between the engines, over "
        f"{engines[0].images} rotated images.",
    )


def _large_table(found: Large) -> Table:
    mb = [f"{n / 1e6:,.1f}" for n in found.anonymous]
    return Table(
        f"A set of {found.rows:,} rows in {found.shards} shards",
        ["order, ms", "block order, ms", "draws, ms", "opening, s", "resident then, MB", "anonymous MB by tenths"],
        [
            [
                f"{found.order_ms:.1f}",
                f"{found.block_ms:.1f}",
                f"{found.draws_ms:.1f}",
                f"{found.open_seconds:.2f}",
                f"{found.open_resident / 1e6:,.0f}",
                " ".join(mb),
            ]
        ],
        "Tiny images. Medians of five. Memory: after each tenth of "
        f"{found.images:,} images, rotated by the host engine.",
    )
