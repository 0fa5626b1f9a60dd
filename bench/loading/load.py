"""`cxrfast bench load`: images/s of loading, compared with what users do instead and with the bare kernels.

A shard set comes in, or phantoms are made; tables, JSON and a plot go out. At each scale all loaders see the same JPEGs
and give the same uint8 grey batches. They take turns in one run, so that ratios hold whatever the machine does meanwhile.
"""

import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from matplotlib import colormaps
from matplotlib.figure import Figure

from cxrfast.bench.data import MIMIC_IMAGES, make_phantoms, tiny_images, uncompressed
from cxrfast.bench.harness import Budget, Measured, announce, file_system, in_time, interleave, no_time, provenance
from cxrfast.bench.loading.job import Job
from cxrfast.bench.loading.large import large
from cxrfast.bench.loading.measure import compare_engines, pass_rate
from cxrfast.bench.loading.ways import (
    CACHE,
    HOST,
    LIMIT,
    PEERS,
    RAW,
    WHAT,
    open_ways,
    peer_versions,
    pick_ways,
    reads_pixels,
    typed,
    usable,
)
from cxrfast.bench.report import ABSENT, Column, left_out_notes, side_axis, table, write_results
from cxrfast.distributed import pick_device
from cxrfast.errors import LoadError
from cxrfast.machine import usable_cores
from cxrfast.pipelines.reader import Reader
from cxrfast.shards.shard_set import ShardSet
from cxrfast.tables import Table

TASKS = {"A": "decode", "B": "decode, rotate by up to 15°, flip"}

PHANTOM_SCALES = [256, 512, 1024, 2048]

MOST_PIXELS = 2**29
"""Limit of the pixels of all images measured on at a scale."""

LARGE_SECONDS = 60.0
"""Time of `large`, roughly."""


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
    only: list[str] | None = None,
    minutes: float | None = None,
) -> "LoadingResult":
    """Measure, write load.json, load.md and load.png into `out`. Raises LoadError or ShardError for bad input.

    `only`: these ways, and those that ratios are to. `minutes`: about how long; smallest scales and rates come first.
    """
    budget, chosen, workers = Budget.of(minutes), pick_device(device), workers or usable_cores()
    ways, left_out = pick_ways(only or [], with_peers, workers)
    if with_engines and "dali" not in ways:
        left_out["engines"] = (
            "they compare dali with host: install NVIDIA DALI, and give --only dali if you give --only"
        )
        with_engines = False
    scales = sorted(scales or (ShardSet(shards).scales if shards else PHANTOM_SCALES))
    if shards:  # a problem is reported before anything is measured
        if ShardSet(shards).info.codec != "jpeg":
            raise LoadError(f"{shards} holds no JPEGs: give the set that its raw images were made from")
        for scale in scales:
            Reader(shards, scale).close()
    extras = {"--engines": with_engines, "--cold": with_cold, "--large": with_large}
    _announce(scales, ways, extras, seconds, rounds, minutes)
    with tempfile.TemporaryDirectory(prefix="cxrfast-bench-") as folder:
        scratch = Path(folder)
        made = shards or make_phantoms(scratch, scales)
        jobs = [_job(scratch, made, scale, workers) for scale in scales]
        out.mkdir(parents=True, exist_ok=True)
        compare = partial(compare_engines, chosen, seconds, rounds)
        result = LoadingResult(
            source="the given set" if shards else "phantoms",
            images={job.scale: len(job.rows) for job in jobs},
            batch={job.scale: job.batch for job in jobs},
            workers=workers,
            lines=_measure_all(jobs, ways, chosen, seconds, rounds, budget, left_out),
            engines=_at_each_scale("engines", jobs, compare, budget, left_out) if with_engines else [],
            cold=_at_each_scale("cold storage", jobs, _cold, budget, left_out) if with_cold else [],
            large=_large(scratch, budget, left_out) if with_large else None,
            left_out=left_out,
            what={way: what for way, what in WHAT.items() if way not in PEERS or way in ways},
            provenance={**provenance(chosen), **peer_versions(), "file_system": file_system(made)},
        )
    write_results(out, "load", result)
    return result


def _announce(
    scales: list[int], ways: list[str], extras: dict[str, bool], seconds: float, rounds: int, minutes: float | None
) -> None:
    absent = ", ".join(typed(way) for way in WHAT if way not in ways)
    then = [option for option, is_on in extras.items() if is_on]
    left_out = [f"{absent} (--only NAME)"] * bool(absent) + [option for option in extras if option not in then]
    announce(
        "bench load: images/s of loading",
        minutes,
        len(scales) * len(TASKS) * len(ways) * (rounds + 1 / 4) * seconds,
        f"scales: {', '.join(map(str, scales))} px; tasks: {', '.join(f'{t} ({what})' for t, what in TASKS.items())}",
        f"ways: {', '.join(map(typed, ways))}; host is always measured, since ratios refer to it",
        f"{rounds} rounds × {seconds:g} s per way, task and scale",
        *([f"then {' '.join(then)}"] if then else []),
        *([f"left out: {'; '.join(left_out)}"] if left_out else []),
    )


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


# Measuring


def _measure_all(
    jobs: list[Job],
    ways: list[str],
    device: torch.device,
    seconds: float,
    rounds: int,
    budget: Budget,
    left_out: dict[str, str],
) -> list[dict[str, Any]]:
    """The lines of every scale and task that there is time for; the others are added to `left_out`."""
    lines: list[dict[str, Any]] = []

    def work(piece: tuple[Job, str], share: Budget) -> list[list[float]]:
        job, task = piece
        if not job.folder.exists():
            _prepare(job, ways)
        each = open_ways(replace(job, turn=task == "B"), device, ways)
        figures = interleave(each, seconds, rounds, share, f"bench load, {job.scale} px, task {task}")
        lines.extend(_lines(job.scale, task, figures))
        return [figure.rounds for figure in figures.values()]

    pieces = {f"{job.scale} px, task {task}": (job.scale, job.batch, (job, task)) for job in jobs for task in TASKS}
    in_time(pieces, work, budget, left_out, seconds)
    if not lines:
        raise LoadError("the time was up before anything was measured: give more --minutes")
    return lines


def _prepare(job: Job, ways: list[str]) -> None:
    """Have the loaders write their input into the folder of the job; it serves all tasks."""
    job.folder.mkdir()
    mine = usable(job, ways)
    for way in mine:
        if way in PEERS:
            PEERS[way].prepare(job)
    if RAW in mine:
        uncompressed(job.shards, job.scale, job.rows, job.folder)


def _lines(scale: int, task: str, figures: dict[str, Measured]) -> list[dict[str, Any]]:
    """One line per way of loading, of one task at one scale.

    `rate`: images/s, median of the rounds. `ratio`: ours / it, round by round; ours is `host`, or `host, cache` among
    ways that read uncompressed `pixels`. `of_limit`: it / the limit of the task.
    """
    return [
        {
            "scale": scale,
            "task": task,
            "way": way,
            "rate": figure.median,
            "ratio": figures[CACHE if reads_pixels(way) else HOST].ratio(figure),
            "of_limit": None if reads_pixels(way) or LIMIT not in figures else figure.ratio(figures[LIMIT]),
            "pixels": reads_pixels(way),
            "rounds": figure.rounds,
        }
        for way, figure in figures.items()
    ]


PASSES: dict[str, dict[str, bool]] = {
    "warm": {"cold": False},
    "cold": {"cold": True},
    "cold_block": {"cold": True, "block": True},
    "cold_unadvised": {"cold": True, "ahead": False},
}
"""Options of `pass_rate`."""


def _cold(job: Job, budget: Budget) -> dict[str, Any]:
    medians = {name: statistics.median(pass_rate(job, **how) for _ in range(3)) for name, how in PASSES.items()}
    return {"scale": job.scale, "images": len(job.rows), **medians}


def _at_each_scale(
    what: str,
    jobs: list[Job],
    work: Callable[[Job, Budget], dict[str, Any]],
    budget: Budget,
    left_out: dict[str, str],
) -> list[dict[str, Any]]:
    """The result of `work` at every scale that there is time for; the others are added to `left_out`."""
    found: list[dict[str, Any]] = []

    def measure(job: Job, share: Budget) -> list[list[float]]:
        found.append(work(job, share))
        return []

    in_time({f"{what}, {job.scale} px": (job.scale, job.batch, job) for job in jobs}, measure, budget, left_out)
    return found


def _large(scratch: Path, budget: Budget, left_out: dict[str, str]) -> dict[str, Any] | None:
    if budget.share([LARGE_SECONDS]) is None:
        left_out["a large set"] = no_time(LARGE_SECONDS, budget.left)
        return None
    return large(tiny_images(scratch / "large", MIMIC_IMAGES, 16), 16, 200_000)


# Results


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
    lines: list[dict[str, Any]]
    """See `_lines`."""
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
        ways = [(way, self.what[way]) for way in dict.fromkeys(line["way"] for line in self.lines)]
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
        lines = [line for line in self.lines if (line["task"], line["pixels"]) == (task, pixels)]
        at = {(line["way"], line["scale"]): f"{line['rate']:,.0f} ({line['ratio']:.2f})" for line in lines}
        scales = sorted({line["scale"] for line in lines})
        ways = dict.fromkeys(line["way"] for line in sorted(lines, key=lambda line: line["ratio"]))
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
        if all(line["of_limit"] is None for line in self.lines):
            return None
        figure = Figure(figsize=(10, 4), layout="constrained")
        panels = figure.subplots(1, len(TASKS), sharey=True)
        colours = dict(zip(dict.fromkeys(line["way"] for line in self.lines), cycle(colormaps["tab20"](range(20)))))
        for axes, task in zip(panels, TASKS, strict=True):
            lines = [line for line in self.lines if line["task"] == task and line["of_limit"] and line["way"] != LIMIT]
            for way in dict.fromkeys(line["way"] for line in lines):
                mine = [line for line in lines if line["way"] == way]
                style = {"color": "black", "linewidth": 2.5} if way == HOST else {"color": colours[way]}
                axes.plot(
                    [line["scale"] for line in mine], [line["of_limit"] for line in mine], "o-", label=way, **style
                )
            axes.axhline(1, color="0.6", linestyle=":")
            axes.set(title=f"{task}: {TASKS[task]}", ylim=(0, None))
            side_axis(axes, sorted({line["scale"] for line in self.lines}))
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
