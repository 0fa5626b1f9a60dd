"""Logits of trained runs for the rows of another set than their own. One process, or several by torchrun.

In: runs and a shard set. Out: RUN/external/NAME.*, see `runs.external`, and remarks on what the set does not share with the
runs, and what it should not share. Nothing is evaluated here.
"""

import logging
from collections.abc import Sequence
from dataclasses import fields, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd

from cxrfast.distributed import World
from cxrfast.errors import RunError, ShardError
from cxrfast.pipelines.reader import Reader
from cxrfast.progress import progress
from cxrfast.runs.external import IDS, External, Matching, OtherSet, check_free, check_name, write_external
from cxrfast.runs.lease import locked_by_first
from cxrfast.runs.overlap import overlap, overlap_note
from cxrfast.runs.run import Run
from cxrfast.shards.building.cautions import hashes_by_row
from cxrfast.shards.format.recipe import ImageRecipe
from cxrfast.shards.parts import check_views
from cxrfast.shards.shard_set import ShardSet
from cxrfast.training.predict import complete, score_rows
from cxrfast.training.setup import is_partial

log = logging.getLogger(__name__)


def predict_external(
    runs: Sequence[Run],
    world: World,
    shards: Path,
    *,
    name: str | None = None,
    views: Sequence[str] = (),
    allow_partial: bool = False,
    own: Path | None = None,
    engine: str = "auto",
    threads: int | None = None,
) -> str:
    """Score the rows of `shards`, another set than the runs' own, with the best weights of each run. Returns its name.

    `name`: what to call the set; default: the name of its folder. `views`: view positions; default: all. `own`: current
    location of the runs' own set, with which it is compared; default: where it was in training.

    Raises RunError if the name is taken by another set, if the set's build is not finished, unless `allow_partial`, and if
    another process writes into a run; LoadError if the set lacks a run's scale.
    """
    name = Path(shards).resolve().name if name is None else name
    check_name(name)
    readers = {scale: Reader(shards, scale) for scale in {run.config.scale for run in runs}}
    partial = {scale: is_partial(reader, allow_partial, "predict") for scale, reader in readers.items()}
    tried = _Tried(ShardSet(shards), name, tuple(views))
    said: set[str] = set()
    for run in runs:
        scale = run.config.scale
        with locked_by_first(run, f"predicting {name}", world) as lease:
            remarks = _predict(
                replace(run, lease=lease), world, readers[scale], tried, partial[scale], own, engine, threads
            )
        for level, text in remarks:
            if text not in said:
                log.log(level, text)
                said.add(text)
    return name


class _Tried:
    """The other set, and the runs' own sets to compare it with; each is read once for all runs."""

    def __init__(self, shard_set: ShardSet, name: str, views: tuple[str, ...]) -> None:
        self.shard_set, self.name, self.views = shard_set, name, views
        self._own: dict[Path, _OwnSet | None] = {}

    @cached_property
    def usable(self) -> np.ndarray:
        """int64: rows with one of the views. Raises RunError for a view that no row has."""
        rows = self.shard_set.rows(["row", "view"])
        if self.views:
            check_views(rows["view"], self.views)
            rows = rows[rows["view"].isin(self.views)]
        return rows["row"].to_numpy(np.int64)

    @cached_property
    def table(self) -> pd.DataFrame:
        return self.shard_set.rows([*IDS, *self.shard_set.info.labels])

    @cached_property
    def sources(self) -> dict[int, bytes]:
        """Hash of the source file of each row that has one."""
        return hashes_by_row(self.shard_set.manifests())

    def own_set(self, run: Run, folder: Path | None) -> "_OwnSet | None":
        """The set that the run was trained on; None if it is not there any more. Raises RunError if `folder` is another."""
        where = folder or run.shards
        if where not in self._own:
            try:
                self._own[where] = _OwnSet(ShardSet(where))
            except (ShardError, OSError, ValueError):  # the path comes from the run's folder, and may be anything
                if folder:
                    raise
                self._own[where] = None
        found = self._own[where]
        if found and found.id != run.config.set_id:
            if folder:
                raise RunError(
                    f"{run.name} was trained on set {run.config.set_id}, {folder} is set {found.id}: give the folder of its own "
                    "set with --shards, or leave it out"
                )
            return None
        return found

    def other_set(self, own: "_OwnSet | None", is_partial: bool) -> OtherSet:
        """What a run's predictions say about the set."""
        info = self.shard_set.info
        return OtherSet(
            name=self.name,
            set_id=info.id,
            labels=tuple(info.labels),
            views=self.views,
            is_partial=is_partial,
            recipe=recipe_differences(info.recipe, own.recipe) if own else "",
            knows_files=bool(own and own.rows and self.sources),
        )

    def copies(self, own: "_OwnSet | None", rows: np.ndarray) -> np.ndarray:
        """int64: the row of the own set whose source file is the same, for each of `rows`; -1 if there is none."""
        if own is None:
            return np.full(len(rows), -1, np.int64)
        return np.array([own.rows.get(self.sources.get(row, b""), -1) for row in rows.tolist()], np.int64)


class _OwnSet:
    """What is compared of the set that runs were trained on."""

    def __init__(self, shard_set: ShardSet) -> None:
        self.id, self.recipe = shard_set.info.id, shard_set.info.recipe
        self.rows = {source: row for row, source in hashes_by_row(shard_set.manifests()).items()}
        """Row by hash of its source file."""


def recipe_differences(recipe: ImageRecipe, own: ImageRecipe) -> str:
    """`resize pad, not squash` for all that images of a recipe were made otherwise with; the seed decides no pixel."""
    names = (field.name for field in fields(ImageRecipe) if field.name != "seed")
    pairs = ((name, getattr(recipe, name), getattr(own, name)) for name in names)
    return "; ".join(
        f"{name} {mine or 'none'}, not {theirs or 'none'}" for name, mine, theirs in pairs if mine != theirs
    )


def _predict(
    run: Run,
    world: World,
    reader: Reader,
    tried: _Tried,
    is_partial: bool,
    own: Path | None,
    engine: str,
    threads: int | None,
) -> list[tuple[int, str]]:
    """Score and store. Returns what to say, with the level of each message; nothing on ranks other than the first."""
    world.on_first(lambda: check_free(run, tried.name, reader.info.id, reader.folder))
    world.on_first(lambda: tried.own_set(run, own) is not None)  # before the work: a wrong --shards is refused
    rows = np.intersect1d(reader.rows, tried.usable)
    if not len(rows):
        raise RunError(f"{reader.folder} holds no row at {reader.scale} px{' of these views' if tried.views else ''}")
    model = run.load(world.device)
    with progress(f"predict {run.name} on {tried.name}", len(rows)) as advance:
        scores = score_rows(run, model, reader, rows, world, engine, threads, advance)

    def store() -> list[tuple[int, str]]:
        assert scores is not None, "rank 0 gathers them"
        own_set = tried.own_set(run, own)
        external = External(
            other=tried.other_set(own_set, is_partial),
            rows=tried.table.iloc[rows].reset_index(drop=True),
            logits=complete(scores, rows, run.name).logits,
            copy_of=tried.copies(own_set, rows),
        )
        write_external(run, external)
        return remarks(run, external, own_set is not None)

    found: list[tuple[int, str]] = world.on_first(store)
    return found if world.is_first else []


def remarks(run: Run, external: External, knows_own_set: bool) -> list[tuple[int, str]]:
    """What to know about a run's predictions on another set: level and sentence."""
    other = external.other
    matching = Matching.of(run.config.labels, other.labels)
    found = []
    if matching.both:
        told = [
            f"{len(matching.both)} of the {len(run.config.labels)} findings of the runs: {', '.join(matching.both)}"
        ]
        told += [f"only in the runs: {', '.join(matching.only_run)}"] if matching.only_run else []
        told += [f"only in {other.name}: {', '.join(matching.only_set)}"] if matching.only_set else []
        found.append((logging.INFO, f"{other.name} has labels of {'; '.join(told)}"))
    else:
        labels = f"its labels are {', '.join(other.labels)}" if other.labels else "it has no labels"
        found.append(
            (
                logging.WARNING,
                f"{other.name} has no finding of the runs ({labels}): logits are stored, nothing can be evaluated",
            )
        )
    found += [
        (logging.WARNING, f"{text} `cxrfast relabel` gives a set other labels") for text in matching.near_misses()
    ]
    if other.recipe:
        found.append(
            (
                logging.WARNING,
                f"images of {other.name} were made otherwise than those the runs were trained on: {other.recipe}",
            )
        )
    if not knows_own_set:
        found.append(
            (
                logging.WARNING,
                f"{run.shards} is not the set that {run.name} was trained on, or not there any more: how images "
                "were made and which files are the same cannot be compared; --shards says where it is",
            )
        )
    shared = overlap(run, external)
    text = overlap_note(other.name, [shared], other.knows_files)
    found.append((logging.WARNING, f"{run.name}: {text}") if shared.mask.any() else (logging.INFO, text))
    return found
