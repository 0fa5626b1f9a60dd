"""Is a shard set what it was when it was built? Hashes, indexes, rows; every image decoded on request. Reads only."""

import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from cxrfast.files import sha256
from cxrfast.machine import usable_cores
from cxrfast.progress import progress
from cxrfast.shards import manifest
from cxrfast.shards.images import BadImage, decode_grey
from cxrfast.shards.manifest import (
    SetInfo,
    ShardManifest,
    read_manifest,
    read_set,
    read_sums,
    shard_path,
)
from cxrfast.shards.plan import Recipe, set_id
from cxrfast.shards.rows import read_rows
from cxrfast.shards.tar import read_index


@dataclass(frozen=True)
class Problem:
    path: str
    """Relative to the set."""
    what: str


@dataclass(frozen=True, kw_only=True)
class Verdict:
    info: SetInfo
    rows: dict[int, int]
    """Rows held a scale."""
    quarantined: int
    bytes: int
    """Read and hashed."""
    problems: list[Problem]


def verify(folder: Path, deep: bool = False, quiet: bool = False) -> Verdict:
    """Compare every file of the set with SHA256SUMS, and the files with each other; `deep` decodes every image.

    Raises ShardError only where nothing can be compared: no set, another schema version, never finished.
    """
    folder = Path(folder)
    info, sums = read_set(folder), read_sums(folder)
    there = {str(p) for p in manifest.data_files(folder)}
    problems = [Problem(name, "missing") for name in sorted(sums.keys() - there)]
    problems += [Problem(name, "not part of the set") for name in sorted(there - sums.keys())]
    problems += _changed(folder, {name: sums[name] for name in sorted(sums.keys() & there)}, quiet)
    held: dict[int, int] = {}
    quarantined: dict[int, int] = {}
    if not problems:  # what follows reads files that are known to be as they were written
        problems += _plan_problems(folder, info)
        for scale in manifest.scales_in(folder):
            manifests = [m for n in manifest.built(folder, scale) if (m := read_manifest(folder, scale, n))]
            held[scale] = sum(len(m.rows) for m in manifests)
            quarantined[scale] = sum(len(m.quarantined) for m in manifests)
            problems += _misplaced(folder, scale, manifests, sums)
            problems += _shard_problems(folder, info, manifests)
            if deep:
                problems += _image_problems(folder, manifests, quiet)
    size = sum((folder / name).stat().st_size for name in there)
    return Verdict(
        info=info, rows=held, quarantined=max(quarantined.values(), default=0), bytes=size, problems=problems
    )


def _changed(folder: Path, sums: dict[str, str], quiet: bool) -> Iterator[Problem]:
    """Files whose bytes are not those in SHA256SUMS. Threads: hashing releases the GIL."""
    total = sum((folder / name).stat().st_size for name in sums)
    with (
        ThreadPoolExecutor(usable_cores()) as pool,
        progress("hashing", round(total / 1e6), unit="MB", quiet=quiet) as advance,
    ):
        for name, digest in zip(sums, pool.map(lambda name: sha256(folder / name), sums), strict=True):
            advance(round((folder / name).stat().st_size / 1e6))
            if digest != sums[name]:
                yield Problem(name, "its bytes have changed")


def _plan_problems(folder: Path, info: SetInfo) -> Iterator[Problem]:
    rows = read_rows(folder / "rows.parquet")
    recipe = Recipe(seed=info.seed, codec=info.codec, quality=info.quality, resize=info.resize, grey=info.grey)
    if rows["row"].tolist() != list(range(info.images)):
        yield Problem("rows.parquet", f"does not hold the rows 0 to {info.images - 1:,}")
    elif set_id(rows, recipe) != info.id:
        yield Problem("rows.parquet", "does not match the set id in set.json")


def _misplaced(folder: Path, scale: int, manifests: list[ShardManifest], sums: dict[str, str]) -> Iterator[Problem]:
    """Manifests of another scale or shard than their name says, or of another tar."""
    for m, shard in zip(manifests, manifest.built(folder, scale), strict=True):
        tar = shard_path(folder, scale, shard, "tar")
        name = str(tar.with_suffix(".json").relative_to(folder))
        if (m.scale, m.shard) != (scale, shard):
            yield Problem(name, f"is the manifest of shard {m.shard} at {m.scale} px")
        elif m.sha256 != sums.get(str(tar.relative_to(folder))) or m.bytes != tar.stat().st_size:
            yield Problem(name, "is the manifest of another tar")


def _shard_problems(folder: Path, info: SetInfo, manifests: list[ShardManifest]) -> Iterator[Problem]:
    """Manifests, indexes and tars that contradict each other, the plan, or the same shard at the first scale."""
    for number, m in enumerate(manifests):
        name = str(shard_path(folder, m.scale, m.shard, "json").relative_to(folder))
        first = number * info.rows_per_shard
        planned = range(first, min(first + info.rows_per_shard, info.images))
        if m.shard != number:
            yield Problem(name, f"shard {number} is missing at {m.scale} px")
            return
        if m.set != info.id:
            yield Problem(name, "belongs to another set")
        if sorted([*m.rows, *map(int, m.quarantined)]) != list(planned):
            yield Problem(name, f"does not account for the rows {planned.start:,} to {planned.stop - 1:,}")
        other = read_manifest(folder, manifest.scales_in(folder)[0], m.shard)
        if other and other.rows != m.rows:
            yield Problem(name, f"holds other rows than at {other.scale} px")
        if [row for row, *_ in read_index(folder, m.scale, m.shard)] != m.rows:
            yield Problem(name, "lists other rows than its index")


def _image_problems(folder: Path, manifests: list[ShardManifest], quiet: bool) -> Iterator[Problem]:
    """Images that do not decode to scale × scale pixels or differ from their crc32, a shard a thread."""
    scale = manifests[0].scale if manifests else 0
    with (
        ThreadPoolExecutor(usable_cores()) as pool,
        progress(f"decoding {scale} px", sum(len(m.rows) for m in manifests), quiet=quiet) as advance,
    ):
        for m, problems in zip(manifests, pool.map(lambda m: _decode_shard(folder, m), manifests), strict=True):
            yield from problems
            advance(len(m.rows))


def _decode_shard(folder: Path, m: ShardManifest) -> list[Problem]:
    path = shard_path(folder, m.scale, m.shard, "tar")
    name = str(path.relative_to(folder))
    problems = []
    with open(path, "rb") as tar:
        for (row, offset, size), crc in zip(read_index(folder, m.scale, m.shard), m.crc32, strict=True):
            tar.seek(offset)
            data = tar.read(size)
            try:
                shape = decode_grey(data).shape
            except BadImage as error:
                problems.append(Problem(name, f"row {row}: {error.reason}"))
                continue
            if shape != (m.scale, m.scale):
                problems.append(Problem(name, f"row {row} is {shape[1]} × {shape[0]} px"))
            if zlib.crc32(data) != crc:
                problems.append(Problem(name, f"row {row} differs from its crc32"))
    return problems
