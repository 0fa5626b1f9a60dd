"""Copy a shard set, or some of its scales, between local folders and object stores.

In: a finished set and where its copy shall be. Out: the same bytes there, hashed on their way, and a SHA256SUMS of
what is there, written last. A copy that was killed is finished by the same call. Never written to: the source.
"""

import json
import shutil
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from cxrfast.errors import ShardError
from cxrfast.machine import usable_cores
from cxrfast.progress import megabytes, progress
from cxrfast.shards.format.checksums import adopt_earlier, check_finished, parse_sums, read_sums, sums_bytes
from cxrfast.shards.format.info import SetInfo, parse_set
from cxrfast.shards.format.lock import locked
from cxrfast.shards.format.names import LOCK_FILE, SET_FILES, is_temporary, shard_files, shard_name
from cxrfast.shards.storage import SetStorage
from cxrfast.shards.upkeep.transfer import Transfer
from cxrfast.units import size

CONNECTIONS = 8
"""Files under way at once, at least, where one of the two ends is remote: most of that time is waiting."""


@dataclass(frozen=True, kw_only=True)
class Staged:
    """What a call of `stage` did."""

    scales: list[int]
    files: int
    """Copied."""
    bytes: int
    kept: int
    """Files that were there already."""
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Cargo:
    """What shall be at the destination, as the source's SHA256SUMS tells it."""

    info: SetInfo
    scales: list[int]
    shards: list[list[str]]
    """Files of each shard in the order in which they are written: tar, index, manifest."""
    digests: dict[str, str]
    """sha256 of all files of the source, other scales included."""
    sizes: dict[str, int]

    @property
    def names(self) -> list[str]:
        return [*SET_FILES, *(name for shard in self.shards for name in shard)]


def stage(
    source: str | Path,
    to: str | Path,
    scales: list[int] | None = None,
    *,
    workers: int | None = None,
) -> Staged:
    """Bring `to` to hold the same bytes as the set `source` at `scales` (px; None: all it has).

    What is there already is kept: on this machine if its hash is right; elsewhere tables and manifests if theirs is,
    tars and indexes if their size is and they have their manifest, which is written after them. Scales that came
    earlier stay. `workers` files are copied at once. Raises ShardError, with whole files kept.
    """
    start = time.monotonic()
    origin, target = SetStorage(source), SetStorage(to)
    if origin.overlaps(target):
        raise ShardError(f"{origin} and {target} are the same place, or one is inside the other: choose another TO")
    cargo = read_cargo(origin, scales)
    _check_target(target, cargo.info)
    if workers is None:
        workers = usable_cores() if origin.is_local and target.is_local else max(CONNECTIONS, usable_cores())
    with _held(target), ThreadPoolExecutor(workers) as pool:
        there = target.sizes()
        known = {**_earlier_sums(target, there), **cargo.digests}
        _check_other_scales(pool, target, cargo, there)
        set_files, shards = _find_lacking(pool, target, cargo, there)
        names = [*set_files, *(name for shard in shards for name in shard)]
        total = sum(cargo.sizes[name] for name in names)
        _check_room(target, total)
        if names:
            if "SHA256SUMS" in there:
                target.remove("SHA256SUMS")  # from here on the set is known to be unfinished
            target.make_folders(sorted({name.partition("/")[0] for name in names if "/" in name}))
            with progress("staging", round(total / 1e6), unit="MB") as advance:
                transfer = Transfer(origin, target, cargo.digests, megabytes(advance))
                _refuse_damaged(origin, transfer.copy(pool, set_files, shards, there))
        _write_sums(pool, target, cargo, known)
    return Staged(
        scales=cargo.scales,
        files=len(names),
        bytes=total,
        kept=len(cargo.names) - len(names),
        seconds=time.monotonic() - start,
    )


# What shall be copied


def read_cargo(origin: SetStorage, scales: list[int] | None) -> Cargo:
    """The files of a finished set at `scales`. Raises ShardError if there is none, or not these scales, or files lack."""
    sizes = origin.sizes()
    if "set.json" not in sizes:
        raise ShardError(f"{origin} is not a shard set (no set.json): give the folder that `cxrfast shard --out` wrote")
    digests = _sums(origin, sizes)
    info = parse_set(origin.read("set.json"), f"{origin}/set.json")
    shards = sorted(_shards(digests))
    held = sorted({scale for scale, _ in shards})
    chosen = held if scales is None else sorted(set(scales))
    if unknown := sorted(set(chosen) - set(held)):
        raise ShardError(f"{origin} has no {_px(unknown)}: it holds {_px(held) if held else 'no scale'}")
    files = [shard_files(scale, shard) for scale, shard in shards if scale in chosen]
    cargo = Cargo(info=info, scales=chosen, shards=files, digests=digests, sizes=sizes)
    if missing := [name for name in cargo.names if name not in sizes or name not in digests]:
        raise ShardError(
            f"{origin} is damaged: it lacks {_few(missing)}; see `cxrfast verify`, and restore what is missing"
        )
    return cargo


def _sums(origin: SetStorage, sizes: dict[str, int]) -> dict[str, str]:
    """SHA256SUMS of the source. Raises ShardError if there is none, or a damaged one."""
    if origin.is_local:
        return read_sums(Path(origin.root))
    sums, wrong = parse_sums(origin.read("SHA256SUMS")) if "SHA256SUMS" in sizes else ({}, [])
    if wrong:
        raise ShardError(f"{origin}/SHA256SUMS is damaged ({wrong[0]}): stage the set there again")
    check_finished(sums, origin)
    return sums


def _shards(names: Iterable[str]) -> list[tuple[int, int]]:
    """Scale and number of the shards that have their manifest."""
    manifests = (PurePosixPath(name) for name in names if "/" in name and name.endswith(".json"))
    return [(int(path.parent.name), int(path.stem)) for path in manifests]


def _px(scales: list[int]) -> str:
    return ", ".join(map(str, scales)) + " px"


def _few(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5:,} more" if len(names) > 5 else "")


# What is there already


def _check_target(target: SetStorage, info: SetInfo) -> None:
    """Raises ShardError, with nothing touched, if there is anything but the same set, parts of it or nothing."""
    names = target.names()
    if "set.json" in names:
        held = parse_set(target.read("set.json"), f"{target}/set.json")
        if held.id != info.id:
            raise ShardError(f"{target} holds another set ({held.id}, not {info.id}): choose another TO")
    elif any(
        name not in SET_FILES and not is_temporary(Path(name)) and not LOCK_FILE.fullmatch(name) for name in names
    ):
        raise ShardError(f"{target} is not empty and not a shard set: choose another TO")


@contextmanager
def _held(target: SetStorage) -> Iterator[None]:
    """The destination, if it is a local folder, made if need be and free of others that write into it and of what
    killed ones left; gone again if nothing came of it. Two that write to the same URL write the same bytes."""
    if not target.is_local:
        yield
        return
    folder = Path(target.root)
    with locked(folder):
        adopt_earlier(folder)
        for path in (*folder.glob("*"), *folder.glob("[0-9]*/*")):
            if is_temporary(path):
                path.unlink(missing_ok=True)
        yield


def _earlier_sums(target: SetStorage, there: dict[str, int]) -> dict[str, str]:
    """What SHA256SUMS at the destination says; nothing if it cannot be relied on."""
    if "SHA256SUMS" not in there:
        return {}
    sums, wrong = parse_sums(target.read("SHA256SUMS"))
    return {} if wrong else sums


def _check_other_scales(pool: Executor, target: SetStorage, cargo: Cargo, there: dict[str, int]) -> None:
    """Raises ShardError if scales that were not asked for are at the destination in an earlier state of the set."""
    asked = set(cargo.names)
    others = [
        name
        for scale, shard in _shards(there)
        if (name := shard_name(scale, shard, "json")) in cargo.digests and name not in asked
    ]
    hashes = pool.map(target.sha256, others)
    pairs = zip(others, hashes, strict=True)
    old = {int(name.partition("/")[0]) for name, found in pairs if found != cargo.digests[name]}
    if old:
        raise ShardError(
            f"{target} holds {_px(sorted(old))} as it was before shards of the set were built again: "
            f"stage it too ({' '.join(f'--scale {scale}' for scale in sorted(old))})"
        )


def _find_lacking(
    pool: Executor, target: SetStorage, cargo: Cargo, there: dict[str, int]
) -> tuple[list[str], list[list[str]]]:
    """The files to copy: those of the set itself, then those of each shard, which end with its manifest.

    Hashes are compared where that takes no download of tars: of all files in a local folder, elsewhere of tables and
    manifests. There the right size is enough for a tar and an index whose manifest is right: it was written after them.
    """
    same_size = {name for name in cargo.names if there.get(name) == cargo.sizes[name]}
    hashed = [name for name in same_size if target.is_local or not name.endswith((".tar", ".idx"))]
    total = sum(cargo.sizes[name] for name in hashed)
    with progress("comparing", round(total / 1e6), unit="MB") as advance:
        count = megabytes(advance)

        def is_same(name: str) -> bool:
            if name not in same_size:
                return False
            count(cargo.sizes[name])
            return target.sha256(name) == cargo.digests[name]

        def lacking(shard: list[str]) -> list[str]:
            *data, manifest = shard
            is_whole = is_same(manifest)
            if target.is_local:
                wrong = [name for name in data if not is_same(name)]
            else:
                wrong = [name for name in data if not is_whole or name not in same_size]
            return [*wrong, manifest] if wrong or not is_whole else []

        set_files = [name for name in SET_FILES if not is_same(name)]
        return set_files, [names for names in pool.map(lacking, cargo.shards) if names]


def _check_room(target: SetStorage, needed: int) -> None:
    if target.is_local and needed > (free := shutil.disk_usage(target.root).free):
        raise ShardError(
            f"{target} needs {size(needed)} more and {size(free)} are free: make room, or stage fewer scales"
        )


# The end


def _refuse_damaged(origin: SetStorage, names: list[str]) -> None:
    if names:
        raise ShardError(
            f"{origin} is damaged, or was changed meanwhile: {_few(sorted(names))} not as its SHA256SUMS says; not "
            f"copied. Run `cxrfast verify` on it, restore what it names, then run the same command again"
        )


def _write_sums(pool: Executor, target: SetStorage, cargo: Cargo, known: dict[str, str]) -> None:
    """SHA256SUMS of what is there now: what was staged, and whole shards that came earlier."""
    there = target.sizes()
    whole = (name for scale, shard in _shards(there) for name in shard_files(scale, shard) if name in there)
    names = list({*cargo.names, *whole})

    def digest(name: str) -> str:
        if name in known:
            return known[name]
        if name.endswith(".tar"):  # hashed when it was written
            return json.loads(target.read(name.removesuffix("tar") + "json"))["sha256"]
        return target.sha256(name)

    text = sums_bytes(dict(zip(names, pool.map(digest, names), strict=True)))
    if "SHA256SUMS" not in there or target.read("SHA256SUMS") != text:
        with target.writing("SHA256SUMS") as file:
            file.write(text)
