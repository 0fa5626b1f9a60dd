"""One task of a build: a shard at every scale that lacks it, made in a worker process. Each image is decoded once."""

import json
import multiprocessing
import os
import threading
from dataclasses import dataclass
from multiprocessing.connection import wait as wait_for_exit
from pathlib import Path

import cv2

from cxrfast.errors import ShardError
from cxrfast.shards.images import BadImage, Reason, at_scales, decode_grey, encode
from cxrfast.shards.manifest import ShardManifest
from cxrfast.shards.tar import TarWriter


@dataclass(frozen=True, kw_only=True)
class Image:
    """What a worker needs to know of one row."""

    row: int
    path: str
    bytes: int
    meta: dict
    """Goes beside the image into the tar: ids and raw labels, null where blank."""


def meta_json(image: Image) -> bytes:
    return json.dumps(image.meta, ensure_ascii=False).encode()


@dataclass(frozen=True, kw_only=True)
class Task:
    """One shard at every scale that lacks it."""

    data: Path
    out: Path
    set: str
    shard: int
    scales: list[int]
    quality: int
    rows: list[Image]
    quarantined: dict[str, str]
    """Rows that an earlier scale had to leave out."""
    held: frozenset[int] | None
    """Rows that an earlier scale holds; None if there is no earlier scale."""


def build_shard(task: Task) -> None:
    """Write one shard at its scales. Raises ShardError if a row that was fine when planned or before is not fine now."""
    writers: dict[int, TarWriter] = {}
    quarantined = dict(task.quarantined)
    rows: list[int] = []
    try:
        for scale in task.scales:
            writers[scale] = TarWriter(task.out, scale, task.shard)
        for image in task.rows:
            if str(image.row) in quarantined:
                continue
            try:
                pixels = at_scales(decode_grey(_read(task, image)), task.scales)
            except BadImage as error:
                if task.held is not None and image.row in task.held:
                    raise ShardError(
                        f"shard {task.shard}: {image.path} was fine at other scales and is {error.reason} now"
                    ) from error
                quarantined[str(image.row)] = error.reason.value
                continue
            rows.append(image.row)
            meta = meta_json(image)
            for scale, picture in pixels.items():
                writers[scale].add(image.row, encode(picture, task.quality), meta)
        for scale, writer in writers.items():
            digest, length = writer.close()
            ShardManifest(
                set=task.set,
                scale=scale,
                shard=task.shard,
                sha256=digest,
                bytes=length,
                rows=rows,
                crc32=writer.crc32,
                quarantined=quarantined,
            ).write(task.out)
    finally:
        for writer in writers.values():
            writer.discard()


def _read(task: Task, image: Image) -> bytes:
    if image.bytes < 0:
        raise BadImage(Reason.MISSING)
    try:
        data = (task.data / image.path).read_bytes()
    except FileNotFoundError:
        raise ShardError(f"shard {task.shard}: {image.path} has vanished since the set was planned") from None
    except OSError as error:
        raise ShardError(f"shard {task.shard}: {image.path} cannot be read ({error.strerror})") from error
    if len(data) != image.bytes:
        raise ShardError(
            f"shard {task.shard}: {image.path} has {len(data):,} bytes, it had {image.bytes:,} when the set was planned"
        )
    return data


def start_worker() -> None:
    """What a worker process does first."""
    cv2.setNumThreads(1)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_exit_with, args=(parent.sentinel,), daemon=True).start()


def _exit_with(sentinel: int) -> None:
    """End this worker when its parent dies, or it would go on writing beside the build that takes over."""
    wait_for_exit([sentinel])
    os._exit(1)
