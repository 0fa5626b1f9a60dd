"""What this machine has, what it lacks, and what to do about it. Read-only."""

import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from cxrfast import config
from cxrfast.distributed import Dali, find_dali, nvidia_driver, pick_device
from cxrfast.errors import CxrfastError, DeviceError
from cxrfast.machine import installed, memory_bytes, processor, usable_cores
from cxrfast.models.precision import resolve_precision
from cxrfast.models.weights import imagenet_file
from cxrfast.pipelines.dali import OLDEST
from cxrfast.shards.building.kinds import MODULES
from cxrfast.shards.shard_set import ShardSet
from cxrfast.tables import Cell, Table

DRIVERS = {12: 525, 13: 580}
"""CUDA major version → oldest branch of NVIDIA's driver that supports all its minor versions."""

OPENCV = "opencv-python-headless"


@dataclass(frozen=True)
class Item:
    """Something that this machine has or lacks."""

    what: str
    found: str
    advice: str = ""
    is_problem: bool = False
    """cxrfast cannot work until the advice is followed."""


def examine() -> list[Item]:
    return [*_software(), *_decoders(), *_machine(), *_dali(), *_device(), *_data()]


def _software() -> Iterator[Item]:
    yield Item("Python", platform.python_version())
    for package in ("torch", "torchvision", "simplejpeg", "zarr", "webdataset"):
        found = installed(package, package)
        yield Item(package, found or "not installed", "" if found else f"pip install {package}", not found)
    found = installed(OPENCV, "cv2")
    advice = "" if found else f"pip install {OPENCV}"
    if found and _major(found) < 5:
        advice = f"rotates images less exactly, by a few grey levels at edges: pip install -U {OPENCV}"
    yield Item(OPENCV, found or "not installed", advice, not found)


def _decoders() -> Iterator[Item]:
    """Packages that only some source images need."""
    reads = {"pylibjpeg-libjpeg": "lossless and 12-bit JPEG", "pylibjpeg-openjpeg": "JPEG 2000"}
    for package, module in MODULES.items():
        found = installed(package, module)
        what = f"DICOM files in {reads[package]}" if package in reads else "DICOM files"
        yield Item(
            package, found or "not installed", "" if found else f"needed for {what}: pip install 'cxrfast[dicom]'"
        )


def _machine() -> Iterator[Item]:
    cores = usable_cores()
    few = "decoding at 256 px needs several cores per GPU" if cores < 4 else ""
    yield Item("processor", f"{processor()}, {cores} usable cores", few)
    yield Item("memory", f"{memory_bytes() / 2**30:,.0f} GiB")
    shared = Path("/dev/shm")
    if shared.exists():
        yield Item("/dev/shm", f"{shutil.disk_usage(shared).total / 2**30:,.1f} GiB", "not used by cxrfast's loaders")


def _dali() -> Iterator[Item]:
    branch = (nvidia_driver() or "").split(".")[0]  # `580.65.06` → 580
    driver = int(branch) if branch.isdecimal() else None
    try:
        dali = find_dali(load=True)
    except DeviceError as error:
        yield Item("DALI", "does not load", f"{error}, or use --engine host", is_problem=True)
        dali = None
    else:
        yield about_dali(dali, driver)
    yield from about_cuda(torch.version.cuda, dali, driver, torch.cuda.is_available())


def about_dali(dali: Dali | None, driver: int | None) -> Item:
    wheel = "nvidia-dali-cuda130" if driver and driver >= DRIVERS[13] else "nvidia-dali-cuda120"
    if dali is None:
        return Item("DALI", "not installed", f"pip install {wheel}; until then the host engine loads images")
    if tuple(map(int, dali.version.split(".")[:2])) < OLDEST:
        why = "before 2.1 it waits for the whole GPU when it frees a buffer, which breaks the capture of CUDA graphs"
        return Item("DALI", str(dali), f"pip install --upgrade {wheel}: {why}", is_problem=True)
    return Item("DALI", str(dali))


def about_cuda(torch_cuda: str | None, dali: Dali | None, driver: int | None, torch_works: bool) -> Iterator[Item]:
    """The CUDA versions of torch and DALI, and whether the driver supports each.

    `driver`: its branch; None: unknown. `torch_works`: torch can use a GPU, which proves that the driver supports torch's
    CUDA version, if only by CUDA's forward-compatibility package.
    """
    versions = {"torch": torch_cuda, "DALI": dali.cuda if dali else None}
    needed = {name: (version, DRIVERS.get(_major(version), 0)) for name, version in versions.items() if version}
    if not needed:
        return
    newest = max(needed.values(), key=lambda need: need[1])[1]
    differ = len({_major(cuda) for cuda, _ in needed.values()}) > 1
    advice = f"a GPU's driver must be {newest} or newer"
    advice += "; the difference does not matter: each brings its own CUDA runtime" if differ else ""
    yield Item("CUDA", ", ".join(f"{name} {cuda}" for name, (cuda, _) in needed.items()), advice)
    if driver is None:
        return
    for name, (cuda, least) in needed.items():
        advice = ""
        is_served = driver >= least or (torch_works and _major(torch_cuda or "0") >= _major(cuda))
        if not is_served:
            advice = f"update the driver to {least} or newer, or install {name} for an older CUDA version"
        elif driver < least:
            advice = "torch can use it nevertheless, by CUDA's forward-compatibility package"
        yield Item(f"driver for {name}", f"{driver}; CUDA {cuda} needs {least}", advice, not is_served)


def _major(version: str) -> int:
    return int(version.split(".")[0])


def _device() -> Iterator[Item]:
    try:
        device = pick_device("auto")
    except CxrfastError as error:
        yield Item("GPU", f"driver {nvidia_driver()}", str(error), is_problem=True)
        return
    if device.type == "cpu":
        yield Item("GPU", "none", "training runs on the CPU: for small scales and trials only")
    for i in range(torch.cuda.device_count() if device.type == "cuda" else 0):
        properties = torch.cuda.get_device_properties(i)
        memory = f"{properties.total_memory / 2**30:,.0f} GiB"
        yield Item(f"GPU {i}", f"{properties.name}, {memory}, driver {nvidia_driver()}, CUDA {torch.version.cuda}")
    yield Item("precision", resolve_precision("auto", device))


def _data() -> Iterator[Item]:
    _, weights = imagenet_file("densenet121")
    if weights.exists():
        yield Item("ImageNet weights", str(weights))
    else:
        advice = "downloaded when first needed; without a network: cxrfast fetch-weights --to DIR"
        yield Item("ImageNet weights", "not on this machine", advice)
    if any(Path(config.DATA).glob("mimic-cxr-2.*.csv*")):
        yield Item("source tree", config.DATA)
    else:
        yield Item("source tree", f"none in {config.DATA}", "set CXRFAST_DATA, or give --data")
    try:
        found = ShardSet(config.SHARDS)
        scales = ", ".join(map(str, found.scales))
        yield Item("shard set", f"{config.SHARDS}: {found.info.images:,} images at {scales} px")
    except CxrfastError:
        yield Item("shard set", f"none in {config.SHARDS}", "cxrfast shard, or set CXRFAST_SHARDS")
    here = Path(os.getcwd())
    yield Item("free space", f"{shutil.disk_usage(here).free / 1e9:,.0f} GB in {here}")


def inventory_table(items: list[Item]) -> Table:
    rows = [
        [Cell(text, "bold red" if item.is_problem else "") for text in (item.what, item.found, item.advice)]
        for item in items
    ]
    return Table("cxrfast doctor", ["what", "found", "advice"], rows, text=["found", "advice"])
