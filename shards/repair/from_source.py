"""Rebuild damaged shards from the source in a separate folder, and keep those whose tars are unchanged."""

import os
import shutil
from dataclasses import replace
from typing import Any

from cxrfast.errors import ShardError
from cxrfast.files import sha256
from cxrfast.progress import progress
from cxrfast.shards.building.tasks import Blueprint, Todo, make_task
from cxrfast.shards.building.workers import run_here, start_pool
from cxrfast.shards.format.info import SetInfo
from cxrfast.shards.format.manifest import ShardManifest, read_manifest, source_hashes
from cxrfast.shards.format.names import WORKSHOP, shard_files, shard_name
from cxrfast.shards.repair.state import ASK, NOTHING, RepairState, digest, rows_of_source
from cxrfast.shards.upkeep.problem import Problem

Shard = tuple[int, int]
"""Scale and number."""

OTHER_BYTES = (
    "rebuilding it gives other bytes (a source image, a label or a library has changed since): restore it from a copy, "
    "or keep the new bytes with --accept-new-bytes"
)


def build_again(
    state: RepairState, blueprint: Blueprint, shards: dict[Shard, ShardManifest | None]
) -> list[ShardManifest]:
    """Rebuild shards: {scale and number: its manifest so far}. Return the manifests of those that were replaced."""
    if not shards:
        return []
    if not state.tree:
        state.failed.update({shard_name(*shard, "tar"): f"{ASK}, to rebuild it" for shard in shards})
        return []
    built = _build_aside(state, blueprint, shards)
    differing = {
        shard: old
        for shard, old in shards.items()
        if state.failed.get(shard_name(*shard, "tar"), "").startswith(OTHER_BYTES)
    }
    if differing and blueprint.info.labels_from:  # tars keep the labels they were built with
        try:
            rows = rows_of_source(state, blueprint.info)[1].assign(bytes=blueprint.rows["bytes"])
        except ShardError as error:
            state.failed.update({shard_name(*shard, "tar"): str(error) for shard in differing})
            return built
        for shard in differing:
            del state.failed[shard_name(*shard, "tar")]
        built += _build_aside(state, replace(blueprint, rows=rows), differing)
    return built


def _build_aside(
    state: RepairState, blueprint: Blueprint, shards: dict[Shard, ShardManifest | None]
) -> list[ShardManifest]:
    workshop, info = state.folder / WORKSHOP, blueprint.info
    aside = replace(blueprint, out=workshop)
    todo, built = [], []
    for scale, shard in shards:
        try:
            (workshop / str(scale)).mkdir(parents=True, exist_ok=True)
            rows, quarantined = info.rows_of(shard), state.quarantined(info, scale, shard)
        except (ShardError, OSError) as error:
            state.failed[shard_name(scale, shard, "tar")] = str(error)
            continue
        held = frozenset(row for row in rows if str(row) not in quarantined)
        todo.append(Todo(shard=shard, scales=[scale], rows=rows, quarantined=quarantined, held=held))
    try:
        with progress("building again", sum(len(t.rows) for t in todo)) as advance, start_pool(state.workers) as pool:
            tasks = (make_task(aside, item) for item in todo)
            for task, failure in run_here(tasks, state.workers, lambda text: advance(0, text), pool):
                advance(len(task.images))
                scale, shard = task.scales[0], task.shard
                if failure:
                    state.failed[shard_name(scale, shard, "tar")] = str(failure)
                elif m := _move_in(state, blueprint, scale, shard, shards[scale, shard]):
                    built.append(m)
    finally:
        shutil.rmtree(workshop, ignore_errors=True)
    return built


def _on_record(state: RepairState, info: SetInfo, new: ShardManifest, old: ShardManifest | None) -> dict[str, Any]:
    """Fields `sources` and `remarks` of an undamaged manifest of the shard that was just rebuilt."""
    if old and old.rows == new.rows and old.sources and state.is_good(shard_name(new.scale, new.shard, "json")):
        return {"sources": old.sources, "remarks": old.remarks}
    return state.about_sources(info, new)


def _changed(state: RepairState, blueprint: Blueprint, new: ShardManifest, old: ShardManifest | None) -> str:
    """Which source images of a rebuilt shard are other files than those on record, or ""."""
    known = source_hashes(replace(new, **_on_record(state, blueprint.info, new, old)))
    rows = [row for row, found in source_hashes(new).items() if known.get(row, found) != found]
    if not rows:
        return ""
    first = blueprint.rows["path"].iloc[rows[0]]
    return f"{len(rows):,} source images are other files than the set was built from (first: {first}, row {rows[0]})"


def _move_in(
    state: RepairState, blueprint: Blueprint, scale: int, shard: int, old: ShardManifest | None
) -> ShardManifest | None:
    """Replace a shard with the rebuilt one if the tars are the same. Return its manifest if so."""
    tar, index, text = shard_files(scale, shard)
    workshop, there = state.folder / WORKSHOP, state.folder / tar
    new = read_manifest(workshop, scale, shard)
    assert new is not None  # it was built a moment ago
    expected = {state.sums.get(tar), old and old.sha256, sha256(there) if there.is_file() else None}
    as_before = new.sha256 in expected
    changed = _changed(state, blueprint, new, old)
    if not as_before and (state.is_good(tar) or not state.accept):
        state.failed[tar] = OTHER_BYTES + (f". {changed}" if changed else "")
        return None
    if as_before and changed:  # the same pixels in other files: those that the tar was made from are on record
        new = replace(new, **_on_record(state, blueprint.info, new, old))
        new.write(workshop)
    try:
        if as_before and old and state.is_good(text):  # its grids may be from decoded images, or missing
            new = old
            new.write(workshop)
        elif state.sums.get(text) == digest(replace(new, **NOTHING).to_json().encode()):
            new = replace(new, **NOTHING)
            new.write(workshop)
        # a manifest says that its shard is whole: remove it first, write it last
        (state.folder / text).unlink(missing_ok=True)
        (state.folder / str(scale)).mkdir(exist_ok=True)
        for name in (tar, index, text):
            os.replace(workshop / name, state.folder / name)
    except OSError as error:
        state.failed[tar] = f"cannot be replaced ({error.strerror}): move what is in its place elsewhere"
        return None
    how = "rebuilt from the source" + ("" if as_before else ", with new bytes")
    state.done += [Problem(name, how) for name in (tar, index, text) if not (as_before and state.is_good(name))]
    if changed and not as_before:
        state.done.append(Problem(tar, f"{changed}: other scales hold the images that those files were before"))
    return new
