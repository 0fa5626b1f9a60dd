"""`cxrfast bench shard`: images/s per core of sharding, compared with what users do instead; its scaling and memory.

Radiographs come in, drawn on the spot or copied from a tree; tables, JSON and a plot go out. All rates are measured in
turns in one run, so that ratios hold whatever the machine does meanwhile; computed figures say so. The given tree is only
read.
"""

import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import torch
from matplotlib.figure import Figure

from cxrfast.bench.data import MIMIC_IMAGES, sample
from cxrfast.bench.harness import Measured, file_system, interleave, provenance
from cxrfast.bench.report import Column, left_out_notes, table, write_results
from cxrfast.bench.sharding.measure import (
    WHAT,
    Notes,
    build_name,
    measurements,
    memory,
    peer_versions,
    peers,
    prepare,
    shard_rows,
    startup_seconds,
)
from cxrfast.machine import usable_cores
from cxrfast.phantoms.dataset import synth
from cxrfast.shards.building.layout import check_scales
from cxrfast.shards.images.decode import decode
from cxrfast.shards.storage import Tree
from cxrfast.tables import Table

SCALES = (256, 512, 1024, 2048)

SIZE = 3056
"""Longer side of the phantoms, px. As in MIMIC-CXR-JPG, most are 2500 × 3056, and a file has 1.5 MB on average."""

MEMORY_ROWS = (1_000, 20_000)

CORES = (2, 16, 128)


def bench(
    data: str | None,
    scales: list[int],
    out: Path,
    *,
    images: int = 24,
    seconds: float = 20.0,
    rounds: int = 5,
    workers: int | None = None,
    with_memory: bool = False,
) -> "ShardingResult":
    """Measure for about `seconds` per figure and round, write shard.json, shard.md and shard.png into `out`.

    `data`: a MIMIC-CXR-JPG tree; None: draw phantoms. Raises ShardError for bad input.
    """
    scales = check_scales(scales or list(SCALES))
    cv2.setNumThreads(1)
    with tempfile.TemporaryDirectory(prefix="cxrfast-bench-") as folder:
        scratch = Path(folder)
        if data is None:
            synth(scratch / "phantoms", images=images, size=SIZE)
        (scratch / "images").mkdir()  # on the disk that builds write to
        files = sample(Tree(data or scratch / "phantoms"), scratch / "images", images)
        out.mkdir(parents=True, exist_ok=True)
        setup = prepare(scratch, files, scales, seconds, workers or usable_cores())
        notes: Notes = {}
        others, left_out = peers()
        figures = interleave(measurements(setup, others, notes), seconds, rounds, label="bench shard")
        rates = {name: figures[name] for name in ("ours", *others, "kernels")}
        builds = [_builds(workers, figures, notes, rounds) for workers in sorted({1, setup.workers})]
        stages, last = notes["ours"][-rounds:], notes[build_name(setup.workers)][-1]
        written = last["written_bytes"] / last["images"]
        sizes = [(len(jpeg), decode(jpeg, "none").size) for jpeg in map(Path.read_bytes, files)]
        mean_bytes, mean_pixels = map(statistics.mean, zip(*sizes, strict=True))
        result = ShardingResult(
            source="images of the given tree" if data else f"phantoms of {SIZE} px",
            images=len(files),
            mean_bytes=mean_bytes,
            mean_pixels=mean_pixels,
            written_bytes=written,
            scales=scales,
            shard_rows=shard_rows(setup, seconds),
            rates={name: figure.median for name, figure in rates.items()},
            ratios={name: rates["ours"].ratio(figure) for name, figure in rates.items() if name != "ours"},
            rounds={name: figure.rounds for name, figure in figures.items()},
            stages={name: statistics.median(line[name] for line in stages) for name in stages[0]},
            builds=builds,
            startup_seconds=statistics.median(startup_seconds(setup) for _ in range(rounds)),
            computed=[_compute(builds[-1], cores, mean_bytes, written) for cores in CORES],
            memory=[memory(setup, rows) for rows in MEMORY_ROWS if with_memory],
            left_out=left_out,
            provenance={**provenance(torch.device("cpu")), **peer_versions(), "file_system": file_system(scratch)},
        )
    write_results(out, "shard", result)
    return result


def _builds(workers: int, figures: dict[str, Measured], notes: Notes, rounds: int) -> dict[str, Any]:
    """A line of BUILDS."""
    figure, calls = figures[build_name(workers)], notes[build_name(workers)][-rounds:]
    rates = {"rate": figure.median, "ratio": figure.ratio(figures[build_name(1)])}
    times = {name: statistics.median(call[name] for call in calls) for name in ("work_seconds", "seconds")}
    return {"workers": workers, "images": calls[-1]["images"], **rates, **times}


def _compute(builds: dict[str, Any], cores: int, read: float, written: float) -> dict[str, Any]:
    """`builds` on another number of cores, each as fast as one of its workers while all of them were at work.

    A line of COMPUTED. `read`, `written`: bytes per image.
    """
    rate = cores * builds["rate"] / builds["workers"]
    needed = {"read_mb": rate * read / 1e6, "written_mb": rate * written / 1e6}
    return {"cores": cores, "rate": rate, "hours": MIMIC_IMAGES / rate / 3600, **needed}


# Results


BUILDS = {
    "workers": Column("workers"),
    "images": Column("images", ","),
    "images/s at work": Column("rate", ",.1f"),  # the estimate before has started the workers
    "/ one worker": Column("ratio", ".2f"),  # round by round
    "seconds at work": Column("work_seconds", ".1f"),
    "seconds in all": Column("seconds", ".1f"),
}
"""Whole builds with a number of workers; medians of the rounds."""

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
    "read MB/s": Column("read_mb", ",.0f"),  # from the source tree
    "written MB/s": Column("written_mb", ",.0f"),  # to the shard set
}
"""What all of MIMIC-CXR-JPG would take on a number of cores, and the throughput of storage that the rate needs."""


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
    builds: list[dict[str, Any]]
    startup_seconds: float
    """Until a new worker has done an empty task."""
    written_bytes: float
    """Per image, over all scales."""
    computed: list[dict[str, Any]]
    memory: list[dict[str, Any]]
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
                f"Cores × the rate of a worker while {self.builds[-1]['workers']} are at work. Assumes that MIMIC's images are like "
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
