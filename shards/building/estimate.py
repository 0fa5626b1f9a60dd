"""Estimate the bytes, files and time of a build from a sample of its images, and check that there is room."""

import os
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from cxrfast.errors import ShardError
from cxrfast.shards.building.agreement import SourceChanged
from cxrfast.shards.building.tasks import Task, decoded, meta_json, pictures_of
from cxrfast.shards.format import film
from cxrfast.shards.format.source_hashes import source_hash
from cxrfast.shards.images.bad_image import BadImage
from cxrfast.units import size

OVERHEAD = 2048
"""Bytes per sample in a tar in addition to image and metadata: two headers, padding."""

MANY_CHANGED = 2
"""Changed images in the sample that stop a build at once; a single one stops its shard only."""


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
    sampled: int = 0
    """Images of the sample that could be decoded."""
    remarks: dict[str, int] = field(default_factory=dict)
    """Number of sampled images by remark."""


@dataclass(kw_only=True)
class Measured:
    """What was found about the images of a task, decoded, resized and encoded in memory."""

    sizes: dict[int, list[int]]
    """Bytes of each image by scale."""
    seconds: list[float] = field(default_factory=list)
    """Time that each image took."""
    remarks: list[list[str]] = field(default_factory=list)
    """Remarks on each image."""
    changed: list[str] = field(default_factory=list)
    """Why images are not those that other scales were made from."""


def measure(task: Task) -> Measured:
    """Decode, resize and encode the images of a task."""
    found = Measured(sizes={scale: [] for scale in task.scales})
    for image in task.images:
        start = time.perf_counter()
        try:
            data = task.tree.read(image.path)
            source, remarks = decoded(task, image, data)
            pictures = pictures_of(task, image, source_hash(data), source)
        except SourceChanged as error:
            found.changed.append(str(error))
            continue
        except (BadImage, OSError):
            continue  # the build itself reports it
        meta = meta_json(image, *source.shape)
        for scale in task.scales:
            member = film.encoded(pictures[scale], task.info.recipe)
            found.sizes[scale].append(len(member) + len(meta) + OVERHEAD)
        found.seconds.append(time.perf_counter() - start)
        found.remarks.append([remark.value for remark in remarks])
    return found


def estimate(
    sample: list[Task],
    remaining: dict[int, tuple[int, int]],
    out: Path,
    workers: int,
    pool: ProcessPoolExecutor,
) -> Estimate:
    """Measure the images of `sample` in `pool`, where a decoder may crash, and extrapolate.

    `remaining`: scale → (shards, images) left to build. Raises ShardError if the recipe does not fit the images, or if
    several are not those that other scales were made from.
    """
    sizes: dict[int, list[int]] = {scale: [] for scale in remaining}
    seconds: list[float] = []
    remarks: list[list[str]] = []
    changed: list[str] = []
    try:
        for found in pool.map(measure, sample):
            seconds += found.seconds
            remarks += found.remarks
            changed += found.changed
            for scale, values in found.sizes.items():
                sizes[scale] += values
    except BrokenProcessPool:
        pass  # the build finds the image
    if len(changed) >= MANY_CHANGED:
        raise SourceChanged(
            f"{len(changed)} of {len(sample)} sampled images are not those that the set was built from, such as "
            f"{changed[0]}. Nothing was written"
        )
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
        sampled=len(remarks),
        remarks=dict(Counter(remark for some in remarks for remark in some)),
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
