import json
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from damage import contents, copy_set, flip_bit

from cxrfast.errors import ShardError
from cxrfast.files import sha256
from cxrfast.phantoms.dataset import synth
from cxrfast.shards.build import build as build_set
from cxrfast.shards.format.info import read_set
from cxrfast.shards.format.lock import Lease
from cxrfast.shards.format.names import shard_path
from cxrfast.shards.format.recipe import ImageRecipe
from cxrfast.shards.format.rows import read_rows
from cxrfast.shards.images.grid import STEPS, pack, tolerance, unpack
from cxrfast.shards.repair.repair import Repair
from cxrfast.shards.repair.repair import repair as repair_set
from cxrfast.shards.storage import Tree
from cxrfast.shards.upkeep.relabel import relabel
from cxrfast.shards.upkeep.verify import verify

DAMAGES = int(os.environ.get("CXRFAST_DAMAGES", "24"))
"""How many changes are tried one after the other; 1,100 is the full measure."""


def repair(folder: Path, tree: Path | None = None, **options) -> Repair:
    return repair_set(folder, Tree(tree) if tree else None, **{"workers": 1, "quiet": True, **options})


def problems(folder: Path) -> list[str]:
    return [f"{problem.path}: {problem.what}" for problem in verify(folder, quiet=True).problems]


def requantise(path: Path) -> None:
    """Give a JPEG other pixels, in as many bytes."""
    data = bytearray(path.read_bytes())
    data[data.index(b"\xff\xdb") + 8] += 3
    path.write_bytes(data)


@pytest.fixture
def folder(tiny_set: Path, tmp_path: Path) -> Path:
    """A copy of the tiny set that can be spoiled."""
    return copy_set(tiny_set, tmp_path / "set")


@pytest.fixture(scope="module", params=["jpeg", "raw"])
def corrupt(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tree with images that cannot be used and one that is missing, and its set at two scales. Not to be written to."""
    recipe = ImageRecipe(codec=request.param)
    tree, out = (tmp_path_factory.mktemp("corrupt") / name for name in ("mimic", "set"))
    synth(tree, images=130, size=64, corrupt=6, workers=1)
    sorted(tree.rglob("*.jpg"))[7].unlink()
    build_set(tree, out, [16, 32], recipe=recipe, workers=1, quiet=True, allow_missing=True)
    return tree, out


# What can be mended from the set alone


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
        flip_bit(path, path.stat().st_size // 2, 4)
    if how == "gone" and name == "SHA256SUMS":
        with pytest.raises(ShardError, match="not finished"):
            repair(folder)
        return
    work = repair(folder)
    if path.match("32/*.json") and read_set(folder).codec == "jpeg":
        assert_same_but_for_grids(folder, corrupt[1], "32/000001.json")
        assert work.report() == [
            "mended: 32/000001.json: made again from its tar, its grids from its images",
            "mended: SHA256SUMS: written anew",
        ]
        return
    assert contents(folder) == contents(corrupt[1])
    assert [problem.path for problem in work.done] == [str(path.relative_to(folder))]
    assert not work.failed


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
    assert verify(folder, deep=True, quiet=True).problems == []


@pytest.mark.parametrize("how", ["changed", "gone"])
def test_with_the_source_a_manifest_has_its_very_bytes_again(corrupt, tmp_path, how):
    folder = copy_set(corrupt[1], tmp_path / "set")
    path = shard_path(folder, 32, 1, "json")
    if how == "changed":
        flip_bit(path, path.stat().st_size - 30)  # in its grids: it can be read, and all else agrees with the tar
    else:
        path.unlink()
    repair(folder, corrupt[0])
    assert contents(folder) == contents(corrupt[1])


def test_where_the_source_has_changed_a_manifest_is_made_from_its_tar_and_the_tar_stays(
    phantoms, folder, tiny_set, tmp_path
):
    tree = shutil.copytree(phantoms, tmp_path / "mimic")
    requantise(tree / read_rows(folder / "rows.parquet")["path"][3])
    shard_path(folder, 32, 0, "json").unlink()
    gone = copy_set(folder, tmp_path / "gone")
    repair(folder, tree, accept_new_bytes=True)
    assert_same_but_for_grids(folder, tiny_set, "32/000000.json")
    (tree / read_rows(gone / "rows.parquet")["path"][3]).unlink()
    repair(gone, tree)
    assert_same_but_for_grids(gone, tiny_set, "32/000000.json")


def test_a_manifest_whose_line_is_lost_keeps_its_grids_if_its_images_agree_with_them(folder, tiny_set):
    lines = (tiny_set / "SHA256SUMS").read_text().splitlines(keepends=True)
    (folder / "SHA256SUMS").write_text("".join(line for line in lines if "64/000001.json" not in line))
    repair(folder)
    assert contents(folder) == contents(tiny_set)
    (folder / "SHA256SUMS").write_text("".join(line for line in lines if "64/000001.json" not in line))
    path = shard_path(folder, 64, 1, "json")
    value = json.loads(path.read_bytes())
    grids = unpack(value["grids"], 64).copy()
    grids[9] += 5 * STEPS
    path.write_text(json.dumps({**value, "grids": pack(grids)}) + "\n")
    repair(folder)
    assert_same_but_for_grids(folder, tiny_set, "64/000001.json")


def test_a_tar_made_again_does_not_change_the_grids_that_were_signed(phantoms, folder, tmp_path):
    shard_path(folder, 32, 1, "json").unlink()
    repair(folder)
    with_grids_of_images = contents(folder)
    flip_bit(shard_path(folder, 32, 1, "tar"), 700)
    work = repair(folder, phantoms)
    assert [problem.path for problem in work.done] == ["32/000001.tar"]
    assert contents(folder) == with_grids_of_images


def test_a_wrong_line_in_the_sums_does_not_condemn_the_file_it_names(folder, tiny_set):
    lines = (tiny_set / "SHA256SUMS").read_text().splitlines(keepends=True)
    for number, line in enumerate(lines):
        wrong = ("f" if line[0] != "f" else "0") + line[1:]
        (folder / "SHA256SUMS").write_text("".join([*lines[:number], wrong, *lines[number + 1 :]]))
        work = repair(folder)
        assert [problem.path for problem in work.done] == ["SHA256SUMS"], line
        assert contents(folder) == contents(tiny_set)


# What needs the source


@pytest.mark.parametrize("name", ["32/000001.tar", "64/000002.tar", "rows.parquet"])
def test_tars_and_the_plan_need_the_source_and_say_so(either_set, phantoms, tmp_path, name):
    folder = copy_set(either_set, tmp_path / "set")
    flip_bit(folder / name, 700)  # in a tar, inside its first image
    before = contents(folder)
    work = repair(folder)
    assert list(work.failed) == [name]
    assert "give the source tree with --data" in work.failed[name]
    assert contents(folder) == before
    work = repair(folder, phantoms)
    assert [problem.path for problem in work.done] == [name]
    assert contents(folder) == contents(either_set)


def test_rows_that_were_left_out_stay_left_out_for_the_same_reasons(corrupt, tmp_path):
    tree, whole = corrupt
    folder = copy_set(whole, tmp_path / "set")
    for scale in ("16", "32"):
        for path in (folder / scale).iterdir():
            path.unlink()
    repair(folder, tree)
    assert contents(folder) == contents(whole)


def test_the_plan_made_again_remembers_what_was_missing(corrupt, tmp_path):
    tree, whole = corrupt
    folder = copy_set(whole, tmp_path / "set")
    (folder / "rows.parquet").unlink()
    found = shutil.copytree(tree, tmp_path / "found")
    rows = read_rows(whole / "rows.parquet")
    path = found / rows.loc[rows["bytes"] < 0, "path"].item()
    path.write_bytes(sorted(tree.rglob("*.jpg"))[20].read_bytes())
    repair(folder, found)
    assert contents(folder) == contents(whole)


def test_an_image_that_has_changed_is_not_put_in_the_place_of_the_old_one_unasked(phantoms, folder, tiny_set, tmp_path):
    tree = shutil.copytree(phantoms, tmp_path / "mimic")
    rows = read_rows(folder / "rows.parquet")
    requantise(tree / rows["path"][3])
    flip_bit(shard_path(folder, 32, 0, "tar"), 5000)
    before = contents(folder)
    work = repair(folder, tree)
    assert "other bytes" in work.failed["32/000000.tar"]
    assert contents(folder) == before
    work = repair(folder, tree, accept_new_bytes=True)
    assert ("32/000000.tar", "built again from the source, with new bytes") in [(p.path, p.what) for p in work.done]
    assert problems(folder) == []
    assert contents(folder)["32/000000.tar"] != contents(tiny_set)["32/000000.tar"]


def test_another_tree_is_refused_for_the_plan(folder, tmp_path):
    other = tmp_path / "other"
    synth(other, images=150, size=64, seed=5, workers=1)
    (folder / "rows.parquet").unlink()
    work = repair(folder, other)
    assert "list other images" in work.failed["rows.parquet"]


def test_one_file_that_cannot_be_mended_does_not_keep_the_others_from_it_nor_is_it_signed(folder, tiny_set):
    flip_bit(folder / "64" / "000001.tar", 700)
    flip_bit(folder / "32" / "000001.idx", 7)
    flip_bit(folder / "SHA256SUMS", 3)
    work = repair(folder)
    assert list(work.failed) == ["64/000001.tar"]
    assert (folder / "32" / "000001.idx").read_bytes() == (tiny_set / "32" / "000001.idx").read_bytes()
    assert (folder / "SHA256SUMS").read_bytes() == (tiny_set / "SHA256SUMS").read_bytes()
    assert problems(folder) == ["64/000001.tar: its bytes have changed"]


def test_set_json_and_the_plan_both_damaged_is_said(folder, phantoms):
    flip_bit(folder / "set.json", 30)
    flip_bit(folder / "rows.parquet", 30)
    assert set(repair(folder, phantoms).failed) == {"set.json", "rows.parquet"}


def test_foreign_files_stay_and_leftovers_of_kills_go(folder, tiny_set):
    (folder / "notes.txt").write_text("mine")
    (folder / "32" / "000001.tar.node7-123.tmp").write_bytes(b"half")
    (folder / "repair.tmp" / "32").mkdir(parents=True)
    (folder / "repair.tmp" / "32" / "000001.tar").write_bytes(b"half")
    repair(folder)
    assert contents(folder) == {**contents(tiny_set), "notes.txt": b"mine"}
    assert problems(folder) == ["notes.txt: not part of the set"]


def test_a_set_that_is_being_built_is_not_repaired(folder):
    flip_bit(folder / "set.json", 3)
    with Lease(folder), pytest.raises(ShardError, match="is being built"):
        repair(folder)


def test_a_whole_set_is_left_alone(folder):
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    work = repair(folder)
    assert (work.done, work.failed) == ([], {})
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_a_set_of_two_shards_swapped_whole_is_put_right(folder, phantoms, tiny_set):
    for suffix in ("tar", "idx", "json"):
        first, second = (shard_path(folder, 32, shard, suffix) for shard in (0, 1))
        data = first.read_bytes()
        first.write_bytes(second.read_bytes())
        second.write_bytes(data)
    repair(folder, phantoms)
    assert contents(folder) == contents(tiny_set)


# What it must not sign


def test_a_set_json_that_is_right_is_not_given_up_for_another_set_s(folder, phantoms, tiny_set, tmp_path):
    build_set(phantoms, tmp_path / "other", [32], workers=1, quiet=True, recipe=ImageRecipe(seed=5))
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


def test_a_foreign_shard_is_not_signed(folder, tiny_set):
    shutil.copy(shard_path(folder, 32, 0, "tar"), shard_path(folder, 32, 4, "tar"))
    repair(folder)
    assert problems(folder) == ["32/000004.tar: not part of the set"]
    assert (folder / "SHA256SUMS").read_bytes() == (tiny_set / "SHA256SUMS").read_bytes()


def test_a_line_lost_and_a_manifest_damaged_are_mended_together(folder, phantoms, tiny_set):
    lines = (folder / "SHA256SUMS").read_text().splitlines(keepends=True)
    (folder / "SHA256SUMS").write_text("".join(line for line in lines if "64/000000.tar" not in line))
    flip_bit(folder / "64" / "000000.json", 40)
    repair(folder, phantoms)
    assert contents(folder) == contents(tiny_set)


def test_a_folder_in_the_place_of_a_file_does_not_keep_the_others_from_being_mended(folder, tiny_set):
    path = folder / "32" / "000001.idx"
    path.unlink()
    path.mkdir()
    flip_bit(folder / "64" / "000001.idx", 7)
    work = repair(folder)
    assert "move what is there away" in work.failed["32/000001.idx"]
    assert (folder / "64" / "000001.idx").read_bytes() == (tiny_set / "64" / "000001.idx").read_bytes()


def test_a_relabelled_set_gets_its_tars_back_with_the_labels_that_they_held(phantoms, folder, tmp_path):
    rows = read_rows(folder / "rows.parquet")
    table = tmp_path / "labels.csv"
    rows[["study_id"]].drop_duplicates().assign(Edema=1).to_csv(table, index=False)
    relabel(folder, table, quiet=True)
    whole = contents(folder)
    flip_bit(folder / "32" / "000001.tar", 9000)
    repair(folder, phantoms)
    assert contents(folder) == whole
    (folder / "rows.parquet").write_bytes(b"")
    assert "relabel" in repair(folder, phantoms).failed["rows.parquet"]
    repair(folder, phantoms, accept_new_bytes=True)
    assert problems(folder) == []
    assert len(read_rows(folder / "rows.parquet").filter(regex="Edema|Fracture").columns) == 2, "the source's labels"


# Whatever happens to one file


def spoil(folder: Path, rng: random.Random, kind: str) -> str:
    """Change one byte, cut a file short, or swap two of a kind. Returns what was done."""
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


def test_every_change_of_a_byte_every_cut_and_every_swap_is_found_and_mended(real_tree, tmp_path):
    folder, rng = tmp_path / "set", random.Random(11)
    build_set(real_tree, folder, [64, 256], quiet=True)
    whole = contents(folder)
    for number in range(DAMAGES):
        what = spoil(folder, rng, "byte" if number % 11 else rng.choice(["cut", "swap"]))
        assert problems(folder), f"{number}: {what}"
        work = repair(folder, real_tree)
        assert contents(folder) == whole, f"{number}: {what}; {work.report()}"


def test_the_copy_of_set_json_inside_the_plan_is_the_same(tiny_set):
    from cxrfast.shards.format.rows import read_info

    assert read_info(tiny_set / "rows.parquet").to_bytes() == (tiny_set / "set.json").read_bytes()
    assert json.loads((tiny_set / "set.json").read_bytes())["images"] == 150


@pytest.mark.parametrize("grids", ["short", None, 5])
def test_a_manifest_that_was_signed_without_sense_is_named_and_made_again(folder, phantoms, tiny_set, grids):
    path = folder / "64" / "000001.json"
    path.write_text(json.dumps({**json.loads(path.read_bytes()), "grids": grids}) + "\n")
    sums = (folder / "SHA256SUMS").read_text().splitlines()
    lines = [f"{sha256(path)}  64/000001.json" if line.endswith("64/000001.json") else line for line in sums]
    (folder / "SHA256SUMS").write_text("\n".join(lines) + "\n")
    assert problems(folder) == ["64/000001.json: cannot be read, and was signed so"]
    repair(folder, phantoms)
    assert problems(folder) == []
    assert contents(folder)["64/000001.json"] == contents(tiny_set)["64/000001.json"]
