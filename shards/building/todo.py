"""What is left to build of a set, and the tasks for its workers. Reads manifests, writes nothing."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from cxrfast.errors import ShardError
from cxrfast.shards.building.tasks import Image, Task
from cxrfast.shards.format import manifest
from cxrfast.shards.format.info import SetInfo
from cxrfast.shards.format.manifest import ShardManifest, read_manifest
from cxrfast.shards.format.names import shard_path
from cxrfast.shards.format.rows import label_names
from cxrfast.shards.storage import Tree


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What every task of a build has in common."""

    tree: Tree | None
    """Where the images are; None where nothing is to be read."""
    out: Path
    info: SetInfo
    rows: pd.DataFrame


@dataclass(frozen=True, kw_only=True)
class Todo:
    """One shard at every asked scale that lacks it."""

    shard: int
    scales: list[int]
    rows: range
    quarantined: dict[str, str]
    """Rows that an earlier scale had to leave out."""
    held: frozenset[int] | None
    """Rows that an earlier scale holds; None if there is no earlier scale."""


def find_todo(plan: Plan, scales: list[int], numbers: range, retry: bool = False) -> list[Todo]:
    """What is left to build. An earlier scale of the same shard says which rows to leave out.

    With `retry`, shards with rows that were left out are to be built again at every scale that they have.
    Raises ShardError for a shard of another set.
    """
    present = manifest.scales_in(plan.out) if plan.out.is_dir() else []
    todo = []
    for shard in numbers:
        there = {scale: m for scale in present if (m := whole_shard(plan, scale, shard))}
        again = retry and any(m.quarantined for m in there.values())
        wanted = sorted({*scales, *there}) if again else [scale for scale in scales if scale not in there]
        earlier = next(iter(there.values()), None)
        if wanted:
            todo.append(
                Todo(
                    shard=shard,
                    scales=wanted,
                    rows=plan.info.rows_of(shard),
                    quarantined=earlier.quarantined if earlier and not again else {},
                    held=frozenset(earlier.rows) if earlier else None,
                )
            )
    return todo


def whole_shard(plan: Plan, scale: int, shard: int) -> ShardManifest | None:
    """The manifest of a shard whose three files are there. Raises ShardError if it is not this set's."""
    m = read_manifest(plan.out, scale, shard)
    if m and (m.set, m.scale, m.shard) != (plan.info.id, scale, shard):
        raise ShardError(
            f"{shard_path(plan.out, scale, shard, 'json')} belongs to shard {m.shard} at {m.scale} px of set {m.set}: "
            "move what does not belong to this set out of its folder, then run this command again"
        )
    others = (shard_path(plan.out, scale, shard, suffix) for suffix in ("tar", "idx"))
    return m if m and all(path.is_file() for path in others) else None


def make_task(plan: Plan, todo: Todo, rows: list[int] | range | None = None) -> Task:
    """What a worker needs for a shard, or for some `rows` of it."""
    assert plan.tree is not None
    part = plan.rows.iloc[list(todo.rows if rows is None else rows)]
    return Task(
        data=plan.tree,
        out=plan.out,
        set=plan.info.id,
        shard=todo.shard,
        scales=todo.scales,
        codec=plan.info.codec,
        quality=plan.info.quality,
        resize=plan.info.resize,
        grey=plan.info.grey,
        rows=_images(part),
        quarantined=todo.quarantined,
        held=todo.held,
    )


def _images(part: pd.DataFrame) -> list[Image]:
    labels = label_names(part)
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
        for r in part.to_dict("records")
    ]
