"""`cxrfast bench shard`: images/s per core of sharding, compared with what users do instead; its scaling and memory.

Radiographs come in, drawn on the spot or copied from a tree; tables, JSON and a plot go out. All rates are measured in
turns in one run, so that ratios hold whatever the machine does meanwhile; computed figures say so. The given tree is only
read.
"""

import statistics
import tempfile
from pathlib import Path

import cv2
import torch

from cxrfast.bench.data import MIMIC_IMAGES
from cxrfast.bench.harness import Measured, file_system, provenance, take_turns
from cxrfast.bench.report import write_results
from cxrfast.bench.sharding.measure import (
    Notes,
    Setup,
    build_name,
    measurements,
    memory,
    prepare,
    shard_rows,
    startup_seconds,
)
from cxrfast.bench.sharding.peers import peer_versions, peers
from cxrfast.bench.sharding.result import Builds, Computed, ShardingResult
from cxrfast.bench.trees import sample
from cxrfast.machine import usable_cores
from cxrfast.phantoms.dataset import synth
from cxrfast.shards.building.layout import check_scales
from cxrfast.shards.images.decode import decode
from cxrfast.shards.storage import Tree

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
) -> ShardingResult:
    """Measure for about `seconds` per figure and round, write shard.json, shard.md and shard.png into `out`.

    `data`: a MIMIC-CXR-JPG tree; None: draw phantoms. Raises ShardError for bad input.
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
    write_results(out, "shard", result)
    return result


def _files(scratch: Path, data: str | None, images: int) -> list[Path]:
    """The JPEGs to measure on, copied to the disk that builds write to."""
    if data is None:
        synth(scratch / "phantoms", images=images, size=SIZE)
    (scratch / "images").mkdir()
    return sample(Tree(data or scratch / "phantoms"), scratch / "images", images)


def _medians(lines: list[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(line[name] for line in lines) for name in lines[0]}


def _builds(setup: Setup, figures: dict[str, Measured], notes: Notes, rounds: int) -> list[Builds]:
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
    """`builds` on another number of cores, each as fast as one of its workers while all of them were at work."""
    rate = cores * builds.rate / builds.workers
    return Computed(
        cores=cores,
        rate=rate,
        hours=MIMIC_IMAGES / rate / 3600,
        read_mb=rate * read / 1e6,
        written_mb=rate * written / 1e6,
    )
