"""What is left to build of a set, and the tasks for its workers. Reads manifests, writes nothing."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from cxrfast.shards import manifest
from cxrfast.shards.manifest import SetInfo, read_manifest
from cxrfast.shards.rows import label_names
from cxrfast.shards.task import Image, Task
from cxrfast.shards.tree import Tree


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


def find_todo(plan: Plan, scales: list[int], numbers: range) -> list[Todo]:
    """What is left to build. An earlier scale of the same shard says which rows to leave out."""
    present = manifest.scales_in(plan.out) if plan.out.is_dir() else []
    todo = []
    for shard in numbers:
        there = {scale: m for scale in present if (m := read_manifest(plan.out, scale, shard))}
        wanted = [scale for scale in scales if scale not in there]
        earlier = next(iter(there.values()), None)
        if wanted:
            todo.append(
                Todo(
                    shard=shard,
                    scales=wanted,
                    rows=plan.info.rows_of(shard),
                    quarantined=earlier.quarantined if earlier else {},
                    held=frozenset(earlier.rows) if earlier else None,
                )
            )
    return todo


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
