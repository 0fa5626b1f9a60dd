"""`cxrfast bench step`: memory and images/s of loading, training and validation at each resolution.

Each scale is measured in its own process, so that memory is its own and a crash costs one line. The training loop
is the real one. A micro-batch that does not fit is halved until it does.
"""

import logging
import tempfile
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from cxrfast.bench.data import make_phantoms
from cxrfast.bench.harness import Budget, announce, in_time, measure_elsewhere, provenance
from cxrfast.bench.report import Column, left_out_notes, side_axis, table, where, write_results
from cxrfast.bench.training.step_measure import FIGURES, measure
from cxrfast.config import Runtime, preset
from cxrfast.distributed import pick_device
from cxrfast.errors import RunError
from cxrfast.models.networks.make import check_arch
from cxrfast.pipelines.reader import Reader
from cxrfast.shards.shard_set import ShardSet
from cxrfast.tables import Table

log = logging.getLogger(__name__)

PHANTOM_SCALES = {"cuda": [256, 512, 1024, 2048], "cpu": [64, 128, 256]}

START_SECONDS = 10.0
"""Time a process that trains takes to start and to end, roughly; used for the plan only."""


def bench(
    shards: Path | None,
    scales: list[int],
    out: Path,
    *,
    arch: str = "densenet121",
    seconds: float = 10.0,
    rounds: int = 5,
    micro_batch: int | None = None,
    device: str = "auto",
    engine: str = "auto",
    threads: int | None = None,
    each_engine: bool = False,
    minutes: float | None = None,
) -> "StepResult":
    """Measure every scale, smallest first, write bench.json, bench.md and bench.png into `out`.

    `seconds`: of all rounds of a figure. `each_engine`: measure with either engine, whatever `engine` says; the one
    that trains faster decides what `auto` should be. `minutes`: about how long; rounds end early, and scales that do
    not fit are left out.
    """
    budget, chosen = Budget.of(minutes), pick_device(device)
    check_arch(arch)
    scales = sorted(scales or (ShardSet(shards).scales if shards else PHANTOM_SCALES[chosen.type]))
    if shards:
        for scale in scales:
            Reader(shards, scale).close()  # a problem is reported before anything is measured
    engines = ("host", "dali") if each_engine else (engine,)
    announce(
        f"bench step: {', '.join(FIGURES)} of {arch} ({chosen.type})",
        minutes,
        len(scales) * len(engines) * (START_SECONDS + len(FIGURES) * seconds * (1 + 1 / (4 * rounds))),
        f"scales: {', '.join(map(str, scales))} px, one process each{'' if shards else ', of freshly drawn phantoms'}",
        f"{rounds} rounds × {seconds / rounds:g} s per figure, or one step where that takes longer",
        f"left out: other scales (--scale){'' if each_engine else ', the other engine (--each-engine)'}",
    )
    out.mkdir(parents=True, exist_ok=True)
    result = StepResult([], {}, provenance(chosen))
    with tempfile.TemporaryDirectory(prefix="cxrfast-bench-") as scratch:
        shards = shards or make_phantoms(Path(scratch), scales)
        runtimes = [
            Runtime(shards=shards, runs=Path(scratch), device=device, engine=one, threads=threads) for one in engines
        ]
        given = {"arch": arch, "seconds": seconds / rounds, "rounds": rounds}
        todo = [
            {**given, "runtime": runtime, "scale": scale, "micro_batch": micro_batch or preset(scale).micro_batch}
            for scale, runtime in product(scales, runtimes)
        ]
        _measure_all(todo, seconds / rounds, result, budget)
    write_results(out, "bench", result)
    return result


def _measure_all(todo: list[dict[str, Any]], turn: float, result: "StepResult", budget: Budget) -> None:
    """Add to `result` the lines, the scales that failed, and what there was no time for."""

    def work(options: dict[str, Any], share: Budget) -> list[list[float]] | None:
        """Measure one scale in a new process, halving the micro-batch until it fits."""
        scale, micro_batch = options["scale"], options["micro_batch"]
        figures = len(FIGURES) * (options["rounds"] + 1)
        while True:
            given, label = {**options, "micro_batch": micro_batch}, f"{scale} px × {micro_batch} images"
            try:
                line = measure_elsewhere(measure, given, share, label, figures)
            except (RunError, MemoryError) as error:
                if isinstance(error, RunError) or micro_batch == 1 or not share.left_of_all:
                    result.failed[scale] = f"{scale} px with micro-batch {micro_batch}: {error}"
                    return None
            else:
                result.lines.append(line)
                return list(line["rounds"].values())
            log.info(f"{scale} px: micro-batch {micro_batch} does not fit, trying {micro_batch // 2}")
            micro_batch //= 2

    pieces = {}
    for one in todo:
        engine = one["runtime"].engine
        name = f"{one['scale']} px{'' if engine == 'auto' else ', ' + engine}"
        pieces[name] = (one["scale"], one["micro_batch"], one)
    in_time(pieces, work, budget, result.left_out, turn)


# Results


COLUMNS = {
    "px": Column("scale"),
    "micro-batch": Column("micro_batch"),
    "load/s": Column("load", ",.1f"),  # the loader alone, with rotation and flip
    "train/s": Column("train", ",.1f"),  # the training loop with real loading
    "cached/s": Column("cached", ",.1f"),  # the same loop with one batch that is already on the device
    "bare/s": Column("bare", ",.1f"),  # forward pass, loss, backward pass and Adam on that batch, and nothing else
    # train / cached and train / bare, round by round: 1 where the loop never waits for data, and where all but the step
    # itself costs nothing
    "fed": Column("fed", ".2f"),
    "loop": Column("loop", ".2f"),
    "validate/s": Column("validate", ",.1f"),
    # kept by autograd between forward and backward, in the run's precision: what limits the micro-batch
    "saved MiB/image": Column("saved_bytes_per_image", ",.1f", 2**20),
    "process GiB": Column("process_bytes", ".1f", 2**30),  # peak of resident memory
    "torch GiB": Column("torch_peak_bytes", ".1f", 2**30),  # peak of torch's allocator on the GPU
    "GPU GiB": Column("gpu_used_bytes", ".1f", 2**30),  # in use at the end, DALI's included, as the driver reports it
    "engine": Column("engine"),
    "precision": Column("precision"),
}

PLOTTED = {"load": "loading", "train": "training", "cached": "training, cached batch", "validate": "validation"}


@dataclass(frozen=True)
class StepResult:
    lines: list[dict[str, Any]]
    failed: dict[int, str]
    """Scales that could not be measured, and why."""
    provenance: dict[str, Any]
    left_out: dict[str, str] = field(default_factory=dict)
    """What there was no time for, and what to do."""

    def tables(self) -> list[Table]:
        notes = [f"{scale} px: {why}" for scale, why in self.failed.items()] + left_out_notes(self.left_out)
        title = f"Memory and images/s by resolution ({where(self.provenance)})"
        return [table(title, COLUMNS, self.lines, "\n".join(notes))]

    def plot(self) -> Figure | None:
        """Images/s (log) and memory by scale."""
        if not self.lines:
            return None
        figure = Figure(figsize=(9, 3.6), layout="constrained")
        rates, memory = figure.subplots(1, 2)
        engines = list(dict.fromkeys(line["engine"] for line in self.lines))
        for engine, (n, (name, what)) in product(engines, enumerate(PLOTTED.items())):
            mine = [line for line in self.lines if line["engine"] == engine]
            rates.plot(
                [line["scale"] for line in mine],
                [line[name] for line in mine],
                "o--" if name == "cached" else "o-",
                color=f"C{n}",
                fillstyle="full" if engine == engines[0] else "none",
                label=f"{what}, {engine}" if len(engines) > 1 else what,
            )
        rates.set(yscale="log", ylabel="images/s")
        lines = [line for line in self.lines if line["engine"] == engines[0]]
        scales = [line["scale"] for line in lines]
        memory.plot(scales, [line["process_bytes"] / 2**30 for line in lines], "o-", label="process, main memory")
        if all(line["gpu_used_bytes"] is not None for line in lines):
            memory.plot(scales, [line["gpu_used_bytes"] / 2**30 for line in lines], "s-", label="GPU")
        memory.set(ylabel="GiB", ylim=(0, None))
        for axes in (rates, memory):
            side_axis(axes, scales, [f"{line['scale']}\n×{line['micro_batch']}" for line in lines])
            axes.legend(frameon=False)
        return figure
