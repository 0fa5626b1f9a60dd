"""Ranks and devices: which GPU this process may use, and how the processes of one training communicate."""

import gc
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from cxrfast.errors import DeviceError, RunError
from cxrfast.launch import launched
from cxrfast.machine import usable_cores, user_sets_threads


@dataclass(frozen=True)
class World:
    """This process among those that torchrun started; without torchrun the only one."""

    device: torch.device
    rank: int = 0
    size: int = 1
    local_size: int = 1
    """Processes on this machine, which share its cores."""

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def gather(self, value: Any) -> list[Any] | None:
        """Every rank's `value` (any picklable object) on rank 0, None elsewhere."""
        if self.size == 1:
            return [value]
        values: list[Any] | None = [None] * self.size if self.is_first else None
        dist.gather_object(value, values)
        return values

    def broadcast(self, value: Any) -> Any:
        """Rank 0's `value` on every rank."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, device=self.device)
        return values[0]

    def on_first(self, action: Callable[[], Any]) -> Any:
        """Run `action` on rank 0 and return its value on every rank.

        If `action` raises, rank 0 raises the same error and the others SystemExit(2), so that no rank waits forever.
        """
        value, error = None, None
        if self.is_first:
            try:
                value = action()
            except Exception as caught:
                error = caught
        value, failed = self.broadcast((value, error is not None))
        if error:
            raise error
        if failed:
            raise SystemExit(2)
        return value

    def broadcast_buffers(self, module: nn.Module) -> None:
        """Give every rank the BatchNorm statistics of rank 0; without it the ranks score differently in eval mode."""
        if self.size > 1:
            for buffer in module.buffers():
                dist.broadcast(buffer, src=0)


@contextmanager
def world(device: str = "auto", timeout: timedelta | None = None) -> Iterator[World]:
    """Join the processes that torchrun started (NCCL on GPUs, gloo on the CPU); leave the group at the end.

    `timeout`: how long a process waits for the others; None: torch's default.
    Raises DeviceError if the device cannot be used, RunError if torchrun's variables contradict each other.
    """
    launch = launched()
    size, local_size = launch.size, launch.local_size
    chosen = pick_device(device, launch.local_rank)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    elif not user_sets_threads():
        torch.set_num_threads(max(1, usable_cores() // local_size))
    if size > 1:
        _join(chosen, size, timeout)
    try:
        yield World(chosen, launch.rank, size, local_size)
        if size > 1:
            dist.barrier()  # gloo may end in `terminate called` if a rank leaves while others still talk
    finally:
        if size > 1:
            gc.collect()
            dist.destroy_process_group()


def _join(device: torch.device, size: int, timeout: timedelta | None) -> None:
    """Join the process group of all ranks. Raises RunError if they do not meet."""
    is_gpu = device.type == "cuda"
    try:
        dist.init_process_group("nccl" if is_gpu else "gloo", device_id=device if is_gpu else None, timeout=timeout)
    except (RuntimeError, ValueError) as error:  # torch.distributed's own are RuntimeErrors
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise RunError(
            f"the {size} processes that WORLD_SIZE={size} announces did not meet at {where} ({reason}): start them all with "
            "torchrun, or unset WORLD_SIZE and RANK to use one process"
        ) from error


def parallel(model: nn.Module) -> DistributedDataParallel:
    """`model` with gradients averaged over the ranks. Buffers are not synchronised, see `World.broadcast_buffers`."""
    # gradients of 1×1 convolutions in channels last have unexpected strides, which is harmless (pytorch#157862)
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    is_new = "forward_sync_buffers" in signature(DistributedDataParallel).parameters  # since torch 2.14
    apart = {"forward_sync_buffers" if is_new else "broadcast_buffers": False}
    return DistributedDataParallel(model, gradient_as_bucket_view=True, **apart)  # type: ignore[arg-type]


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """`auto`, `cpu`, `cuda` or `cuda:N` → the device of this process.

    `auto` is the CPU only if there is no NVIDIA device. Raises DeviceError for one that torch cannot use.
    """
    if name == "cpu":
        return torch.device("cpu")
    if name != "auto" and not name.startswith("cuda"):
        raise DeviceError(f"--device {name} is unknown: use auto, cpu or cuda")
    number = name.partition(":")[2] or str(local_rank)
    if not number.isdecimal():
        raise DeviceError(f"--device {name} is unknown: use auto, cpu, cuda or cuda:0")
    if torch.cuda.is_available():
        index = int(number)
        if index >= torch.cuda.device_count():
            raise DeviceError(
                f"GPU {index} was requested, but there are only {torch.cuda.device_count()}: start fewer processes "
                "(--nproc_per_node), or set CUDA_VISIBLE_DEVICES"
            )
        return torch.device("cuda", index)
    if driver := nvidia_driver():
        raise DeviceError(
            f"torch {torch.__version__} (CUDA {torch.version.cuda}) cannot use the NVIDIA driver {driver} of this machine "
            f"(DALI: {dali_build()}): update the driver, install a torch for its CUDA version, "
            "or use --device cpu"
        )
    if name == "auto":
        return torch.device("cpu")
    raise DeviceError(f"--device {name}: this machine has no NVIDIA GPU; use --device cpu, or run `cxrfast doctor`")


def nvidia_driver() -> str | None:
    """Version of the kernel driver; None without NVIDIA devices, or if CUDA_VISIBLE_DEVICES hides them all."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1") or not Path("/dev/nvidiactl").exists():
        return None
    try:
        return Path("/sys/module/nvidia/version").read_text().strip()
    except OSError:
        return "of unknown version"


@dataclass(frozen=True)
class Dali:
    """An installed NVIDIA DALI."""

    version: str
    cuda: str
    """Version of its CUDA runtime: `12.9`, or only `12` if it is known from the package's name."""

    def __str__(self) -> str:
        return f"{self.version} (CUDA {self.cuda})"


def find_dali(load: bool = False) -> Dali | None:
    """The installed DALI, or None. `load`: import it to prove that it loads, which takes a second.

    It is also imported if its package has no metadata. Raises DeviceError if the import fails.
    """
    if not load:
        for package in ("nvidia-dali-cuda120", "nvidia-dali-cuda130"):
            try:
                return Dali(version(package), package[-3:-1])
            except PackageNotFoundError:
                continue
    if find_spec("nvidia") is None or find_spec("nvidia.dali") is None:
        return None
    try:
        from nvidia import dali
    except Exception as error:  # a broken library may raise anything
        raise DeviceError(f"DALI is installed but does not load ({error}): reinstall it") from error
    digits = str(dali.__cuda_version__)  # CUDA 12.9.86 is 12986
    return Dali(dali.__version__, f"{digits[:2]}.{digits[2]}")


def dali_build() -> str:
    """`2.4.0 (CUDA 12)`, `not installed` or `does not load`."""
    try:
        return str(find_dali() or "not installed")
    except DeviceError:
        return "does not load"
