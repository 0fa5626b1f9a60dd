"""The measurements of `cxrfast bench step`: a shard set, a scale and a micro-batch come in, rates and memory go out.

`measure` runs in its own process, whose memory it reports. The training loop is the real one.
"""

import copy
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, nullcontext
from dataclasses import replace
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from cxrfast.bench.data import LongOrder, endless
from cxrfast.bench.harness import (
    Budget,
    Measurement,
    gpu_used_bytes,
    interleave,
    limit_memory,
    peak_resident_bytes,
    rate,
    saved_bytes,
)
from cxrfast.config import Runtime
from cxrfast.distributed import World, pick_device
from cxrfast.models.classifier import Classifier
from cxrfast.models.networks.factories import trusted
from cxrfast.models.precision import resolve_precision
from cxrfast.pipelines.loader import Batch, Loader
from cxrfast.pipelines.reader import Reader
from cxrfast.runs.run import Run
from cxrfast.training.monitor import Timed
from cxrfast.training.setup import make_config, select_rows
from cxrfast.training.trainer import Trainer

FIGURES = ("load", "train", "cached", "bare", "validate")


def measure(
    runtime: Runtime, scale: int, arch: str, micro_batch: int, seconds: float, rounds: int, budget: Budget
) -> dict[str, Any]:
    """A line of `step.COLUMNS`, measured in this process with `seconds` per turn.

    The run gets a new folder in `runtime.runs`. Rates are images/s, medians of the rounds; bytes of the GPU are None on a CPU.
    """
    ranks = World(pick_device(runtime.device))
    limit_memory(ranks.device)
    runtime = replace(runtime, runs=Path(tempfile.mkdtemp(dir=runtime.runs)))
    trainer = make_trainer(runtime, scale, arch, micro_batch, ranks)
    figures = interleave(measurements(trainer, micro_batch), seconds, rounds, budget)
    gpu_used, process = gpu_used_bytes(ranks.device), peak_resident_bytes()
    peak = torch.cuda.max_memory_allocated(ranks.device) if gpu_used else None
    with trainer.autocast():  # after the peaks, to which it would add
        saved = saved_bytes(trainer.model, scale)
    return {
        "scale": scale,
        "micro_batch": micro_batch,
        **{name: figures[name].median for name in FIGURES[:-1]},
        "fed": figures["train"].ratio(figures["cached"]),
        "loop": figures["train"].ratio(figures["bare"]),
        "validate": figures["validate"].median,
        "saved_bytes_per_image": saved,
        "process_bytes": process,
        "torch_peak_bytes": peak,
        "gpu_used_bytes": gpu_used,
        "engine": trainer.train_loader.engine,
        "precision": trainer.config.precision,
        "rounds": {name: figure.rounds for name, figure in figures.items()},
    }


def make_trainer(runtime: Runtime, scale: int, arch: str, micro_batch: int, ranks: World) -> Trainer:
    """A trainer whose steps have one micro-batch and whose epochs of training and validation hardly ever end."""
    # batches of 1, since there may be fewer rows than `micro_batch`: the orders below say how many images a step has
    config = make_config(
        runtime.shards,
        scale,
        device=runtime.device,
        arch=arch,
        weights="none",
        global_batch=1,
        micro_batch=1,
        precision=resolve_precision("auto", ranks.device),
    )
    reader = Reader(runtime.shards, scale)
    rows = select_rows(reader.shard_set.rows(), config, reader.rows)
    run = Run.start(runtime.runs / "run", config, runtime.shards, rows)
    with trusted(arch):
        model = Classifier.of(config)
    trainer = Trainer(run, ranks, model, reader, runtime)
    trainer.train_loader.order = LongOrder(rows=trainer.order.rows, micro_batch=micro_batch)
    trainer.val_loader.order = LongOrder(rows=trainer.val_rows, micro_batch=micro_batch)
    return trainer


Step = Callable[[], int]
"""Takes a step and returns its number of images."""


def measurements(trainer: Trainer, micro_batch: int) -> dict[str, Measurement]:
    """One measurement for each of FIGURES. A pipeline starts before the clock does, and runs on until it stops."""
    with closing(endless(trainer.train_loader)) as batches:
        kept = next(batches)

    def timed(start: Callable[[Trainer, Iterator[Batch]], Step], loader: Loader | None = None) -> Measurement:
        """The rate of the steps that `start` makes of a loader's batches, or of the one kept on the device."""

        def measure(seconds: float) -> float:
            with closing(endless(loader)) if loader is not None else nullcontext(repeat(kept)) as batches:
                step = start(trainer, batches)
                step()  # to warm up
                return rate(step, seconds, trainer.ranks.device)

        return measure

    train = partial(train_steps, np.resize(trainer.order.rows, micro_batch))
    return {
        "load": timed(load_steps, trainer.train_loader),
        "train": timed(train, trainer.train_loader),
        "cached": timed(train),
        "bare": timed(bare_steps),
        "validate": timed(validation_steps, trainer.val_loader),
    }


def load_steps(trainer: Trainer, batches: Iterator[Batch]) -> Step:
    next(batches), next(batches)
    return lambda: len(next(batches).row)


def train_steps(rows: np.ndarray, trainer: Trainer, batches: Iterator[Batch]) -> Step:
    """Steps of the trainer's own loop; `rows` are those of a step."""
    trainer.model.train()
    source = Timed(batches, trainer.ranks.device)
    trainer.monitor.start_epoch(steps=2**62, images=trainer.counters.consumed)

    def step() -> int:
        trainer.step(rows, source)
        trainer.counters.consumed += len(rows)
        trainer.look(source)
        trainer.after_step(1)
        return len(rows)

    return step


def bare_steps(trainer: Trainer, batches: Iterator[Batch]) -> Step:
    """Forward pass, loss, backward pass and Adam, on a copy of the model."""
    model = copy.deepcopy(trainer.model).train()
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    batch = next(batches)
    target = trainer.targets.target[batch.row]

    def step() -> int:
        with trainer.autocast():
            logits = model(batch.image)
        binary_cross_entropy_with_logits(logits.float(), target).backward()
        optimizer.step()
        optimizer.zero_grad()
        return len(batch.row)

    return step


def validation_steps(trainer: Trainer, batches: Iterator[Batch]) -> Step:
    trainer.model.eval()

    @torch.inference_mode()
    def step() -> int:
        batch = next(batches)
        with trainer.autocast():
            trainer.model(batch.image)
        return len(batch.row)

    return step
