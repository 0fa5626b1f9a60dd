import json

from damage import assert_same_but_for_grids, change, contents, copy_set, flip_bit, problems, repair, requantise

from cxrfast.files import sha256
from cxrfast.shards.format.names import shard_path
from cxrfast.shards.format.rows import read_rows
from cxrfast.shards.images.cell_means import STEPS, pack, unpack


def test_with_the_source_a_manifest_has_its_very_bytes_again(corrupt, tmp_path):
    folder = copy_set(corrupt[1], tmp_path / "set")
    path = shard_path(folder, 32, 1, "json")
    flip_bit(path, path.stat().st_size - 30)  # in its grids: it can be read, and the rest agrees with the tar
    shard_path(folder, 16, 1, "json").unlink()
    repair(folder, corrupt[0])
    assert contents(folder) == contents(corrupt[1])


def test_where_the_source_has_changed_a_manifest_is_made_from_its_tar_and_the_tar_stays(
    tree, folder, tiny_set, tmp_path
):
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
    grids = unpack(json.loads(path.read_bytes())["grids"], 64).copy()
    grids[9] += 5 * STEPS
    change(path, grids=pack(grids))
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


def test_invalid_manifests_that_were_signed_are_named_and_made_again(folder, phantoms, tiny_set):
    sums = (folder / "SHA256SUMS").read_text()
    for shard, grids in enumerate(["short", None, 5]):
        path = shard_path(folder, 64, shard, "json")
        before = sha256(path)
        change(path, grids=grids)
        sums = sums.replace(before, sha256(path))
    (folder / "SHA256SUMS").write_text(sums)
    assert problems(folder) == [f"64/00000{n}.json: cannot be read, although its hash is right" for n in range(3)]
    repair(folder, phantoms)
    assert contents(folder) == contents(tiny_set)
