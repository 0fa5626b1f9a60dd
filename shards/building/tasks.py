"""One task of a build: a shard at every scale that lacks it, made in a worker process. Each image is decoded once."""

import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import wait as wait_for_exit
from pathlib import Path

import cv2
import numpy as np

from cxrfast.errors import ShardError
from cxrfast.shards.format.codec import encode_member
from cxrfast.shards.format.manifest import ShardManifest
from cxrfast.shards.format.names import shard_path
from cxrfast.shards.format.tar import TarWriter
from cxrfast.shards.images.decode import BadImage, Reason, at_scales, decode
from cxrfast.shards.images.grid import grid, pack
from cxrfast.shards.storage import Tree


@dataclass(frozen=True, kw_only=True)
class Image:
    """What a worker needs to know of one row."""

    row: int
    path: str
    bytes: int
    meta: dict
    """Ids and raw labels, null where blank."""


def meta_json(image: Image, height: int, width: int) -> bytes:
    """What goes beside an image into the tar; `height` and `width` are those of the source image, px."""
    return json.dumps({**image.meta, "height": height, "width": width}, ensure_ascii=False).encode()


@dataclass(frozen=True, kw_only=True)
class Task:
    """One shard at every scale that lacks it."""

    data: Tree
    out: Path
    set: str
    shard: int
    scales: list[int]
    codec: str
    quality: int | None
    resize: str
    grey: str
    rows: list[Image]
    quarantined: dict[str, str]
    """Rows that an earlier scale had to leave out."""
    held: frozenset[int] | None
    """Rows that an earlier scale holds; None if there is no earlier scale."""


def build_shard(task: Task, began: Callable[[int], None] = lambda row: None) -> None:
    """Write one shard at its scales; `began` hears of each row before its image is touched.

    Raises ShardError if a row that was fine when planned or before is not fine now.
    """
    writers: dict[int, TarWriter] = {}
    quarantined = dict(task.quarantined)
    rows: list[int] = []
    sizes: list[list[int]] = []
    grids: dict[int, list[np.ndarray]] = {scale: [] for scale in task.scales}
    try:
        for scale in task.scales:
            writers[scale] = TarWriter(task.out, scale, task.shard, task.codec)
        for image in task.rows:
            if str(image.row) in quarantined:
                continue
            began(image.row)
            try:
                source = decoded(task, image, read(task, image))
            except BadImage as error:
                if task.held is not None and image.row in task.held:
                    raise ShardError(
                        f"shard {task.shard}: {image.path} was fine at other scales and is {error.reason} now"
                    ) from error
                quarantined[str(image.row)] = error.reason.value
                continue
            rows.append(image.row)
            sizes.append(list(source.shape))
            meta = meta_json(image, *source.shape)
            for scale, picture in at_scales(source, task.scales, task.resize).items():
                grids[scale].append(grid(picture))
                writers[scale].add(image.row, encode_member(picture, task.codec, task.quality), meta)
        for scale in task.scales:  # one that is replaced is not whole for a while, at any scale
            shard_path(task.out, scale, task.shard, "json").unlink(missing_ok=True)
        closed = {scale: writer.close() for scale, writer in writers.items()}
        for scale, (digest, length) in closed.items():
            ShardManifest(
                set=task.set,
                scale=scale,
                shard=task.shard,
                sha256=digest,
                bytes=length,
                rows=rows,
                crc32=writers[scale].crc32,
                sizes=sizes,
                quarantined=quarantined,
                grids=pack(grids[scale]),
            ).write(task.out)
    finally:
        for writer in writers.values():
            writer.discard()


def decoded(task: Task, image: Image, data: bytes) -> np.ndarray:
    """uint8 (H, W). Raises BadImage, or ShardError naming the image where the recipe or a missing codec is at fault."""
    try:
        return decode(data, task.grey)
    except BadImage:
        raise
    except ShardError as error:
        raise ShardError(f"{image.path}: {error}") from error


def read(task: Task, image: Image) -> bytes:
    """The file. Raises BadImage if it was missing when planned, ShardError if it is not what it was then."""
    if image.bytes < 0:
        raise BadImage(Reason.MISSING)
    try:
        data = task.data.read(image.path)
    except FileNotFoundError:
        raise ShardError(f"shard {task.shard}: {image.path} has vanished since the set was planned") from None
    except OSError as error:
        raise ShardError(f"shard {task.shard}: {image.path} cannot be read ({error.strerror or error})") from error
    if len(data) != image.bytes:
        raise ShardError(
            f"shard {task.shard}: {image.path} has {len(data):,} bytes, it had {image.bytes:,} when the set was planned"
        )
    return data


def start_worker() -> None:
    """What a worker process does first."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends its workers
    cv2.setNumThreads(1)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_exit_with, args=(parent.sentinel,), daemon=True).start()


def _exit_with(sentinel: int) -> None:
    """End this worker when its parent dies, or it would go on writing beside the build that takes over."""
    wait_for_exit([sentinel])
    os._exit(1)
