"""The results of `cxrfast bench shard`: rates, times and memory come in, tables and a plot go out."""

from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure

from cxrfast.bench.data import MIMIC_IMAGES
from cxrfast.bench.sharding.measure import Memory
from cxrfast.bench.sharding.peers import WHAT
from cxrfast.tables import Table


@dataclass(frozen=True, kw_only=True)
class Builds:
    """Whole builds with so many workers; medians of the rounds."""

    workers: int
    images: int
    rate: float
    """Images/s from the end of the plan to the last manifest; the workers were started for the estimate before."""
    ratio: float
    """Rate / that of one worker, round by round."""
    work_seconds: float
    seconds: float
    """The whole call: tables, plan, estimate and checksums too."""


@dataclass(frozen=True, kw_only=True)
class Computed:
    """What all of MIMIC-CXR-JPG would take. Not measured."""

    cores: int
    rate: float
    hours: float
    read_mb: float
    """MB/s from the source tree that the rate needs."""
    written_mb: float
    """MB/s to the shard set that it needs."""


@dataclass(frozen=True, kw_only=True)
class ShardingResult:
    source: str
    images: int
    mean_bytes: float
    mean_pixels: float
    scales: list[int]
    shard_rows: int
    """Rows of a shard of `ours`."""
    rates: dict[str, float]
    """Images/s and core, medians of the rounds."""
    ratios: dict[str, float]
    """Ours / theirs: medians over the rounds of the ratio in a round."""
    rounds: dict[str, list[float]]
    stages: dict[str, float]
    """ms an image within `ours`, medians of the rounds."""
    builds: list[Builds]
    startup_seconds: float
    """From nothing to a worker that has done an empty task."""
    written_bytes: float
    """An image, over all scales."""
    computed: list[Computed]
    memory: list[Memory]
    left_out: dict[str, str]
    """What could not be compared with, and why."""
    provenance: dict[str, Any]


def tables(result: ShardingResult) -> list[Table]:
    """Everything that is printed."""
    r = result
    sides = ", ".join(map(str, r.scales))
    found = [
        Table(
            f"Sharding at {sides} px, on one core ({r.provenance['processor']})",
            ["way", "images/s", "ms an image", "ours / it", "what it does"],
            [
                [name, f"{rate:,.1f}", f"{1e3 / rate:,.1f}", f"{r.ratios.get(name, 1):.2f}", WHAT[name]]
                for name, rate in r.rates.items()
            ],
            f"{r.images} {r.source}, {r.mean_bytes / 1e6:.2f} MB and {r.mean_pixels / 1e6:.1f} Mpx on average, from the page "
            f"cache. Ours writes shards of {r.shard_rows:,} rows and waits until they are on the disk; the others do not wait. "
            "draft decodes at a half or less only where the largest scale is at most half of the image's shorter side."
            + "".join(f" Left out: {name} ({why})." for name, why in r.left_out.items()),
            text=["what it does"],
        ),
        Table(
            "Where ours spends its time",
            [*r.stages, "sum"],
            [[f"{ms:.1f} ms" for ms in (*r.stages.values(), sum(r.stages.values()))]],
            "an image; medians of the rounds. sync: fsync of tars, indexes, manifests and folders.",
        ),
        Table(
            "Whole builds",
            ["workers", "images", "images/s at work", "/ one worker", "seconds at work", "seconds in all"],
            [
                [
                    str(b.workers),
                    f"{b.images:,}",
                    f"{b.rate:,.1f}",
                    f"{b.ratio:.2f}",
                    f"{b.work_seconds:.1f}",
                    f"{b.seconds:.1f}",
                ]
                for b in r.builds
            ],
            f"At work: from the end of the plan to the last manifest. In all: tables, plan, the start of the workers "
            f"({r.startup_seconds:.1f} s for one), estimate and checksums too.",
        ),
    ]
    if r.memory:
        found.append(_memory_table(r.memory))
    return [*found, _computed_table(r)]


def _memory_table(memory: list[Memory]) -> Table:
    def mb(n: int) -> str:
        return f"{n / 1e6:,.0f}"

    return Table(
        "Peak memory of a build, MB",
        ["rows", "of full size", "workers", "worker RSS", "worker USS", "parent RSS", "parent USS"],
        [
            [
                f"{m.rows:,}",
                f"{m.full_size:,}",
                str(m.workers),
                mb(m.worker_rss),
                mb(m.worker_uss),
                mb(m.parent_rss),
                mb(m.parent_uss),
            ]
            for m in memory
        ],
        "Of the largest worker. RSS counts libraries that processes share for each of them; USS leaves them out.",
    )


def _computed_table(r: ShardingResult) -> Table:
    return Table(
        f"Computed, not measured: all {MIMIC_IMAGES:,} images of MIMIC-CXR-JPG",
        ["cores", "images/s", "hours", "read MB/s", "written MB/s"],
        [
            [f"{c.cores}", f"{c.rate:,.0f}", f"{c.hours:,.2f}", f"{c.read_mb:,.0f}", f"{c.written_mb:,.0f}"]
            for c in r.computed
        ],
        f"Cores × the rate of a worker while {r.builds[-1].workers} are at work. Assumes that MIMIC's images are like those "
        f"measured ({r.mean_bytes / 1e6:.2f} MB, {r.mean_pixels / 1e6:.1f} Mpx), that more cores do not slow each other down and "
        "that the storage reads and writes as many MB/s as the table says.",
    )


def plot(result: ShardingResult) -> Figure:
    """Images/s and core of each way with ours / theirs, and where ours spends its time."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    ways, spent = figure.subplots(1, 2, width_ratios=(3, 2))
    names = sorted(result.rates, key=lambda name: result.rates[name])
    rates = [result.rates[name] for name in names]
    bars = ways.barh(names, rates, color=["C0" if name == "ours" else "0.75" for name in names])
    ways.bar_label(
        bars,
        [
            f"{rate:,.1f}" + (f"  (ours {result.ratios[n]:.2f}×)" if n != "ours" else "")
            for n, rate in zip(names, rates, strict=True)
        ],
        padding=3,
    )
    ways.set(xlabel="images/s and core", xlim=(0, 1.6 * max(rates)))
    stages = list(result.stages)[::-1]
    times = [result.stages[name] for name in stages]
    spent.bar_label(spent.barh(stages, times, color="C0"), fmt="%.1f", padding=3)
    spent.set(xlabel="ms an image of ours", xlim=(0, 1.2 * max(times)))
    for axes in (ways, spent):
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"Sharding at {', '.join(map(str, result.scales))} px; {result.mean_bytes / 1e6:.2f} MB an image")
    return figure
