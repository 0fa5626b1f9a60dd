import shutil

import pytest
from damage import contents, copy_set, flip_bit, problems, repair, requantise, swap

from cxrfast.shards.format.names import shard_path
from cxrfast.shards.format.rows import read_rows
from cxrfast.shards.upkeep.relabel import relabel


@pytest.mark.parametrize("names", [["32/000001.tar", "64/000002.tar"], ["rows.parquet"]])
def test_tars_and_the_rows_table_need_the_source_and_say_so(either_set, either_copy, phantoms, names):
    for name in names:
        flip_bit(either_copy / name, 700)  # in a tar, inside its first image
    before = contents(either_copy)
    work = repair(either_copy)
    assert list(work.failed) == names
    assert all("give the source tree with --data" in why for why in work.failed.values())
    assert contents(either_copy) == before
    work = repair(either_copy, phantoms)
    assert [problem.path for problem in work.done] == names
    assert contents(either_copy) == contents(either_set)


def test_rows_made_again_remember_what_was_missing_and_what_was_left_out_stays_so(corrupt, tmp_path):
    tree, whole = corrupt
    folder = copy_set(whole, tmp_path / "set")
    for path in [*folder.glob("16/*"), *folder.glob("32/*")]:
        path.unlink()
    repair(folder, tree)
    assert contents(folder) == contents(whole)
    (folder / "rows.parquet").unlink()
    found = shutil.copytree(tree, tmp_path / "found")
    rows = read_rows(whole / "rows.parquet")
    path = found / rows.loc[rows["bytes"] < 0, "path"].item()
    path.write_bytes(sorted(tree.rglob("*.jpg"))[20].read_bytes())
    repair(folder, found)
    assert contents(folder) == contents(whole)


def test_an_image_that_has_changed_is_not_put_in_the_place_of_the_old_one_unasked(tree, folder, tiny_set):
    requantise(tree / read_rows(folder / "rows.parquet")["path"][3])
    flip_bit(shard_path(folder, 32, 0, "tar"), 5000)
    before = contents(folder)
    work = repair(folder, tree)
    assert "other bytes" in work.failed["32/000000.tar"]
    assert contents(folder) == before
    work = repair(folder, tree, accept_new_bytes=True)
    assert ("32/000000.tar", "rebuilt from the source, with new bytes") in [(p.path, p.what) for p in work.done]
    assert problems(folder) == []
    assert contents(folder)["32/000000.tar"] != contents(tiny_set)["32/000000.tar"]


def test_another_tree_is_refused_for_the_rows_table_and_the_right_one_puts_swapped_shards_right(
    folder, sound, phantoms, tiny_set
):
    (folder / "rows.parquet").unlink()
    assert "list other images" in repair(folder, sound).failed["rows.parquet"]
    swap(folder, "tar", "idx", "json")
    repair(folder, phantoms)
    assert contents(folder) == contents(tiny_set)


def test_a_relabelled_set_gets_its_tars_back_with_the_labels_that_they_held(phantoms, folder, tmp_path):
    rows = read_rows(folder / "rows.parquet")
    table = tmp_path / "labels.csv"
    rows[["study_id"]].drop_duplicates().assign(Edema=1).to_csv(table, index=False)
    relabel(folder, table)
    whole = contents(folder)
    flip_bit(folder / "32" / "000001.tar", 9000)
    repair(folder, phantoms)
    assert contents(folder) == whole
    (folder / "rows.parquet").write_bytes(b"")
    assert "relabel" in repair(folder, phantoms).failed["rows.parquet"]
    repair(folder, phantoms, accept_new_bytes=True)
    assert problems(folder) == []
    assert len(read_rows(folder / "rows.parquet").filter(regex="Edema|Fracture").columns) == 2, "the source's labels"
