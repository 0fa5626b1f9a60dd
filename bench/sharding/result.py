"""The result of `cxrfast bench shard`: rates, times and memory come in, tables and a plot go out."""

from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure

from cxrfast.bench.data import MIMIC_IMAGES
from cxrfast.bench.report import Column, left_out_notes, table
from cxrfast.bench.sharding.measure import Memory
from cxrfast.bench.sharding.peers import WHAT
from cxrfast.tables import Table


@dataclass(frozen=True, kw_only=True)
class Builds:
    """Whole builds with a number of workers; medians of the rounds."""

    workers: int
    images: int
    rate: float
    """Images/s from the end of the plan to the last manifest; the estimate before has started the workers."""
    ratio: float
    """Rate / the rate of one worker, round by round."""
    work_seconds: float
    seconds: float
    """The whole call, including tables, plan, estimate and checksums."""


@dataclass(frozen=True, kw_only=True)
class Computed:
    """What all of MIMIC-CXR-JPG would take on a number of cores. Not measured."""

    cores: int
    rate: float
    hours: float
    read_mb: float
    """MB/s from the source tree that the rate needs."""
    written_mb: float
    """MB/s to the shard set that it needs."""


BUILDS = {
    "workers": Column("workers"),
    "images": Column("images", ","),
    "images/s at work": Column("rate", ",.1f"),
    "/ one worker": Column("ratio", ".2f"),
    "seconds at work": Column("work_seconds", ".1f"),
    "seconds in all": Column("seconds", ".1f"),
}

MEMORY = {
    "rows": Column("rows", ","),
    "of full size": Column("full_size", ","),
    "workers": Column("workers"),
    "worker RSS": Column("worker_rss", ",.0f", 1e6),
    "worker USS": Column("worker_uss", ",.0f", 1e6),
    "parent RSS": Column("parent_rss", ",.0f", 1e6),
    "parent USS": Column("parent_uss", ",.0f", 1e6),
}

COMPUTED = {
    "cores": Column("cores"),
    "images/s": Column("rate", ",.0f"),
    "hours": Column("hours", ",.2f"),
    "read MB/s": Column("read_mb", ",.0f"),
    "written MB/s": Column("written_mb", ",.0f"),
}


@dataclass(frozen=True, kw_only=True)
class ShardingResult:
    source: str
    images: int
    mean_bytes: float
    mean_pixels: float
    scales: list[int]
    shard_rows: int
    """Rows per shard of `ours`."""
    rates: dict[str, float]
    """Images/s per core, medians of the rounds."""
    ratios: dict[str, float]
    """Ours / theirs: median over the rounds of the ratio in a round."""
    rounds: dict[str, list[float]]
    stages: dict[str, float]
    """ms per image within `ours`, medians of the rounds."""
    builds: list[Builds]
    startup_seconds: float
    """Until a new worker has done an empty task."""
    written_bytes: float
    """Per image, over all scales."""
    computed: list[Computed]
    memory: list[Memory]
    left_out: dict[str, str]
    """Peers that do not run here, and why."""
    provenance: dict[str, Any]

    def tables(self) -> list[Table]:
        sides = ", ".join(map(str, self.scales))
        found = [
            Table(
                f"Sharding at {sides} px, on one core ({self.provenance['processor']})",
                ["way", "images/s", "ms per image", "ours / it", "what it does"],
                [
                    [name, f"{rate:,.1f}", f"{1e3 / rate:,.1f}", f"{self.ratios.get(name, 1):.2f}", WHAT[name]]
                    for name, rate in self.rates.items()
                ],
                f"{self.images} {self.source}, {self.mean_bytes / 1e6:.2f} MB and {self.mean_pixels / 1e6:.1f} Mpx on average, "
                f"from the page cache. Ours writes shards of {self.shard_rows:,} rows and waits until they are on the disk; the "
                "others do not wait. draft decodes at a half or less only where the largest scale is at most half of the "
                + "\n".join(["image's shorter side.", *left_out_notes(self.left_out)]),
                text=["what it does"],
            ),
            Table(
                "Where ours spends its time",
                [*self.stages, "sum"],
                [[f"{ms:.1f} ms" for ms in (*self.stages.values(), sum(self.stages.values()))]],
                "Per image; medians of the rounds. sync: fsync of tars, indexes, manifests and folders.",
            ),
            table(
                "Whole builds",
                BUILDS,
                self.builds,
                f"At work: from the end of the plan to the last manifest. In all: tables, plan, the start of the workers "
                f"({self.startup_seconds:.1f} s for one), estimate and checksums too.",
            ),
        ]
        if self.memory:
            note = "Values of the largest worker. RSS counts shared libraries in every process; USS does not."
            found.append(table("Peak memory of a build, MB", MEMORY, self.memory, note))
        found.append(
            table(
                f"Computed, not measured: all {MIMIC_IMAGES:,} images of MIMIC-CXR-JPG",
                COMPUTED,
                self.computed,
                f"Cores × the rate of a worker while {self.builds[-1].workers} are at work. Assumes that MIMIC's images are like "
                f"those measured ({self.mean_bytes / 1e6:.2f} MB, {self.mean_pixels / 1e6:.1f} Mpx), that more cores do not slow "
                "each other down and that the storage reads and writes as many MB/s as the table says.",
            )
        )
        return found

    def plot(self) -> Figure:
        """Images/s per core of each way with ours / theirs, and where ours spends its time."""
        figure = Figure(figsize=(9, 3.4), layout="constrained")
        ways, spent = figure.subplots(1, 2, width_ratios=(3, 2))
        rates = dict(sorted(self.rates.items(), key=lambda pair: pair[1]))
        bars = ways.barh(
            list(rates), list(rates.values()), color=["C0" if name == "ours" else "0.75" for name in rates]
        )
        compared = {name: f"  (ours {ratio:.2f}×)" for name, ratio in self.ratios.items()}
        ways.bar_label(bars, [f"{rate:,.1f}{compared.get(name, '')}" for name, rate in rates.items()], padding=3)
        ways.set(xlabel="images/s per core", xlim=(0, 1.6 * max(rates.values())))
        stages = dict(reversed(self.stages.items()))
        spent.bar_label(spent.barh(list(stages), list(stages.values()), color="C0"), fmt="%.1f", padding=3)
        spent.set(xlabel="ms per image of ours", xlim=(0, 1.2 * max(stages.values())))
        for axes in (ways, spent):
            axes.spines[["top", "right"]].set_visible(False)
        figure.suptitle(f"Sharding at {', '.join(map(str, self.scales))} px; {self.mean_bytes / 1e6:.2f} MB per image")
        return figure
