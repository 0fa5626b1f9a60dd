"""`cxrfast bench load`: images/s of loading beside what users do instead, and beside the bare kernels.

A shard set comes in, or phantoms are made; tables, JSON and a plot go out. At each scale all loaders see the same JPEGs and
give the same uint8 grey batches, and take turns in one run, so that ratios hold whatever the machine does meanwhile.
"""

import statistics
import tempfile
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from matplotlib import colormaps
from matplotlib.figure import Figure as Plot

from cxrfast.bench.harness import Figure, file_system, provenance, take_turns, write_results
from cxrfast.bench.load_engines import Engines, compare_engines
from cxrfast.bench.load_measure import (
    MIMIC_ROWS,
    Large,
    Measurement,
    large,
    limit,
    measurement,
    ours,
    pass_rate,
)
from cxrfast.bench.load_peers import Job, Peer, peer_versions, peers
from cxrfast.bench.step import make_phantoms
from cxrfast.bench.tables import Section, to_markdown
from cxrfast.bench.trees import tiny_images, uncompressed
from cxrfast.distributed import pick_device
from cxrfast.errors import LoadError
from cxrfast.machine import usable_cores
from cxrfast.pipelines import dali
from cxrfast.pipelines.reader import Reader
from cxrfast.shards.manifest import read_set, scales_in

PHANTOM_SCALES = [256, 512, 1024, 2048]

TASKS = {"A": "decode", "B": "decode, rotate by up to 15°, flip"}

PIXEL_SCALE = 512
"""Largest scale at which uncompressed pixels are measured, px."""

MOST_PIXELS = 2**29
"""Images of a scale that are measured on have at most so many pixels together."""

HOST, CACHE, LIMIT = "host", "host, cache", "limit"

WHAT = {
    "host": "Loader(engine='host')",
    "dali": "Loader(engine='dali')",
    "host, 1 thread": "Loader(engine='host', threads=1)",
    CACHE: "Loader(engine='host', cache=…), filled before",
    "host, raw": "Loader(engine='host') of a set made with --codec raw",
    LIMIT: "the same decoder, and warpAffine, in bare threads: bytes in memory, no loader",
}


@dataclass(frozen=True, kw_only=True)
class Line:
    """One way of loading, one task, one scale."""

    scale: int
    task: str
    way: str
    rate: float
    """Images/s, median of the rounds."""
    ratio: float
    """Ours / it: medians over the rounds of the ratio in a round. Ours is `host`, or `host, cache` among pixels."""
    of_limit: float | None
    """It / the limit of the task."""
    pixels: bool
    """It reads uncompressed pixels."""
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


@dataclass(frozen=True, kw_only=True)
class Result:
    source: str
    images: dict[int, int]
    """By scale: how many were measured on."""
    batch: dict[int, int]
    workers: int
    lines: list[Line]
    left_out: dict[str, str]
    what: dict[str, str]
    engines: list[Engines] = field(default_factory=list)
    cold: list[Cold] = field(default_factory=list)
    large: Large | None = None
    provenance: dict[str, Any]


def bench(
    shards: Path | None,
    scales: list[int],
    out: Path,
    *,
    device: str = "auto",
    workers: int | None = None,
    seconds: float = 2.0,
    rounds: int = 5,
    with_peers: bool = True,
    with_engines: bool = False,
    with_cold: bool = False,
    with_large: bool = False,
) -> Result:
    """Measure, write load.json, load.md and load.png into `out`. Raises LoadError or ShardError for bad input."""
    chosen, workers = pick_device(device), workers or usable_cores()
    found, left_out = peers() if with_peers else ({}, {})
    with tempfile.TemporaryDirectory(prefix="cxrfast-bench-") as name:
        scratch = Path(name)
        made = make_phantoms(scratch, scales or PHANTOM_SCALES) if shards is None else shards
        if read_set(made).codec != "jpeg":
            raise LoadError(f"{made} holds no JPEGs: give the set that its raw images were made beside")
        jobs = [_job(scratch, made, scale, workers) for scale in scales or scales_in(made)]
        out.mkdir(parents=True, exist_ok=True)
        lines: list[Line] = []
        for job in jobs:
            lines += _measure_scale(job, chosen, found, seconds, rounds)
        result = Result(
            source="the given set" if shards else "phantoms",
            images={job.scale: len(job.rows) for job in jobs},
            batch={job.scale: job.batch for job in jobs},
            workers=workers,
            lines=lines,
            left_out=left_out,
            what={**WHAT, **{way: peer.what for way, peer in found.items()}},
            engines=[compare_engines(job, chosen, seconds, rounds) for job in jobs if with_engines],
            cold=[_cold(job) for job in jobs if with_cold],
            large=large(tiny_images(scratch / "large", MIMIC_ROWS, 16), 16, 200_000) if with_large else None,
            provenance={**provenance(chosen), **peer_versions(), "file_system": file_system(made)},
        )
    write_results(out, "load", asdict(result), to_markdown(sections(result)), plot(result))
    return result


def _job(scratch: Path, shards: Path, scale: int, workers: int) -> Job:
    with Reader(shards, scale) as reader:
        rows = reader.rows[: max(1, MOST_PIXELS // scale**2)]
    return Job(
        folder=scratch / str(scale),
        shards=shards,
        scale=scale,
        rows=rows,
        batch=max(8, min(64, 16384 // scale)),
        workers=workers,
        turn=False,
    )


def _measure_scale(job: Job, device: torch.device, found: dict[str, Peer], seconds: float, rounds: int) -> list[Line]:
    job.folder.mkdir()
    fits = job.scale <= PIXEL_SCALE
    mine = {way: peer for way, peer in found.items() if fits or not peer.pixels}
    for peer in mine.values():
        peer.prepare(job)
    raw = uncompressed(job.shards, job.scale, job.rows, job.folder) if fits else None
    lines = []
    for task in TASKS:
        here = replace(job, turn=task == "B")
        each = _ways(here, device, mine, raw)
        figures = take_turns(f"bench load, {job.scale} px, task {task}", each, seconds, rounds)
        lines += _lines(here, task, figures, {way for way, peer in mine.items() if peer.pixels})
    return lines


def _ways(job: Job, device: torch.device, found: dict[str, Peer], raw: Path | None) -> dict[str, Measurement]:
    ways = {HOST: ours(job, "host", device)}
    if dali.available():
        ways["dali"] = ours(job, "dali", device)
    if job.workers > 1:
        ways["host, 1 thread"] = ours(job, "host", device, threads=1)
    if raw:
        with Reader(raw, job.scale) as reader:
            of_raw = replace(job, shards=raw, rows=reader.rows)
        ways[CACHE] = ours(job, "host", device, cache=job.folder / "cache")
        ways["host, raw"] = ours(of_raw, "host", device)
    ways |= {way: partial(peer.batches, job) for way, peer in found.items() if peer.turns or not job.turn}
    return {**{way: measurement(batches, device) for way, batches in ways.items()}, LIMIT: limit(job)}


def _lines(job: Job, task: str, figures: dict[str, Figure], of_pixels: set[str]) -> list[Line]:
    of_pixels = of_pixels | {CACHE, "host, raw"}
    lines = []
    for way, figure in figures.items():
        pixels = way in of_pixels
        lines.append(
            Line(
                scale=job.scale,
                task=task,
                way=way,
                rate=figure.median,
                ratio=figures[CACHE if pixels else HOST].ratio(figure),
                of_limit=None if pixels else figure.ratio(figures[LIMIT]),
                pixels=pixels,
                rounds=figure.rounds,
            )
        )
    return lines


def _cold(job: Job) -> Cold:
    def median(**how: bool) -> float:
        return statistics.median(pass_rate(job, **how) for _ in range(3))

    return Cold(
        scale=job.scale,
        images=len(job.rows),
        warm=median(cold=False),
        cold=median(cold=True),
        cold_block=median(cold=True, block=True),
        cold_unadvised=median(cold=True, ahead=False),
    )


# Results


def sections(result: Result) -> list[Section]:
    """Everything that is printed."""
    found = [_rates(result, task, pixels) for pixels in (False, True) for task in TASKS]
    found = [section for section in found if section.lines]
    ways = dict.fromkeys(line.way for line in result.lines)
    found.append(
        Section("The ways", ["way", "what it does"], [[way, result.what[way]] for way in ways], _left_out(result))
    )
    if result.engines:
        found += [engines_section(result.engines)]
    if result.cold:
        found.append(_cold_section(result.cold))
    if result.large:
        found.append(_large_section(result.large))
    return found


def _left_out(result: Result) -> str:
    return " ".join(f"Left out: {way} ({why})." for way, why in result.left_out.items())


def _rates(result: Result, task: str, pixels: bool) -> Section:
    lines = [line for line in result.lines if (line.task, line.pixels) == (task, pixels)]
    scales = sorted({line.scale for line in lines})
    at = {(line.way, line.scale): line for line in lines}

    def cell(line: Line | None) -> str:
        return f"{line.rate:,.0f} ({line.ratio:.2f})" if line else "-"

    ways = sorted({line.way for line in lines}, key=lambda way: min(at[way, s].ratio for s in scales if (way, s) in at))
    where = result.provenance["gpu"] or f"{result.provenance['processor']}, {result.workers} threads or workers"
    sizes = ", ".join(f"{s} px: {result.images[s]:,} images, batches of {result.batch[s]}" for s in scales)
    mine = CACHE if pixels else "host"
    return Section(
        f"Task {task}, {TASKS[task]}{', without JPEG' if pixels else ''}: images/s ({mine} / it), on {where}",
        ["way", *(f"{s} px" for s in scales)],
        [[way, *(cell(at.get((way, s))) for s in scales)] for way in ways],
        f"Medians of the rounds; ratios are taken round by round. {sizes}. All in the page cache.",
    )


def engines_section(engines: list[Engines]) -> Section:
    """What GPU machines differ in; see `load_engines`."""
    return Section(
        "The engines beside each other",
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
        "hardware: hw_decoder_load, the share of a batch that a GPU's JPEG engines get. within: pixels, of those that stay in the "
        f"image, whose grey levels differ by at most so much between the engines, over {engines[0].images} images, turned.",
    )


def _cold_section(cold: list[Cold]) -> Section:
    return Section(
        "Cold storage: one pass, decoding only, images/s",
        ["px", "images", "warm", "cold", "cold, block order", "cold, no readahead"],
        [
            [str(c.scale), f"{c.images:,}", *(f"{x:,.0f}" for x in (c.warm, c.cold, c.cold_block, c.cold_unadvised))]
            for c in cold
        ],
        "Medians of three passes. Cold: every page of the tars was dropped from the page cache before.",
    )


def _large_section(found: Large) -> Section:
    mb = [f"{n / 1e6:,.1f}" for n in found.anonymous]
    return Section(
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
        f"Tiny images. Medians of five. Memory: after each tenth of {found.images:,} images, turned by the host engine.",
    )


def plot(result: Result) -> Plot:
    """Share of the limit by scale, a line for each way with JPEGs, a panel a task."""
    figure = Plot(figsize=(10, 4), layout="constrained")
    panels = figure.subplots(1, len(TASKS), sharey=True)
    colours = dict(zip(dict.fromkeys(line.way for line in result.lines), cycle(colormaps["tab20"](range(20)))))
    for axes, task in zip(panels, TASKS, strict=True):
        lines = [line for line in result.lines if line.task == task and line.of_limit is not None and line.way != LIMIT]
        for way in dict.fromkeys(line.way for line in lines):
            mine = [line for line in lines if line.way == way]
            style = {"color": "black", "linewidth": 2.5} if way == HOST else {"color": colours[way]}
            axes.plot([line.scale for line in mine], [line.of_limit for line in mine], "o-", label=way, **style)
        axes.axhline(1, color="0.6", linestyle=":")
        axes.set(xscale="log", xlabel="side, px", title=f"{task}: {TASKS[task]}", ylim=(0, None))
        scales = sorted({line.scale for line in lines})
        axes.set_xticks(scales, map(str, scales))
        axes.minorticks_off()
    panels[0].set_ylabel("images/s / those of the bare kernels")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    return figure
