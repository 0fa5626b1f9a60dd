"""What this machine has, what it lacks, what to do about it. Looks only; changes nothing."""

import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from rich.table import Table

from cxrfast import config
from cxrfast.distributed import dali_build, nvidia_driver, pick_device
from cxrfast.errors import CxrfastError
from cxrfast.machine import memory_bytes, processor, usable_cores
from cxrfast.model import imagenet_file, resolve_precision
from cxrfast.pipelines import dali
from cxrfast.shards.manifest import read_set, scales_in


@dataclass(frozen=True)
class Finding:
    what: str
    found: str
    advice: str = ""
    is_problem: bool = False
    """True where cxrfast cannot work before the advice is followed."""


def examine() -> list[Finding]:
    return [*_software(), *_machine(), *_device(), *_data()]


def _software() -> Iterator[Finding]:
    yield Finding("Python", platform.python_version())
    for package in ("torch", "torchvision", "opencv-python-headless", "simplejpeg", "zarr", "webdataset"):
        try:
            yield Finding(package, version(package))
        except PackageNotFoundError:
            yield Finding(package, "not installed", f"pip install {package}", is_problem=True)


def _machine() -> Iterator[Finding]:
    cores, memory = usable_cores(), memory_bytes()
    yield Finding(
        "processor",
        f"{processor()}, {cores} usable cores",
        "decoding at 256 px wants several cores a GPU" if cores < 4 else "",
    )
    yield Finding("memory", f"{memory / 2**30:,.0f} GiB")
    shared = Path("/dev/shm")
    if shared.exists():
        yield Finding(
            "/dev/shm", f"{shutil.disk_usage(shared).total / 2**30:,.1f} GiB", "not used by cxrfast's loaders"
        )


def _device() -> Iterator[Finding]:
    yield Finding(
        "DALI",
        dali_build(),
        "" if dali.available() else "pip install nvidia-dali-cuda120; the host engine serves meanwhile",
    )
    try:
        device = pick_device("auto")
    except CxrfastError as error:
        yield Finding("GPU", f"driver {nvidia_driver()}", str(error), is_problem=True)
        return
    if device.type == "cpu":
        yield Finding("GPU", "none", "training runs on the CPU: for small scales and trials only")
    for i in range(torch.cuda.device_count() if device.type == "cuda" else 0):
        properties = torch.cuda.get_device_properties(i)
        yield Finding(
            f"GPU {i}",
            f"{properties.name}, {properties.total_memory / 2**30:,.0f} GiB, driver {nvidia_driver()}, "
            f"CUDA {torch.version.cuda}",
        )
    yield Finding("precision", resolve_precision("auto", device))


def _data() -> Iterator[Finding]:
    _, weights = imagenet_file("densenet121")
    yield Finding(
        "ImageNet weights",
        str(weights) if weights.exists() else "not on this machine",
        "" if weights.exists() else "downloaded when first needed; without a network: cxrfast fetch-weights --to DIR",
    )
    tables = any(Path(config.DATA).glob("mimic-cxr-2.*.csv*"))
    yield Finding(
        "source tree",
        config.DATA if tables else f"none in {config.DATA}",
        "" if tables else "set CXRFAST_DATA, or give --data",
    )
    try:
        info = read_set(config.SHARDS)
        yield Finding(
            "shard set",
            f"{config.SHARDS}: {info.images:,} images at {', '.join(map(str, scales_in(config.SHARDS)))} px",
        )
    except CxrfastError:
        yield Finding("shard set", f"none in {config.SHARDS}", "cxrfast shard, or set CXRFAST_SHARDS")
    here = Path(os.getcwd())
    yield Finding("free space", f"{shutil.disk_usage(here).free / 1e9:,.0f} GB in {here}")


def to_table(findings: list[Finding]) -> Table:
    table = Table("what", "found", "advice", title="cxrfast doctor")
    for f in findings:
        table.add_row(f.what, f.found, f.advice, style="bold red" if f.is_problem else None)
    return table
