"""Images that are equal byte for byte under several patients are said: one patient may have two ids."""

import shutil

from commands import invoke
from sets import rows_of, table_arguments, write_table


def words(result) -> str:
    return " ".join(result.output.split())


def test_links_and_copies_under_several_patients_are_said_by_shard_and_describe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    patients = ["a", "a", "b", "c", "d", "e", "f", "f"]
    tree = write_table(tmp_path / "data", patients, Mass=[0, 1] * 4)
    for n in (3, 4, 5):
        (tree / f"i{n:02d}.jpg").unlink()
    shutil.copy(tree / "i00.jpg", tree / "i03.jpg")
    (tree / "i04.jpg").hardlink_to(tree / "i02.jpg")
    (tree / "i05.jpg").symlink_to("i02.jpg")
    done = invoke("shard", *table_arguments(tree, tmp_path / "set", "Mass"))
    row = rows_of(tmp_path / "set").set_index("image_id")["row"]
    pair, three = (sorted(row[names]) for names in (["i00", "i03"], ["i02", "i04", "i05"]))
    groups = sorted(
        (" and ".join(f"row {n}" for n in group) for group in (pair, three)), key=lambda t: int(t.split()[1])
    )
    said = (
        "warning: the same image under different patients: 5 images have source files that are equal byte for byte, such as "
        f"{'; '.join(groups)}; if these are one patient, a model is tested on images that it was trained on"
    )
    assert done.exit_code == 0
    assert said in words(done)
    assert said in words(invoke("describe", tmp_path / "set"))


def test_copies_of_one_patient_say_nothing(tmp_path):
    tree = write_table(tmp_path / "data", ["a", "a", "b", "c"], Mass=[0, 1] * 2)
    shutil.copy(tree / "i00.jpg", tree / "i01.jpg")
    assert "the same image" not in invoke("shard", *table_arguments(tree, tmp_path / "set", "Mass")).output
