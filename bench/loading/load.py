"""`cxrfast bench load`: images/s of loading, next to what users do instead and to the bare kernels.

A shard set comes in, or phantoms are made; tables, JSON and a plot go out. At each scale all loaders see the same JPEGs and
give the same uint8 grey batches, and take turns in one run, so that ratios hold whatever the machine does meanwhile.
"""

import statistics
import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch

from cxrfast.bench.data import MIMIC_IMAGES, make_phantoms
from cxrfast.bench.harness import (
    Budget,
    Measured,
    announce,
    file_system,
    least_seconds,
    no_time,
    provenance,
    take_turns,
    write_results,
)
from cxrfast.bench.loading.engines import compare_engines
from cxrfast.bench.loading.job import Job, Peer
from cxrfast.bench.loading.measure import Large, large, pass_rate
from cxrfast.bench.loading.peers import peer_names, peer_versions
from cxrfast.bench.loading.result import TASKS, Cold, LoadingLine, LoadingResult, plot, tables
from cxrfast.bench.loading.ways import CACHE, HOST, LIMIT, PIXEL_SCALE, RAW, WHAT, open_ways, pick_ways, typed, usable
from cxrfast.bench.trees import tiny_images, uncompressed
from cxrfast.distributed import pick_device
from cxrfast.errors import LoadError
from cxrfast.machine import usable_cores
from cxrfast.pipelines.reader import Reader
from cxrfast.shards.shard_set import ShardSet

PHANTOM_SCALES = [256, 512, 1024, 2048]

MOST_PIXELS = 2**29
"""Images of a scale that are measured on have at most so many pixels together."""

LARGE_SECONDS = 60.0
"""What `large` takes, about."""

T = TypeVar("T")


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
) -> LoadingResult:
    """Measure, write load.json, load.md and load.png into `out`. Raises LoadError or ShardError for bad input.

    `only`: these ways, and those that their ratios are to. `minutes`: about so long; smallest scales and rates first.
    """
    budget, chosen, workers = Budget.of(minutes), pick_device(device), workers or usable_cores()
    ways, found, left_out = pick_ways(only or [], with_peers, workers)
    if with_engines and "dali" not in ways:
        left_out["engines"] = (
            "they compare dali with host: install NVIDIA DALI, and give --only dali if you give --only"
        )
        with_engines = False
    scales = sorted(scales or (ShardSet(shards).scales if shards else PHANTOM_SCALES))
    if shards:
        _check(shards, scales)
    extras = {"--engines": with_engines, "--cold": with_cold, "--large": with_large}
    _announce(scales, ways, extras, seconds, rounds, minutes)
    with tempfile.TemporaryDirectory(prefix="cxrfast-bench-") as folder:
        scratch = Path(folder)
        made = shards or make_phantoms(scratch, scales)
        jobs = [_job(scratch, made, scale, workers) for scale in scales]
        out.mkdir(parents=True, exist_ok=True)
        prepare = partial(_prepare, ways=ways, found=found)
        measure = partial(_measure, device=chosen, ways=ways, found=found, seconds=seconds, rounds=rounds)
        result = LoadingResult(
            source="the given set" if shards else "phantoms",
            images={job.scale: len(job.rows) for job in jobs},
            batch={job.scale: job.batch for job in jobs},
            workers=workers,
            lines=_measure_all(jobs, prepare, measure, seconds, budget, left_out),
            engines=_in_time("engines", jobs, partial(compare_engines, chosen, seconds, rounds), budget, left_out)
            if with_engines
            else [],
            cold=_in_time("cold storage", jobs, lambda job, budget: _cold(job), budget, left_out) if with_cold else [],
            large=_large(scratch, budget, left_out) if with_large else None,
            left_out=left_out,
            what={**WHAT, **{way: peer.what for way, peer in found.items()}},
            provenance={**provenance(chosen), **peer_versions(), "file_system": file_system(made)},
        )
    write_results(out, "load", asdict(result), tables(result), plot(result))
    return result


def _announce(
    scales: list[int],
    ways: list[str],
    extras: dict[str, bool],
    seconds: float,
    rounds: int,
    minutes: float | None,
) -> None:
    absent = [typed(way) for way in (*WHAT, *peer_names()) if way not in ways]
    options = [option for option, is_on in extras.items() if not is_on]
    then = [option for option, is_on in extras.items() if is_on]
    left_out = [f"{', '.join(absent)} (--only NAME)"] if absent else []
    announce(
        "bench load: images/s of loading",
        minutes,
        len(scales) * len(TASKS) * len(ways) * (rounds + 1 / 4) * seconds,
        f"scales: {', '.join(map(str, scales))} px; tasks: {', '.join(f'{t} ({what})' for t, what in TASKS.items())}",
        f"ways: {', '.join(map(typed, ways))}; host is always measured, since ratios are to it",
        f"{rounds} rounds × {seconds:g} s per way, task and scale",
        *([f"then {' '.join(then)}"] if then else []),
        *([f"left out: {'; '.join([*left_out, *options])}"] if left_out or options else []),
    )


def _check(shards: Path, scales: list[int]) -> None:
    if ShardSet(shards).info.codec != "jpeg":
        raise LoadError(f"{shards} holds no JPEGs: give the set that its raw images were made from")
    for scale in scales:
        Reader(shards, scale).close()  # says what is wrong before anything is measured


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
    prepare: Callable[[Job], None],
    measure: Callable[[Job, str, Budget], list[LoadingLine]],
    seconds: float,
    budget: Budget,
    left_out: dict[str, str],
) -> list[LoadingLine]:
    """The lines of every scale and task that there is time for; the others are added to `left_out`."""
    lines: list[LoadingLine] = []
    last: list[LoadingLine] = []
    first = next(iter(TASKS))
    preparing = wall = 0.0
    blocks = [(job, task) for job in jobs for task in TASKS]
    for n, (job, task) in enumerate(blocks):
        least = [
            _least(last, wall, seconds, later) + (preparing if its_task == first else 0.0)
            for later, its_task in blocks[n:]
        ]
        share = budget.share(least)
        if share is None:
            left_out[f"{job.scale} px, task {task}"] = no_time(least[0], budget.left)
            continue
        begun = budget.clock()
        if task == first:
            prepare(job)
            preparing = budget.clock() - begun
            begun = budget.clock()
        last = measure(job, task, share)
        lines += last
        wall = budget.clock() - begun
    if not lines:
        raise LoadError("nothing was measured, the time was over before: give more --minutes")
    return lines


def _least(lines: list[LoadingLine], wall: float, seconds: float, job: Job) -> float:
    """Seconds that a task takes at least, judging by the lines of another one, which took `wall` seconds."""
    if not lines:
        return 0.0
    growth = (job.scale / lines[0].scale) ** 2
    return least_seconds(wall, len(lines[0].rounds), [job.batch / line.rate for line in lines], seconds, growth)


def _prepare(job: Job, ways: list[str], found: dict[str, Peer]) -> None:
    """Have the loaders write what they read into the folder of the job; it serves all tasks."""
    job.folder.mkdir()
    for peer in usable(job, found).values():
        peer.prepare(job)
    if job.scale <= PIXEL_SCALE and RAW in ways:
        uncompressed(job.shards, job.scale, job.rows, job.folder)


def _measure(
    job: Job,
    task: str,
    budget: Budget,
    *,
    device: torch.device,
    ways: list[str],
    found: dict[str, Peer],
    seconds: float,
    rounds: int,
) -> list[LoadingLine]:
    """One task at one scale."""
    mine = usable(job, found)
    here = replace(job, turn=task == "B")
    own = ways if job.scale <= PIXEL_SCALE else [way for way in ways if way not in (CACHE, RAW)]
    each = open_ways(here, device, own, mine)
    figures = take_turns(f"bench load, {job.scale} px, task {task}", each, seconds, rounds, budget)
    return _lines(here, task, figures, {way for way, peer in mine.items() if peer.pixels})


def _lines(job: Job, task: str, figures: dict[str, Measured], of_pixels: set[str]) -> list[LoadingLine]:
    of_pixels = of_pixels | {CACHE, RAW}
    lines = []
    for way, figure in figures.items():
        pixels = way in of_pixels
        lines.append(
            LoadingLine(
                scale=job.scale,
                task=task,
                way=way,
                rate=figure.median,
                ratio=figures[CACHE if pixels else HOST].ratio(figure),
                of_limit=None if pixels or LIMIT not in figures else figure.ratio(figures[LIMIT]),
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


def _in_time(
    what: str, jobs: list[Job], work: Callable[[Job, Budget], T], budget: Budget, left_out: dict[str, str]
) -> list[T]:
    """What `work` gives for every scale that there is time for; the others are added to `left_out`."""
    found: list[T] = []
    took = 0.0
    for n, job in enumerate(jobs):
        share = budget.share([took] * (len(jobs) - n))
        if share is None:
            left_out[f"{what}, {job.scale} px"] = no_time(took, budget.left)
            continue
        begun = budget.clock()
        found.append(work(job, share))
        took = budget.clock() - begun
    return found


def _large(scratch: Path, budget: Budget, left_out: dict[str, str]) -> Large | None:
    if budget.share([LARGE_SECONDS]) is None:
        left_out["a large set"] = no_time(LARGE_SECONDS, budget.left)
        return None
    return large(tiny_images(scratch / "large", MIMIC_IMAGES, 16), 16, 200_000)
