"""`cxrfast bench step`: memory and images/s of loading, training and validation at each resolution.

Each scale is measured in a process of its own, so that memory is its own and a crash costs one line. The training loop
is the real one. A micro-batch that does not fit is halved until it does.
"""

import logging
import tempfile
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from cxrfast.bench.data import make_phantoms
from cxrfast.bench.harness import (
    Budget,
    announce,
    answer,
    in_own_process,
    least_seconds,
    no_time,
    provenance,
    write_results,
)
from cxrfast.bench.training.step_measure import FIGURES, StepLine, measure
from cxrfast.config import preset
from cxrfast.distributed import pick_device
from cxrfast.errors import RunError
from cxrfast.models.classifier import check_arch
from cxrfast.pipelines.reader import Reader
from cxrfast.progress import progress
from cxrfast.shards.shard_set import ShardSet
from cxrfast.tables import Table

log = logging.getLogger(__name__)

PHANTOM_SCALES = {"cuda": [256, 512, 1024, 2048], "cpu": [64, 128, 256]}

START_SECONDS = 10.0
"""A process that trains takes about so long to start and to end; for the plan alone."""


@dataclass(frozen=True)
class StepResult:
    lines: list[StepLine]
    failed: dict[int, str]
    """Scales that could not be measured, and why."""
    provenance: dict[str, Any]
    left_out: dict[str, str] = field(default_factory=dict)
    """What there was no time for, and what to do."""

    def columns(self) -> dict[str, list[str]]:
        """Header → a cell for each line; the GPU's columns where there is one."""
        columns = {
            "px": [str(line.scale) for line in self.lines],
            "micro-batch": [str(line.micro_batch) for line in self.lines],
            "load/s": [_per_second(line.load) for line in self.lines],
            "train/s": [_per_second(line.train) for line in self.lines],
            "cached/s": [_per_second(line.cached) for line in self.lines],
            "bare/s": [_per_second(line.bare) for line in self.lines],
            "fed": [f"{line.fed:.2f}" for line in self.lines],
            "loop": [f"{line.loop:.2f}" for line in self.lines],
            "validate/s": [_per_second(line.validate) for line in self.lines],
            "saved MiB/image": [f"{line.saved_bytes_per_image / 2**20:,.1f}" for line in self.lines],
            "process GiB": [_gib(line.process_bytes) for line in self.lines],
            "torch GiB": [_gib(line.torch_peak_bytes) for line in self.lines],
            "GPU GiB": [_gib(line.gpu_used_bytes) for line in self.lines],
            "engine": [line.engine for line in self.lines],
            "precision": [line.precision for line in self.lines],
        }
        absent = () if self.provenance["gpu"] else ("torch GiB", "GPU GiB")
        return {name: cells for name, cells in columns.items() if name not in absent}

    def remarks(self) -> list[str]:
        """What is not in the table, and why."""
        failed = [f"{scale} px: {why}" for scale, why in self.failed.items()]
        return failed + [f"Left out: {what} ({why})." for what, why in self.left_out.items()]

    def table(self) -> Table:
        where = self.provenance["gpu"] or f"{self.provenance['processor']}, {self.provenance['cores']} cores"
        columns = self.columns()
        rows = list(zip(*columns.values(), strict=True))
        title = f"Memory and images/s by resolution ({where})"
        return Table(title, list(columns), rows, "\n".join(self.remarks()), text=["engine", "precision"])


def _per_second(rate: float) -> str:
    return f"{rate:,.1f}" if rate < 1000 else f"{rate:,.0f}"


def _gib(size: int | None) -> str:
    return "-" if size is None else f"{size / 2**30:.1f}"


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
) -> StepResult:
    """Measure every scale, smallest first, write bench.json, bench.md and bench.png into `out`.

    `each_engine`: with either engine, whatever `engine` says; which of them trains faster decides what `auto` should be.
    `minutes`: about so long; rounds end early, and scales that do not fit are left out.
    """
    budget, chosen = Budget.of(minutes), pick_device(device)
    check_arch(arch)
    scales = sorted(scales or (ShardSet(shards).scales if shards else PHANTOM_SCALES[chosen.type]))
    if shards:
        for scale in scales:
            Reader(shards, scale).close()  # says what is wrong before anything is measured
    engines = ("host", "dali") if each_engine else (engine,)
    announce(
        f"bench step: {', '.join(FIGURES)} of {arch} ({chosen.type})",
        minutes,
        len(scales) * len(engines) * (START_SECONDS + len(FIGURES) * seconds * (1 + 1 / (4 * rounds))),
        f"scales: {', '.join(map(str, scales))} px, one process each{'' if shards else ', of phantoms made for it'}",
        f"{rounds} rounds × {seconds / rounds:g} s per figure, or one step where that takes longer",
        f"left out: other scales (--scale){'' if each_engine else ', the other engine (--each-engine)'}",
    )
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="cxrfast-bench-") as temporary:
        options = {
            "shards": str(shards or make_phantoms(Path(temporary), scales)),
            "arch": arch,
            "seconds": seconds,
            "rounds": rounds,
            "device": device,
            "threads": threads,
        }
        todo = [
            {**options, "scale": scale, "engine": one, "micro_batch": micro_batch or preset(scale).micro_batch}
            for scale, one in product(scales, engines)
        ]
        lines, failed, left_out = _measure_all(todo, budget)
    result = StepResult(lines, failed, provenance(chosen), left_out)
    write_results(out, "bench", asdict(result), [result.table()], plot(result) if result.lines else None)
    return result


def _measure_all(todo: list[dict[str, Any]], budget: Budget) -> tuple[list[StepLine], dict[int, str], dict[str, str]]:
    """Lines; scales that failed; and what there was no time for."""
    lines: list[StepLine] = []
    failed: dict[int, str] = {}
    left_out: dict[str, str] = {}
    wall = 0.0
    for n, options in enumerate(todo):
        least = [_least(lines[-1], wall, later) if lines else 0.0 for later in todo[n:]]
        share = budget.share(least)
        if share is None:
            engine = "" if options["engine"] == "auto" else f", {options['engine']}"
            left_out[f"{options['scale']} px{engine}"] = no_time(least[0], budget.left)
            continue
        begun = budget.clock()
        try:
            lines.append(_measure_scale(options, share))
            wall = budget.clock() - begun
        except RunError as error:
            failed[options["scale"]] = str(error)
    return lines, failed, left_out


def _least(line: StepLine, wall: float, options: dict[str, Any]) -> float:
    """Seconds that a measurement takes at least, judging by another one that took `wall` seconds."""
    steps = [line.micro_batch / getattr(line, name) for name in FIGURES]
    growth = options["scale"] ** 2 * options["micro_batch"] / (line.scale**2 * line.micro_batch)
    turn = options["seconds"] / options["rounds"]
    return least_seconds(wall, len(line.rounds["train"]), steps, turn, growth)


def _measure_scale(options: dict[str, Any], budget: Budget) -> StepLine:
    """Measure one scale in a new process, with ever smaller micro-batches until one fits."""
    scale, micro_batch = options["scale"], options["micro_batch"]
    while True:
        try:
            figures = len(FIGURES) * (options["rounds"] + 1)
            with progress(f"{scale} px × {micro_batch} images", figures, unit="figures") as advance:
                given = {**options, "micro_batch": micro_batch}
                return StepLine(**in_own_process("cxrfast.bench.training.step", given, budget, advance))
        except (RunError, MemoryError) as error:
            if isinstance(error, RunError) or micro_batch == 1 or not budget.left_of_all:
                raise RunError(f"{scale} px with micro-batch {micro_batch}: {error}") from error
        log.info(f"{scale} px: micro-batch {micro_batch} does not fit, trying {micro_batch // 2}")
        micro_batch //= 2


# Results


def plot(result: StepResult) -> Figure:
    """Images/s (log) and memory against the side of the images."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    rates, memory = figure.subplots(1, 2)
    engines = list(dict.fromkeys(line.engine for line in result.lines))
    for engine in engines:
        mine = [line for line in result.lines if line.engine == engine]
        more = {"fillstyle": "none"} if engine != engines[0] else {}
        for n, (name, what) in enumerate(
            {
                "load": "loading",
                "train": "training",
                "cached": "training, cached batch",
                "validate": "validation",
            }.items()
        ):
            values = [getattr(line, name) for line in mine]
            rates.plot(
                [line.scale for line in mine],
                values,
                "o--" if name == "cached" else "o-",
                color=f"C{n}",
                label=f"{what}, {engine}" if len(engines) > 1 else what,
                **more,
            )
    lines = {line.scale: line for line in result.lines if line.engine == engines[0]}
    x = list(lines)
    rates.set(xscale="log", yscale="log", xlabel="side, px", ylabel="images/s")
    rates.legend(frameon=False)
    memory.plot(x, [line.process_bytes / 2**30 for line in lines.values()], "o-", label="process, main memory")
    if all(line.gpu_used_bytes is not None for line in lines.values()):
        memory.plot(x, [(line.gpu_used_bytes or 0) / 2**30 for line in lines.values()], "s-", label="GPU")
    memory.set(xscale="log", xlabel="side, px", ylabel="GiB", ylim=(0, None))
    memory.legend(frameon=False)
    for axes in (rates, memory):
        axes.set_xticks(x, [f"{scale}\n×{line.micro_batch}" for scale, line in lines.items()])
        axes.minorticks_off()
    return figure


if __name__ == "__main__":
    answer(lambda shards, **options: asdict(measure(Path(shards), **options)))
