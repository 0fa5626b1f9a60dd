"""Tasks of a build: one shard at every scale that lacks it, each image decoded once.

`find_todo` reads manifests; `build_shard` runs in a worker process and writes the shard.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from cxrfast.errors import ShardError
from cxrfast.files import sha256
from cxrfast.shards.building.agreement import Earlier, SourceChanged, disagreements, earlier
from cxrfast.shards.building.reading import ImageReader
from cxrfast.shards.format import film, manifest
from cxrfast.shards.format.checksums import listed_sums
from cxrfast.shards.format.info import SetInfo
from cxrfast.shards.format.manifest import ShardManifest, read_manifest
from cxrfast.shards.format.names import shard_name, shard_path
from cxrfast.shards.format.rows import label_names
from cxrfast.shards.format.source_hashes import pack as pack_hashes
from cxrfast.shards.format.source_hashes import source_hash
from cxrfast.shards.format.tar import TarWriter
from cxrfast.shards.images.bad_image import BadImage
from cxrfast.shards.images.cell_means import grid, pack
from cxrfast.shards.images.remark import Remark
from cxrfast.shards.storage import Tree


@dataclass(frozen=True, kw_only=True)
class Blueprint:
    """What all tasks of a build share: the rows, the source and the destination."""

    tree: Tree | None
    """Source of the images; None if none are read."""
    out: Path
    """Folder of the set, or a folder where shards are rebuilt first."""
    info: SetInfo
    rows: pd.DataFrame
    """The table that `layout.assign_rows` makes, `bytes` included."""
    allow_missing: bool = False
    """Leave out images that have vanished since the set was planned."""


@dataclass(frozen=True, kw_only=True)
class Todo:
    """One shard at every requested scale that lacks it."""

    shard: int
    scales: list[int]
    rows: range
    quarantined: dict[str, str]
    """Rows left out at an earlier scale."""
    held: frozenset[int] | None
    """Rows held at an earlier scale; None without one."""
    earlier: Earlier = field(default_factory=Earlier)
    """What the manifests of scales built before say about the source images."""


@dataclass(frozen=True, kw_only=True)
class Image:
    """One row, as a worker needs it."""

    row: int
    path: str
    bytes: int
    meta: dict
    """Ids and raw labels, null where blank."""


@dataclass(frozen=True, kw_only=True)
class Task(Todo):
    """A `Todo` with everything a worker needs to build it."""

    tree: Tree
    out: Path
    info: SetInfo
    images: list[Image]
    allow_missing: bool = False


def find_todo(blueprint: Blueprint, scales: list[int], shards: range, retry: bool = False) -> list[Todo]:
    """What is left to build of these shards. An earlier scale of a shard determines which rows to leave out.

    With `retry`, shards with quarantined rows are rebuilt at every scale they have. Raises ShardError for a shard of another
    set.
    """
    present = manifest.scales_in(blueprint.out) if blueprint.out.is_dir() else []
    sums = listed_sums(blueprint.out) if present else {}
    todo = []
    for shard in shards:
        there = {scale: m for scale in present if (m := _whole_shard(blueprint, scale, shard))}
        again = retry and any(m.quarantined for m in there.values())
        wanted = sorted({*scales, *there}) if again else [scale for scale in scales if scale not in there]
        first = next(iter(there.values()), None)
        if wanted:
            todo.append(
                Todo(
                    shard=shard,
                    scales=wanted,
                    rows=blueprint.info.rows_of(shard),
                    quarantined=first.quarantined if first and not again else {},
                    held=frozenset(first.rows) if first else None,
                    earlier=_undamaged(blueprint, there, sums),
                )
            )
    return todo


def _whole_shard(blueprint: Blueprint, scale: int, shard: int) -> ShardManifest | None:
    """The manifest of a shard whose three files exist. Raises ShardError if it belongs to another set."""
    m = read_manifest(blueprint.out, scale, shard)
    if m and (m.set, m.scale, m.shard) != (blueprint.info.id, scale, shard):
        raise ShardError(
            f"{shard_path(blueprint.out, scale, shard, 'json')} belongs to shard {m.shard} at {m.scale} px of set {m.set}: "
            "move what does not belong to this set out of its folder, then run this command again"
        )
    others = (shard_path(blueprint.out, scale, shard, suffix) for suffix in ("tar", "idx"))
    return m if m and all(path.is_file() for path in others) else None


def _undamaged(blueprint: Blueprint, there: dict[int, ShardManifest], sums: dict[str, str]) -> Earlier:
    """What the shard's manifests say about its source images, without those that have changed since they were signed.

    Raises ShardError if they all have, if they contradict each other, and for a set so old that its manifests say nothing.
    """
    names = {scale: shard_name(scale, m.shard, "json") for scale, m in there.items()}
    sound = [m for scale, m in there.items() if sums.get(names[scale]) in (None, sha256(blueprint.out / names[scale]))]
    first, repair = names[min(there)] if there else "", f"`cxrfast verify --repair {blueprint.out}`"
    if there and not sound:
        raise ShardError(f"{blueprint.out / first} is damaged: repair it first, with {repair}")
    if any(m.rows for m in sound) and not any(m.sources or m.grids for m in sound):
        raise ShardError(
            f"{blueprint.out / first} is of an earlier version and does not say which images its rows were made from: run "
            f"{repair} first, which adds grids to compare new scales with"
        )
    for m, what in disagreements(sound, blueprint.info):
        tar = shard_path(blueprint.out, m.scale, m.shard, "tar")
        raise ShardError(f"{tar}: {what}; delete the shard's files at the wrong scale, then run this command again")
    return earlier(sound)


def make_task(blueprint: Blueprint, todo: Todo, rows: list[int] | range | None = None) -> Task:
    """The task for a shard, or for some `rows` of it."""
    assert blueprint.tree is not None
    images = _images(blueprint.rows.iloc[list(todo.rows if rows is None else rows)])
    return Task(
        **vars(todo),
        tree=blueprint.tree,
        out=blueprint.out,
        info=blueprint.info,
        images=images,
        allow_missing=blueprint.allow_missing,
    )


def _images(rows: pd.DataFrame) -> list[Image]:
    labels = label_names(rows)
    return [
        Image(
            row=r["row"],
            path=r["path"],
            bytes=r["bytes"],
            meta={
                **{name: r[name] for name in ("row", "image_id", "study_id", "patient_id")},
                "labels": {name: None if np.isnan(r[name]) else r[name] for name in labels},
            },
        )
        for r in rows.to_dict("records")
    ]


# In a worker


def build_shard(task: Task, began: Callable[[int], None] = lambda row: None) -> None:
    """Write one shard at its scales; `began` is called with each row before its image is read.

    Raises ShardError if a row that was fine when the set was laid out, or at another scale, is not fine now, and if its
    source image is not the one that another scale was made from.
    """
    info = task.info
    writers: dict[int, TarWriter] = {}
    quarantined = dict(task.quarantined)
    reader = ImageReader(tree=task.tree, images=len(task.images), allow_missing=task.allow_missing)
    shard = _Shard(grids={scale: [] for scale in task.scales})
    try:
        for scale in task.scales:
            writers[scale] = TarWriter(task.out, scale, task.shard, info.codec)
        for image in task.images:
            if str(image.row) in quarantined:
                continue
            began(image.row)
            try:
                data = _read(reader, task, image)
                source, remarks = decoded(task, image, data)
            except BadImage as error:
                if task.held is not None and image.row in task.held:
                    raise ShardError(
                        f"shard {task.shard}: {image.path} was fine at other scales but is {error.reason} now"
                    ) from error
                quarantined[str(image.row)] = error.reason.value
                continue
            meta = meta_json(image, *source.shape)
            of_file = source_hash(data)
            pictures = pictures_of(task, image, of_file, source)
            shard.add(image.row, of_file, source, remarks)
            for scale in task.scales:
                shard.grids[scale].append(grid(pictures[scale]))
                writers[scale].add(image.row, film.encoded(pictures[scale], info.recipe), meta)
        for scale in task.scales:  # a replaced shard is not whole until its new manifest is written
            shard_path(task.out, scale, task.shard, "json").unlink(missing_ok=True)
        closed = {scale: writer.close() for scale, writer in writers.items()}
        for scale, (digest, length) in closed.items():
            ShardManifest(
                set=info.id,
                scale=scale,
                shard=task.shard,
                sha256=digest,
                bytes=length,
                rows=shard.rows,
                crc32=writers[scale].crc32,
                sizes=shard.sizes,
                quarantined=quarantined,
                remarks=shard.remarks,
                sources=pack_hashes(shard.hashes),
                grids=pack(shard.grids[scale]),
            ).write(task.out)
    finally:
        for writer in writers.values():
            writer.discard()


@dataclass(kw_only=True)
class _Shard:
    """What the manifests of a shard record about its rows, in their order."""

    grids: dict[int, list[np.ndarray]]
    """By scale."""
    rows: list[int] = field(default_factory=list)
    sizes: list[list[int]] = field(default_factory=list)
    hashes: list[bytes] = field(default_factory=list)
    remarks: dict[str, list[str]] = field(default_factory=dict)

    def add(self, row: int, digest: bytes, source: np.ndarray, remarks: list[Remark]) -> None:
        """Add a row: the hash of its source image, and the decoded pixels."""
        self.rows.append(row)
        self.sizes.append(list(source.shape))
        self.hashes.append(digest)
        if remarks:
            self.remarks[str(row)] = [remark.value for remark in remarks]


def pictures_of(task: Task, image: Image, digest: bytes, source: np.ndarray) -> dict[int, np.ndarray]:
    """{scale: uint8 (scale, scale)} of a decoded source image, uint8 (H, W), at the task's scales at least.

    Raises SourceChanged if its hash or pixels are not those that another scale was made from.
    """
    known = task.earlier
    try:
        known.check_hash(image.row, image.path, digest)
        compared = known.scale if image.row in known.grids else None
        scales = {*task.scales, compared} if compared else {*task.scales}
        pictures = film.scaled(source, scales, task.info.recipe)
        if compared:
            known.check_pixels(image.row, image.path, pictures[compared], task.info)
    except SourceChanged as error:
        raise SourceChanged(f"shard {task.shard}: {error}") from error
    return pictures


def _read(reader: ImageReader, task: Task, image: Image) -> bytes:
    """Read the file. Raises BadImage, or ShardError naming the shard if it must stop."""
    try:
        return reader.read(image.path, image.bytes)
    except BadImage:
        raise
    except ShardError as error:
        raise ShardError(f"shard {task.shard}: {error}") from error


def decoded(task: Task, image: Image, data: bytes) -> tuple[np.ndarray, list[Remark]]:
    """Decode to uint8 (H, W), with remarks.

    Raises BadImage, or ShardError naming the image if the recipe or a missing codec is at fault.
    """
    try:
        return film.decoded(data, task.info.recipe)
    except BadImage:
        raise
    except ShardError as error:
        raise ShardError(f"{image.path}: {error}") from error


def meta_json(image: Image, height: int, width: int) -> bytes:
    """The JSON next to an image in the tar; `height` and `width` are the source image's, px."""
    return json.dumps({**image.meta, "height": height, "width": width}, ensure_ascii=False).encode()
