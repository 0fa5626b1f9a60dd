"""Copy a shard set, or some of its scales, between local folders and object stores.

Files are hashed while they are copied, and SHA256SUMS of the destination is written last. The same call finishes a copy
that was killed. Nothing is written into the source.
"""

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
from cxrfast.shards.format.checksums import adopt_earlier, check_finished, parse_sums, sums_bytes
from cxrfast.shards.format.info import SetInfo, parse_set
from cxrfast.shards.format.lock import locked
from cxrfast.shards.format.manifest import parse_manifest
from cxrfast.shards.format.names import LOCK_FILE, SET_FILES, is_temporary, shard_files, shard_name
from cxrfast.shards.set_storage import SetStorage
from cxrfast.shards.upkeep.transfer import Transfer
from cxrfast.units import size

CONNECTIONS = 8
"""Minimum number of files copied at once if one end is remote: most of the time is waiting."""


@dataclass(frozen=True, kw_only=True)
class Staged:
    """Result of `stage`."""

    scales: list[int]
    files: int
    """Copied."""
    bytes: int
    kept: int
    """Files already there."""
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Cargo:
    """What the destination will hold, from the source's SHA256SUMS."""

    info: SetInfo
    scales: list[int]
    shards: list[list[str]]
    """Files of each shard in the order they are written: tar, index, manifest."""
    digests: dict[str, str]
    """sha256 of all files of the source, including other scales."""
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
    """Copy the set `source` at `scales` (px; None: all it has) to `to`.

    Keeps files that are there already: local ones with the right hash; remote tables and manifests with the right hash,
    and remote tars and indexes of the right size whose manifest, written after them, is right. Scales staged earlier stay.
    `workers` files are copied at once. Raises ShardError; whole files are kept.
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


# The source


def read_cargo(origin: SetStorage, scales: list[int] | None) -> Cargo:
    """The files of a finished set at `scales`. Raises ShardError if set, scales or files are missing."""
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
    """SHA256SUMS of the source. Raises ShardError if it is missing or damaged."""
    sums, wrong = parse_sums(origin.read("SHA256SUMS")) if "SHA256SUMS" in sizes else ({}, [])
    if wrong:
        raise ShardError(
            f"{origin}/SHA256SUMS is damaged ({wrong[0]}): run `cxrfast verify --repair` on the set, or stage it there again"
        )
    check_finished(sums, origin)
    return sums


def _shards(names: Iterable[str]) -> list[tuple[int, int]]:
    """Scale and number of shards that have a manifest."""
    manifests = (PurePosixPath(name) for name in names if "/" in name and name.endswith(".json"))
    return [(int(path.parent.name), int(path.stem)) for path in manifests]


def _px(scales: list[int]) -> str:
    return ", ".join(map(str, scales)) + " px"


def _few(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5:,} more" if len(names) > 5 else "")


# The destination


def _check_target(target: SetStorage, info: SetInfo) -> None:
    """Raises ShardError if the destination holds anything but this set or parts of it."""
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
    """Make and lock the destination if it is a local folder, and remove what killed copies left. Remote ones are not locked:
    two copies of one set write the same bytes."""
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
    """SHA256SUMS of the destination; empty if it is missing or damaged."""
    if "SHA256SUMS" not in there:
        return {}
    sums, wrong = parse_sums(target.read("SHA256SUMS"))
    return {} if wrong else sums


def _check_other_scales(pool: Executor, target: SetStorage, cargo: Cargo, there: dict[str, int]) -> None:
    """Raises ShardError if the destination holds other scales in an earlier state of the set."""
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
            f"{target} holds {_px(sorted(old))} from before shards of the set were rebuilt: "
            f"stage it too ({' '.join(f'--scale {scale}' for scale in sorted(old))})"
        )


def _find_lacking(
    pool: Executor, target: SetStorage, cargo: Cargo, there: dict[str, int]
) -> tuple[list[str], list[list[str]]]:
    """The files to copy: the set's own files, then each shard's, its manifest last.

    Hashes are compared if that does not download tars: for all local files, and for remote tables and manifests. A remote
    tar or index of the right size is kept if its manifest is right, since that was written after them.
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


# Finishing


def _refuse_damaged(origin: SetStorage, names: list[str]) -> None:
    if names:
        raise ShardError(
            f"{origin} is damaged, or was changed meanwhile: not copied, because they differ from its SHA256SUMS: "
            f"{_few(sorted(names))}. Run `cxrfast verify` on it, restore what it names, then run the same command again"
        )


def _write_sums(pool: Executor, target: SetStorage, cargo: Cargo, known: dict[str, str]) -> None:
    """Write SHA256SUMS of what was staged now and of whole shards staged earlier."""
    there = target.sizes()
    whole = (name for scale, shard in _shards(there) for name in shard_files(scale, shard) if name in there)
    names = list({*cargo.names, *whole})

    def digest(name: str) -> str:
        if name in known:
            return known[name]
        if name.endswith(".tar"):  # hashed when it was written
            text = name.removesuffix("tar") + "json"
            return parse_manifest(target.read(text), f"{target}/{text}").sha256
        return target.sha256(name)

    text = sums_bytes(dict(zip(names, pool.map(digest, names), strict=True)))
    if "SHA256SUMS" not in there or target.read("SHA256SUMS") != text:
        with target.writing("SHA256SUMS") as file:
            file.write(text)
