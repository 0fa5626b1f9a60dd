"""`--micro-batch auto`: the largest micro-batch whose training step fits the memory of every rank.

On a GPU, steps of a throw-away model are tried, and running out of memory only means that a smaller size is tried next. On a
CPU it could end the process: there the memory of two small steps is measured and extrapolated.
"""

import gc
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from cxrfast.config import Runtime, TrainConfig
from cxrfast.distributed import World
from cxrfast.errors import RunError, is_out_of_memory
from cxrfast.machine import memory_bytes, resident_bytes
from cxrfast.models.classifier import Classifier
from cxrfast.models.networks.densenet import ARCHITECTURES
from cxrfast.models.networks.make import is_exact
from cxrfast.models.precision import autocast, compiled, use_tf32

log = logging.getLogger(__name__)

RESERVE = 0.10
"""Fraction of memory reserved for what a trial does not allocate: loader, NCCL, the buckets of DistributedDataParallel."""

CPU_MEMORY = 0.85
"""Fraction of the main memory that the local ranks may use between them."""

CPU_LARGEST = 64
"""Largest micro-batch on a CPU: more images gain nothing there."""

CPU_SIDE = 64
"""Largest side of the images that are measured on a CPU, px."""


class GpuMemory(NamedTuple):
    """Bytes in use at the peak of a training step."""

    own: int
    """Allocated by torch in this process."""
    whole: int
    """In use on the whole GPU after the step, other processes included."""


def largest_micro_batch(config: TrainConfig, runtime: Runtime, ranks: World, most: int | None = None) -> int:
    """Images of the largest micro-batch, `most` at most, whose training step fits every rank; all ranks call it.

    It divides the global batch of `config`, whose own micro-batch is ignored, into equally many per rank.
    Raises RunError if the ranks cannot share the global batch, or if not even one image fits.
    """
    device, is_gpu = ranks.device, ranks.device.type == "cuda"
    sizes = shareable(config.global_batch, ranks.size, most or (config.global_batch if is_gpu else CPU_LARGEST))
    needed = None if is_gpu else cpu_step_bytes(config, runtime)
    room = gpu_room(device) if is_gpu else max(0, cpu_room(ranks.local_size))
    tried: list[int] = []

    def fits(size: int) -> bool:
        is_enough, peak, problem = False, 0, ""
        try:
            if needed is None:
                found = gpu_step_memory(config, runtime, device, size)
                is_enough, peak = found is not None, found.own if found else 0
            else:
                peak = needed(size)
                is_enough = peak <= room
        except RunError as error:
            problem = str(error)
        votes = ranks.gather((is_enough, problem)) or []  # empty except on rank 0

        def all_fit() -> bool:
            if problems := [text for _, text in votes if text]:
                raise RunError(problems[0])
            return all(enough for enough, _ in votes)

        fit = ranks.on_first(all_fit)
        tried.append(size)
        what = f"fits into {gib(room)}, peak {gib(peak)}" if fit else f"does not fit into {gib(room)}"
        log.info(f"--micro-batch auto: {size} × {max(config.sides)} px {what}")
        return fit

    if fits(sizes[-1]):
        return sizes[-1]
    low, high = -1, len(sizes) - 1  # sizes[low] fits, sizes[high] does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(sizes[middle]) else (low, middle)

    def chosen() -> int:
        if low >= 0:
            return sizes[low]
        helps = "use a smaller scale" if runtime.recompute else "give --recompute, or use a smaller scale"
        raise RunError(
            f"--micro-batch auto: tried {', '.join(map(str, tried))} images of {max(config.sides)} px on {device}, "
            f"none fits into {gib(room)}: {helps}"
        )

    return ranks.on_first(chosen)


def shareable(global_batch: int, world: int, most: int) -> list[int]:
    """Ascending: the divisors of `global_batch`, up to `most`, whose quotient `world` ranks can share.

    Raises RunError if there are none.
    """
    if global_batch % world:
        raise RunError(
            f"--micro-batch auto: {world} ranks cannot share a global batch of {global_batch}: "
            f"choose a --global-batch that is a multiple of {world}"
        )
    share = global_batch // world
    return [size for size in range(1, min(share, most) + 1) if share % size == 0]


# Measuring


def gpu_step_memory(config: TrainConfig, runtime: Runtime, device: torch.device, images: int) -> GpuMemory | None:
    """Memory of a training step over `images` on a GPU; None if it does not fit, less `RESERVE`. Leaves nothing behind."""
    total = torch.cuda.mem_get_info(device)[1]
    torch.cuda.set_per_process_memory_fraction(gpu_room(device) / total, device)
    torch.cuda.reset_peak_memory_stats(device)
    try:
        _train(config, runtime, device, images, max(config.sides))
        torch.cuda.synchronize(device)
        return GpuMemory(torch.cuda.max_memory_allocated(device), total - torch.cuda.mem_get_info(device)[0])
    except (RuntimeError, MemoryError, ValueError) as error:
        if is_out_of_memory(error):
            return None
        raise RunError(f"a training step over {images} images failed, give --micro-batch a number: {error}") from error
    finally:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(1.0, device)
        torch.cuda.reset_peak_memory_stats(device)


def gpu_room(device: torch.device) -> int:
    """Bytes that a training step may allocate on a GPU, next to what other processes use."""
    gc.collect()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    return max(0, int(free + torch.cuda.memory_reserved(device) - RESERVE * total))


def cpu_step_bytes(config: TrainConfig, runtime: Runtime) -> Callable[[int], int]:
    """Bytes that torch allocates for a training step on a CPU, as a function of its number of images.

    Linear in images and in their area, from steps over 2 and 4 images of at most `CPU_SIDE`, unless the network takes images
    of one size alone.
    """
    scale = max(config.sides)
    side = scale if is_exact(config.arch) else min(scale, CPU_SIDE)
    two, four = (_allocated(config, runtime, images, side) for images in (2, 4))
    return lambda images: int(two + (images * (scale / side) ** 2 - 2) * (four - two) / 2)


def cpu_room(local_ranks: int) -> int:
    """Bytes that a training step of one of the ranks on this machine may allocate."""
    return int((1 - RESERVE) * CPU_MEMORY * memory_bytes() / local_ranks) - resident_bytes()


def _allocated(config: TrainConfig, runtime: Runtime, images: int, side: int) -> int:
    """Bytes that torch has allocated at the peak of a training step on the CPU."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own messages
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        _train(config, runtime, torch.device("cpu"), images, side)
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_bytes())["traceEvents"]
    return max(event["args"]["Total Allocated"] for event in events if event.get("name") == "[memory]")


def _train(config: TrainConfig, runtime: Runtime, device: torch.device, images: int, side: int) -> None:
    """Two steps of a throw-away model: the second finds gradients and Adam's moments in memory."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        outputs = len(config.labels)
        use_tf32(config.precision)
        torch.backends.cudnn.benchmark = not runtime.deterministic  # as in training: its workspaces count
        model = Classifier.of(config, recompute=runtime.recompute).to(device).train()
        forward = compiled(model, runtime.compile) if runtime.compile else model
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, fused=True)
        scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
        image = torch.zeros((images, 1, side, side), dtype=torch.uint8, device=device)
        target = torch.zeros((images, outputs), device=device)
        try:
            for _ in range(2):
                with autocast(device, config.precision):
                    logits = forward(image)
                loss = F.binary_cross_entropy_with_logits(logits.float(), target, reduction="sum")
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
        finally:
            if runtime.compile:
                torch._dynamo.reset()  # else the training is compiled for a batch of any size


def gib(n: float) -> str:
    return f"{n / 2**30:.1f} GiB"


# Running out of it


@contextmanager
def memory_explained(config: TrainConfig, ranks: World) -> Iterator[None]:
    """Turn running out of memory inside the block into a RunError that says what helps."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        if ranks.device.type == "cuda":
            total = torch.cuda.get_device_properties(ranks.device).total_memory
            peak = torch.cuda.max_memory_allocated(ranks.device)
            room = f"the GPU has {gib(total)}, training took {peak / 2**30:.1f} of them"
        else:
            room = f"the machine has {gib(memory_bytes())}, {ranks.local_size} processes share it"
        smaller = [n for n in shareable(config.global_batch, ranks.size, config.micro_batch) if n < config.micro_batch]
        helps = [f"--micro-batch {smaller[-1]}", "--micro-batch auto"] if smaller else ["a smaller --scale"]
        if config.arch in ARCHITECTURES:
            helps.append("--recompute")
        raise RunError(
            f"memory ran out with micro-batches of {config.micro_batch} images of {config.scale} px in "
            f"{config.precision} ({room}): use {' or '.join(helps)}"
        ) from error
