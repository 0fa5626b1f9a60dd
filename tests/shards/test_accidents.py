"""Accidents to shard sets and their sources: kills, full disks, damaged and misplaced files."""

import contextlib
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from damage import contents, flip_bit, mounted
from sets import build

from cxrfast.errors import ShardError
from cxrfast.shards.building.layout import assign_rows
from cxrfast.shards.format.names import shard_path
from cxrfast.shards.format.recipe import ImageRecipe
from cxrfast.shards.images.decode import encode
from cxrfast.shards.sources.read import read_source
from cxrfast.shards.upkeep.verify import verify


@pytest.mark.parametrize("damage", [lambda path: flip_bit(path, 300), Path.unlink])
def test_a_build_clears_away_what_kills_left_and_makes_lost_files_and_set_json_again(
    phantoms, tiny_set, folder, damage
):
    for name in ("SHA256SUMS", "quarantine.csv", "set.json", "rows.parquet", "64/000001.tar"):
        (folder / f"{name}.1.tmp").write_bytes(b"half")
    damage(folder / "set.json")
    stray = folder / "32" / "000000-Copy1.json"
    shutil.copy(shard_path(folder, 32, 0, "json"), stray)
    for shard, suffix in enumerate(("tar", "idx", "json")):
        shard_path(folder, 32, shard, suffix).unlink()
    report = build(phantoms, folder, [32])
    assert report.complete
    assert report.rows[32] == 150, "a stray manifest is not a shard"
    assert [p.path for p in verify(folder).problems] == ["32/000000-Copy1.json"]
    stray.unlink()
    assert contents(folder) == contents(tiny_set)


def test_a_build_killed_before_it_wrote_set_json_is_finished_by_the_same_command(phantoms, tiny_set, tmp_path):
    out = tmp_path / "set"
    for scale in ("32", "64"):
        (out / scale).mkdir(parents=True)
    (out / "rows.parquet.1.tmp").write_bytes(b"PAR1")
    build(phantoms, out, [32, 64])
    assert contents(out) == contents(tiny_set)


@pytest.mark.slow
def test_a_full_disk_is_an_error_and_after_making_room_the_build_is_finished(tree, tmp_path):
    """The images that the estimate samples are flat, the others noise: it expects too few bytes."""
    source = read_source("mimic", tree)
    rng = np.random.default_rng(0)
    for row, path in enumerate(assign_rows(source.images, source.labels, 0)["path"]):
        flat = np.full((128, 128), 90, np.uint8)
        (tree / path).write_bytes(encode(flat if row % 12 == 0 else rng.integers(0, 256, (128, 128), np.uint8), 95))
    with mounted(tmp_path / "disk", "size=1m") as disk:
        with pytest.raises(ShardError, match="no space or quota left"):
            build(tree, disk / "set", [128])
        assert not list(disk.rglob("*.tmp")), "half a tar must not fill the disk"
        subprocess.run(["mount", "-o", "remount,size=16m", str(disk)], check=True)
        build(tree, disk / "set", [128])
        build(tree, tmp_path / "undisturbed", [128])
        assert contents(disk / "set") == contents(tmp_path / "undisturbed")


def test_a_packed_table_with_flipped_bytes_is_named(tree):
    path = tree / "mimic-cxr-2.0.0-metadata.csv.gz"
    for position in range(20, path.stat().st_size - 9, 199):
        flip_bit(path, position, 0xFF)
        with pytest.raises(ShardError):
            read_source("mimic", tree)
        flip_bit(path, position, 0xFF)


def test_a_flipped_bit_anywhere_in_the_sums_is_found(folder):
    data = (folder / "SHA256SUMS").read_bytes()
    flips = [(position, 1 << position % 8) for position in range(0, len(data), 11)]
    for position, mask in [(64, 1), (65, 0x10), (3, 0x80), (66, 1), (10, 0x3B), *flips]:
        flip_bit(folder / "SHA256SUMS", position, mask)
        with contextlib.suppress(ShardError):
            assert verify(folder).problems, position
        (folder / "SHA256SUMS").write_bytes(data)


# What a build must not take for its own, sign or lose


def test_shards_of_another_set_are_not_taken_for_its_own(phantoms, folder, tmp_path):
    build(phantoms, tmp_path / "other", [16], recipe=ImageRecipe(seed=5))
    shutil.copytree(tmp_path / "other" / "16", folder / "16")
    before = contents(folder)
    with pytest.raises(ShardError, match=r"16/000000.json belongs to shard 0 at 16 px of set"):
        build(phantoms, folder, [16])
    assert contents(folder) == before


@pytest.mark.parametrize("name", ["rows.parquet", "SHA256SUMS"])
def test_a_damaged_file_of_the_set_itself_stops_a_build_instead_of_being_signed(phantoms, folder, name):
    mask = 0x80 if name == "SHA256SUMS" else 1  # not one hash into another, which is for `verify` to find
    flip_bit(folder / name, (folder / name).stat().st_size // 2, mask)
    before = contents(folder)
    with pytest.raises(ShardError, match=r"damaged|cannot be read"):
        build(phantoms, folder, [16])
    assert contents(folder) == before


def test_damage_done_before_a_build_is_still_found_after_it(phantoms, folder):
    names = ["32/000001.idx", "32/000002.tar", "64/000001.json"]
    for name in names:
        data = (folder / name).read_bytes()
        at = data.rindex(b"9") if name.endswith(("idx", "json")) else 5000
        (folder / name).write_bytes(data[:at] + b"8" + data[at + 1 :])
    build(phantoms, folder, [16])
    assert [p.path for p in verify(folder).problems] == names


def test_a_scale_that_lies_elsewhere_behind_a_link_stays_part_of_the_set(phantoms, folder, tmp_path):
    (folder / "32").rename(tmp_path / "elsewhere")
    (folder / "32").symlink_to(tmp_path / "elsewhere")
    build(phantoms, folder, [16])
    assert verify(folder).problems == []
    assert verify(folder).rows == {16: 150, 32: 150, 64: 150}


def test_other_labels_than_the_set_was_laid_out_with_are_refused(phantoms, folder):
    with pytest.raises(ShardError, match=r"was built with --labels chexpert, not negbio.*cxrfast relabel"):
        build(phantoms, folder, [16], source_options={"labels": "negbio"})
    assert build(phantoms, folder, [32], source_options={"labels": "chexpert"}).complete


@pytest.mark.parametrize("where", ["inside", "around", "same"])
def test_set_and_source_never_lie_in_one_another(tree, where):
    out = {"inside": tree / "shards", "around": tree.parent, "same": tree}[where]
    with pytest.raises(ShardError, match=r"overlap|not empty"):
        build(tree, out, [16])
    assert not (tree / "shards").exists()


@pytest.mark.slow
@pytest.mark.parametrize("step", ["write", "fsync", "close"])
def test_a_quota_that_ends_while_a_tar_is_written_synced_or_closed_leaves_no_half_file(phantoms, tmp_path, step):
    """EDQUOT, which no file system here gives: the system call that fails is replaced, in the worker."""
    script = tmp_path / "script.py"
    script.write_text(QUOTA)
    command = [sys.executable, script, step, phantoms, tmp_path / "set"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "no space or quota left" in done.stderr, done.stderr
    assert not list((tmp_path / "set").rglob("*.tmp"))
    build(phantoms, tmp_path / "set", [32, 64])
    build(phantoms, tmp_path / "undisturbed", [32, 64])
    assert contents(tmp_path / "set") == contents(tmp_path / "undisturbed")


QUOTA = """
import errno, os, sys
from pathlib import Path
from cxrfast.errors import ShardError
from cxrfast.shards import build
from cxrfast.shards.format import tar
step = sys.argv[1]
def refuse(*arguments):
    raise OSError(errno.EDQUOT, "Disk quota exceeded")
class File:
    def __init__(self, file):
        self.file = file
    def __getattr__(self, name):
        return refuse if name == step else getattr(self.file, name)
if step == "fsync":
    real = os.fsync
    os.fsync = lambda fd: refuse() if os.readlink(f"/proc/self/fd/{fd}").endswith(".tmp") and ".tar." in os.readlink(f"/proc/self/fd/{fd}") else real(fd)
else:
    tar.open = lambda *a, **k: File(open(*a, **k)) if "wb" in a else open(*a, **k)
if __name__ == "__main__":
    try:
        build.build(Path(sys.argv[2]), Path(sys.argv[3]), [32, 64], workers=1)
    except ShardError as error:
        sys.exit(str(error))
"""
