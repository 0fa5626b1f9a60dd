"""Damage to copies of shard sets, for the tests of the code that must find it."""

import json
import os
import shutil
import subprocess
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from cxrfast.files import sha256, write_bytes
from cxrfast.shards.format.checksums import sums_bytes
from cxrfast.shards.format.info import COPY
from cxrfast.shards.format.manifest import built, scales_in
from cxrfast.shards.format.names import files_in, shard_path
from cxrfast.shards.format.tar import read_index
from cxrfast.shards.images.cell_means import STEPS, tolerance, unpack
from cxrfast.shards.repair.repair import repair as repair_set
from cxrfast.shards.repair.state import RepairState
from cxrfast.shards.storage import Tree
from cxrfast.shards.upkeep.verify import verify


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below `folder`, by its relative path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def copy_set(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to)
    return to


def flip_bit(path: Path, position: int, mask: int = 1) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= mask
    path.write_bytes(data)


def change(path: Path, **fields) -> None:
    """Change fields of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_bytes()), **fields}) + "\n")


def swap(folder: Path, *suffixes: str) -> None:
    """Swap files of the first two shards at 32 px."""
    for suffix in suffixes:
        one, two = (shard_path(folder, 32, shard, suffix) for shard in (0, 1))
        data = one.read_bytes()
        one.write_bytes(two.read_bytes())
        two.write_bytes(data)


def where(folder: Path, scale: int, row: int) -> tuple[int, int, int]:
    """(shard, offset, size) of the image of `row`."""
    for shard in built(folder, scale):
        for held, offset, size in read_index(folder, scale, shard):
            if held == row:
                return shard, offset, size
    raise KeyError(row)


def image_bytes(folder: Path, scale: int, row: int) -> bytes:
    """The image of `row` as it lies in its tar."""
    shard, offset, size = where(folder, scale, row)
    return shard_path(folder, scale, shard, "tar").read_bytes()[offset : offset + size]


def replace_image(folder: Path, scale: int, row: int, data: bytes) -> None:
    """Replace a row's image by `data`, padded to the old length, and make every hash agree, as if the build had written it."""
    shard, offset, size = where(folder, scale, row)
    assert len(data) <= size
    tar = shard_path(folder, scale, shard, "tar")
    whole = bytearray(tar.read_bytes())
    whole[offset : offset + size] = data.ljust(size, b"\0")
    tar.write_bytes(whole)
    path = shard_path(folder, scale, shard, "json")
    manifest = json.loads(path.read_bytes())
    manifest["sha256"] = sha256(tar)
    manifest["crc32"][manifest["rows"].index(row)] = zlib.crc32(whole[offset : offset + size])
    path.write_text(json.dumps(manifest) + "\n")
    sign(folder)


def without_grids(folder: Path, shards: list[tuple[int, int]] | None = None) -> Path:
    """Remove the grids from the set or some (scale, shard) of it, and sign it, as an earlier version built it."""
    return _without(folder, shards, "grids")


def without_hashes(folder: Path, shards: list[tuple[int, int]] | None = None) -> Path:
    """Remove the hashes of source images likewise, as a version after grids and before hashes built it."""
    return _without(folder, shards, "sources")


def _without(folder: Path, shards: list[tuple[int, int]] | None, field: str) -> Path:
    if shards is None:
        shards = [(scale, shard) for scale in scales_in(folder) for shard in built(folder, scale)]
    for scale, shard in shards:
        path = shard_path(folder, scale, shard, "json")
        value = json.loads(path.read_bytes())
        del value[field]
        path.write_text(json.dumps(value) + "\n")
    sign(folder)
    return folder


def redescribe(folder: Path, **fields) -> Path:
    """Change fields of set.json and of its copy in rows.parquet, and sign the set, as somebody hostile would."""
    change(folder / "set.json", **fields)
    path = folder / "rows.parquet"
    table = pq.read_table(path)
    pq.write_table(table.replace_schema_metadata({COPY: (folder / "set.json").read_bytes()}), path)
    sign(folder)
    return folder


def sign(folder: Path) -> None:
    """Write the present hashes into SHA256SUMS, so that only contradictions between files can be found."""
    write_bytes(folder / "SHA256SUMS", sums_bytes({name: sha256(folder / name) for name in files_in(folder)}))


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    """Make `folder` and mount a file system in memory there; skip the test where that is not allowed."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if os.getuid() != 0 or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("needs to mount a disk")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def repair(folder: Path, tree: Path | None = None, **options) -> RepairState:
    return repair_set(folder, Tree(tree) if tree else None, **{"workers": 1, **options})


def problems(folder: Path) -> list[str]:
    return [f"{problem.path}: {problem.what}" for problem in verify(folder).problems]


def put(kind: str, path: Path, **targets: Path) -> None:
    """Put something at a free path: a pipe, folder, empty or huge file, loop of links, nothing (absent), or else a link to
    `kind`, or to what `targets` calls so."""
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "empty":
        path.touch()
    elif kind == "huge":
        with path.open("wb") as file:
            file.truncate(2**40)
    elif kind != "absent":
        path.symlink_to({"loop": path, **targets}.get(kind, kind))


def requantise(path: Path) -> None:
    """Change the pixels of a JPEG but not its length."""
    data = bytearray(path.read_bytes())
    data[data.index(b"\xff\xdb") + 8] += 3
    path.write_bytes(data)


def assert_same_but_for_grids(folder: Path, whole: Path, *manifests: str) -> None:
    """Assert that only the grids of JPEGs in these manifests, and their hashes, differ, and that the set is whole."""
    there, then = contents(folder), contents(whole)
    for name in manifests:
        new, old = json.loads(there.pop(name)), json.loads(then.pop(name))
        now, before = (unpack(m.pop("grids"), len(m["rows"])).astype(int) for m in (new, old))
        assert new == old
        assert 0 < np.abs(now - before).max() < STEPS * tolerance("jpeg", 95, new["scale"])
    sums = [
        dict(line.split("  ")[::-1] for line in files.pop("SHA256SUMS").decode().splitlines())
        for files in (there, then)
    ]
    assert there == then
    assert {name for name in sums[0] if sums[0][name] != sums[1][name]} == set(manifests)
    assert sums[0].keys() == sums[1].keys()
    assert verify(folder, deep=True).problems == []
