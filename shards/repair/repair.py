"""Restore the bytes that a damaged shard set was built with.

What is broken is derived from what is whole: an index or manifest from its tar, SHA256SUMS and quarantine.csv from the
manifests, set.json from its copy inside rows.parquet. Only a broken tar or rows table is made again from the source tree,
and only kept if its bytes are the old ones. Only the grids in a manifest may differ; see `repair.from_tar`.
"""

import os
import shutil
from dataclasses import replace
from pathlib import Path

from cxrfast.errors import ShardError
from cxrfast.files import read_file, sha256, temporary_name, write_bytes
from cxrfast.machine import usable_cores
from cxrfast.shards.building.layout import set_id
from cxrfast.shards.building.tasks import Blueprint
from cxrfast.shards.format import manifest
from cxrfast.shards.format.checksums import adopt_earlier, parse_sums, sums_bytes
from cxrfast.shards.format.info import SetInfo, read_info, read_set, read_set_json
from cxrfast.shards.format.lock import Lock
from cxrfast.shards.format.manifest import ShardManifest, read_manifest
from cxrfast.shards.format.names import SET_FILES, WORKSHOP, is_temporary, shard_files, shard_name
from cxrfast.shards.format.rows import is_relabelled, read_rows, write_rows
from cxrfast.shards.images.bad_image import Reason
from cxrfast.shards.repair.cell_means import add_grids
from cxrfast.shards.repair.from_source import Shard, build_again
from cxrfast.shards.repair.from_tar import Derived, derive
from cxrfast.shards.repair.state import ASK, RepairState, rows_of_source
from cxrfast.shards.source_file import MISSING, NOT_A_FILE
from cxrfast.shards.storage import Tree
from cxrfast.shards.upkeep.problem import Problem
from cxrfast.shards.upkeep.verify import verify

NEAR = 8
"""Two hashes that differ in fewer of their 64 digits are one damaged hash; by chance that happens once in 10^60."""


def repair(
    folder: Path,
    tree: Tree | None = None,
    *,
    accept_new_bytes: bool = False,
    workers: int | None = None,
    trust_source: str | None = None,
    table: str | None = None,
) -> RepairState:
    """Repair what `verify` finds, then add grids to the manifests that lack them.

    `tree` is the source, needed to repair a tar or rows.parquet, and for the old bytes of a lost manifest of JPEGs. A file
    whose restored bytes would differ from the old ones, because libraries or images have changed, is not replaced unless
    `accept_new_bytes`. A source other than the four built-in ones is only imported if it is `trust_source`
    (`package.module:function`); `table` says where the table of a set from the source `table` is, and must be given if it is
    not in the tree. Foreign files are left alone. Raises ShardError if nothing says what the right bytes were.
    """
    folder = Path(folder).absolute()
    if not folder.is_dir():
        read_set(folder)  # raises
    with Lock(folder):
        shutil.rmtree(folder / WORKSHOP, ignore_errors=True)
        adopt_earlier(folder)
        found = {problem.path for problem in verify(folder).problems}
        sums, _ = parse_sums(read_file(folder / "SHA256SUMS"))
        state = RepairState(
            folder=folder,
            tree=tree,
            accept=accept_new_bytes,
            workers=workers or usable_cores(),
            trusted=trust_source,
            table=table,
            sums=sums,
            suspects=found,
        )
        if found:
            _trust_near_hashes(state)
            _clear(state)
            if blueprint := _restore_blueprint(state):
                _restore_lists(state, blueprint, _restore_shards(state, blueprint))
        if not state.failed:
            add_grids(state)
    return state


def _trust_near_hashes(state: RepairState) -> None:
    """Where a file's hash and its line in SHA256SUMS differ in a few digits, the line is damaged, not the file."""
    for name in state.suspects & state.sums.keys():
        if (state.folder / name).is_file():
            digest = sha256(state.folder / name)
            if 0 < sum(a != b for a, b in zip(digest, state.sums[name], strict=True)) < NEAR:
                state.sums[name] = digest
                state.suspects.remove(name)


def _clear(state: RepairState) -> None:
    """Remove temporary files of killed builds."""
    for name in sorted(state.suspects):
        if is_temporary(state.folder / name) and (state.folder / name).is_file():
            (state.folder / name).unlink()
            state.done.append(Problem(name, "removed: left by a killed build"))


# set.json and rows.parquet


def _restore_blueprint(state: RepairState) -> Blueprint | None:
    """Repair set.json and rows.parquet; None if that cannot be done."""
    path = state.folder / "rows.parquet"
    is_good = state.is_good(path.name)
    if is_good or is_relabelled(state.folder):
        info = read_info(path)
        state.put("set.json", info.to_bytes(), "restored from its copy in rows.parquet", is_new=not is_good)
        return Blueprint(tree=state.tree, out=state.folder, info=info, rows=read_rows(path))
    try:
        if not state.may_be_good("set.json"):
            raise ShardError("set.json and rows.parquet are both damaged")
        info = read_set_json(state.folder)
    except ShardError as error:
        state.failed.update({name: str(error) for name in ("set.json", path.name)})
        return None
    if why := _rebuild_rows(state, info):
        state.failed[path.name] = why
        return None
    return Blueprint(tree=state.tree, out=state.folder, info=read_set(state.folder), rows=read_rows(path))


def _rebuild_rows(state: RepairState, info: SetInfo) -> str:
    """Make rows.parquet again from the source's tables. Return why that failed, or ""."""
    if not state.tree:
        return f"{ASK}, to plan it again"
    path = state.folder / "rows.parquet"
    try:
        labels, rows = rows_of_source(state, info)
    except ShardError as error:
        return str(error)
    if set_id(rows, info.recipe, info.own_folds) != info.id:
        return f"the tables in {state.tree} list other images than the set was planned from"
    rows["bytes"] = state.tree.sizes(rows["path"].tolist())
    manifests = filter(None, (state.manifest(info, *shard) for shard in state.shards(info)))
    reasons = {int(row): why for m in manifests for row, why in m.quarantined.items()}
    for reason, size in ((Reason.MISSING, MISSING), (Reason.NOT_A_FILE, NOT_A_FILE)):  # it may be there by now
        rows.loc[rows["row"].map(reasons).eq(reason), "bytes"] = size
    if state.accept:
        info = replace(info, labels=labels, labels_from="")
    new = temporary_name(path)
    try:
        write_rows(new, rows, info)
        if sha256(new) != state.sums.get(path.name) and not state.accept:
            return (
                "planning it again gives other bytes (labels replaced by `cxrfast relabel`, or other library "
                "versions): restore it from a copy, or keep the new bytes with --accept-new-bytes and relabel again"
            )
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)
    state.done.append(Problem(path.name, "planned again from the source's tables"))
    state.put("set.json", info.to_bytes(), "reset to the labels of the source's tables")
    return ""


# Shards


def _restore_shards(state: RepairState, blueprint: Blueprint) -> list[ShardManifest]:
    """Repair every shard with a broken file. Return the manifests of all whole shards."""
    rebuild: dict[Shard, ShardManifest | None] = {}
    inexact: dict[Shard, Derived] = {}
    manifests: list[ShardManifest | None] = []
    for scale, shard in state.shards(blueprint.info):
        files = shard_files(scale, shard)
        if all(map(state.is_good, files)):
            manifests.append(read_manifest(state.folder, scale, shard))
            continue
        old = state.manifest(blueprint.info, scale, shard)
        if old or sum(name in state.sums for name in files) > 1:  # a single line alone is damage
            try:
                derived = derive(state, blueprint, scale, shard, old)
            except (ShardError, OSError) as error:
                state.failed[files[0]] = str(error)
                continue
            if derived and derived.is_exact:
                derived.put(state)
                manifests.append(derived.manifest)
            else:
                rebuild[scale, shard] = old
                if derived:
                    inexact[scale, shard] = derived
    manifests += build_again(state, blueprint, rebuild)
    for (scale, shard), derived in inexact.items():
        if why := state.failed.pop(shard_name(scale, shard, "tar"), None):
            derived.put(state, why)
            manifests.append(derived.manifest)
    return [m for m in manifests if m]


# quarantine.csv and SHA256SUMS


def _restore_lists(state: RepairState, blueprint: Blueprint, manifests: list[ShardManifest]) -> None:
    """Write quarantine.csv and SHA256SUMS again; SHA256SUMS keeps the lines of files that could not be repaired."""
    if not state.failed:
        paths = dict(zip(blueprint.rows["row"], blueprint.rows["path"], strict=True))
        state.put("quarantine.csv", manifest.quarantine_bytes(paths, manifests), "derived from the manifests")
    whole = {*SET_FILES, *(name for m in manifests for name in shard_files(m.scale, m.shard))} - state.failed.keys()
    repaired = {problem.path for problem in state.done}
    broken = {*state.failed, *(f"{name[:-3]}{end}" for name in state.failed for end in ("tar", "idx", "json"))}
    if state.failed:
        broken.add("quarantine.csv")  # its content is unknown
    sums = {name: digest for name, digest in state.sums.items() if name in broken}
    for name in sorted(whole - broken):
        is_same = state.is_good(name) and name not in repaired  # else the file is right and its line was wrong
        sums[name] = state.sums[name] if is_same else sha256(state.folder / name)
    state.sums, text = sums, sums_bytes(sums)
    if read_file(state.folder / "SHA256SUMS") != text:
        write_bytes(state.folder / "SHA256SUMS", text)
        state.done.append(Problem("SHA256SUMS", "written again"))
