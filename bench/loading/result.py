"""The result of `cxrfast bench load`: rates and memory come in, tables and a plot go out."""

from dataclasses import dataclass, field
from itertools import cycle
from typing import Any

from matplotlib import colormaps
from matplotlib.figure import Figure

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


COLD = {
    "px": Column("scale"),
    "images": Column("images", ","),
    "warm": Column("warm", ",.0f"),
    "cold": Column("cold", ",.0f"),
    "cold, block order": Column("cold_block", ",.0f"),
    "cold, no readahead": Column("cold_unadvised", ",.0f"),  # in the global order
}

LARGE = {
    "order, ms": Column("order_ms", ".1f"),
    "block order, ms": Column("block_ms", ".1f"),
    "draws, ms": Column("draws_ms", ".1f"),
    "opening, s": Column("open_seconds", ".2f"),
    "resident then, MB": Column("open_resident", ",.0f", 1e6),
    "anonymous MB by tenths": Column("anonymous", ",.1f", 1e6),
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
    engines: list[dict[str, Any]] = field(default_factory=list)
    """By scale, see `compare_engines`."""
    cold: list[dict[str, Any]] = field(default_factory=list)
    """Images/s by scale."""
    large: dict[str, Any] | None = None
    """See `large`."""
    provenance: dict[str, Any]

    def tables(self) -> list[Table]:
        found = [self._rates(task, pixels) for pixels in (False, True) for task in TASKS]
        found = [table for table in found if table.rows]
        ways = [(way, self.what[way]) for way in dict.fromkeys(line.way for line in self.lines)]
        notes = "\n".join(left_out_notes(self.left_out))
        found.append(Table("The ways", ["way", "what it does"], ways, notes, text=["what it does"]))
        if self.engines:
            found.append(_engines_table(self.engines))
        if self.cold:
            note = "Medians of three passes. Cold: every page of the tars was dropped from the page cache before."
            found.append(table("Cold storage: one pass, decoding only, images/s", COLD, self.cold, note))
        if found_large := self.large:
            title = f"A set of {found_large['rows']:,} rows in {found_large['shards']} shards"
            note = f"each tenth of {found_large['images']:,} images, rotated by the host engine."
            note = f"Tiny images. Medians of five. Memory: after {note}"
            found.append(table(title, LARGE, [found_large], note))
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


def _engines_table(engines: list[dict[str, Any]]) -> Table:
    """What differs between machines with a GPU; see `compare_engines`."""
    dali = [f"dali/s, hardware {name}" for name in engines[0]["dali"]["A"]]
    return Table(
        "The engines side by side",
        ["px", "task", "host/s", *dali, "within 1", "within 4", "largest", "GPU GiB"],
        [
            [
                str(e["scale"]),
                task,
                f"{e['host'][task]:,.0f}",
                *(f"{rate:,.0f}" for rate in e["dali"][task].values()),
                f"{e['within_1']:.5%}",
                f"{e['within_4']:.5%}",
                str(e["largest"]),
                ABSENT if e["gpu_bytes"] is None else f"{e['gpu_bytes'] / 2**30:.2f}",
            ]
            for e in engines
            for task in TASKS
        ],
        "hardware: hw_decoder_load, the share of a batch that a GPU's JPEG engines get. within: share of the pixels that stay in "
        "the image whose grey levels differ by at most 1 or 4 between the engines, over "
        f"{engines[0]['images']} rotated images.",
    )
