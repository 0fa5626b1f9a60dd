"""The tar, index and manifest of damaged shards: derived from a sound tar, or built again from the source in a folder aside.

A manifest's grids are of pixels before they were encoded, which a tar of JPEGs does not hold. So a lost manifest is built
again from the source where there is one; else it gets the grids of the decoded images.
"""

import csv
import os
import shutil
from dataclasses import dataclass, replace
from hashlib import sha256 as new_sha256
from tarfile import TarError

import numpy as np

from cxrfast.errors import ShardError
from cxrfast.files import sha256
from cxrfast.progress import progress
from cxrfast.shards.building.todo import Plan, Todo, make_task
from cxrfast.shards.building.workers import run_here, start_pool
from cxrfast.shards.format import manifest
from cxrfast.shards.format.info import SetInfo
from cxrfast.shards.format.manifest import ShardManifest, read_manifest
from cxrfast.shards.format.names import WORKSHOP, shard_path
from cxrfast.shards.format.tar import Contents, read_contents
from cxrfast.shards.images.grid import STEPS, pack, tolerance, unpack
from cxrfast.shards.repair.grids import take_grids
from cxrfast.shards.repair.work import ASK, Repair, files_of, manifest_of, rows_of_source
from cxrfast.shards.upkeep.verify import Problem

Shard = tuple[int, int]
"""Scale and number."""

OTHER_BYTES = (
    "built again, it has other bytes (a source image, a label or a library has changed since): restore it from a copy, "
    "or keep the new ones with --accept-new-bytes"
)


@dataclass(frozen=True, kw_only=True)
class Derived:
    """What a sound tar tells of its index and manifest."""

    index: bytes
    manifest: ShardManifest
    is_exact: bool
    """False where the grids are of decoded images, and were of others."""

    def put(self, work: Repair, why: str = "") -> None:
        """Write index and manifest. `why`: what kept the shard from being built again from the source."""
        _, index, text = files_of(self.manifest.scale, self.manifest.shard)
        work.put(index, self.index, "made again from its tar")
        if not work.is_good(text):
            how = "made again from its tar" + ("" if self.is_exact else ", its grids from its images")
            if why and work.tree:
                how += f", since from the source it could not be ({why})"
            work.put(text, self.manifest.to_json().encode(), how, is_new=not self.is_exact)


def restore_shards(work: Repair, plan: Plan) -> list[ShardManifest]:
    """Mend every shard of which a file is broken; returns the manifests of all whole ones."""
    rebuild: dict[Shard, ShardManifest | None] = {}
    inexact: dict[Shard, Derived] = {}
    manifests: list[ShardManifest | None] = []
    for scale, shard in work.shards():
        files = files_of(scale, shard)
        if all(map(work.is_good, files)):
            manifests.append(read_manifest(work.folder, scale, shard))
            continue
        old = manifest_of(work, plan.info, scale, shard)
        is_planned = shard < plan.info.shards
        if is_planned and (old or sum(name in work.sums for name in files) > 1):  # one line alone is a damaged one
            try:
                derived = _derive(work, plan, scale, shard, old)
            except (ShardError, OSError) as error:
                work.failed[files[0]] = str(error)
                continue
            if derived and derived.is_exact:
                derived.put(work)
                manifests.append(derived.manifest)
            else:
                rebuild[scale, shard] = old
                if derived:
                    inexact[scale, shard] = derived
    manifests += _build_again(work, plan, rebuild)
    for (scale, shard), derived in inexact.items():
        if why := work.failed.pop(files_of(scale, shard)[0], None):
            derived.put(work, why)
            manifests.append(derived.manifest)
    return [m for m in manifests if m]


def _derive(work: Repair, plan: Plan, scale: int, shard: int, old: ShardManifest | None) -> Derived | None:
    """Index and manifest from the tar; None if the tar itself is broken or holds other images."""
    tar = shard_path(work.folder, scale, shard, "tar")
    name = files_of(scale, shard)[0]
    if not tar.is_file():
        return None
    digest = work.sums[name] if work.is_good(name) else sha256(tar)
    if not work.is_good(name) and not (old and old.sha256 == digest):
        return None
    try:
        contents = read_contents(tar)
    except (TarError, ValueError, KeyError, TypeError, AttributeError):
        return None
    quarantined = _quarantined(work, plan.info, scale, shard)
    rows = [row for row in plan.info.rows_of(shard) if str(row) not in quarantined]
    if contents.rows != rows or contents.image_ids != plan.rows["image_id"].iloc[rows].tolist():
        return None
    made = ShardManifest(
        set=plan.info.id,
        scale=scale,
        shard=shard,
        sha256=digest,
        bytes=tar.stat().st_size,
        rows=contents.rows,
        crc32=contents.crc32,
        sizes=contents.sizes,
        quarantined=quarantined,
    )
    made, is_exact = _with_grids(work, plan.info, made, old, contents)
    return Derived(index=contents.index, manifest=made, is_exact=is_exact)


def _with_grids(
    work: Repair, info: SetInfo, made: ShardManifest, old: ShardManifest | None, contents: Contents
) -> tuple[ShardManifest, bool]:
    """The manifest `made` from a tar with grids, and whether these are those that it had."""
    tar, _, text = files_of(made.scale, made.shard)
    if old and work.is_good(text):
        return old, True
    signed = work.sums.get(text)
    if signed == _digest(made) or (signed is None and old == made):
        return made, True  # of a set that was built before there were grids
    grids = take_grids(work.folder / tar, contents.places, info.codec, work.workers)
    decoded = replace(made, grids=pack(grids))
    if old and old.grids and not signed and replace(old, grids="") == made:  # only its line is lost
        off = np.abs(unpack(old.grids, len(grids)) - grids.astype(np.int32)).max(initial=0)
        if off <= STEPS * tolerance(info.codec, info.quality, made.scale):
            return old, True
    return decoded, info.codec == "raw" or signed == _digest(decoded)


def _digest(m: ShardManifest) -> str:
    return new_sha256(m.to_json().encode()).hexdigest()


def _quarantined(work: Repair, info: SetInfo, scale: int, shard: int) -> dict[str, str]:
    """Rows of a shard that were left out and why: by a manifest that is as it was written, else by quarantine.csv."""
    for other in (scale, *manifest.scales_in(work.folder)):
        if work.may_be_good(files_of(other, shard)[2]) and (m := manifest_of(work, info, other, shard)):
            return m.quarantined
    rows = info.rows_of(shard)
    try:
        if work.may_be_good("quarantine.csv"):
            with open(work.folder / "quarantine.csv", newline="") as file:
                return {line["row"]: line["reason"] for line in csv.DictReader(file) if int(line["row"]) in rows}
    except (OSError, ValueError, KeyError, TypeError):
        pass  # it cannot be read
    raise ShardError(
        f"neither a manifest of shard {shard} nor quarantine.csv says which rows were left out: delete the shard's "
        "files at all scales and run the same `cxrfast shard` command again"
    )


def _build_again(work: Repair, plan: Plan, shards: dict[Shard, ShardManifest | None]) -> list[ShardManifest]:
    """Broken tars from the source, in a folder aside; they move in if they are what they were."""
    if not shards:
        return []
    if not work.tree:
        work.failed.update({files_of(*shard)[0]: f"{ASK}, to build it again" for shard in shards})
        return []
    mended = _build_aside(work, plan, shards)
    differing = {shard: old for shard, old in shards.items() if work.failed.get(files_of(*shard)[0]) == OTHER_BYTES}
    if differing and plan.info.labels_from:  # the tars hold the labels of when they were built
        rows = rows_of_source(work.tree, plan.info)[1]
        rows["bytes"] = plan.rows["bytes"]
        earlier = Plan(tree=plan.tree, out=plan.out, info=plan.info, rows=rows)
        for shard in differing:
            del work.failed[files_of(*shard)[0]]
        mended += _build_aside(work, earlier, differing)
    return mended


def _build_aside(work: Repair, plan: Plan, shards: dict[Shard, ShardManifest | None]) -> list[ShardManifest]:
    workshop = work.folder / WORKSHOP
    aside = Plan(tree=plan.tree, out=workshop, info=plan.info, rows=plan.rows)
    todo = []
    for scale, shard in shards:
        name = files_of(scale, shard)[0]
        try:
            (workshop / str(scale)).mkdir(parents=True, exist_ok=True)
            rows, quarantined = plan.info.rows_of(shard), _quarantined(work, plan.info, scale, shard)
        except (ShardError, OSError) as error:
            work.failed[name] = str(error)
            continue
        held = frozenset(row for row in rows if str(row) not in quarantined)
        todo.append(Todo(shard=shard, scales=[scale], rows=rows, quarantined=quarantined, held=held))
    mended = []
    try:
        with (
            progress("building again", sum(len(t.rows) for t in todo), quiet=work.quiet) as advance,
            start_pool(work.workers) as pool,
        ):
            tasks = (make_task(aside, item) for item in todo)
            for task, failure in run_here(tasks, work.workers, lambda text: advance(0, text), pool):
                advance(len(task.rows))
                scale, shard = task.scales[0], task.shard
                if failure:
                    work.failed[files_of(scale, shard)[0]] = str(failure)
                elif m := _move_in(work, scale, shard, shards[scale, shard]):
                    mended.append(m)
    finally:
        shutil.rmtree(workshop, ignore_errors=True)
    return mended


def _move_in(work: Repair, scale: int, shard: int, old: ShardManifest | None) -> ShardManifest | None:
    """Put a shard that was built again into its place, if it is what it was."""
    tar, index, text = files_of(scale, shard)
    new = read_manifest(work.folder / WORKSHOP, scale, shard)
    assert new is not None  # it was built a moment ago
    there = work.folder / tar
    expected = {work.sums.get(tar), old and old.sha256, sha256(there) if there.is_file() else None}
    as_before = new.sha256 in expected
    if not as_before and (work.is_good(tar) or not work.accept):
        work.failed[tar] = OTHER_BYTES
        return None
    try:
        if as_before and old and work.is_good(text):  # its grids may be of decoded images, or it may have none
            old.write(work.folder / WORKSHOP)
            new = old
        # a manifest means that its shard is whole: it leaves first, comes last
        (work.folder / text).unlink(missing_ok=True)
        (work.folder / str(scale)).mkdir(exist_ok=True)
        for name in (tar, index, text):
            os.replace(work.folder / WORKSHOP / name, work.folder / name)
    except OSError as error:
        work.failed[tar] = f"cannot be replaced ({error.strerror}): move what is there away"
        return None
    how = "built again from the source" + ("" if as_before else ", with new bytes")
    work.done += [Problem(name, how) for name in (tar, index, text) if not (as_before and work.is_good(name))]
    return new
