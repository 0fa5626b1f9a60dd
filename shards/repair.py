"""Give a damaged shard set back the bytes it was built with.

What is broken is derived from what is whole: an index or manifest from its tar, SHA256SUMS and quarantine.csv from the
manifests, set.json from its copy inside rows.parquet. Only a broken tar or plan is made again from the source tree, and
takes its place only if it has the bytes that it had.
"""

import csv
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from hashlib import sha256 as new_sha256
from pathlib import Path
from tarfile import TarError

import pandas as pd

from cxrfast.errors import ShardError
from cxrfast.files import sha256, temporary_name, write_bytes
from cxrfast.machine import usable_cores
from cxrfast.progress import progress
from cxrfast.shards import manifest
from cxrfast.shards.lease import Lease
from cxrfast.shards.manifest import WORKSHOP, SetInfo, ShardManifest, read_manifest, read_set, shard_path
from cxrfast.shards.plan import plan_rows, set_id
from cxrfast.shards.rows import is_as_written, read_info, read_rows, write_rows
from cxrfast.shards.sources import read_source
from cxrfast.shards.tar import read_contents
from cxrfast.shards.todo import Plan, Todo, make_task
from cxrfast.shards.tree import Tree
from cxrfast.shards.verify import Problem, verify
from cxrfast.shards.workers import run_here, start_pool

ASK = "give the source tree with --data"

OTHER_BYTES = (
    "built again, it has other bytes (a source image, a label or a library has changed since): restore it from a copy, "
    "or keep the new ones with --accept-new-bytes"
)


@dataclass(kw_only=True)
class Repair:
    """A repair under way, and in the end what it did."""

    folder: Path
    tree: Tree | None
    accept: bool
    """Keep new bytes where the old ones cannot be had."""
    workers: int
    quiet: bool
    sums: dict[str, str]
    """SHA256SUMS as far as it can be read."""
    suspects: set[str]
    done: list[Problem] = field(default_factory=list)
    """File, and how it was mended."""
    failed: dict[str, str] = field(default_factory=dict)
    """File, and why it could not be mended."""

    def is_good(self, name: str) -> bool:
        """Has the file the hash that SHA256SUMS gives?"""
        return name in self.sums and name not in self.suspects

    def may_be_good(self, name: str) -> bool:
        """Does SHA256SUMS at least not say otherwise? It may have lost the line."""
        return name not in self.sums or self.is_good(name)

    def put(self, name: str, data: bytes, how: str) -> None:
        """Write a file made again, if it differs; but not one that contradicts SHA256SUMS."""
        path = self.folder / name
        try:
            if path.is_file() and path.read_bytes() == data:
                return
            if not self.accept and name in self.sums and new_sha256(data).hexdigest() != self.sums[name]:
                self.failed[name] = "made again, it is not what SHA256SUMS says: restore it from a copy"
                return
            write_bytes(path, data)
        except OSError as error:
            self.failed[name] = f"cannot be written ({error.strerror}): move what is there away"
            return
        self.done.append(Problem(name, how))

    def report(self) -> list[str]:
        """A line a file."""
        done = [f"mended: {problem.path}: {problem.what}" for problem in self.done]
        return done + [f"not mended: {name}: {why}" for name, why in self.failed.items()]


def repair(
    folder: Path,
    tree: Tree | None = None,
    *,
    accept_new_bytes: bool = False,
    workers: int | None = None,
    quiet: bool = False,
) -> Repair:
    """Mend what `verify` finds. `tree` is the source, needed where a tar or the plan is broken.

    A file that comes out with other bytes than it had, because libraries or images have changed, is left as it is
    unless `accept_new_bytes`. Foreign files are left alone. Raises ShardError where there is nothing to go by.
    """
    folder = Path(folder).absolute()
    if not folder.is_dir():
        read_set(folder)  # says so
    with Lease(folder):
        shutil.rmtree(folder / WORKSHOP, ignore_errors=True)
        found = {problem.path for problem in verify(folder, quiet=quiet).problems}
        sums, _ = manifest.parse_sums((folder / "SHA256SUMS").read_bytes())
        work = Repair(
            folder=folder,
            tree=tree,
            accept=accept_new_bytes,
            workers=workers or usable_cores(),
            quiet=quiet,
            sums=sums,
            suspects=found,
        )
        if found:
            _clear(work)
            plan = _restore_plan(work)
            if plan:
                manifests = _restore_shards(work, plan)
                _restore_lists(work, plan, manifests)
    return work


def _clear(work: Repair) -> None:
    """Remove what killed builds left."""
    for name in sorted(work.suspects):
        if manifest.is_temporary(work.folder / name) and (work.folder / name).is_file():
            (work.folder / name).unlink()
            work.done.append(Problem(name, "left by a killed build: removed"))


# set.json and rows.parquet


def _restore_plan(work: Repair) -> Plan | None:
    """The plan, mended; None where that cannot be done."""
    path = work.folder / "rows.parquet"
    if work.is_good(path.name):
        info = read_info(path)
        work.put("set.json", info.to_bytes(), "restored from its copy in rows.parquet")
        return Plan(tree=work.tree, out=work.folder, info=info, rows=read_rows(path))
    try:
        if not work.may_be_good("set.json"):
            raise ShardError("set.json and rows.parquet are both damaged")
        info = read_set(work.folder)
    except ShardError as error:
        work.failed.update({name: str(error) for name in ("set.json", path.name)})
        return None
    if not (is_as_written(path) and read_info(path) == info):  # else it is its line that is wrong
        why = _plan_again(work, info)
        if why:
            work.failed[path.name] = why
            return None
    return Plan(tree=work.tree, out=work.folder, info=read_set(work.folder), rows=read_rows(path))


def _plan_again(work: Repair, info: SetInfo) -> str:
    """rows.parquet from the source's tables. Returns why not, if not."""
    if not work.tree:
        return f"{ASK}, to plan it again"
    path = work.folder / "rows.parquet"
    labels, rows = _rows_of_source(work.tree, info)
    if set_id(rows, info.recipe) != info.id:
        return f"the tables in {work.tree} list other images than the set was planned from"
    rows["bytes"] = work.tree.sizes(rows["path"].tolist(), True)
    reasons = {int(row): why for m in _readable(work, info) for row, why in m.quarantined.items()}
    rows.loc[rows["row"].map(reasons).eq("missing"), "bytes"] = -1  # perhaps downloaded since
    if work.accept:
        info = replace(info, labels=labels, labels_from="")
    new = temporary_name(path)
    try:
        write_rows(new, rows, info)
        if sha256(new) != work.sums.get(path.name) and not work.accept:
            return (
                "planned again, it has other bytes (labels replaced by `cxrfast relabel`, or other library versions): "
                "restore it from a copy, or keep the new ones with --accept-new-bytes and relabel again"
            )
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)
    work.done.append(Problem(path.name, "planned again from the source's tables"))
    work.put("set.json", info.to_bytes(), "has the labels of the source's tables again")
    return ""


def _rows_of_source(tree: Tree, info: SetInfo) -> tuple[list[str], pd.DataFrame]:
    """Labels and rows as the source's tables give them; `bytes` is 0."""
    listed = read_source(info.source, tree, info.source_options)
    return list(listed.labels), plan_rows(listed.images, listed.labels, info.seed)


# Shards


def _restore_shards(work: Repair, plan: Plan) -> list[ShardManifest]:
    """Mend every shard of which a file is broken; returns the manifests of all whole ones."""
    names = {name for name in (*work.sums, *manifest.files_in(work.folder)) if manifest.NAMES.fullmatch(name)}
    shards = sorted({(int(p.parts[0]), int(p.stem)) for p in map(Path, names) if len(p.parts) == 2})
    rebuild: dict[tuple[int, int], ShardManifest | None] = {}
    manifests: list[ShardManifest | None] = []
    for scale, shard in shards:
        files = _names(scale, shard)
        if all(map(work.is_good, files)):
            manifests.append(read_manifest(work.folder, scale, shard))
        elif shard < plan.info.shards and (
            sum(name in work.sums for name in files) > 1 or _manifest(work, plan.info, scale, shard)
        ):  # one line alone is a damaged one
            old = _manifest(work, plan.info, scale, shard)
            try:
                if mended := _derive(work, plan, scale, shard, old):
                    manifests.append(mended)
                else:
                    rebuild[scale, shard] = old
            except (ShardError, OSError) as error:
                work.failed[files[0]] = str(error)
    manifests += _build_again(work, plan, rebuild)
    return [m for m in manifests if m]


def _names(scale: int, shard: int) -> list[str]:
    return [manifest.shard_name(scale, shard, suffix) for suffix in ("tar", "idx", "json")]


def _manifest(work: Repair, info: SetInfo, scale: int, shard: int) -> ShardManifest | None:
    """A shard's manifest if it can be read and is the one that belongs there."""
    try:
        m = read_manifest(work.folder, scale, shard)
    except ShardError:
        return None
    return m if m and (m.set, m.scale, m.shard) == (info.id, scale, shard) else None


def _readable(work: Repair, info: SetInfo) -> Iterable[ShardManifest]:
    for scale in manifest.scales_in(work.folder):
        for shard in manifest.built(work.folder, scale):
            if m := _manifest(work, info, scale, shard):
                yield m


def _derive(work: Repair, plan: Plan, scale: int, shard: int, old: ShardManifest | None) -> ShardManifest | None:
    """Index and manifest from the tar; None if the tar itself is broken or holds other images."""
    tar = shard_path(work.folder, scale, shard, "tar")
    name, index, text = _names(scale, shard)
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
    work.put(index, contents.index, "made again from its tar")
    work.put(text, made.to_json().encode(), "made again from its tar")
    return made


def _quarantined(work: Repair, info: SetInfo, scale: int, shard: int) -> dict[str, str]:
    """Rows of a shard that were left out and why: by a manifest that is as it was written, else by quarantine.csv."""
    for other in (scale, *manifest.scales_in(work.folder)):
        if work.may_be_good(_names(other, shard)[2]) and (m := _manifest(work, info, other, shard)):
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


def _build_again(work: Repair, plan: Plan, shards: dict[tuple[int, int], ShardManifest | None]) -> list[ShardManifest]:
    """Broken tars from the source, in a folder aside; they move in if they are what they were."""
    if not shards:
        return []
    if not work.tree:
        work.failed.update({_names(*shard)[0]: f"{ASK}, to build it again" for shard in shards})
        return []
    mended = _build_aside(work, plan, shards)
    differing = {shard: old for shard, old in shards.items() if work.failed.get(_names(*shard)[0]) == OTHER_BYTES}
    if differing and plan.info.labels_from:  # the tars hold the labels of when they were built
        rows = _rows_of_source(work.tree, plan.info)[1]
        rows["bytes"] = plan.rows["bytes"]
        earlier = Plan(tree=plan.tree, out=plan.out, info=plan.info, rows=rows)
        for shard in differing:
            del work.failed[_names(*shard)[0]]
        mended += _build_aside(work, earlier, differing)
    return mended


def _build_aside(work: Repair, plan: Plan, shards: dict[tuple[int, int], ShardManifest | None]) -> list[ShardManifest]:
    workshop = work.folder / WORKSHOP
    aside = Plan(tree=plan.tree, out=workshop, info=plan.info, rows=plan.rows)
    todo = []
    for scale, shard in shards:
        name = _names(scale, shard)[0]
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
                    work.failed[_names(scale, shard)[0]] = str(failure)
                elif m := _move_in(work, scale, shard, shards[scale, shard]):
                    mended.append(m)
    finally:
        shutil.rmtree(workshop, ignore_errors=True)
    return mended


def _move_in(work: Repair, scale: int, shard: int, old: ShardManifest | None) -> ShardManifest | None:
    """Put a shard that was built again into its place, if it is what it was."""
    tar, index, text = _names(scale, shard)
    new = read_manifest(work.folder / WORKSHOP, scale, shard)
    assert new is not None  # it was built a moment ago
    there = work.folder / tar
    expected = {work.sums.get(tar), old and old.sha256, sha256(there) if there.is_file() else None}
    if new.sha256 not in expected and not work.accept:
        work.failed[tar] = OTHER_BYTES
        return None
    try:
        (work.folder / text).unlink(
            missing_ok=True
        )  # a manifest means that its shard is whole: it leaves first, comes last
        (work.folder / str(scale)).mkdir(exist_ok=True)
        for name in (tar, index, text):
            os.replace(work.folder / WORKSHOP / name, work.folder / name)
    except OSError as error:
        work.failed[tar] = f"cannot be replaced ({error.strerror}): move what is there away"
        return None
    as_before = new.sha256 in expected
    how = "built again from the source" + ("" if as_before else ", with new bytes")
    work.done += [Problem(name, how) for name in (tar, index, text) if not (as_before and work.is_good(name))]
    return new


# quarantine.csv and SHA256SUMS


def _restore_lists(work: Repair, plan: Plan, manifests: list[ShardManifest]) -> None:
    """From what is whole now. Whatever could not be mended keeps its line in SHA256SUMS; foreign files get none."""
    if not work.failed:
        paths = dict(zip(plan.rows["row"], plan.rows["path"], strict=True))
        work.put("quarantine.csv", manifest.quarantine_bytes(paths, manifests), "made again from the manifests")
    whole = {*manifest.PLAN, *(name for m in manifests for name in _names(m.scale, m.shard))} - work.failed.keys()
    mended = {problem.path for problem in work.done}
    broken = {*work.failed, *(f"{name[:-3]}{end}" for name in work.failed for end in ("tar", "idx", "json"))}
    if work.failed:
        broken.add("quarantine.csv")  # nobody knows what it should say
    sums = {name: digest for name, digest in work.sums.items() if name in broken}
    for name in sorted(whole - broken):
        is_same = work.is_good(name) and name not in mended  # else the file is right, and its line was wrong
        sums[name] = work.sums[name] if is_same else sha256(work.folder / name)
    text = manifest.sums_bytes(sums)
    if (work.folder / "SHA256SUMS").read_bytes() != text:
        write_bytes(work.folder / "SHA256SUMS", text)
        work.done.append(Problem("SHA256SUMS", "written anew"))
