"""`--micro-batch auto`: the largest micro-batch whose training step fits the memory of the device.

In: what decides that memory (architecture, scale, precision, …) and the batch sizes that the ranks can share. Out: one
of these sizes, measured with real steps, each in a process of its own, so that running out of memory costs that process
alone and leaves nothing behind on the device. The answer is remembered. No process group may be needed or made here.
"""

import fcntl
import json
import logging
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch.nn import functional as F

from cxrfast import __version__
from cxrfast.config import TrainConfig
from cxrfast.distributed import World, pick_device
from cxrfast.errors import CxrfastError, RunError, is_out_of_memory
from cxrfast.files import write_json
from cxrfast.machine import memory_bytes, processor, usable_cores
from cxrfast.models import densenet
from cxrfast.models.classifier import Classifier, check_arch
from cxrfast.models.precision import autocast, compiled, resolve_precision, use_tf32

log = logging.getLogger(__name__)

RESERVE = 0.10
"""Fraction of memory reserved for what a trial does not allocate: loader, NCCL, the buckets of DistributedDataParallel."""

CPU_MEMORY = 0.85
"""Fraction of the main memory that the local ranks may use between them."""

CPU_LARGEST = 64
"""Largest micro-batch tried on a CPU: more images gain nothing there."""

KILLED = {-signal.SIGKILL, -signal.SIGABRT, -signal.SIGSEGV, -signal.SIGBUS}
"""How a trial ends that the memory killer took, or whose libraries do not expect a failed allocation."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """A training step whose largest micro-batch is searched for."""

    arch: str
    scale: int
    """Side of the images, px; the largest one where it changes."""
    outputs: int
    precision: str
    recompute: bool
    """Recompute activations in the backward pass."""
    compile: str | None
    """torch.compile's mode."""
    device: str
    memory: int
    """Bytes that the process may use, the reserve not yet taken off; on a GPU, at most what it has."""
    threads: int


@dataclass(frozen=True)
class Trial:
    """Result of trying training steps on a number of images."""

    has_room: bool
    """Whether the memory was enough."""
    peak: int = 0
    """Bytes: of the GPU, other processes and the context included; on a CPU, resident."""
    shared: bool = False
    """Another process held a good part of the GPU meanwhile."""
    own: int = 0
    """Bytes of the steps alone: on a GPU, torch's peak; on a CPU, by how much resident memory grew."""
    whole: int = 0
    """Bytes in use on the whole GPU after the steps, by all processes; 0 on a CPU."""


def largest_micro_batch(
    *,
    arch: str,
    scale: int,
    outputs: int,
    global_batch: int,
    precision: str = "auto",
    recompute: bool = False,
    compile: str | None = None,
    device: str = "auto",
    world: int | None = None,
    local_ranks: int | None = None,
    memory: int | None = None,
) -> int:
    """The largest divisor of `global_batch` images that fits the device and gives all ranks equally many micro-batches.

    Call it before the process group is made, on every rank: the first of a machine measures, the others wait for its
    answer. Ranks of different machines may get different ones: take the smallest. SyncBatchNorm needs no other memory.

    `world`, `local_ranks`: processes of the training and of this machine; default: as torchrun says. `memory`: bytes a
    process may use; default: all of the GPU, or this process's part of the main memory. Raises RunError if not one
    image fits, or if the ranks cannot share the global batch.
    """
    check_arch(arch)
    world = world or int(os.environ.get("WORLD_SIZE", 1))
    local_ranks = local_ranks or int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    chosen = pick_device(device, int(os.environ.get("LOCAL_RANK", 0)))
    is_gpu = chosen.type == "cuda"
    sizes = shareable(global_batch, world, global_batch if is_gpu else CPU_LARGEST)
    properties = torch.cuda.get_device_properties(chosen) if is_gpu else None
    step = Step(
        arch=arch,
        scale=scale,
        outputs=outputs,
        precision=resolve_precision(precision, chosen),
        recompute=recompute,
        compile=compile,
        device=str(chosen),
        memory=memory or (properties.total_memory if properties else int(CPU_MEMORY * memory_bytes() / local_ranks)),
        threads=max(1, usable_cores() // local_ranks),
    )
    known = asdict(step) | {
        "device": properties.name if properties else processor(),
        "global_batch": global_batch,
        "world": world,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cxrfast": __version__,
    }
    known["checkpoint"] = known.pop("recompute")  # its name in files that were written before
    return _remembered(json.dumps(known, sort_keys=True), lambda: _search(step, sizes))


def shareable(global_batch: int, world: int, most: int) -> list[int]:
    """Ascending: the divisors of `global_batch`, up to `most`, whose quotient `world` ranks can share.

    Raises RunError if there is none.
    """
    if global_batch % world:
        raise RunError(
            f"--micro-batch auto: {world} ranks cannot share a global batch of {global_batch}: "
            f"choose a --global-batch that is a multiple of {world}"
        )
    share = global_batch // world
    return [size for size in range(1, min(share, most) + 1) if share % size == 0]


# Measuring


def _search(step: Step, sizes: list[int]) -> tuple[int, bool]:
    """The largest of `sizes` that fits, and whether that is worth remembering. The largest is tried first, then halves."""
    tried: dict[int, Trial] = {}

    def has_room(size: int) -> bool:
        trial = tried[size] = try_in_own_process(step, size)
        peak = f"fits, peak {trial.peak / 2**30:.1f} GiB" if trial.has_room else "does not fit"
        log.info(f"--micro-batch auto: {size} × {step.scale} px {peak} ({step.memory / 2**30:.1f} GiB there)")
        return trial.has_room

    if has_room(sizes[-1]):
        return sizes[-1], not tried[sizes[-1]].shared
    low, high = -1, len(sizes) - 1  # sizes[low] has room, sizes[high] has not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if has_room(sizes[middle]) else (low, middle)
    if low < 0:
        raise RunError(
            f"--micro-batch auto: tried {', '.join(map(str, tried))} images of {step.scale} px on {step.device}, none fits "
            f"into {step.memory / 2**30:.1f} GiB less {RESERVE:.0%}: "
            + ("use a smaller scale" if step.recompute else "give --recompute, or use a smaller scale")
        )
    return sizes[low], not any(trial.shared for trial in tried.values())


def try_in_own_process(step: Step, size: int) -> Trial:
    """Try `size` images in a new process. Raises RunError if it fails for another reason than memory."""
    argument = json.dumps({"step": asdict(step), "size": size, "parent": os.getpid()})
    done = subprocess.run(
        [sys.executable, "-m", "cxrfast.training.micro_batch", argument], capture_output=True, text=True
    )
    if done.returncode == 0:
        return Trial(**json.loads(done.stdout.splitlines()[-1]))
    tail = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    if done.returncode in KILLED or is_out_of_memory(RuntimeError(tail)):
        return Trial(has_room=False)
    raise RunError(f"--micro-batch auto: the trial of {size} images failed, give a number instead: {tail}")


def try_step(step: Step, size: int) -> Trial:
    """Take training steps over `size` images in this process, which may use 90 % of the memory and must not be reused afterwards.

    Raises RuntimeError or MemoryError where the memory does not suffice.
    """
    device = torch.device(step.device)
    room, shared = int((1 - RESERVE) * step.memory), False
    if device.type == "cuda":
        torch.cuda.set_device(device)
        free, total = torch.cuda.mem_get_info(device)
        others = total - free  # and the context of this process
        shared = others > RESERVE * total
        torch.cuda.set_per_process_memory_fraction(min(1.0, max(0, room - others) / total), device)
    else:
        torch.set_num_threads(step.threads)
        resource.setrlimit(resource.RLIMIT_DATA, (room, room))
    before = _peak_resident()
    _train(step, size, device)
    if device.type == "cuda":
        free, own = torch.cuda.mem_get_info(device)[0], torch.cuda.max_memory_allocated(device)
        return Trial(True, others + own, shared, own, total - free)
    peak = _peak_resident()
    return Trial(True, peak, own=peak - before)


def _peak_resident() -> int:
    """Bytes: the most that this process has been resident with."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _train(step: Step, size: int, device: torch.device) -> None:
    """Two micro-batches and a step after the first: the second finds gradients and Adam's moments in memory."""
    more: dict[str, Any] = {"recompute": True} if step.recompute else {}
    use_tf32(step.precision)
    torch.backends.cudnn.benchmark = True  # as in training: its workspaces count
    model = Classifier(step.arch, step.outputs, **more).to(device).train()
    forward = compiled(model, step.compile) if step.compile else model
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, fused=device.type == "cuda")
    scaler = torch.amp.GradScaler(device.type, enabled=step.precision == "fp16")
    image = torch.zeros((size, 1, step.scale, step.scale), dtype=torch.uint8, device=device)
    target = torch.zeros((size, step.outputs), device=device)
    for _ in range(2):
        with autocast(device, step.precision):
            logits = forward(image)
        loss = F.binary_cross_entropy_with_logits(logits.float(), target, reduction="none").sum()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# Running out of it


@contextmanager
def memory_explained(config: TrainConfig, ranks: World) -> Iterator[None]:
    """Turn running out of memory in here into a RunError that says what helps."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        if ranks.device.type == "cuda":
            total = torch.cuda.get_device_properties(ranks.device).total_memory
            peak = torch.cuda.max_memory_allocated(ranks.device)
            room = f"the GPU has {total / 2**30:.1f} GiB, training took {peak / 2**30:.1f} of them"
        else:
            room = f"the machine has {memory_bytes() / 2**30:.1f} GiB, {ranks.local_size} processes share it"
        smaller = [n for n in shareable(config.global_batch, ranks.size, config.micro_batch) if n < config.micro_batch]
        helps = [f"--micro-batch {smaller[-1]}", "--micro-batch auto"] if smaller else ["a smaller --scale"]
        if config.arch in densenet.ARCHITECTURES:
            helps.append("--recompute")
        raise RunError(
            f"memory ran out with micro-batches of {config.micro_batch} images of {config.scale} px in "
            f"{config.precision} ({room}): use {' or '.join(helps)}"
        ) from error


# Remembering


def cache_file() -> Path:
    """Where answers are kept: a JSON object, from what was asked to images."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(home) / "cxrfast" / "micro-batch.json"


def _remembered(key: str, search: Callable[[], tuple[int, bool]]) -> int:
    """The answer known under `key`, else that of `search`, by one process at a time. A useless cache is only warned of."""
    path = cache_file()
    with _lock(path.with_suffix(".lock")) or nullcontext() as lock:  # the kernel releases it if this process dies
        answers = _read(path) if lock else {}
        if key in answers:
            return answers[key]
        size, lasting = search()
        if lock and lasting:
            try:
                write_json(path, answers | {key: size})
                log.info(f"--micro-batch auto: {size}, remembered in {path}")
            except OSError as error:
                _warn(path, error)
        return size


def _lock(path: Path) -> IO[bytes] | None:
    """Wait for the lock on this file; it is held until the file is closed. None where that cannot be."""
    file = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "ab")  # noqa: SIM115
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as error:
        if file:
            file.close()
        _warn(path, error)
        return None
    return file


def _read(path: Path) -> dict[str, int]:
    try:
        answers = json.loads(path.read_bytes())
        if not isinstance(answers, dict) or not all(type(size) is int and size > 0 for size in answers.values()):
            raise ValueError("not a table of sizes")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        log.info(f"--micro-batch auto: {path} is damaged ({error}), it is made anew")
        return {}
    return answers


def _warn(path: Path, error: Exception) -> None:
    log.info(f"--micro-batch auto: {path} cannot be used ({error}), nothing is remembered")


# The process of a trial


def _end_with(parent: int) -> None:
    """Leave when the process that asked is gone, so that no trial holds a device for nobody."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    threading.Thread(target=_end_with, args=(given["parent"],), daemon=True).start()
    try:
        print(json.dumps(asdict(try_step(Step(**given["step"]), given["size"]))))
    except (CxrfastError, RuntimeError, MemoryError) as error:
        lines = str(error).strip().splitlines()
        sys.exit(f"{type(error).__name__}: {lines[0] if lines else 'out of memory'}")
