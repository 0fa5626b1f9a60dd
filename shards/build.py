"""Build a shard set: write the images of a source tree into tars at every requested scale, decoding each image once.

A task is one shard at all scales that lack it. Its files appear whole or not at all, the manifest last, so the same call
finishes a build that was killed at any instant, with the same bytes. Nothing is written into the source.
"""

import logging
import shlex
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from cxrfast.errors import ShardError, is_disk_full
from cxrfast.files import write_bytes
from cxrfast.machine import usable_cores
from cxrfast.progress import progress
from cxrfast.shards.building.build_report import Report
from cxrfast.shards.building.cautions import cautions, copies_in_words, kept, sample_lines
from cxrfast.shards.building.dask_workers import run_on_dask
from cxrfast.shards.building.estimate import Estimate, check_room, estimate
from cxrfast.shards.building.kinds import look_at_kinds
from cxrfast.shards.building.layout import assign_rows, check_scales, rows_per_shard, set_id
from cxrfast.shards.building.reading import check_missing, images_found
from cxrfast.shards.building.tasks import Blueprint, Todo, find_todo, make_task
from cxrfast.shards.building.workers import run_here, start_pool
from cxrfast.shards.format.checksums import check_undamaged, mark_unfinished, write_sums
from cxrfast.shards.format.info import SetInfo, is_laid_out, read_set, versions, write_set_json
from cxrfast.shards.format.lock import Lock, Part, locked
from cxrfast.shards.format.manifest import ShardManifest, quarantine_bytes, source_hashes
from cxrfast.shards.format.names import WORKSHOP, is_foreign, is_temporary, shard_files
from cxrfast.shards.format.recipe import ImageRecipe
from cxrfast.shards.format.rows import read_rows, write_rows
from cxrfast.shards.shard_set import ShardSet
from cxrfast.shards.sources.read import as_stored, read_source, with_defaults
from cxrfast.shards.sources.source import Source
from cxrfast.shards.storage import URL, Tree
from cxrfast.text import without_credentials

log = logging.getLogger(__name__)

SAMPLE = 12
"""Images that the estimate decodes."""


@dataclass(frozen=True, kw_only=True)
class _Request:
    """The arguments of `build`, defaults filled in."""

    scales: list[int]
    tree: Tree
    out: Path
    source: str
    source_options: dict[str, Any]
    recipe: ImageRecipe
    workers: int
    part: Part | None
    dask: str | None
    limit: int | None
    allow_missing: bool
    allow_shared_patients: bool
    retry_quarantined: bool

    def shards(self, info: SetInfo) -> range:
        """Numbers of the requested shards."""
        last = info.shards if self.limit is None else min(info.shards, -(-max(self.limit, 1) // info.rows_per_shard))
        return range(last)[self.part[0] - 1 :: self.part[1]] if self.part else range(last)


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
    allow_shared_patients: bool = False,
    retry_quarantined: bool = False,
    dry_run: bool = False,
    announce: Callable[[str], None] = log.info,
) -> Report:
    """Write the images of the tree `data` into the shard set `out` at `scales` (px).

    Adds what an existing set lacks, leaves the rest alone. `part` (i, n) builds every n-th shard; `dask` is the address
    of a scheduler whose workers build instead of `workers` processes here; `limit` builds the shards that hold the first
    `limit` rows; `dry_run` estimates and writes nothing. `announce` is called with what the source lists and what to know
    about it, before anything is written. Raises ShardError, also for a patient in two parts of the source's split unless
    `allow_shared_patients`; finished shards are kept.
    """
    start = time.monotonic()
    tree = _source_tree(data, dask)
    request = _Request(
        scales=check_scales(scales),
        tree=tree,
        out=Path(out).absolute(),
        source=source,
        source_options=as_stored(tree, source_options or {}),
        recipe=_with_encoder(recipe or ImageRecipe(), Path(out)),
        workers=max(1, workers or usable_cores()),
        part=part,
        dask=dask,
        limit=limit,
        allow_missing=allow_missing,
        allow_shared_patients=allow_shared_patients,
        retry_quarantined=retry_quarantined,
    )
    if part and (dask or retry_quarantined):
        raise ShardError(f"--part cannot be combined with {'--dask' if dask else '--retry-quarantined'}")
    listed = read_source(request.source, request.tree, request.source_options)  # its errors come before all others
    _check_folder(request.tree, request.out)
    if dry_run:
        with start_pool(request.workers) as pool:
            return _survey(request, listed, pool, announce)[2]
    with _writing_to(request.out, part) as lock, start_pool(request.workers) as pool:
        blueprint, todo, report = _survey(request, listed, pool, announce)
        _warn_of_sampled(report)
        if not retry_quarantined:  # a retry replaces files
            check_room(report.estimate, request.out)
        _prepare(request, blueprint, todo)
        _run(request, blueprint, todo, lock, pool)
        _finish(blueprint, report, whole=not part)
    report.seconds = time.monotonic() - start
    return report


def _warn_of_sampled(report: Report) -> None:
    """Warn of what the sampled images show now, not after hours."""
    for line in sample_lines(report.estimate.remarks, report.estimate.sampled):
        log.warning(line)


def _with_encoder(recipe: ImageRecipe, out: Path) -> ImageRecipe:
    """The recipe with the JPEG encoder of the set in `out`, if there is one: what it lacks is encoded as what it has."""
    dct = read_set(out).dct if is_laid_out(out) else None
    return replace(recipe, dct=dct) if dct and recipe.dct else recipe


def _source_tree(data: Tree | Path | str, dask: str | None) -> Tree:
    """The source tree, by absolute path if dask workers read it."""
    tree = data if isinstance(data, Tree) else Tree(data)
    if dask and tree.is_local and "://" not in tree.location:
        return Tree(Path(tree.location).absolute())
    return tree


def _check_folder(tree: Tree, out: Path) -> None:
    """Raises ShardError if `out` holds anything but a set, or if one of set and source contains the other."""
    if out.is_dir() and not is_laid_out(out) and any(is_foreign(path) for path in out.iterdir()):
        raise ShardError(f"{out} is not empty and not a shard set: choose another --out")
    if overlap(tree, out):
        raise ShardError(f"{out} and the source {tree} overlap (one contains the other): choose another --out")


def overlap(tree: Tree, out: Path) -> bool:
    """Whether the source tree contains the folder `out`, or the other way round."""
    ours = f"{out.resolve()}/"
    return any(ours.startswith(root) or root.startswith(ours) for root in (tree.roots if tree.is_local else ()))


def default_out(data: str, usual: Path) -> Path:
    """Folder for a set of the tree `data`: the usual one, or one next to the tree if the usual one would lie inside it."""
    tree = Tree(data)
    if not overlap(tree, usual):
        return usual
    is_named = Path(data).name not in ("", "..") and not URL.match(data)
    root = Path(data) if is_named else Path(tree.roots[0])
    return root.with_name(f"{root.name}-shards") if root.name else usual


# Planning


def _survey(
    request: _Request, listed: Source, pool: ProcessPoolExecutor, announce: Callable[[str], None]
) -> tuple[Blueprint, list[Todo], Report]:
    """Lay the set out, estimate the work left and announce what was found; write nothing."""
    blueprint, changes = _lay_out(request, listed)
    is_new = not is_laid_out(request.out)
    todo = find_todo(blueprint, request.scales, request.shards(blueprint.info), request.retry_quarantined)
    left = blueprint.rows.iloc[[row for item in todo for row in item.rows]]
    kinds = look_at_kinds(request.tree, left.loc[left["bytes"] > 0, "path"], blueprint.info.grey)
    needed = _estimate(blueprint, todo, request.workers, pool)
    report = Report(
        info=blueprint.info,
        scales=request.scales,
        source_counts=listed.counts,
        source_notes=listed.notes,
        found=images_found(request.tree, blueprint.rows) if is_new and request.source == "table" else {},
        kinds=kinds,
        cautions=[*cautions(blueprint.info, blueprint.rows, listed.label_like), *changes],
        estimate=needed,
    )
    announce("\n".join(report.listed()))
    return blueprint, todo, report


def _lay_out(request: _Request, listed: Source) -> tuple[Blueprint, list[str]]:
    """The set's description and rows, new or read from `out`, and what the latter keeps although the tables have changed."""
    tree, out, recipe = request.tree, request.out, request.recipe
    rows = assign_rows(listed.images, listed.labels, recipe.seed)
    own_folds = "fold" in listed.images
    identity = set_id(rows, recipe, own_folds)
    if is_laid_out(out):
        info = _read_same_set(request, identity, own_folds)
        there = read_rows(out / "rows.parquet", info)
        blueprint = Blueprint(tree=tree, out=out, allow_missing=request.allow_missing, info=info, rows=there)
        return blueprint, kept(info, there, rows)
    if listed.shared and not request.allow_shared_patients:
        raise ShardError(
            f"the tables in {tree} hold a split in which {listed.shared}: a model would be tested on patients that it was "
            "trained on; correct the table, or continue with --allow-shared-patients"
        )
    rows["bytes"] = tree.sizes(rows["path"].tolist())
    check_missing(tree, rows, request.allow_missing)
    info = SetInfo(
        id=identity,
        source=request.source,
        source_options=_stored(request.source_options),
        labels=list(listed.labels),
        own_folds=own_folds,
        images=len(rows),
        studies=rows["study_id"].nunique(),
        patients=rows["patient_id"].nunique(),
        rows_per_shard=rows_per_shard(len(rows)),
        versions=versions(),
        **asdict(recipe),
    )
    return Blueprint(tree=tree, out=out, allow_missing=request.allow_missing, info=info, rows=rows), []


def _stored(options: Any) -> Any:
    """Options of a source as set.json holds them: whoever gets the set gets no credentials, so a repair asks for the table."""
    if isinstance(options, dict):
        return {name: _stored(value) for name, value in options.items()}
    if isinstance(options, list | tuple):
        return [_stored(value) for value in options]
    return without_credentials(options) if isinstance(options, str) else options


def _read_same_set(request: _Request, identity: str, own_folds: bool) -> SetInfo:
    """The description in `out`. Raises ShardError if that set has other images or labels, or another recipe."""
    out = request.out
    info = read_set(out)
    if info.id != identity:
        differing = [
            f"{name} {there} there, {asked} requested"
            for name, asked in asdict(request.recipe).items()
            if (there := getattr(info, name)) != asked and None not in (there, asked)  # None: raw has no quality
        ]
        what = f"its images {'or folds ' if own_folds or info.own_folds else ''}differ"
        raise ShardError(
            f"{out} was built from other input ({'; '.join(differing) or what}): it is a set of {info.images:,} images from "
            f"{info.source}; choose another --out, or give the same --data and options"
        )
    if info.source != request.source:  # which may name code, and must not be imported
        raise ShardError(f"{out} was built with --source {info.source}, not {request.source}: give the same value")
    there, asked = (with_defaults(request.source, s.source_options) for s in (info, request))
    for name in ("label", "labels", "keep"):
        before, now = (_as_typed(name, options.get(name)) for options in (there, asked))
        if before != now:
            other = "choose another --out" if name == "keep" else "replace labels with `cxrfast relabel`"
            raise ShardError(
                f"{out} was built with {before or f'no --{name}'}, not {now.removeprefix('--labels ') or f'without --{name}'}: "
                f"give the same, and {other}"
            )
    return info


def _as_typed(option: str, value: Any) -> str:
    """An option as it is typed; "" if it has no value."""
    values = [value] if isinstance(value, str) else list(value or ())
    return " ".join(f"--{option} {shlex.quote(one)}" for one in values)


def _estimate(blueprint: Blueprint, todo: list[Todo], workers: int, pool: ProcessPoolExecutor) -> Estimate:
    """Estimate the work left from a sample of its images."""
    by_shard = {item.shard: item for item in todo}
    rows = np.concatenate([np.arange(item.rows.start, item.rows.stop) for item in todo] or [np.arange(0)])
    rows = rows[blueprint.rows["bytes"].to_numpy()[rows] > 0]
    chosen = rows[:: max(1, len(rows) // SAMPLE)][:SAMPLE]
    sample = [make_task(blueprint, by_shard[row // blueprint.info.rows_per_shard], [row]) for row in chosen.tolist()]
    remaining = {
        scale: (len(of_scale), sum(len(item.rows) for item in of_scale))
        for scale in sorted({scale for item in todo for scale in item.scales})
        if (of_scale := [item for item in todo if scale in item.scales])
    }
    return estimate(sample, remaining, blueprint.out, workers, pool)


# Building


@contextmanager
def _writing_to(out: Path, part: Part | None) -> Iterator[Lock]:
    """Lock the folder of the set; before and after, remove what dead builds and workers left."""
    with locked(out, part) as lock:
        _clear_stale(out, lock)
        try:
            yield lock
        finally:
            _clear_stale(out, lock)


def _clear_stale(out: Path, lock: Lock) -> None:
    """Remove temporary files and scales without a file: all, or only files of this part's shards while another part is running."""
    alone = lock.alone()
    if alone:
        shutil.rmtree(out / WORKSHOP, ignore_errors=True)
        for path in filter(Path.is_dir, out.glob("[0-9]*")):
            with suppress(OSError):  # it holds files
                path.rmdir()
    part, parts = lock.part or (1, 1)
    for path in [*out.glob("*.tmp"), *out.glob("[0-9]*/*.tmp")]:
        if is_temporary(path) and (alone or (path.parent != out and int(path.name[:6]) % parts == part - 1)):
            path.unlink(missing_ok=True)


def _prepare(request: _Request, blueprint: Blueprint, todo: list[Todo]) -> None:
    """Write the rows if they are new, and set.json; mark the set as unfinished."""
    out, retry = blueprint.out, request.retry_quarantined
    check_undamaged(out)
    if not is_laid_out(out):
        write_rows(out / "rows.parquet", blueprint.rows, blueprint.info)
    write_set_json(out)
    if todo:
        found = _look_again(blueprint, request.tree, todo) if retry else None
        mark_unfinished(out, [name for t in todo for scale in t.scales for name in shard_files(scale, t.shard)])
        if found is not None:
            blueprint.rows.loc[found.index, "bytes"] = found
            write_rows(out / "rows.parquet", blueprint.rows, blueprint.info)
    for scale in request.scales:
        (out / str(scale)).mkdir(exist_ok=True)


def _look_again(blueprint: Blueprint, tree: Tree, todo: list[Todo]) -> pd.Series:
    """Sizes of the source files of quarantined rows, by row. Raises ShardError if a file of another row has changed."""
    again = [item for item in todo if item.held is not None and not item.quarantined]
    rows = blueprint.rows.iloc[[row for item in again for row in item.rows]]
    held = rows["row"].isin({row for item in again for row in item.held or ()})
    found = pd.Series(tree.sizes(rows["path"].tolist()), index=rows.index, dtype=np.int64)
    changed = rows[held & (rows["bytes"] != found)]
    if len(changed):
        raise ShardError(
            f"{len(changed):,} images of the shards to rebuild have changed (first: "
            f"{changed['path'].iloc[0]}): give --data the tree that the set was built from; nothing was changed"
        )
    return found[~held]


def _run(request: _Request, blueprint: Blueprint, todo: list[Todo], lock: Lock, pool: ProcessPoolExecutor) -> None:
    """Build the shards left to do. One that fails does not stop the others; its error is raised at the end."""
    if not todo:
        return
    failed: list[str] = []
    tasks = (make_task(blueprint, item) for item in todo)
    with progress("sharding", sum(len(item.rows) for item in todo)) as advance:
        outcomes = (
            run_on_dask(tasks, request.dask)
            if request.dask
            else run_here(tasks, request.workers, lambda text: advance(0, text), pool)
        )
        with closing(outcomes):
            for task, error in outcomes:
                if isinstance(error, ShardError):
                    failed.append(str(error))
                elif isinstance(error, OSError):
                    what = f"no space or quota left in {blueprint.out}" if is_disk_full(error) else str(error)
                    raise ShardError(
                        f"{what}: finished shards are kept; fix the cause and run the same command again"
                    ) from error
                elif error:
                    raise error
                lock.check()
                advance(len(task.images))
    if failed:
        raise ShardError(
            f"{len(failed)} shards could not be built, all others are kept:\n  "
            + "\n  ".join(failed[:10])
            + "\nfix the source and run the same command again"
        )


def _finish(blueprint: Blueprint, report: Report, whole: bool) -> None:
    """Complete the report, and write quarantine.csv and SHA256SUMS; of several parts (`whole` False) the last one does."""
    out, built = blueprint.out, ShardSet(blueprint.out)
    manifests: list[ShardManifest] = []
    hashes: dict[int, bytes] = {}
    for m in built.manifests():
        hashes |= source_hashes(m)
        # without what takes a gigabyte in large sets
        manifests.append(replace(m, rows=[], crc32=[], sizes=[], remarks={}, sources="", grids=""))
        report.rows[m.scale] = report.rows.get(m.scale, 0) + len(m.rows)
        report.bytes[m.scale] = report.bytes.get(m.scale, 0) + m.bytes
        report.quarantined.update({int(row): reason for row, reason in m.quarantined.items()})
        report.remarks.update({int(row): remarks for row, remarks in m.remarks.items()})
    report.copies = copies_in_words(hashes, blueprint.rows)
    report.missing_shards = sum(built.info.shards - len(built.shards(scale)) for scale in report.scales)
    report.is_done = True
    if whole or report.complete:
        paths = dict(zip(blueprint.rows["row"], blueprint.rows["path"], strict=True))
        write_bytes(out / "quarantine.csv", quarantine_bytes(paths, manifests))
        write_sums(out, manifests)
