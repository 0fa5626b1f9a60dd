from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from commands import invoke
from damage import contents, copy_set
from hypothesis import given
from hypothesis import strategies as st
from sets import is_as_planned, rows_of

from cxrfast.errors import ShardError
from cxrfast.labels import MIMIC
from cxrfast.shards.format.info import read_set
from cxrfast.shards.format.rows import write_rows
from cxrfast.shards.upkeep.id_matching import match_ids, shared_tail
from cxrfast.shards.upkeep.relabel import relabel


def set_of_ids(tiny_set: Path, to: Path, study: Callable[[int], str]) -> Path:
    """A folder whose studies have the ids that `study` gives their numbers."""
    copy_set(tiny_set, to)
    rows = rows_of(to)
    rows["study_id"] = [study(n) for n in pd.factorize(rows["study_id"])[0]]
    write_rows(to / "rows.parquet", rows, read_set(to))
    (to / "SHA256SUMS").unlink()
    return to


@given(number=st.integers(1, 10**9), form=st.sampled_from(["{}", "{}.0", "{}.000", " {}", "{}.0 "]))
def test_a_study_is_found_whatever_a_spreadsheet_made_of_its_number(number, form):
    ids = pd.Series([form.format(number), form.format(number + 1)], dtype="str")
    known = pd.Series([str(number), f"0{number}", f"{number}0"])
    assert match_ids(ids, known, 0, "t").tolist() == [str(number), str(number + 1)]


@pytest.mark.parametrize("form", ["{:04d}", "1.{}"])
def test_ids_of_the_set_itself_that_look_like_numbers_are_matched_as_they_are(form, tiny_set, tmp_path):
    folder = set_of_ids(tiny_set, tmp_path / "set", form.format)
    ids = [form.format(i) for i in range(rows_of(folder)["study_id"].nunique())]
    pd.DataFrame({"study_id": ids, "ill": 1}).to_csv(tmp_path / "text.csv", index=False)
    assert relabel(folder, tmp_path / "text.csv").matched == 150
    if form == "1.{}":
        return
    before = contents(folder)
    pd.DataFrame({"study_id": range(len(ids)), "ill": 0}).to_parquet(tmp_path / "numbers.parquet")
    with pytest.raises(ShardError, match=r"only in leading zeros \(0 is 0000 there\): write them as text"):
        relabel(folder, tmp_path / "numbers.parquet")
    assert contents(folder) == before


def test_an_image_s_id_may_have_the_suffix_of_its_file_unless_the_set_itself_has_such_ids():
    stems = [f"{patient:08d}_{visit:03d}" for patient in (1, 2, 27426, 30805) for visit in range(2)]
    for form in ("{}.png", "{}", "{}.dcm"):
        ids = pd.Series([form.format(stem) for stem in stems])
        assert match_ids(ids, pd.Series(stems, name="image_id"), 0, "t").tolist() == stems
    known = pd.Series(["a.png", "a", "b"], name="image_id")
    assert match_ids(pd.Series(["a.png", "b.jpg", "c.png"]), known, 0, "t").tolist() == ["a.png", "b", "c.png"]
    with pytest.raises(ShardError, match=r"t lists b more than once"):
        match_ids(pd.Series(["b.jpg", "b.png"]), known, 0, "t")
    study = pd.Series(["a", "b"], name="study_id")
    assert match_ids(pd.Series(["a.png"]), study, 0, "t").tolist() == ["a.png"], "a study is not a file"


CHEXPERT_IMAGES = [
    f"{part}/patient{first + n:05d}/study{study}/view1_frontal.jpg"
    for part, first in (("train", 1), ("valid", 64541))
    for n in range(6)
    for study in (1, 2)
]


@pytest.mark.parametrize(
    ("train", "valid", "tail"),
    [
        ("train", "valid", 4),
        ("CheXpert-v1.0-small/train", "CheXpert-v1.0-small/valid", 5),
        ("CheXpert-v1.0 batch 2 (train 1)", "CheXpert-v1.0 batch 1 (validate & csv)/valid", 3),
    ],
)
def test_chexpert_s_images_are_found_by_the_ends_of_their_paths(train, valid, tail):
    """In the layouts of the small download, of the same in a folder, and of the full download's batches."""
    known = [f"{train if p.startswith('train') else valid}/{p.partition('/')[2]}" for p in CHEXPERT_IMAGES]
    ids = pd.Series([f"CheXpert-v1.0-small/{path}" for path in CHEXPERT_IMAGES])
    column = pd.Series(known, name="path")
    assert shared_tail(ids, column) == tail
    assert match_ids(ids, column, tail, "t").tolist() == known


def test_paths_count_only_where_the_table_has_no_other_ids(tiny_set, folder, tmp_path):
    rows = rows_of(tiny_set)
    table = rows[["image_id", *MIMIC]].assign(path="mimic-cxr-jpg/" + rows["path"])
    table.assign(path="nowhere.jpg").to_csv(tmp_path / "t.csv", index=False)
    assert relabel(folder, tmp_path / "t.csv").by == "image_id"
    table.drop(columns="image_id").to_csv(tmp_path / "t.csv", index=False)
    assert relabel(folder, tmp_path / "t.csv").by == "path"
    assert is_as_planned(folder, tiny_set, tmp_path / "t.csv")
    table.rename(columns={"path": "location"}).drop(columns="image_id").to_csv(tmp_path / "t.csv", index=False)
    done = invoke("relabel", folder, tmp_path / "t.csv", "--key", "location")
    assert "150 of 150 images found" in done.stdout, done.output
    assert "by location (by the last 5 parts of each path)" in done.stdout


def test_paths_are_found_with_backslashes_and_in_another_unicode_form():
    known = pd.Series(["a/M\u00fcller.png", "b/M\u00fcller.png", "b/2.png"], name="path")
    ids = pd.Series(["C:\\films\\a\\Mu\u0308ller.png", "C:\\films\\b\\M\u00fcller.png", "D:\\b\\2.png"])
    assert match_ids(ids, known, shared_tail(ids, known), "t").tolist() == known.tolist()


@pytest.mark.parametrize("form", ["s{}", "{}\u00a0", "\ufeff{}"])
def test_a_study_is_found_with_its_folder_s_letter_and_with_invisible_characters(form):
    known = pd.Series(["50000014", "50000111"], name="study_id")
    assert match_ids(known.map(form.format), known, 0, "t").tolist() == known.tolist()
    lettered = pd.Series(["s50000014", "s50000111"], name="study_id")
    assert match_ids(lettered, lettered, 0, "t").tolist() == lettered.tolist(), "ids that the set itself has stay"


@pytest.mark.parametrize(
    ("text", "message"),
    [("nan", r"study_id is blank in line 3 \('nan'\)"), ("5.0E+07", "study_id was rounded by a spreadsheet in line 3")],
)
def test_a_table_with_what_is_no_id_is_refused_with_its_line(text, message, folder, tmp_path):
    studies = rows_of(folder)["study_id"].unique().tolist()
    studies[1] = text
    pd.DataFrame({"study_id": studies, "ill": 1}).to_csv(tmp_path / "t.csv", index=False)
    before = contents(folder)
    with pytest.raises(ShardError, match=message):
        relabel(folder, tmp_path / "t.csv")
    assert contents(folder) == before


@pytest.mark.parametrize("key", ["image_id", "study_id", "path"])
@pytest.mark.parametrize("name", ["subject_id", "Patient ID"])
def test_labels_of_other_patients_of_the_set_are_refused_with_their_lines(key, name, folder, tmp_path):
    """As of a table of which some columns were sorted alone."""
    rows = rows_of(folder).drop_duplicates(key, ignore_index=True)
    patients = rows["patient_id"].tolist()
    other = next(n for n, patient in enumerate(patients) if patient != patients[0])
    patients[0], patients[other] = patients[other], patients[0]
    table = pd.DataFrame({key: rows[key], name: patients, "ill": 1})
    table.to_csv(tmp_path / "t.csv", index=False)
    before = contents(folder)
    message = rf"gives {key} {rows[key][0]} to the patient {patients[0]} in lines 2, {other + 2}, and the set to {patients[other]}: "
    with pytest.raises(ShardError, match=message):
        relabel(folder, tmp_path / "t.csv")
    assert contents(folder) == before
    assert relabel(folder, tmp_path / "t.csv", allow_unmatched=True).matched == 150


def test_patients_are_compared_as_copies_of_tables_write_them_and_other_numberings_are_not(folder, tmp_path):
    rows = rows_of(folder)
    patient = rows["patient_id"]
    for patients in (patient, "p" + patient, "00" + patient, patient + ".0", "anonymous-" + patient, [""] * 150):
        pd.DataFrame({"image_id": rows["image_id"], "patient_id": patients, "ill": 1}).to_csv(
            tmp_path / "t.csv", index=False
        )
        assert relabel(folder, tmp_path / "t.csv").matched == 150


@given(data=st.data())
def test_paths_that_their_ends_do_not_tell_apart_are_never_matched_to_another_file(data):
    parts = st.lists(st.sampled_from("ab"), min_size=1, max_size=4).map("/".join)
    known = data.draw(st.lists(parts, min_size=1, max_size=6, unique=True))
    asked = data.draw(st.lists(parts, min_size=1, max_size=6, unique=True))
    ids, there = pd.Series(asked, dtype=object), pd.Series(known, name="path", dtype=object)
    tail = shared_tail(ids, there)
    found = match_ids(ids, there, tail, "t") if tail else ids
    for before, after in zip(asked, found, strict=True):
        if before != after:
            assert before.split("/")[-tail:] == after.split("/")[-tail:]
            assert sum(path.split("/")[-tail:] == before.split("/")[-tail:] for path in known) == 1
    exact = set(asked) & set(known)
    assert sum(found.isin(known)) >= len(exact), "at its full length a path is matched as it is"
