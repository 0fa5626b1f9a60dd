"""Build a shard set: a source tree becomes tars at every asked scale, each image read and decoded once.

A task is one shard at all scales that lack it. Its files appear whole or not at all, the manifest last, so a build
killed at any instant is finished by the same call: no row lost, none doubled, the same bytes. Nothing is written into
the source.
"""

import multiprocessing
import os
import re
import shutil
import time
from collections import Counter
from collections.abc import Generator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from cxrfast.errors import ShardError, is_disk_full
from cxrfast.files import TEMPORARY
from cxrfast.machine import usable_cores
from cxrfast.progress import duration, progress, size
from cxrfast.shards import manifest
from cxrfast.shards.images import BadImage, at_scales, decode_grey, encode
from cxrfast.shards.manifest import SetInfo, read_manifest, read_set, shard_path
from cxrfast.shards.plan import Recipe, check_scales, missing_by_folder, plan_rows, rows_per_shard, set_id
from cxrfast.shards.rows import label_names, read_rows, write_rows
from cxrfast.shards.sources import Source, read_source
from cxrfast.shards.task import Image, Task, build_shard, meta_json, start_worker

OURS = re.compile(
    r"(rows\.parquet|set\.json|quarantine\.csv|SHA256SUMS|\d{6}\.(tar|idx|json))\.\d+" + re.escape(TEMPORARY)
)
"""Names of the files that a build writes, while it writes them."""

MISSING_ALLOWED = 0.001
"""Share of images that may be missing; above it the tree is half a download."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a build will take, from a sample of the images, for shards that are not there yet."""

    images: dict[int, int]
    bytes: dict[int, int]
    files: dict[int, int]
    seconds: float
    free: int
    """Bytes free where the set goes."""


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
    complete: bool = False
    """False after a dry run and where `limit` left shards for later."""


def build(
    data: Path,
    out: Path,
    scales: list[int],
    *,
    source: str = "mimic",
    recipe: Recipe | None = None,
    workers: int | None = None,
    limit: int | None = None,
    allow_missing: bool = False,
    retry_quarantined: bool = False,
    dry_run: bool = False,
    quiet: bool = False,
) -> Report:
    """Cut the images of the tree `data` into the shard set `out` at `scales` (px).

    An existing set is continued: scales and shards that it lacks are added, the others keep their bytes. `limit` builds
    the shards that hold the first `limit` rows of the full plan. Raises ShardError, with finished shards kept.
    """
    start = time.monotonic()
    recipe, scales = recipe or Recipe(), check_scales(scales)
    data, out = Path(data), Path(out)
    info, rows, counts = _plan(data, out, source, recipe, allow_missing, quiet)
    if out.is_dir() and not dry_run:
        _clear_stale(out)
        if retry_quarantined:
            scales = sorted({*scales, *manifest.scales_in(out)})
            _forget_quarantined(data, out, rows)
    numbers = range(info.shards if limit is None else min(info.shards, -(-max(limit, 1) // info.rows_per_shard)))
    tasks = _tasks(data, out, info, rows, scales, numbers)
    workers = max(1, workers or usable_cores())
    estimate = estimate_build(tasks, out, workers)
    report = Report(info=info, scales=scales, source_counts=counts, estimate=estimate)
    if dry_run:
        return report
    if sum(estimate.bytes.values()) > estimate.free:
        raise ShardError(
            f"{out} needs about {size(sum(estimate.bytes.values()))} more and {size(estimate.free)} are free: "
            "make room, choose another --out or fewer scales"
        )
    _prepare(out, info, rows, scales)
    if tasks:
        _run(tasks, workers, quiet)
    _finish(out, info, rows, report)
    report.seconds = time.monotonic() - start
    return report


# The plan


def _plan(
    data: Path, out: Path, source: str, recipe: Recipe, allow_missing: bool, quiet: bool
) -> tuple[SetInfo, pd.DataFrame, dict[str, int]]:
    """The set's description and rows table: the one in `out` if it was planned from the same images, else a new one."""
    listed: Source = read_source(source, data)
    rows = plan_rows(listed.images, listed.labels, recipe.seed)
    identity = set_id(rows, recipe)
    if (out / "set.json").exists():
        info = read_set(out)
        if info.id != identity:
            differing = [
                f"{name} {getattr(info, name)} there, {getattr(recipe, name)} asked for"
                for name in ("seed", "codec", "quality", "resize", "grey")
                if getattr(info, name) != getattr(recipe, name)
            ]
            raise ShardError(
                f"{out} was planned from other input ({'; '.join(differing) or 'its images differ'}): "
                "choose another --out, or give the same --data and options"
            )
        return info, read_rows(out / "rows.parquet"), listed.counts
    if out.is_dir() and any(_is_foreign(path) for path in out.iterdir()):
        raise ShardError(f"{out} is not empty and not a shard set: choose another --out")
    rows["bytes"] = source_bytes(data, rows["path"].tolist(), quiet)
    _check_missing(data, rows, allow_missing)
    info = SetInfo(
        id=identity,
        source=source,
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
        versions=manifest.versions(),
    )
    return info, rows, listed.counts


def _is_foreign(path: Path) -> bool:
    """Is this no file that a build killed before its plan was whole may have left?"""
    return not (OURS.fullmatch(path.name) or path.name == "rows.parquet" or (path.is_dir() and path.name.isdecimal()))


def source_bytes(data: Path, paths: list[str], quiet: bool = True) -> np.ndarray:
    """Size of every source file, int64; -1 where there is none. Threads, since a network file system answers slowly."""

    def stat(path: str) -> int:
        try:
            return os.stat(data / path).st_size
        except (FileNotFoundError, NotADirectoryError):
            return -1

    with ThreadPoolExecutor(16) as pool, progress("looking for images", len(paths), quiet=quiet) as advance:
        sizes = np.empty(len(paths), np.int64)
        for i, value in enumerate(pool.map(stat, paths, chunksize=256)):
            sizes[i] = value
            advance()
    return sizes


def _check_missing(data: Path, rows: pd.DataFrame, allow_missing: bool) -> None:
    """Raises ShardError where so many images are missing that the tree must be half a download."""
    missing = int(rows["bytes"].lt(0).sum())
    if missing == len(rows):
        raise ShardError(
            f"none of the {len(rows):,} images that the tables list is in {data} (first: {rows['path'].iloc[0]}): "
            "give --data the folder that holds files/"
        )
    if missing > MISSING_ALLOWED * len(rows) and not allow_missing:
        folders = missing_by_folder(rows).query("missing > 0")
        lines = "\n".join(f"  {name}: {m:,} of {n:,}" for name, n, m in folders.head(20).itertuples())
        raise ShardError(
            f"{missing:,} of {len(rows):,} images are missing in {data}:\n{lines}\n"
            "finish the download, or leave them out with --allow-missing"
        )


def _prepare(out: Path, info: SetInfo, rows: pd.DataFrame, scales: list[int]) -> None:
    """Write the plan if it is new."""
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "set.json").exists():
        write_rows(out / "rows.parquet", rows)
        info.write(out)  # after the rows: set.json says that the plan is whole
    for scale in scales:
        (out / str(scale)).mkdir(exist_ok=True)


def _clear_stale(out: Path) -> None:
    """Remove what a killed build left half-written."""
    for pattern in (f"*{TEMPORARY}", f"[0-9]*/*{TEMPORARY}"):
        for stale in out.glob(pattern):
            if OURS.fullmatch(stale.name):
                stale.unlink(missing_ok=True)


# Tasks


def _tasks(data: Path, out: Path, info: SetInfo, rows: pd.DataFrame, scales: list[int], numbers: range) -> list[Task]:
    """What is left to build. An earlier scale of the same shard says which rows to leave out."""
    present = manifest.scales_in(out) if out.is_dir() else []
    tasks = []
    for shard in numbers:
        there = {scale: m for scale in present if (m := read_manifest(out, scale, shard))}
        wanted = [scale for scale in scales if scale not in there]
        earlier = next(iter(there.values()), None)
        if wanted:
            part = rows.iloc[shard * info.rows_per_shard : (shard + 1) * info.rows_per_shard]
            tasks.append(
                Task(
                    data=data,
                    out=out,
                    set=info.id,
                    shard=shard,
                    scales=wanted,
                    quality=info.quality,
                    rows=_images(part),
                    quarantined=earlier.quarantined if earlier else {},
                    held=frozenset(earlier.rows) if earlier else None,
                )
            )
    return tasks


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


def _forget_quarantined(data: Path, out: Path, rows: pd.DataFrame) -> None:
    """Drop, at every scale, the manifests of shards with quarantined rows, whose files are looked at anew."""
    held = [
        m
        for scale in manifest.scales_in(out)
        for shard in manifest.built(out, scale)
        if (m := read_manifest(out, scale, shard)) and m.quarantined
    ]
    again = rows["row"].isin({int(row) for m in held for row in m.quarantined})
    if again.any():
        redo = rows["row"].isin({row for m in held for row in m.rows}) | again
        found = pd.Series(source_bytes(data, rows.loc[redo, "path"].tolist()), index=rows.index[redo])
        whole = rows.loc[redo & ~again]
        changed = whole[whole["bytes"] != found[whole.index]]
        if len(changed):
            raise ShardError(
                f"{len(changed):,} images of the shards to build again are not what they were (first: "
                f"{changed['path'].iloc[0]}): give --data the tree that the set was made of; nothing was changed"
            )
        (out / "SHA256SUMS").unlink(missing_ok=True)
        rows.loc[again, "bytes"] = found[rows.index[again]]
        write_rows(out / "rows.parquet", rows)  # before the manifests go: a kill in between costs nothing
        for m in held:
            shard_path(out, m.scale, m.shard, "json").unlink()


def estimate_build(tasks: list[Task], out: Path, workers: int, sample: int = 12) -> Estimate:
    """Decode, resize and encode a few images of the remaining shards, in memory, and multiply."""
    present = [(task, image) for task in tasks for image in task.rows if image.bytes > 0]
    chosen = present[:: max(1, len(present) // sample)][:sample]
    sizes: dict[int, list[int]] = {}
    seconds = []
    for task, image in chosen:
        start = time.perf_counter()
        try:
            pixels = at_scales(decode_grey((task.data / image.path).read_bytes()), task.scales)
        except (BadImage, OSError):
            continue  # the build itself reports it
        for scale, picture in pixels.items():
            sizes.setdefault(scale, []).append(len(encode(picture, task.quality)) + len(meta_json(image)) + 2048)
        seconds.append(time.perf_counter() - start)
    scales = sorted({scale for task in tasks for scale in task.scales})
    images = {scale: sum(len(task.rows) for task in tasks if scale in task.scales) for scale in scales}
    folder = next(p for p in (out, *out.absolute().parents) if p.exists())
    return Estimate(
        images=images,
        bytes={scale: int(np.mean(sizes.get(scale, [0])) * images[scale]) for scale in scales},
        files={scale: 3 * sum(scale in task.scales for task in tasks) for scale in scales},
        seconds=float(np.mean(seconds or [0.0])) * sum(len(task.rows) for task in tasks) / workers,
        free=shutil.disk_usage(folder).free,
    )


def _run(tasks: list[Task], workers: int, quiet: bool) -> None:
    """Build all tasks in a pool of processes; a shard that fails is named at the end, and the others are still built."""
    failed: list[str] = []
    total = sum(len(task.rows) for task in tasks)
    try:
        with (
            closing(_completed(tasks, min(workers, len(tasks)))) as completed,
            progress("sharding", total, quiet=quiet) as advance,
        ):
            for task, future in completed:
                try:
                    future.result()
                except ShardError as error:
                    failed.append(str(error))
                advance(len(task.rows))
    except BrokenProcessPool as error:
        raise ShardError(
            "a worker process died (killed, or out of memory): finished shards are kept, run the same command "
            "again, with fewer --workers if memory is short"
        ) from error
    except OSError as error:
        what = f"no space or quota left in {tasks[0].out}" if is_disk_full(error) else str(error)
        raise ShardError(f"{what}: finished shards are kept; mend it and run the same command again") from error
    if failed:
        raise ShardError(
            f"{len(failed)} shards could not be built, all others are kept:\n  "
            + "\n  ".join(failed[:10])
            + "\nmend the source and run the same command again"
        )


def _completed(tasks: list[Task], workers: int) -> Generator[tuple[Task, Future[None]]]:
    """Run the tasks, a few more submitted than run, and yield each when it is done."""
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"), initializer=start_worker)
    waiting: dict[Future[None], Task] = {}
    queue = iter(tasks)
    try:
        while True:
            while len(waiting) < 2 * workers and (task := next(queue, None)):
                waiting[pool.submit(build_shard, task)] = task
            if not waiting:
                return
            for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                yield waiting.pop(future), future
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


# The end


def _finish(out: Path, info: SetInfo, rows: pd.DataFrame, report: Report) -> None:
    """quarantine.csv and SHA256SUMS from the manifests, and the report's counts."""
    manifests = [
        m
        for scale in manifest.scales_in(out)
        for shard in manifest.built(out, scale)
        if (m := read_manifest(out, scale, shard))
    ]
    for m in manifests:
        report.rows[m.scale] = report.rows.get(m.scale, 0) + len(m.rows)
        report.bytes[m.scale] = report.bytes.get(m.scale, 0) + m.bytes
        report.quarantined.update({int(row): reason for row, reason in m.quarantined.items()})
    manifest.write_quarantine(out, dict(zip(rows["row"], rows["path"], strict=True)), report.quarantined)
    manifest.write_sums(out, manifests)
    report.complete = all(len(manifest.built(out, scale)) == info.shards for scale in report.scales)


def describe(report: Report, out: Path) -> str:
    """What a person wants to know after a build or a dry run."""
    info, estimate = report.info, report.estimate
    lines = [f"{info.images:,} images, {info.studies:,} studies, {info.patients:,} patients from {info.source}"]
    lines += [f"{what}: {n:,}" for what, n in report.source_counts.items() if n]
    if not report.rows:
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
    lines.append(
        f"set {info.id} in {out}: {'complete' if report.complete else 'a prefix; run again without --limit for the rest'}, "
        f"{duration(report.seconds)}"
    )
    return "\n".join(lines)
