"""Estimate the bytes, files and time of a build from a sample of its images, and check that there is room."""

import os
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cxrfast.errors import ShardError
from cxrfast.shards.building.tasks import Task, decoded, meta_json
from cxrfast.shards.format.codec import encode_member
from cxrfast.shards.images.bad_image import BadImage
from cxrfast.shards.images.resize import at_scales
from cxrfast.units import size

OVERHEAD = 2048
"""Bytes per sample in a tar in addition to image and metadata: two headers, padding."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Resources needed to build the missing shards."""

    images: dict[int, int]
    """By scale, like bytes and files."""
    bytes: dict[int, int]
    files: dict[int, int]
    seconds: float
    free: int
    """Bytes free on the set's file system."""
    free_files: int
    """Files that can still be created there."""


def measure(task: Task) -> tuple[dict[int, list[int]], list[float]]:
    """Bytes at each scale and seconds per image of a task: decoded, resized and encoded in memory."""
    sizes: dict[int, list[int]] = {scale: [] for scale in task.scales}
    seconds = []
    for image in task.images:
        start = time.perf_counter()
        try:
            source = decoded(task, image, task.tree.read(image.path))
        except (BadImage, OSError):
            continue  # the build itself reports it
        meta = meta_json(image, *source.shape)
        for scale, picture in at_scales(source, task.scales, task.info.resize).items():
            member = encode_member(picture, task.info.codec, task.info.quality, task.info.dct)
            sizes[scale].append(len(member) + len(meta) + OVERHEAD)
        seconds.append(time.perf_counter() - start)
    return sizes, seconds


def estimate(
    sample: list[Task],
    remaining: dict[int, tuple[int, int]],
    out: Path,
    workers: int,
    pool: ProcessPoolExecutor,
) -> Estimate:
    """Measure the images of `sample` in `pool`, where a decoder may crash, and extrapolate.

    `remaining`: scale → (shards, images) left to build. Raises ShardError if the recipe does not fit the images.
    """
    sizes: dict[int, list[int]] = {scale: [] for scale in remaining}
    seconds: list[float] = []
    try:
        for by_scale, took in pool.map(measure, sample):
            seconds += took
            for scale, values in by_scale.items():
                sizes[scale] += values
    except BrokenProcessPool:
        pass  # the build finds the image
    most = max((images for _, images in remaining.values()), default=0)
    folder = next(p for p in (out, *out.absolute().parents) if p.exists())
    disk = os.statvfs(folder)
    return Estimate(
        images={scale: images for scale, (_, images) in remaining.items()},
        bytes={scale: int(np.mean(sizes[scale] or [0]) * images) for scale, (_, images) in remaining.items()},
        files={scale: 3 * shards for scale, (shards, _) in remaining.items()},
        seconds=float(np.mean(seconds or [0.0])) * most / workers,
        free=disk.f_bavail * disk.f_frsize,
        free_files=disk.f_favail,
    )


def check_room(needed: Estimate, out: Path) -> None:
    """Raises ShardError if there is not enough room."""
    total, files = sum(needed.bytes.values()), sum(needed.files.values())
    if total > needed.free:
        raise ShardError(
            f"{out} needs about {size(total)} more and {size(needed.free)} are free: "
            "make room, choose another --out or fewer scales"
        )
    if 0 < needed.free_files < files:  # 0: a file system that does not count them
        raise ShardError(f"{out} needs {files:,} more files and {needed.free_files:,} are left: choose another --out")
