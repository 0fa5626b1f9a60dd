"""Give a damaged shard set back the bytes it was built with.

What is broken is derived from what is whole: an index or manifest from its tar, SHA256SUMS and quarantine.csv from the
manifests, set.json from its copy inside rows.parquet. Only a broken tar or plan is made again from the source tree, and
takes its place only if it has the bytes that it had. Only the grids in a manifest may come out otherwise; see
`repair_shards`.
"""

import os
import shutil
from dataclasses import replace
from pathlib import Path

from cxrfast.errors import ShardError
from cxrfast.files import sha256, temporary_name, write_bytes
from cxrfast.machine import usable_cores
from cxrfast.shards.building.layout import set_id
from cxrfast.shards.building.todo import Plan
from cxrfast.shards.format import manifest
from cxrfast.shards.format.checksums import parse_sums, sums_bytes
from cxrfast.shards.format.info import SetInfo, read_set
from cxrfast.shards.format.lock import Lease
from cxrfast.shards.format.manifest import ShardManifest
from cxrfast.shards.format.names import PLAN, WORKSHOP, is_temporary
from cxrfast.shards.format.rows import is_as_written, read_info, read_rows, write_rows
from cxrfast.shards.repair.grids import add_grids
from cxrfast.shards.repair.shards import restore_shards
from cxrfast.shards.repair.work import ASK, Repair, files_of, readable, rows_of_source
from cxrfast.shards.storage import Tree
from cxrfast.shards.upkeep.verify import Problem, verify

NEAR = 8
"""Of 64 digits; two hashes that have nothing to do with each other differ in fewer than that once in 10^60."""


def repair(
    folder: Path,
    tree: Tree | None = None,
    *,
    accept_new_bytes: bool = False,
    workers: int | None = None,
    quiet: bool = False,
) -> Repair:
    """Mend what `verify` finds, and then add grids where shards have none.

    `tree` is the source, needed where a tar or the plan is broken, and for the old bytes of a lost manifest of JPEGs.
    A file that comes out with other bytes than it had, because libraries or images have changed, is left as it is
    unless `accept_new_bytes`. Foreign files are left alone. Raises ShardError where there is nothing to go by.
    """
    folder = Path(folder).absolute()
    if not folder.is_dir():
        read_set(folder)  # says so
    with Lease(folder):
        shutil.rmtree(folder / WORKSHOP, ignore_errors=True)
        found = {problem.path for problem in verify(folder, quiet=quiet).problems}
        sums, _ = parse_sums((folder / "SHA256SUMS").read_bytes())
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
            _trust_near_hashes(work)
            _clear(work)
            plan = _restore_plan(work)
            if plan:
                manifests = restore_shards(work, plan)
                _restore_lists(work, plan, manifests)
        if not work.failed:
            added, work.failed = add_grids(folder, read_set(folder).codec, work.workers, quiet)
            work.done += [
                Problem(f"{scale}/", f"manifests given the grids of their images: {n:,}") for scale, n in added.items()
            ]
    return work


def _trust_near_hashes(work: Repair) -> None:
    """Where a hash in SHA256SUMS and that of the file differ in a few digits, it is the line that is damaged."""
    for name in work.suspects & work.sums.keys():
        if (work.folder / name).is_file():
            digest = sha256(work.folder / name)
            if 0 < sum(a != b for a, b in zip(digest, work.sums[name], strict=True)) < NEAR:
                work.sums[name] = digest
                work.suspects.remove(name)


def _clear(work: Repair) -> None:
    """Remove what killed builds left."""
    for name in sorted(work.suspects):
        if is_temporary(work.folder / name) and (work.folder / name).is_file():
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
    labels, rows = rows_of_source(work.tree, info)
    if set_id(rows, info.recipe) != info.id:
        return f"the tables in {work.tree} list other images than the set was planned from"
    rows["bytes"] = work.tree.sizes(rows["path"].tolist(), True)
    reasons = {int(row): why for m in readable(work, info) for row, why in m.quarantined.items()}
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


# quarantine.csv and SHA256SUMS


def _restore_lists(work: Repair, plan: Plan, manifests: list[ShardManifest]) -> None:
    """From what is whole now. Whatever could not be mended keeps its line in SHA256SUMS; foreign files get none."""
    if not work.failed:
        paths = dict(zip(plan.rows["row"], plan.rows["path"], strict=True))
        work.put("quarantine.csv", manifest.quarantine_bytes(paths, manifests), "made again from the manifests")
    whole = {*PLAN, *(name for m in manifests for name in files_of(m.scale, m.shard))} - work.failed.keys()
    mended = {problem.path for problem in work.done}
    broken = {*work.failed, *(f"{name[:-3]}{end}" for name in work.failed for end in ("tar", "idx", "json"))}
    if work.failed:
        broken.add("quarantine.csv")  # nobody knows what it should say
    sums = {name: digest for name, digest in work.sums.items() if name in broken}
    for name in sorted(whole - broken):
        is_same = work.is_good(name) and name not in mended  # else the file is right, and its line was wrong
        sums[name] = work.sums[name] if is_same else sha256(work.folder / name)
    text = sums_bytes(sums)
    if (work.folder / "SHA256SUMS").read_bytes() != text:
        write_bytes(work.folder / "SHA256SUMS", text)
        work.done.append(Problem("SHA256SUMS", "written anew"))
