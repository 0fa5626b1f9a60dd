"""Build a shard set: a source tree becomes tars at every asked scale, each image read and decoded once.

A task is one shard at all scales that lack it. Its files appear whole or not at all, the manifest last, so a build
killed at any instant is finished by the same call: no row lost, none doubled, the same bytes. Nothing is written into
the source.
"""

import shutil
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, closing, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from cxrfast.errors import ShardError, is_disk_full
from cxrfast.files import write_bytes
from cxrfast.machine import usable_cores
from cxrfast.progress import progress
from cxrfast.shards.building.estimate import Estimate, check_room, estimate
from cxrfast.shards.building.layout import check_scales, missing_by_folder, plan_rows, rows_per_shard, set_id
from cxrfast.shards.building.todo import Plan, Todo, find_todo, make_task
from cxrfast.shards.building.workers import run_here, run_on_dask, start_pool
from cxrfast.shards.format import manifest
from cxrfast.shards.format.checksums import mark_unfinished, write_sums
from cxrfast.shards.format.info import SetInfo, read_set, versions
from cxrfast.shards.format.lock import Lease, Part, leased
from cxrfast.shards.format.names import WORKSHOP, check_labels_settled, is_foreign, is_temporary, shard_name
from cxrfast.shards.format.recipe import ImageRecipe
from cxrfast.shards.format.rows import read_info, read_rows, write_rows
from cxrfast.shards.sources.read import read_source, with_defaults
from cxrfast.shards.storage import Tree
from cxrfast.units import duration, size

MISSING_ALLOWED = 0.001
"""Share of images that may be missing; above it the tree is half a download."""

ENDS = ("tar", "idx", "json")

SAMPLE = 12
"""Images that the estimate looks at."""


@dataclass(kw_only=True)
class Report:
    """What a build did."""

    info: SetInfo
    scales: list[int]
    source_counts: dict[str, int]
    estimate: Estimate
    rows: dict[int, int] = field(default_factory=dict)
    """Rows held a scale, shards of earlier builds included."""
    bytes: dict[int, int] = field(default_factory=dict)
    quarantined: dict[int, str] = field(default_factory=dict)
    seconds: float = 0.0
    is_done: bool
    """False after a dry run."""
    missing_shards: int = 0
    """What `limit` or other parts left for later, over the asked scales."""

    @property
    def complete(self) -> bool:
        return self.is_done and not self.missing_shards


def build(
    data: Tree | Path | str,
    out: Path | str,
    scales: list[int],
    *,
    source: str = "mimic",
    source_options: dict[str, Any] | None = None,
    recipe: ImageRecipe | None = None,
    workers: int | None = None,
    part: Part | None = None,
    dask: str | None = None,
    limit: int | None = None,
    allow_missing: bool = False,
    retry_quarantined: bool = False,
    dry_run: bool = False,
    quiet: bool = False,
) -> Report:
    """Cut the images of the tree `data` into the shard set `out` at `scales` (px).

    An existing set is continued: scales and shards that it lacks are added, the others keep their bytes. `part` (i, n)
    builds every n-th shard; `dask` is a scheduler's address whose workers build instead of `workers` processes here;
    `limit` builds the shards that hold the first `limit` rows of the full plan. Raises ShardError, with finished shards
    kept.
    """
    start = time.monotonic()
    recipe, scales = recipe or ImageRecipe(), check_scales(scales)
    tree, out = data if isinstance(data, Tree) else Tree(data), Path(out).absolute()
    if dask and tree.is_local:
        tree = Tree(tree.location if "://" in tree.location else Path(tree.location).absolute())
    if part and (dask or retry_quarantined):
        raise ShardError(f"--part does not go together with {'--dask' if dask else '--retry-quarantined'}")
    _check_folder(tree, out)
    workers = max(1, workers or usable_cores())
    with (
        nullcontext() if dry_run else leased(out, part) as lease,
        ExitStack() as afterwards,
        start_pool(workers) as pool,
    ):
        plan, counts = _plan(tree, out, source, source_options or {}, recipe, allow_missing, quiet)
        info = plan.info
        last = info.shards if limit is None else min(info.shards, -(-max(limit, 1) // info.rows_per_shard))
        numbers = range(last)[part[0] - 1 :: part[1]] if part else range(last)
        if lease:
            _clear_stale(out, numbers, lease)
            afterwards.callback(_clear_stale, out, numbers, lease)  # of workers that died, or were ended
        todo = find_todo(plan, scales, numbers, retry_quarantined)
        needed = _estimate(plan, todo, workers, pool)
        report = Report(info=info, scales=scales, source_counts=counts, estimate=needed, is_done=bool(lease))
        if not lease:
            return report
        if not retry_quarantined:  # which replaces what is there
            check_room(needed, out)
        _prepare(plan, tree, scales, todo, retry_quarantined)
        if todo:
            _run(plan, todo, lease, workers, pool, dask, quiet)
        _finish(plan, report, whole=not part)
    report.seconds = time.monotonic() - start
    return report


def _check_folder(tree: Tree, out: Path) -> None:
    """Raises ShardError if there is something else than a set, or if set and source lie in one another."""
    if out.is_dir() and not (out / "set.json").exists() and any(is_foreign(path) for path in out.iterdir()):
        raise ShardError(f"{out} is not empty and not a shard set: choose another --out")
    ours = f"{out.resolve()}/"
    for root in tree.roots if tree.is_local else ():
        if ours.startswith(root) or root.startswith(ours):
            raise ShardError(f"{out} and the source {tree} lie in one another: choose another --out")


# The plan


def _plan(
    tree: Tree,
    out: Path,
    source: str,
    options: dict[str, Any],
    recipe: ImageRecipe,
    allow_missing: bool,
    quiet: bool,
) -> tuple[Plan, dict[str, int]]:
    """The set's description and rows table: the one in `out` if it was planned from the same images, else a new one."""
    listed = read_source(source, tree, options)
    rows = plan_rows(listed.images, listed.labels, recipe.seed)
    identity = set_id(rows, recipe)
    if (out / "set.json").exists():
        info = read_set(out)
        if info.id != identity:
            differing = [
                f"{name} {there} there, {asked} asked for"
                for name, asked in asdict(recipe).items()
                if (there := getattr(info, name)) != asked and None not in (there, asked)  # None: raw has no quality
            ]
            raise ShardError(
                f"{out} was planned from other input ({'; '.join(differing) or 'its images differ'}): "
                "choose another --out, or give the same --data and options"
            )
        check_labels_settled(out)
        _check_same_labels(out, info, source, options)
        if read_info(out / "rows.parquet") != info:
            raise ShardError(f"set.json and rows.parquet in {out} disagree: `cxrfast verify --repair {out}` mends them")
        return Plan(tree=tree, out=out, info=info, rows=read_rows(out / "rows.parquet")), listed.counts
    rows["bytes"] = tree.sizes(rows["path"].tolist(), quiet)
    _check_missing(tree, rows, allow_missing)
    info = SetInfo(
        id=identity,
        source=source,
        source_options=options,
        labels=list(listed.labels),
        seed=recipe.seed,
        images=len(rows),
        studies=rows["study_id"].nunique(),
        patients=rows["patient_id"].nunique(),
        rows_per_shard=rows_per_shard(len(rows)),
        codec=recipe.codec,
        quality=recipe.quality,
        resize=recipe.resize,
        grey=recipe.grey,
        versions=versions(),
    )
    return Plan(tree=tree, out=out, info=info, rows=rows), listed.counts


def _check_same_labels(out: Path, info: SetInfo, source: str, options: dict[str, Any]) -> None:
    """Raises ShardError if the source was asked for other labels than those that the set was planned with."""
    there = with_defaults(info.source, info.source_options)
    asked = with_defaults(source, options)
    for name in ("label", "labels"):
        if there.get(name) != asked.get(name):
            raise ShardError(
                f"{out} was planned with --{name} {there.get(name)}, not {asked.get(name)}: "
                "give the same again, and replace labels with `cxrfast relabel`"
            )


def _check_missing(tree: Tree, rows: pd.DataFrame, allow_missing: bool) -> None:
    """Raises ShardError where so many images are missing that the tree must be half a download."""
    missing = int(rows["bytes"].lt(0).sum())
    if missing == len(rows):
        raise ShardError(
            f"none of the {len(rows):,} images that the tables list is in {tree} (first: {rows['path'].iloc[0]}): "
            "give --data the folder that holds the tables and the images"
        )
    if missing > MISSING_ALLOWED * len(rows) and not allow_missing:
        folders = missing_by_folder(rows).query("missing > 0")
        lines = "\n".join(f"  {name}: {m:,} of {n:,}" for name, n, m in folders.head(20).itertuples())
        raise ShardError(
            f"{missing:,} of {len(rows):,} images are missing in {tree}:\n{lines}\n"
            "finish the download, or leave them out with --allow-missing"
        )


def _prepare(plan: Plan, tree: Tree, scales: list[int], todo: list[Todo], retry: bool) -> None:
    """Write the plan if it is new; without SHA256SUMS a set is known to be unfinished."""
    out = plan.out
    if not (out / "set.json").exists():
        write_rows(out / "rows.parquet", plan.rows, plan.info)
        plan.info.write(out)  # after the rows: set.json says that the plan is whole
    if todo:
        if retry:
            found = _look_again(plan, tree, todo)
        names = (shard_name(scale, t.shard, end) for t in todo for scale in t.scales for end in ENDS)
        mark_unfinished(out, names)
        if retry:
            plan.rows.loc[found.index, "bytes"] = found
            write_rows(out / "rows.parquet", plan.rows, plan.info)
    for scale in scales:
        (out / str(scale)).mkdir(exist_ok=True)


def _look_again(plan: Plan, tree: Tree, todo: list[Todo]) -> pd.Series:
    """Sizes of the source files of rows that were left out, by row. Raises ShardError if one of those held has changed."""
    again = [item for item in todo if item.held is not None and not item.quarantined]
    rows = plan.rows.iloc[[row for item in again for row in item.rows]]
    held = rows["row"].isin({row for item in again for row in item.held or ()})
    found = pd.Series(tree.sizes(rows["path"].tolist(), True), index=rows.index, dtype=np.int64)
    changed = rows[held & (rows["bytes"] != found)]
    if len(changed):
        raise ShardError(
            f"{len(changed):,} images of the shards to build again are not what they were (first: "
            f"{changed['path'].iloc[0]}): give --data the tree that the set was made of; nothing was changed"
        )
    return found[~held]


def _clear_stale(out: Path, numbers: range, lease: Lease) -> None:
    """Remove what a killed build left half-written: of these shards, and of the set where no other part is at work."""
    alone = lease.alone()
    if alone:
        shutil.rmtree(out / WORKSHOP, ignore_errors=True)
    for path in [*out.glob("*.tmp"), *out.glob("[0-9]*/*.tmp")]:
        if is_temporary(path) and (alone or (path.parent != out and int(path.name[:6]) in numbers)):
            path.unlink(missing_ok=True)


# Tasks


def _estimate(plan: Plan, todo: list[Todo], workers: int, pool: ProcessPoolExecutor) -> Estimate:
    """From images spread over what is left to build."""
    by_shard = {item.shard: item for item in todo}
    rows = np.concatenate([np.arange(item.rows.start, item.rows.stop) for item in todo] or [np.arange(0)])
    rows = rows[plan.rows["bytes"].to_numpy()[rows] > 0]
    chosen = rows[:: max(1, len(rows) // SAMPLE)][:SAMPLE]
    sample = [make_task(plan, by_shard[row // plan.info.rows_per_shard], [row]) for row in chosen.tolist()]
    remaining = {
        scale: (len(of_scale), sum(len(item.rows) for item in of_scale))
        for scale in sorted({scale for item in todo for scale in item.scales})
        if (of_scale := [item for item in todo if scale in item.scales])
    }
    return estimate(sample, remaining, plan.out, workers, pool)


def _run(
    plan: Plan,
    todo: list[Todo],
    lease: Lease,
    workers: int,
    pool: ProcessPoolExecutor,
    dask: str | None,
    quiet: bool,
) -> None:
    """Build all that is left; a shard that fails is named at the end, and the others are still built."""
    failed: list[str] = []
    tasks = (make_task(plan, item) for item in todo)
    with progress("sharding", sum(len(item.rows) for item in todo), quiet=quiet) as advance:
        outcomes = run_on_dask(tasks, dask) if dask else run_here(tasks, workers, lambda text: advance(0, text), pool)
        with closing(outcomes):
            for task, error in outcomes:
                if isinstance(error, ShardError):
                    failed.append(str(error))
                elif isinstance(error, OSError):
                    what = f"no space or quota left in {plan.out}" if is_disk_full(error) else str(error)
                    raise ShardError(
                        f"{what}: finished shards are kept; mend it and run the same command again"
                    ) from error
                elif error:
                    raise error
                lease.check()
                advance(len(task.rows))
    if failed:
        raise ShardError(
            f"{len(failed)} shards could not be built, all others are kept:\n  "
            + "\n  ".join(failed[:10])
            + "\nmend the source and run the same command again"
        )


# The end


def _finish(plan: Plan, report: Report, whole: bool) -> None:
    """quarantine.csv and SHA256SUMS from the manifests, and the report's counts.

    Of several parts, the last one to end writes them (`whole` is False for a part).
    """
    out = plan.out
    manifests = []
    for m in manifest.read_manifests(out):
        manifests.append(replace(m, rows=[], crc32=[], sizes=[]))  # of large sets they would take a gigabyte
        report.rows[m.scale] = report.rows.get(m.scale, 0) + len(m.rows)
        report.bytes[m.scale] = report.bytes.get(m.scale, 0) + m.bytes
        report.quarantined.update({int(row): reason for row, reason in m.quarantined.items()})
    report.missing_shards = sum(plan.info.shards - len(manifest.built(out, scale)) for scale in report.scales)
    if whole or report.complete:
        paths = dict(zip(plan.rows["row"], plan.rows["path"], strict=True))
        write_bytes(out / "quarantine.csv", manifest.quarantine_bytes(paths, manifests))
        write_sums(out, manifests)


def describe(report: Report, out: Path) -> str:
    """What a person wants to know after a build or a dry run."""
    info, estimate = report.info, report.estimate
    lines = [f"{info.images:,} images, {info.studies:,} studies, {info.patients:,} patients from {info.source}"]
    lines += [f"{what}: {n:,}" for what, n in report.source_counts.items() if n]
    if not report.is_done:
        lines += [
            f"to do at {s} px: {estimate.images[s]:,} rows, about {size(estimate.bytes[s])} in {estimate.files[s]:,} files"
            for s in estimate.images
        ] or ["nothing left to do"]
        lines += [
            f"free in {out}: {size(estimate.free)}",
            f"estimated time: {duration(estimate.seconds)}, from a sample of the images",
        ]
        return "\n".join(lines)
    lines += [f"{s} px: {n:,} rows, {size(report.bytes[s])}" for s, n in sorted(report.rows.items())]
    reasons = Counter(report.quarantined.values())
    lines.append(
        f"quarantined: {len(report.quarantined):,}"
        + "".join(f"; {reason}: {n:,}" for reason, n in reasons.most_common())
        + (f" (see {out / 'quarantine.csv'})" if reasons else "")
    )
    left = f"{report.missing_shards:,} shards are left for other parts or a run without --limit"
    lines.append(f"set {info.id} in {out}: {'complete' if report.complete else left}, {duration(report.seconds)}")
    return "\n".join(lines)
