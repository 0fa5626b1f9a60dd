"""Damage done on purpose to copies of shard sets; shared by the tests of those who must find it."""

import json
import os
import shutil
import subprocess
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from cxrfast.files import sha256
from cxrfast.shards.format.checksums import write_sums
from cxrfast.shards.format.manifest import built, read_manifest, scales_in
from cxrfast.shards.format.names import shard_path
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
    """Put `data`, padded to the old length, in the place of a row's image, and make every hash and checksum agree:
    what a set would look like whose build had written a bad image."""
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
    """Make the set, or (scale, shard) of it, what it was before there were grids, and sign it. Returns `folder`."""
    if shards is None:
        shards = [(scale, shard) for scale in scales_in(folder) for shard in built(folder, scale)]
    for scale, shard in shards:
        path = shard_path(folder, scale, shard, "json")
        value = json.loads(path.read_bytes())
        del value["grids"]
        path.write_text(json.dumps(value) + "\n")
    sign(folder)
    return folder


def sign(folder: Path) -> None:
    """Write SHA256SUMS again, so that only contradictions between files remain to be found."""
    manifests = [
        m for scale in scales_in(folder) for n in built(folder, scale) if (m := read_manifest(folder, scale, n))
    ]
    (folder / "SHA256SUMS").unlink(missing_ok=True)
    write_sums(folder, manifests)


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    """A file system in memory at `folder`, which is made; the test skips where that is not allowed."""
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


def requantise(path: Path) -> None:
    """Give a JPEG other pixels, in as many bytes."""
    data = bytearray(path.read_bytes())
    data[data.index(b"\xff\xdb") + 8] += 3
    path.write_bytes(data)


def assert_same_but_for_grids(folder: Path, whole: Path, *manifests: str) -> None:
    """Every file has its old bytes, but for the grids of JPEGs in these manifests, and their hashes; and all agree."""
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
