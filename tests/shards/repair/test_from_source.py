import shutil

import pytest
from damage import contents, copy_set, flip_bit, problems, repair, requantise, swap

from cxrfast.phantoms.dataset import synth
from cxrfast.shards.format.names import shard_path
from cxrfast.shards.format.rows import read_rows
from cxrfast.shards.upkeep.relabel import relabel


@pytest.mark.parametrize("names", [["32/000001.tar", "64/000002.tar"], ["rows.parquet"]])
def test_tars_and_the_rows_table_need_the_source_and_say_so(either_set, phantoms, tmp_path, names):
    folder = copy_set(either_set, tmp_path / "set")
    for name in names:
        flip_bit(folder / name, 700)  # in a tar, inside its first image
    before = contents(folder)
    work = repair(folder)
    assert list(work.failed) == names
    assert all("give the source tree with --data" in why for why in work.failed.values())
    assert contents(folder) == before
    work = repair(folder, phantoms)
    assert [problem.path for problem in work.done] == names
    assert contents(folder) == contents(either_set)


def test_rows_that_were_left_out_stay_left_out_for_the_same_reasons(corrupt, tmp_path):
    tree, whole = corrupt
    folder = copy_set(whole, tmp_path / "set")
    for scale in ("16", "32"):
        for path in (folder / scale).iterdir():
            path.unlink()
    repair(folder, tree)
    assert contents(folder) == contents(whole)


def test_the_rows_table_made_again_remembers_what_was_missing(corrupt, tmp_path):
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
    assert ("32/000000.tar", "rebuilt from the source, with new bytes") in [(p.path, p.what) for p in work.done]
    assert problems(folder) == []
    assert contents(folder)["32/000000.tar"] != contents(tiny_set)["32/000000.tar"]


def test_another_tree_is_refused_for_the_rows_table(folder, tmp_path):
    other = tmp_path / "other"
    synth(other, images=40, size=64, seed=5, workers=1)
    (folder / "rows.parquet").unlink()
    work = repair(folder, other)
    assert "list other images" in work.failed["rows.parquet"]


def test_a_set_of_two_shards_swapped_whole_is_put_right(folder, phantoms, tiny_set):
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
