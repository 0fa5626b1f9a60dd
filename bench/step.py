"""`cxrfast bench step`: memory and images/s of loading, training and validation at each resolution.

Each scale is measured in a process of its own, so that memory is its own and a crash costs one line. The training loop
is the real one. A micro-batch that does not fit is halved until it does.
"""

import copy
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import product, repeat
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure as Plot
from rich.table import Table
from torch.nn.functional import binary_cross_entropy_with_logits

from cxrfast.bench.harness import (
    answer,
    in_own_process,
    interleave,
    limit_memory,
    peak_resident_bytes,
    provenance,
    rate,
    write_results,
)
from cxrfast.config import preset
from cxrfast.densenet import saved_bytes
from cxrfast.distributed import World, pick_device
from cxrfast.errors import RunError
from cxrfast.markdown import markdown_table
from cxrfast.model import Classifier, check_arch
from cxrfast.pipelines.loader import Batch, Loader
from cxrfast.pipelines.reader import Reader
from cxrfast.runs import start_run
from cxrfast.shards.build import build
from cxrfast.shards.manifest import read_set, scales_in
from cxrfast.shards.rows import read_rows
from cxrfast.synth import synth
from cxrfast.train import Place, Trainer, make_config, select_rows
from cxrfast.watch import Timed, Watch

PHANTOM_SCALES = {"cuda": [256, 512, 1024, 2048], "cpu": [64, 128, 256]}
PHANTOMS = 200


@dataclass(frozen=True, kw_only=True)
class Line:
    """Measured at one scale. Rates are images/s, medians of the rounds."""

    scale: int
    micro_batch: int
    load: float
    """The loader alone, with rotation and flip."""
    train: float
    """The training loop with real loading."""
    cached: float
    """The same loop with one batch that is on the device already."""
    bare: float
    """Forward pass, loss, backward pass and Adam on that batch, and nothing else."""
    fed: float
    """train / cached, round by round: 1 where the loop never waits for data."""
    loop: float
    """train / bare, round by round: 1 where loading and all that the loop looks after cost nothing."""
    validate: float
    saved_bytes_per_image: int
    """That autograd keeps between forward and backward, in the run's precision: what limits the micro-batch."""
    process_bytes: int
    """Peak resident memory of the whole process."""
    torch_peak_bytes: int | None
    """Peak of torch's allocator on the GPU; None on a CPU."""
    gpu_used_bytes: int | None
    """GPU memory in use at the end, DALI's included, as the driver reports it; None on a CPU."""
    engine: str
    precision: str
    rounds: dict[str, list[float]]


@dataclass(frozen=True)
class Result:
    lines: list[Line]
    failed: dict[int, str]
    """Scales that could not be measured, and why."""
    provenance: dict[str, Any]


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
) -> Result:
    """Measure every scale, write bench.json, bench.md and bench.png into `out`.

    `each_engine`: with either engine, whatever `engine` says; which of them trains faster decides what `auto` should be.
    """
    chosen = pick_device(device)
    check_arch(arch)
    with tempfile.TemporaryDirectory(prefix="cxrfast-bench-") as temporary:
        if shards is None:
            scales = scales or PHANTOM_SCALES[chosen.type]
            shards = make_phantoms(Path(temporary), scales)
        there = scales_in(shards) if read_set(shards) else []
        for scale in scales:
            Reader(shards, scale)  # says what is wrong before anything is measured
        out.mkdir(parents=True, exist_ok=True)
        lines, failed = [], {}
        for scale, one in product(scales or there, ("host", "dali") if each_engine else (engine,)):
            size = micro_batch or preset(scale).micro_batch
            options = {
                "shards": str(shards),
                "scale": scale,
                "arch": arch,
                "seconds": seconds,
                "rounds": rounds,
                "device": device,
                "engine": one,
                "threads": threads,
            }
            try:
                lines.append(_in_own_process(options, size))
            except RunError as error:
                failed[scale] = str(error)
    result = Result(lines, failed, provenance(chosen))
    _write(result, out)
    return result


def make_phantoms(folder: Path, scales: list[int]) -> Path:
    """A shard set of phantom radiographs, large enough for the largest scale."""
    synth(folder / "source", images=PHANTOMS, size=min(2048, max(256, max(scales))))
    build(folder / "source", folder / "shards", scales)
    return folder / "shards"


def _in_own_process(options: dict[str, Any], micro_batch: int) -> Line:
    """Measure one scale in a new process, with ever smaller micro-batches until one fits."""
    while True:
        try:
            return Line(**in_own_process("cxrfast.bench.step", {**options, "micro_batch": micro_batch}))
        except (RunError, MemoryError) as error:
            if isinstance(error, RunError) or micro_batch == 1:
                raise RunError(f"{options['scale']} px with micro-batch {micro_batch}: {error}") from error
        print(
            f"{options['scale']} px: micro-batch {micro_batch} does not fit, trying {micro_batch // 2}", file=sys.stderr
        )
        micro_batch //= 2


def measure(
    shards: Path,
    scale: int,
    arch: str,
    seconds: float,
    rounds: int,
    device: str,
    engine: str,
    threads: int | None,
    micro_batch: int,
) -> Line:
    """One scale, in this process."""
    ranks = World(pick_device(device))
    limit_memory(ranks.device)
    config = make_config(
        shards, scale, device=device, arch=arch, weights="none", global_batch=micro_batch, micro_batch=micro_batch
    )
    reader = Reader(shards, scale)
    rows = select_rows(read_rows(shards / "rows.parquet"), config, reader.rows)
    with tempfile.TemporaryDirectory(prefix="cxrfast-bench-") as folder:
        run = start_run(Path(folder) / "run", config, shards, rows)
        place = Place(shards=shards, runs=Path(folder), device=device, engine=engine, threads=threads, quiet=True)
        trainer = Trainer(run, ranks, Classifier(arch, len(config.labels)), reader, place)
        figures = interleave(_measurements(trainer), seconds / rounds, rounds)
    is_gpu = ranks.device.type == "cuda"
    free, total = torch.cuda.mem_get_info(ranks.device) if is_gpu else (0, 0)
    process, peak = peak_resident_bytes(), torch.cuda.max_memory_allocated(ranks.device) if is_gpu else None
    with trainer.autocast():  # after the peaks, to which it would add
        saved = saved_bytes(trainer.model, scale)
    return Line(
        scale=scale,
        micro_batch=micro_batch,
        **{name: figure.median for name, figure in figures.items()},
        fed=figures["train"].ratio(figures["cached"]),
        loop=figures["train"].ratio(figures["bare"]),
        saved_bytes_per_image=saved,
        process_bytes=process,
        torch_peak_bytes=peak,
        gpu_used_bytes=total - free if is_gpu else None,
        engine=trainer.train_loader.engine,
        precision=config.precision,
        rounds={name: figure.rounds for name, figure in figures.items()},
    )


def _measurements(trainer: Trainer) -> dict[str, Callable[[float], float]]:
    """Each takes seconds and returns images/s. Loading starts anew each time, burn-in included in the first batch's wait."""
    device = trainer.ranks.device
    rows = trainer.order.global_batches(0)[0]

    def load(seconds: float) -> float:
        batches = _endless(trainer.train_loader)
        next(batches)
        return rate(lambda: len(next(batches).row), seconds, device)

    def train(seconds: float, batches: Iterator[Batch] | None = None) -> float:
        trainer.model.train()
        source = Timed(batches or _endless(trainer.train_loader))
        watch = Watch(trainer, source, steps=2**62)

        def step() -> int:
            trainer.step(rows, source)
            trainer.consumed += len(rows)
            watch.note()
            watch.after(1)
            return len(rows)

        step()
        return rate(step, seconds, device)

    def cached(seconds: float) -> float:
        return train(seconds, repeat(next(trainer.train_loader.epoch())))

    def bare(seconds: float) -> float:
        model = copy.deepcopy(trainer.model).train()
        optimizer, batch = torch.optim.Adam(model.parameters(), fused=True), next(trainer.train_loader.epoch())
        target = trainer.target[batch.row]

        def step() -> int:
            with trainer.autocast():
                logits = model(batch.image)
            binary_cross_entropy_with_logits(logits.float(), target).backward()
            optimizer.step()
            optimizer.zero_grad()
            return len(batch.row)

        step()
        return rate(step, seconds, device)

    def validate(seconds: float) -> float:
        trainer.model.eval()
        batches = _endless(trainer.val_loader)

        @torch.inference_mode()
        def step() -> int:
            batch = next(batches)
            with trainer.autocast():
                trainer.model(batch.image)
            return len(batch.row)

        step()
        return rate(step, seconds, device)

    return {"load": load, "train": train, "cached": cached, "bare": bare, "validate": validate}


def _endless(loader: Loader) -> Iterator[Batch]:
    epoch = 0
    while True:
        yield from loader.epoch(epoch)
        epoch += 1


# Results


def to_table(result: Result) -> Table:
    where = result.provenance["gpu"] or f"{result.provenance['processor']}, {result.provenance['cores']} cores"
    table = Table(title=f"Memory and images/s by resolution ({where})")
    columns = _columns(result)
    for name in columns:
        table.add_column(name, justify="right")
    for cells in zip(*columns.values(), strict=True):
        table.add_row(*cells)
    for scale, why in result.failed.items():
        table.caption = f"{table.caption or ''}{scale} px: {why}\n"
    return table


def _columns(result: Result) -> dict[str, list[str]]:
    """Header → a cell for each line; the GPU's columns where there is one."""

    def gib(size: int | None) -> str:
        return "-" if size is None else f"{size / 2**30:.1f}"

    lines = result.lines
    columns = {
        "px": [str(line.scale) for line in lines],
        "micro-batch": [str(line.micro_batch) for line in lines],
        "load/s": [f"{line.load:,.1f}" for line in lines],
        "train/s": [f"{line.train:,.1f}" for line in lines],
        "cached/s": [f"{line.cached:,.1f}" for line in lines],
        "bare/s": [f"{line.bare:,.1f}" for line in lines],
        "fed": [f"{line.fed:.2f}" for line in lines],
        "loop": [f"{line.loop:.2f}" for line in lines],
        "validate/s": [f"{line.validate:,.1f}" for line in lines],
        "saved MiB/image": [f"{line.saved_bytes_per_image / 2**20:,.1f}" for line in lines],
        "process GiB": [gib(line.process_bytes) for line in lines],
        "torch GiB": [gib(line.torch_peak_bytes) for line in lines],
        "GPU GiB": [gib(line.gpu_used_bytes) for line in lines],
        "engine": [line.engine for line in lines],
        "precision": [line.precision for line in lines],
    }
    return (
        columns if result.provenance["gpu"] else {k: v for k, v in columns.items() if k not in ("torch GiB", "GPU GiB")}
    )


def _write(result: Result, out: Path) -> None:
    columns = _columns(result)
    failed = "".join(f"\n{scale} px: {why}\n" for scale, why in result.failed.items())
    text = markdown_table(list(columns), zip(*columns.values(), strict=True)) + failed
    write_results(out, "bench", asdict(result), text, plot(result) if result.lines else None)


def plot(result: Result) -> Plot:
    """Images/s (log) and memory against the side of the images."""
    figure = Plot(figsize=(9, 3.6), layout="constrained")
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
