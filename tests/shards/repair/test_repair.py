import os
import random
import shutil
from pathlib import Path

import pytest
from damage import assert_same_but_for_grids, contents, copy_set, flip_bit, problems, repair

from cxrfast.errors import ShardError
from cxrfast.shards.build import build as build_set
from cxrfast.shards.format.info import read_set
from cxrfast.shards.format.lock import Lock
from cxrfast.shards.format.names import shard_path
from cxrfast.shards.format.recipe import ImageRecipe

DAMAGES = int(os.environ.get("CXRFAST_DAMAGES", "200"))
"""Changes tried one after the other on real radiographs; 1,100 is the full measure."""


# What can be repaired from the set alone


@pytest.mark.parametrize("name", ["set.json", "quarantine.csv", "64/000001.idx", "64/000001.json", "SHA256SUMS"])
@pytest.mark.parametrize("how", ["changed", "empty", "gone"])
def test_lists_indexes_and_manifests_are_made_again_without_the_source(corrupt, tmp_path, name, how):
    folder = copy_set(corrupt[1], tmp_path / "set")
    path = folder / name.replace("64/", "32/")
    if how == "gone":
        path.unlink()
    elif how == "empty":
        path.write_bytes(b"")
    else:
        is_manifest = path.match("32/*.json")  # in its grids, which its tar does not hold
        flip_bit(path, path.stat().st_size - 40 if is_manifest else path.stat().st_size // 2, 4)
    if how == "gone" and name == "SHA256SUMS":
        with pytest.raises(ShardError, match="not finished"):
            repair(folder)
        return
    work = repair(folder)
    if path.match("32/*.json") and read_set(folder).codec == "jpeg":
        assert_same_but_for_grids(folder, corrupt[1], "32/000001.json")
        assert work.lines() == [
            "repaired: 32/000001.json: derived from its tar, with grids from its images",
            "repaired: SHA256SUMS: written again",
        ]
        return
    assert contents(folder) == contents(corrupt[1])
    assert [problem.path for problem in work.done] == [str(path.relative_to(folder))]
    assert not work.failed


def test_a_wrong_line_in_the_sums_does_not_condemn_the_file_it_names(folder, tiny_set):
    lines = (tiny_set / "SHA256SUMS").read_text().splitlines(keepends=True)
    for number, line in enumerate(lines):
        wrong = ("f" if line[0] != "f" else "0") + line[1:]
        (folder / "SHA256SUMS").write_text("".join([*lines[:number], wrong, *lines[number + 1 :]]))
        work = repair(folder)
        assert [problem.path for problem in work.done] == ["SHA256SUMS"], line
        assert contents(folder) == contents(tiny_set)


# What cannot be repaired, and what is left alone


def test_one_file_that_cannot_be_repaired_does_not_stop_the_others_nor_is_it_signed(folder, phantoms, tiny_set):
    flip_bit(folder / "64" / "000001.tar", 700)
    flip_bit(folder / "32" / "000001.idx", 7)
    flip_bit(folder / "SHA256SUMS", 3)
    with Lock(folder), pytest.raises(ShardError, match="is being built"):
        repair(folder)
    work = repair(folder)
    assert list(work.failed) == ["64/000001.tar"]
    assert (folder / "32" / "000001.idx").read_bytes() == (tiny_set / "32" / "000001.idx").read_bytes()
    assert (folder / "SHA256SUMS").read_bytes() == (tiny_set / "SHA256SUMS").read_bytes()
    assert problems(folder) == ["64/000001.tar: its bytes have changed"]
    flip_bit(folder / "set.json", 30)
    flip_bit(folder / "rows.parquet", 30)
    assert {"set.json", "rows.parquet"} <= set(repair(folder, phantoms).failed), "one is needed for the other"


def test_foreign_files_stay_unsigned_and_leftovers_of_kills_go(folder, tiny_set):
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.*")}
    (folder / "notes.txt").write_text("mine")
    shutil.copy(shard_path(folder, 32, 0, "tar"), shard_path(folder, 32, 4, "tar"))
    (folder / "32" / "000001.tar.node7-123.tmp").write_bytes(b"half")
    (folder / "repair.tmp" / "32").mkdir(parents=True)
    (folder / "repair.tmp" / "32" / "000001.tar").write_bytes(b"half")
    repair(folder)
    foreign = {"notes.txt": b"mine", "32/000004.tar": (tiny_set / "32" / "000000.tar").read_bytes()}
    assert contents(folder) == {**contents(tiny_set), **foreign}
    assert problems(folder) == ["32/000004.tar: not part of the set", "notes.txt: not part of the set"]
    work = repair(folder)
    assert (work.done, work.failed) == ([], {}), "a whole set is left alone"
    assert {path: path.stat().st_mtime_ns for path in before} == before


# What it must not sign


def test_a_set_json_that_is_right_is_not_given_up_for_another_set_s(folder, phantoms, tiny_set, tmp_path):
    build_set(phantoms, tmp_path / "other", [32], workers=1, recipe=ImageRecipe(seed=5))
    shutil.copy(tmp_path / "other" / "rows.parquet", folder)
    work = repair(folder)
    assert list(work.failed) == ["rows.parquet"]
    assert (folder / "set.json").read_bytes() == (tiny_set / "set.json").read_bytes()
    assert (folder / "SHA256SUMS").read_bytes() == (tiny_set / "SHA256SUMS").read_bytes()
    repair(folder, phantoms)
    assert contents(folder) == contents(tiny_set)


def test_reasons_that_are_not_those_that_were_signed_are_not_signed_now(corrupt, tmp_path):
    folder = copy_set(corrupt[1], tmp_path / "set")
    (folder / "quarantine.csv").write_text((folder / "quarantine.csv").read_text().replace("not an image", "truncated"))
    for path in folder.glob("*/*.json"):
        path.write_text(path.read_text() + "x")
    work = repair(folder)
    assert work.failed
    assert (folder / "SHA256SUMS").read_bytes() == (corrupt[1] / "SHA256SUMS").read_bytes()


def test_a_folder_in_the_place_of_a_file_does_not_stop_the_repair_of_others(folder, tiny_set):
    path = folder / "32" / "000001.idx"
    path.unlink()
    path.mkdir()
    flip_bit(folder / "64" / "000001.idx", 7)
    work = repair(folder)
    assert "move what is in its place elsewhere" in work.failed["32/000001.idx"]
    assert (folder / "64" / "000001.idx").read_bytes() == (tiny_set / "64" / "000001.idx").read_bytes()


def test_sums_that_lost_lines_are_written_again_with_a_damaged_manifest(phantoms, folder, tiny_set):
    lines = (folder / "SHA256SUMS").read_text().splitlines(keepends=True)
    for keep in (4, len(lines) - 3, len(lines) - 1):  # the last three name the files of the set itself
        (folder / "SHA256SUMS").write_text("".join(lines[:keep]))
        assert repair(folder, phantoms).failed == {}
        assert contents(folder) == contents(tiny_set)
    (folder / "SHA256SUMS").write_text("".join(line for line in lines if "64/000000.tar" not in line))
    flip_bit(folder / "64" / "000000.json", 40)
    repair(folder, phantoms)
    assert contents(folder) == contents(tiny_set)


# Whatever happens to one file


def spoil(folder: Path, rng: random.Random, kind: str) -> str:
    """Change one byte, cut a file short, or swap two of a kind. Return what was done."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    kinds = sorted({path.suffix for path in files})
    suffix = rng.choice(kinds)
    path = rng.choice([p for p in files if p.suffix == suffix])
    data = path.read_bytes()
    if kind == "byte":
        at = rng.randrange(len(data))
        path.write_bytes(data[:at] + bytes([data[at] ^ rng.randrange(1, 256)]) + data[at + 1 :])
        return f"{path.name}: byte {at}"
    others = [p for p in files if p.suffix == suffix and p.read_bytes() != data]
    if kind == "swap" and others:
        other = rng.choice(others)
        path.write_bytes(other.read_bytes())
        other.write_bytes(data)
        return f"{path.name} and {other.name} swapped"
    keep = rng.randrange(len(data))
    path.write_bytes(data[:keep])
    return f"{path.name}: {keep} of {len(data)} bytes kept"


def assert_damages_are_repaired(tree: Path, folder: Path, damages: int) -> None:
    whole, rng = contents(folder), random.Random(11)
    for number in range(damages):
        what = spoil(folder, rng, "byte" if number % 11 else rng.choice(["cut", "swap"]))
        assert problems(folder), f"{number}: {what}"
        repair(folder, tree)
        assert contents(folder) == whole, f"{number}: {what}"


def test_a_changed_byte_a_cut_and_a_swap_are_found_and_repaired(phantoms, folder):
    assert_damages_are_repaired(phantoms, folder, 14)


@pytest.mark.slow
def test_every_change_of_a_byte_every_cut_and_every_swap_is_found_and_repaired(real_tree, tmp_path):
    build_set(real_tree, tmp_path / "set", [64, 256])
    assert_damages_are_repaired(real_tree, tmp_path / "set", DAMAGES)
