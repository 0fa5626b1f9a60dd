"""`cxrfast bench shard`: images/s per core of sharding, next to what users do instead; its scaling and memory.

Radiographs come in, drawn on the spot or copied from a tree, and a table, JSON and a plot go out. All rates are measured
in one run in turns, so that ratios hold whatever the machine does meanwhile; what is computed says so. The given tree is
only read.
"""

import statistics
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cv2
import torch
from matplotlib.figure import Figure as Plot

from cxrfast.bench.harness import Figure, file_system, provenance, take_turns, write_results
from cxrfast.bench.sharding.measure import (
    Memory,
    Notes,
    Setup,
    build_name,
    measurements,
    memory,
    prepare,
    shard_rows,
    startup_seconds,
)
from cxrfast.bench.sharding.peers import WHAT, peer_versions, peers
from cxrfast.bench.trees import sample
from cxrfast.machine import usable_cores
from cxrfast.phantoms.dataset import synth
from cxrfast.shards.building.layout import check_scales
from cxrfast.shards.images.decode import decode
from cxrfast.shards.storage import Tree
from cxrfast.tables import Section, to_markdown

SCALES = (256, 512, 1024, 2048)

SIZE = 3056
"""Longer side of the phantoms, px. Most are 2500 × 3056, as in MIMIC-CXR-JPG, and files of 1.5 MB on average, too."""

MEMORY_ROWS = (1_000, 20_000)

MIMIC_IMAGES = 377_110

CORES = (2, 16, 128)


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
) -> ShardingResult:
    """Measure for about `seconds` a figure and round, write shard.json, shard.md and shard.png into `out`.

    `data`: a MIMIC-CXR-JPG tree, else phantoms are drawn. Raises ShardError for bad input.
    """
    scales = check_scales(scales or list(SCALES))
    cv2.setNumThreads(1)
    with tempfile.TemporaryDirectory(prefix="cxrfast-bench-") as folder:
        scratch = Path(folder)
        files = _files(scratch, data, images)
        out.mkdir(parents=True, exist_ok=True)
        setup = prepare(scratch, files, scales, seconds, workers or usable_cores())
        notes = Notes()
        others, left_out = peers()
        figures = take_turns("bench shard", measurements(setup, others, notes), seconds, rounds)
        rates = {name: figures[name] for name in ("ours", *others, "kernels")}
        builds = _builds(setup, figures, notes, rounds)
        last = notes.calls[setup.workers][-1]
        written = last.written_bytes / last.images
        sizes = [(len(jpeg), decode(jpeg, "none").size) for jpeg in map(Path.read_bytes, files)]
        result = ShardingResult(
            source="images of the given tree" if data else f"phantoms of {SIZE} px",
            images=len(files),
            mean_bytes=statistics.mean(size for size, _ in sizes),
            mean_pixels=statistics.mean(area for _, area in sizes),
            written_bytes=written,
            scales=scales,
            shard_rows=shard_rows(setup, seconds),
            rates={name: figure.median for name, figure in rates.items()},
            ratios={name: rates["ours"].ratio(figure) for name, figure in rates.items() if name != "ours"},
            rounds={name: figure.rounds for name, figure in figures.items()},
            stages=_medians(notes.stages[-rounds:]),
            builds=builds,
            startup_seconds=statistics.median(startup_seconds(setup) for _ in range(rounds)),
            computed=[_compute(builds[-1], cores, statistics.mean(s for s, _ in sizes), written) for cores in CORES],
            memory=[memory(setup, rows) for rows in MEMORY_ROWS if with_memory],
            left_out=left_out,
            provenance={**provenance(torch.device("cpu")), **peer_versions(), "file_system": file_system(scratch)},
        )
    write_results(out, "shard", asdict(result), to_markdown(sections(result)), plot(result))
    return result


def _files(scratch: Path, data: str | None, images: int) -> list[Path]:
    """The JPEGs to measure on, on the disk that is written to."""
    if data is None:
        synth(scratch / "phantoms", images=images, size=SIZE)
    (scratch / "images").mkdir()
    return sample(Tree(data or scratch / "phantoms"), scratch / "images", images)


def _medians(lines: list[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(line[name] for line in lines) for name in lines[0]}


def _builds(setup: Setup, figures: dict[str, Figure], notes: Notes, rounds: int) -> list[Builds]:
    found = []
    for workers, calls in sorted(notes.calls.items()):
        figure, calls = figures[build_name(workers)], calls[-rounds:]
        found.append(
            Builds(
                workers=workers,
                images=calls[-1].images,
                rate=figure.median,
                ratio=figure.ratio(figures[build_name(1)]),
                work_seconds=statistics.median(call.work_seconds for call in calls),
                seconds=statistics.median(call.seconds for call in calls),
            )
        )
    return found


def _compute(builds: Builds, cores: int, read: float, written: float) -> Computed:
    """`builds` with more or fewer cores, each as fast as one of its workers while all of them were at work."""
    rate = cores * builds.rate / builds.workers
    return Computed(
        cores=cores,
        rate=rate,
        hours=MIMIC_IMAGES / rate / 3600,
        read_mb=rate * read / 1e6,
        written_mb=rate * written / 1e6,
    )


# Results


def sections(result: ShardingResult) -> list[Section]:
    """Everything that is printed."""
    r = result
    sides = ", ".join(map(str, r.scales))
    found = [
        Section(
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
        ),
        Section(
            "Where ours spends its time",
            [*r.stages, "sum"],
            [[f"{ms:.1f} ms" for ms in (*r.stages.values(), sum(r.stages.values()))]],
            "an image; medians of the rounds. sync: fsync of tars, indexes, manifests and folders.",
        ),
        Section(
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
        found.append(_memory_section(r.memory))
    return [*found, _computed_section(r)]


def _memory_section(memory: list[Memory]) -> Section:
    def mb(n: int) -> str:
        return f"{n / 1e6:,.0f}"

    return Section(
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


def _computed_section(r: ShardingResult) -> Section:
    return Section(
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


def plot(result: ShardingResult) -> Plot:
    """Images/s and core of each way with ours / theirs, and where ours spends its time."""
    figure = Plot(figsize=(9, 3.4), layout="constrained")
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
