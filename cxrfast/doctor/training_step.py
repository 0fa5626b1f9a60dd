"""Checks of a training step: it never makes the host wait for the GPU, and it fits the memory.

A reader and a device come in; each check returns what it measured, in words, or raises RunError saying what is wrong.
"""

import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import torch

from cxrfast.config import Runtime, TrainConfig, preset
from cxrfast.distributed import World
from cxrfast.doctor.gradients import ARCH
from cxrfast.errors import RunError
from cxrfast.machine import memory_bytes, resident_bytes
from cxrfast.models.classifier import Classifier
from cxrfast.models.precision import resolve_precision, without_tf32
from cxrfast.pipelines.reader import Reader
from cxrfast.runs.folder import RunFolder
from cxrfast.runs.run import Run
from cxrfast.training.micro_batch import cpu_room, cpu_step_bytes, gib, gpu_step_memory
from cxrfast.training.trainer import Trainer

WARM_UP = 2
"""Training steps before those in which synchronisations are counted."""

STEPS = 2
"""Training steps in which synchronisations are counted."""

MOST = 1000
"""Most rows used by the training that takes these steps."""


def synchronisations(reader: Reader, device: torch.device) -> str:
    """No training step makes the host wait for the GPU; DALI's own waiting is not seen."""
    with new_trainer(reader, device) as trainer:
        batches = trainer.train_loader.epoch(0)
        steps = iter(trainer.order.global_batches(0))

        def step() -> None:
            trainer.step(next(steps), batches)

        for _ in range(WARM_UP):
            step()
        torch.cuda.synchronize(device)
        found = waiting_in(step, STEPS)
        batches.close()
    if found:
        raise RunError(
            f"{len(found)} in {STEPS} steps, which cost speed, not correctness: {'; '.join(sorted(set(found)))}"
        )
    return f"none in {STEPS} steps of {trainer.config.global_batch} images, engine {trainer.train_loader.engine}"


def waiting_in(step: Callable[[], None], steps: int) -> list[str]:
    """What torch says of each synchronisation with a GPU in `steps` calls of `step`."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            for _ in range(steps):
                step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    messages = [str(warning.message).splitlines()[0] for warning in seen]
    return [message for message in messages if "synchronizing" in message]


def new_config(reader: Reader, device: torch.device, size: int) -> TrainConfig:
    """Configuration of a training with two micro-batches of `size` images a step."""
    return TrainConfig(
        set_id=reader.info.id,
        scale=reader.scale,
        labels=tuple(reader.info.labels) or ("unlabelled",),
        weights="none",
        global_batch=2 * size,
        micro_batch=size,
        learning_rate=1e-4,
        precision=resolve_precision("auto", device),
    )


@contextmanager
def new_trainer(reader: Reader, device: torch.device) -> Iterator[Trainer]:
    """A training on some rows of the set, two micro-batches a step, its run in a temporary folder.

    Raises RunError for a set with too few rows.
    """
    table = reader.shard_set.rows()
    table = table[table["row"].isin(reader.rows[:MOST])].reset_index(drop=True)
    size = min(8, (len(table) - 1) // (2 * (WARM_UP + STEPS)))
    if not size:
        raise RunError(f"{len(table)} images are too few for {WARM_UP + STEPS} steps: give a larger set with --shards")
    table["part"] = ["val"] + ["train"] * (len(table) - 1)
    config = new_config(reader, device, size)
    table = table.assign(**{name: np.float32(0) for name in config.labels if name not in table})  # of an unlabelled set
    benchmark = torch.backends.cudnn.benchmark
    try:
        with without_tf32(), tempfile.TemporaryDirectory(prefix="cxrfast-doctor-") as runs:
            runtime = Runtime(shards=reader.folder, runs=Path(runs), device=str(device))
            folder = RunFolder.of(runtime.runs, config.arch, config.scale, config.fold).folder
            run = Run.start(folder, config, reader.folder, table)
            model = Classifier(config.arch, len(config.labels))
            trainer = Trainer(run, World(device), model, reader, runtime)
            with closing(trainer.train_loader), closing(trainer.val_loader):
                yield trainer
    finally:
        torch.backends.cudnn.benchmark = benchmark


def memory(reader: Reader, device: torch.device) -> str:
    """One micro-batch of the scale's preset fits the memory, with a reserve for the loader."""
    gpu = device.type == "cuda"
    Classifier(ARCH, 1).check_size(reader.scale)  # says what is wrong with images that are too small
    size = preset(reader.scale).micro_batch
    config, runtime = new_config(reader, device, size), Runtime(shards=reader.folder, runs=Path())
    there = torch.cuda.get_device_properties(device).total_memory if gpu else memory_bytes()
    with without_tf32():
        trial = gpu_step_memory(config, runtime, device, size) if gpu else None
        needed = 0 if gpu else cpu_step_bytes(config, runtime)(size)
    what = f"{ARCH}, {size} × {reader.scale} px, {config.precision}"
    if trial is None if gpu else needed > cpu_room(1):
        raise RunError(f"{what} does not fit {gib(there)}: train with a smaller --micro-batch, or with --recompute")
    if trial:
        return f"{what}: torch's peak {gib(trial.own)}, whole GPU {gib(trial.whole)} of {gib(there)}"
    return f"{what}: about {gib(needed)} more at the peak, {gib(needed + resident_bytes())} resident of {gib(there)}"
