"""Checks of training: gradients, a process group, synchronisations, compilation and memory are what they should be.

A device, and a reader where images are needed, come in; each check returns what it measured, in words, or raises
RunError saying what is wrong. A process group and what fills the memory run in processes of their own.
"""

import copy
import gc
import logging
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from cxrfast.config import Runtime, TrainConfig, preset
from cxrfast.distributed import World, parallel
from cxrfast.errors import RunError
from cxrfast.machine import memory_bytes, usable_cores
from cxrfast.models.classifier import Classifier
from cxrfast.models.densenet import DenseNet, Shape
from cxrfast.models.precision import autocast, compiled, resolve_precision, use_tf32, without_tf32
from cxrfast.pipelines.loader import Loader
from cxrfast.pipelines.order import EvalOrder
from cxrfast.pipelines.reader import Reader
from cxrfast.runs.folder import RunFolder
from cxrfast.runs.run import Run
from cxrfast.training.loss import masked_bce_sum
from cxrfast.training.micro_batch import CPU_MEMORY, Step, in_own_process
from cxrfast.training.trainer import Trainer

ARCH = "densenet121"

LIMITS = {"fp32": (1e-4, 1e-3), "tf32": (2e-3, 0.1), "bf16": (1e-2, 0.5), "fp16": (1e-2, 0.5)}
"""Relative error of the loss, and of the smooth network's gradient, that each precision may have.

On a CPU they are 1e-6 and 1e-5 in fp32, 2e-3 and 0.2 in bf16; 2e-4 and 0.04 where operands are rounded as TF32 does.
"""

IMAGES = 8
"""Of the batch whose gradients are compared; copies of fewer would leave BatchNorm nothing to normalise."""

SCALING = 1024
"""A loss is multiplied by it for the backward pass, so that small gradients are not zero in fp16."""

TINY = Shape(4, (1, 1), 8)
"""A DenseNet with all that a large one consists of."""

SAME = 1e-3
"""Relative difference of gradients that are computed in two ways in float32."""

GROUP_SECONDS = 60.0
"""Until a process group that does not answer is given up."""

WARM_UP, STEPS = 2, 2
"""Training steps before those in which synchronisations are counted, and these."""

MOST = 1000
"""Rows of the training whose steps these are, at most."""


# Gradients


def gradients(reader: Reader, device: torch.device) -> str:
    """Losses and gradients of 8 images on the device agree with float32 on the CPU; see LIMITS.

    Gradients are those of a network whose ReLUs are smooth: where rounding moves an input of a ReLU across zero, its
    gradient jumps, so that float32 gradients of DenseNet121 are 1 to 4 % off float64 ones. On a CPU, activations are
    recomputed, and fp32 runs on one thread, so that it is not compared with itself.
    """
    gpu = device.type == "cuda"
    image = _eight(reader, 256 if gpu else 64)
    precisions = ["fp32", "tf32"] if gpu else ["fp32"]
    if (lower := resolve_precision("auto", device)) != "fp32":
        precisions.append(lower)
    with without_tf32():
        expected = _loss_and_gradient(image, torch.device("cpu"), "fp32", checkpoint=False)
        measured, wrong = [], []
        for precision in precisions:
            with _threads(1) if precision == "fp32" and not gpu else nullcontext():
                found = _loss_and_gradient(image, device, precision, checkpoint=not gpu)
            errors = abs(found[0] / expected[0] - 1), relative_error(found[1], expected[1])
            words = f"{precision}: loss off by {errors[0]:.0e}, gradient by {errors[1]:.0e}"
            measured.append(words)
            if not all(error <= limit for error, limit in zip(errors, LIMITS[precision], strict=True)):
                loss, gradient = LIMITS[precision]
                wrong.append(f"{words} (at most {loss:g} and {gradient:g})")
    if wrong:
        raise RunError(
            "; ".join(wrong) + f" of float32 on the CPU: torch or a library under it computes wrongly on {device}"
        )
    return "; ".join(measured)


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm of what was expected; NaN where either is not finite."""
    return ((found - expected).norm() / expected.norm()).item()


def _eight(reader: Reader, side: int) -> torch.Tensor:
    """uint8 (8, 1, side, side) on the CPU: of 32 px, BatchNorm would see too few pixels for bf16 to be near float32."""
    order = EvalOrder(rows=reader.rows[:IMAGES], micro_batch=IMAGES)
    with closing(Loader(reader, order, scale=side, engine="host")) as loader:
        return next(iter(loader)).image


def _loss_and_gradient(
    image: torch.Tensor, device: torch.device, precision: str, checkpoint: bool
) -> tuple[float, torch.Tensor]:
    """Loss of the real network, and gradient of the smooth one: float64 (parameters,) on the CPU. Same weights each time."""
    use_tf32(precision)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Classifier(ARCH, 14, checkpoint)
        target = torch.randint(0, 2, (len(image), 14)).float().to(device)
    image, mask = image.to(device), torch.ones_like(target, dtype=torch.bool)

    def loss_of(model: nn.Module) -> torch.Tensor:
        with autocast(device, precision):
            logits = model.to(device)(image)
        return masked_bce_sum(logits.float(), target, mask) / target.numel()

    with torch.no_grad():
        loss = loss_of(copy.deepcopy(model)).item()
    smooth = smoothed(model)
    (SCALING * loss_of(smooth)).backward()
    parts = [p.grad.flatten().cpu().double() / SCALING for p in smooth.parameters() if p.grad is not None]
    return loss, torch.cat(parts)


def smoothed(model: nn.Module) -> nn.Module:
    """`model` itself, each of its ReLU modules replaced by SiLU, which is near it and has no kink."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.ReLU):
                setattr(parent, name, nn.SiLU())
    return model


@contextmanager
def _threads(n: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# A process group


def process_group(device: torch.device) -> str:
    """A process group of one rank, in a process of its own, does all that a training asks of one."""
    command = [sys.executable, "-m", "cxrfast.doctor.training", str(device)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=GROUP_SECONDS)
    except subprocess.TimeoutExpired:
        raise RunError(
            f"no answer within {GROUP_SECONDS:g} s: run `{' '.join(command)}` with NCCL_DEBUG=INFO to see where it waits"
        ) from None
    if done.returncode:
        tail = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise RunError(f"a group of one rank on {device} fails: {tail}")
    return done.stdout.strip()


def one_rank(device: torch.device) -> str:
    """Make a group of one rank, use it as a training does, and leave it. Raises RunError for a wrong answer."""
    backend, timeout = "nccl" if device.type == "cuda" else "gloo", timedelta(seconds=GROUP_SECONDS)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    store = dist.TCPStore("127.0.0.1", 0, world_size=1, is_master=True, timeout=timeout)
    at = device if device.type == "cuda" else None
    dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout, device_id=at)
    votes = torch.tensor([3, 1])
    group = dist.new_group(backend="gloo", timeout=timeout)
    work: Any = dist.all_reduce(votes, dist.ReduceOp.MAX, group=group, async_op=True)  # type: ignore[arg-type]
    work.wait()
    _same("votes", votes.tolist(), [3, 1])
    model = _tiny(device)
    difference = max(_distributed_difference(model, micro_batches) for micro_batches in (1, 2))
    gathered: list[Any] = [None]
    dist.gather_object({"loss": 0.5}, gathered)
    _same("gather_object", gathered, [{"loss": 0.5}])
    told = ["start"]
    dist.broadcast_object_list(told, device=device)
    _same("broadcast_object_list", told, ["start"])
    for buffer in model.buffers():
        before = buffer.clone()
        dist.broadcast(buffer, src=0)
        _same("broadcast", torch.equal(buffer, before), True)
    dist.barrier()
    gc.collect()
    dist.destroy_process_group()
    return f"{backend}: gradients as without a group (within {difference:.0e}), votes, objects, buffers, barrier"


def _same(what: str, found: object, expected: object) -> None:
    if found != expected:
        raise RunError(f"{what} gives {found}, not {expected}")


def _distributed_difference(model: nn.Module, micro_batches: int) -> float:
    """Relative difference of a gradient under DistributedDataParallel, all but the last micro-batch not synchronised.

    Raises RunError if it is above SAME.
    """
    ddp = parallel(copy.deepcopy(model))
    found = _accumulated(ddp, micro_batches, ddp.no_sync)[1]
    difference = relative_error(found, _accumulated(copy.deepcopy(model), micro_batches)[1])
    if not difference <= SAME:
        raise RunError(
            f"the gradient of {micro_batches} micro-batches differs by {difference:.0e} under DistributedDataParallel"
        )
    return difference


def _tiny(device: torch.device) -> nn.Module:
    """A small DenseNet in training mode, of the same weights each time."""
    use_tf32("fp32")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return DenseNet(TINY, 3).to(device).to(memory_format=torch.channels_last)


def _accumulated(
    model: nn.Module, micro_batches: int, unsynced: Callable[[], Any] = nullcontext
) -> tuple[float, torch.Tensor]:
    """Summed loss and gradient, float64 (parameters,) on the CPU, of micro-batches of 4 images of 32 px."""
    device, total = next(model.parameters()).device, 0.0
    for i in range(micro_batches):
        image = torch.rand((4, 3, 32, 32), generator=torch.Generator().manual_seed(i)).to(device)
        with nullcontext() if i == micro_batches - 1 else unsynced():
            loss = model(image.contiguous(memory_format=torch.channels_last)).square().sum()
            loss.backward()
        total += loss.item()
    return total, torch.cat([p.grad.flatten().cpu().double() for p in model.parameters() if p.grad is not None])


# Synchronisations


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
            f"{len(found)} in {STEPS} steps, which cost speed and no correctness: {'; '.join(sorted(set(found)))}"
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
    config = TrainConfig(
        set_id=reader.info.id,
        scale=reader.scale,
        labels=tuple(reader.info.labels),
        weights="none",
        global_batch=2 * size,
        micro_batch=size,
        learning_rate=1e-4,
        precision=resolve_precision("auto", device),
    )
    benchmark = torch.backends.cudnn.benchmark
    try:
        with without_tf32(), tempfile.TemporaryDirectory(prefix="cxrfast-doctor-") as runs:
            runtime = Runtime(shards=reader.folder, runs=Path(runs), device=str(device), quiet=True)
            run = Run.start(
                RunFolder.of(runtime.runs, config.arch, config.scale, config.fold).folder, config, reader.folder, table
            )
            model = Classifier(config.arch, len(config.labels))
            trainer = Trainer(run, World(device), model, reader, runtime)
            with closing(trainer.train_loader), closing(trainer.val_loader):
                yield trainer
    finally:
        torch.backends.cudnn.benchmark = benchmark


# Compilation


def compiled_step(device: torch.device) -> str:
    """Two accumulated micro-batches of a small DenseNet give the same loss and gradient compiled and eager."""
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it warns where there is no GPU
    with without_tf32():
        loss, gradient = _accumulated(_tiny(device), 2)
        found, compiled_gradient = _accumulated(compiled(_tiny(device), "default"), 2)
    errors = abs(found / loss - 1), relative_error(compiled_gradient, gradient)
    words = f"loss off by {errors[0]:.0e}, gradient by {errors[1]:.0e}"
    if not max(errors) <= SAME:
        raise RunError(f"{words} when compiled (at most {SAME:g}): train without --compile")
    return f"{words} (at most {SAME:g})"


def no_compiler() -> str:
    """Why torch.compile cannot work here; empty if nothing is known to be lacking."""
    compilers = [os.environ.get("CXX") or os.environ.get("CC"), "g++", "clang++", "gcc", "clang"]
    if not any(name and shutil.which(name) for name in compilers):
        return "no C++ compiler, so --compile cannot be used"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "Python's headers are not installed (Python.h), so --compile cannot be used"
    return ""


# Memory


def memory(reader: Reader, device: torch.device) -> str:
    """One micro-batch of the scale's preset fits the memory, with a reserve for the loader; in a process of its own."""
    gpu = device.type == "cuda"
    Classifier(ARCH, 1).check_size(reader.scale)  # says what is wrong with images that are too small
    size = preset(reader.scale).micro_batch
    precision = resolve_precision("auto", device)
    if gpu:
        torch.cuda.empty_cache()
    there = torch.cuda.get_device_properties(device).total_memory if gpu else memory_bytes()
    step = Step(
        arch=ARCH,
        scale=reader.scale,
        outputs=len(reader.info.labels),
        precision=precision,
        checkpoint=False,
        compile=None,
        device=str(device),
        memory=there if gpu else int(CPU_MEMORY * there),
        threads=usable_cores(),
    )
    trial = in_own_process(step, size)
    what = f"{ARCH}, {size} × {reader.scale} px, {precision}"
    if not trial.has_room:
        raise RunError(f"{what} does not fit {_gib(there)}: train with a smaller --micro-batch, or with --recompute")
    if gpu:
        return f"{what}: torch's peak {_gib(trial.own)}, whole GPU {_gib(trial.whole)} of {_gib(there)}"
    return f"{what}: {_gib(trial.own)} more at the peak, {_gib(trial.peak)} resident of {_gib(there)}"


def _gib(n: int) -> str:
    return f"{n / 2**30:.1f} GiB"


if __name__ == "__main__":
    try:
        print(one_rank(torch.device(sys.argv[1])))
    except Exception as error:  # whatever it is, the process that asked tells it
        sys.exit(f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}")
