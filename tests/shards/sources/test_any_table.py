import os
import shutil
import tarfile
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
from commands import invoke
from sets import REAL, build

from cxrfast.errors import ShardError
from cxrfast.pipelines.reader import Reader
from cxrfast.shards.format.rows import label_names, read_rows
from cxrfast.shards.sources.read import as_stored, read_source
from cxrfast.shards.storage import Tree

FRAME = pd.DataFrame(
    {
        "path": ["a/1.png", "a/2.png", "./b//3.jpg", "4"],
        "patient_id": ["007", "007", "8", "N-A"],
        "Study No": ["1", "1", "2", "3"],
        "Name": ["x", "y", "z", "ä"],
        "Mass": ["1", "0.0", "-1", ""],
        "Edema": ["True", "FALSE", "", "1.0"],
        "projection": ["AP", "", "LL", "PA"],
        "part": ["Training", "val", " TEST", "  "],
        "rows": ["10", "", "20", "30"],
    }
)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    FRAME.to_csv(tmp_path / "data" / "t.csv", index=False)
    return tmp_path / "data"


def listed(tree: Path | str, **options):
    return read_source("table", tree, {"table": "t.csv", "label": ["Mass", "Edema"], **options})


def change(tree: Path, line: int, column: str, value: str) -> None:
    frame = FRAME.copy()
    frame.loc[line - 2, column] = value
    frame.to_csv(tree / "t.csv", index=False)


@pytest.mark.parametrize("column", ["path", "file", "Filename"])
def test_the_needed_columns_are_enough_under_their_usual_names(tree, column):
    patient = "patient_id" if column == "path" else "Patient_ID"
    FRAME.rename(columns={"path": column, "patient_id": patient}).to_csv(tree / "t.csv", index=False)
    assert listed(tree, label="Mass").labels == ("Mass",)
    source = listed(tree)
    images = source.images
    assert source.labels == ("Mass", "Edema")
    assert images["path"].tolist() == ["a/1.png", "a/2.png", "b/3.jpg", "4"]
    assert images["image_id"].tolist() == images["study_id"].tolist() == ["a/1", "a/2", "b/3", "4"]
    assert images["patient_id"].tolist() == ["007", "007", "8", "N-A"], "text as it is written"
    np.testing.assert_array_equal(images["Mass"], np.float32([1, 0, -1, np.nan]))
    np.testing.assert_array_equal(images["Edema"], np.float32([1, 0, np.nan, 1]))
    assert images[["view", "split", "height", "width"]].isna().all(axis=None)


def test_every_column_can_be_named(tree):
    images = listed(
        tree,
        path_column="path",
        patient_column="Study No",
        image_column="Name",
        study_column="Study No",
        view_column="projection",
        split_column="part",
        height_column="rows",
        width_column="rows",
    ).images
    assert images["image_id"].tolist() == ["x", "y", "z", "ä"]
    assert images["study_id"].tolist() == images["patient_id"].tolist() == ["1", "1", "2", "3"]
    assert images["view"].fillna("?").tolist() == ["AP", "?", "LL", "PA"]
    assert images["split"].fillna("?").tolist() == ["train", "validate", "test", "?"]
    np.testing.assert_array_equal(images["height"], [10, np.nan, 20, 30])
    np.testing.assert_array_equal(images["width"], images["height"])


def test_a_table_may_lie_elsewhere(tree, tmp_path, monkeypatch):
    before = listed(tree).images
    (tree / "t.csv").rename(tmp_path / "labels.csv")
    monkeypatch.chdir(tree)
    for table in (str(tmp_path / "labels.csv"), f"file://{tmp_path}/labels.csv"):
        pd.testing.assert_frame_equal(listed(".", table=table).images, before)
    for table, message in [
        ("t.csv", "no t.csv in"),
        (str(tmp_path / "no.csv"), "no no.csv in .*its tables: labels.csv"),
    ]:
        with pytest.raises(ShardError, match=message):
            listed(tree, table=table)
    with pytest.raises(ShardError, match=r"'\.\./labels.csv' is not a path below the source tree"):
        listed(tree, table="../labels.csv")


def test_absolute_paths_inside_the_tree_become_relative_and_others_are_refused(tree, tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to(tree)
    monkeypatch.chdir(tmp_path)
    for place, prefix in [
        (tree, tree),
        ("data", tree),
        ("link", tmp_path / "link"),
        ("link", tree),
        (f"file://{tree}", tree),
    ]:
        change(tree, 3, "path", f"{prefix}/a/2.png")
        assert listed(place).images["path"][1] == "a/2.png"
    for outside in ("/elsewhere/2.png", f"{tree}-old/2.png", "../2.png", f"{tree}/../2.png", "s3://bucket/2.png"):
        change(tree, 3, "path", outside)
        with pytest.raises(ShardError, match=rf"line 3 names {outside}, which is not in .*give paths inside --data"):
            listed(tree)


@pytest.mark.parametrize(
    ("rename", "message"),
    [
        (
            {"path": "picture"},
            r"which column of t.csv holds the path of an image\? name it with --path-column \(its columns: picture, patient_id",
        ),
        ({"patient_id": "person"}, r"holds the patient of an image\? name it with --patient-column"),
        ({"Name": "file"}, r"holds the path of an image\? name it with --path-column"),
        ({"Name": "patient"}, r"holds the patient of an image"),
    ],
)
def test_columns_that_cannot_be_told_are_asked_for(tree, rename, message):
    FRAME.rename(columns=rename).to_csv(tree / "t.csv", index=False)
    with pytest.raises(ShardError, match=message):
        listed(tree)


def test_a_column_that_is_named_and_not_there_is_an_error(tree):
    for name in ("path", "patient", "image", "study", "view", "split", "height", "width"):
        with pytest.raises(ShardError, match=r"t.csv lacks the columns Nowhere: its columns: path, patient_id, Study"):
            listed(tree, **{f"{name}_column": "Nowhere"})
    with pytest.raises(ShardError, match=r"lacks the columns Masses, Nodule"):
        listed(tree, label=["Mass", "Masses", "Nodule"])


@pytest.mark.parametrize(
    ("line", "column", "value", "message"),
    [
        (3, "patient_id", "", "t.csv: patient_id is blank in line 3"),
        (5, "patient_id", "  ", "t.csv: patient_id is blank in line 5"),
        (2, "path", "", "t.csv: path is blank in line 2"),
        (4, "Mass", "2", "t.csv holds '2' for Mass in line 4: only 1, 0, -1 and blank"),
        (4, "part", "holdout", "t.csv holds 'holdout' for part in line 4: use train, validate, test or blank"),
        (3, "rows", "ten", "t.csv holds 'ten' for rows in line 3"),
        (3, "path", "a/1.jpg", r"t.csv lists image a/1 in lines 2, 3: name .*--image-column"),
    ],
)
def test_a_line_that_is_wrong_is_named(tree, line, column, value, message):
    change(tree, line, column, value)
    with pytest.raises(ShardError, match=message):
        listed(tree, split_column="part", height_column="rows", study_column="Study No")


FINDINGS = ("normal", "bacteria", "virus")


@pytest.mark.slow
def test_real_radiographs_of_a_table_become_shards_by_the_command_line(tmp_path):
    """5,216 real radiographs of children in a folder, and a table with a column for each of their three classes."""
    if not (REAL / "kermany224.tar").exists():
        pytest.skip("the real radiographs are not here")
    data = tmp_path / "kermany"
    with tarfile.open(REAL / "kermany224.tar") as archive:
        archive.extractall(data / "images", filter="data")
    published = pd.read_csv(REAL / "kermany224.csv", dtype=str)
    one_hot = {name: published["finding"].eq(name).astype(int) for name in FINDINGS}
    published.assign(file="images/" + published["file"], **one_hot).to_csv(data / "labels.csv", index=False)

    images = read_source("table", data, {"table": "labels.csv", "label": list(FINDINGS)}).images
    assert len(images) == len(published) == 5216
    assert images["patient_id"].tolist() == published["patient_id"].tolist()
    for finding in FINDINGS:
        assert images[finding].tolist() == published["finding"].eq(finding).tolist()
    assert set(images["path"]) == {f"images/{name}" for name in os.listdir(data / "images")}

    labels = [argument for finding in FINDINGS for argument in ("--label", finding)]
    places = ["--data", str(data), "--out", str(tmp_path / "set"), "--source", "table", "--table", "labels.csv"]
    done = invoke("shard", *places, "--scale", "56", "--limit", "50", "--workers", "1", *labels)
    assert done.exit_code == 0, done.output
    assert "5,216 images, 5,216 studies, 2,846 patients from table" in done.output
    rows = read_rows(tmp_path / "set" / "rows.parquet")
    assert label_names(rows) == FINDINGS
    assert rows[list(FINDINGS)].sum(axis=1).eq(1).all()
    with Reader(tmp_path / "set", 56) as reader:
        assert len(reader.rows) > 50
        for row in reader.rows[:20].tolist():
            pixels = cv2.imdecode(np.frombuffer(reader.read(row), np.uint8), cv2.IMREAD_GRAYSCALE)
            source = cv2.imread(str(data / rows["path"][row]), cv2.IMREAD_GRAYSCALE)
            error = pixels - cv2.resize(source, (56, 56), interpolation=cv2.INTER_AREA).astype(float)
            assert np.abs(error).mean() < 3, "the picture is that of the row's path"


# Ids, names of files, words, places


def write(tree: Path, **columns: list[str]) -> None:
    pd.DataFrame(columns).to_csv(tree / "t.csv", index=False)


def simple(tree: Path, **options):
    return read_source("table", tree, {"table": "t.csv", "label": ["Mass"], **options})


def test_one_patient_written_in_several_ways_is_one_patient(tree):
    patients = ["7", " 7", "7\u00a0", "7.0", "\ufeff7", "M\u00fcller", "Mu\u0308ller"]
    write(tree, path=[f"{n}.png" for n in range(7)], patient_id=patients, Mass=["1"] * 7)
    assert simple(tree).images["patient_id"].tolist() == ["7"] * 5 + ["M\u00fcller"] * 2


@pytest.mark.parametrize("column", ["patient_id", "study"])
@pytest.mark.parametrize(
    ("one", "other", "message"),
    [
        ("1", "0001", r"holds ids that may be the same: '1' in line 2; '0001' in line 3: write each id in one way"),
        ("a", "nan", r"is blank in line 3 \('nan'\)"),
        ("a", "8.4E+35", "was rounded by a spreadsheet in line 3"),
    ],
)
def test_ids_that_may_be_those_of_one_or_two_patients_are_refused(tree, column, one, other, message):
    write(
        tree,
        path=["1.png", "2.png"],
        **{"patient_id": ["a", "b"], "study": ["x", "y"], column: [one, other]},
        Mass=["1", "0"],
    )
    with pytest.raises(ShardError, match=message):
        simple(tree, study_column="study")


def test_a_uid_is_an_image_s_id_to_its_last_number_and_a_suffix_is_not_part_of_it(tree):
    names = ["1.2.840.10008.1", "1.2.840.10008.2", "1.2.840.10008.3.dcm", "a.b/c.JPG", "a.b/d", "x.tar.gz"]
    write(tree, path=names, patient_id=list("abcdef"), Mass=["1"] * 6)
    expected = ["1.2.840.10008.1", "1.2.840.10008.2", "1.2.840.10008.3", "a.b/c", "a.b/d", "x.tar"]
    assert simple(tree).images["image_id"].tolist() == expected


def test_an_image_in_several_lines_is_to_have_one(tree):
    write(tree, path=["1.png", "1.png", "2.png", "./2.png"], patient_id=list("aabb"), Mass=["1", "0", "1", "1"])
    with pytest.raises(
        ShardError, match=r"t.csv lists 1.png in lines 2, 3, and 1 more in several lines: keep one line per image"
    ):
        simple(tree)
    with pytest.raises(ShardError, match="keep one line per image"):
        simple(tree, image_column="patient_id")
    write(tree, path=["1.png", "1.jpg", "2.png", "2.jpg"], patient_id=list("aabb"), Mass=["1", "0", "1", "1"])
    with pytest.raises(
        ShardError, match="lists image 1 in lines 2, 3, and 1 more in several lines: name a column of un"
    ):
        simple(tree)


def test_paths_with_backslashes_or_in_another_unicode_form_are_found(tree):
    (tree / "a").mkdir()
    for name in ("a/1.png", "a/Mu\u0308ller.png", "\u00e9.png", r"odd\name.png"):
        (tree / name).write_bytes(b"an image")
    asked = [r"a\1.png", "a\\M\u00fcller.png", "e\u0301.png", r"odd\name.png", r"a\absent.png"]
    write(tree, path=asked, patient_id=list("abcde"), Mass=["1"] * 5)
    expected = ["a/1.png", "a/Mu\u0308ller.png", "\u00e9.png", r"odd\name.png", r"a\absent.png"]
    assert simple(tree).images["path"].tolist() == expected


def test_words_for_labels_are_read_and_reported(tree):
    write(tree, path=["1.png", "2.png", "3.png"], patient_id=list("abc"), Mass=["Yes", "no", ""])
    source = simple(tree)
    np.testing.assert_array_equal(source.images["Mass"], np.float32([1, 0, np.nan]))
    assert source.notes == ("labels read from words, Yes as 1, no as 0: Mass",)


def test_a_table_is_found_as_a_shell_completes_its_name_and_stored_by_its_place_in_the_tree(
    tree, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other").mkdir()
    shutil.copy(tree / "t.csv", tmp_path / "other")
    place = Tree("data")
    for given, stored in [
        ("data/t.csv", "t.csv"),
        ("./data/t.csv", "t.csv"),
        ("other/t.csv", str(tmp_path / "other" / "t.csv")),
        ("data/../other/t.csv", str(tmp_path / "other" / "t.csv")),
        ("t.csv", "t.csv"),  # in the tree
        ("absent.csv", "absent.csv"),
        (f"file://{tree}/t.csv", f"file://{tree}/t.csv"),
    ]:
        assert as_stored(place, {"table": given, "label": ["Mass"]}) == {"table": stored, "label": ["Mass"]}
    shutil.copy(tree / "t.csv", tmp_path)
    assert as_stored(place, {"table": "t.csv"}) == {"table": "t.csv"}, "the tree's own comes first"


# Images that are not where the table says


@pytest.mark.parametrize(
    ("listed", "there", "message"),
    [
        ("{}.jpg", "{}.png", r"2 of 2 .* with the suffix .png instead of .jpg \(such as \d.png\): rename them"),
        ("a/{}.jpg", "a/{}.JPG", r"with the suffix .JPG instead of .jpg \(such as a/\d.JPG\)"),
        ("a/{}.jpg", "a/{}", r"without the suffix .jpg \(such as a/\d\)"),
        ("a/x{}.jpg", "a/X{}.jpg", r"with other capital letters \(such as a/X\d.jpg\)"),
        ("a/b/{}.jpg", "{}.jpg", r"in other folders \(such as \d.jpg\): give a table with the paths as they are"),
        (
            "{}.jpg",
            "images-224/images-224/{}.jpg",
            r"in images-224/images-224 .*: give --data \S+/images-224/images-224$",
        ),
        ("a/{}.jpg", "deep/a/{}.jpg", r"in deep \(such as deep/a/\d.jpg\): give --data \S+/deep$"),
        ("{}.jpg", "1.2.{}.4", "give --data the folder that holds the tables and the images"),
    ],
)
def test_a_message_says_where_images_of_these_names_are(tree, tmp_path, listed, there, message):
    for n in range(2):
        (tree / there.format(n)).parent.mkdir(parents=True, exist_ok=True)
        (tree / there.format(n)).write_bytes(b"an image")
    write(tree, path=[listed.format(n) for n in range(2)], patient_id=["a", "b"], Mass=["1", "0"])
    with pytest.raises(ShardError, match=r"(?m)^none of the 2 images .* is in .*" + message):
        build(tree, tmp_path / "set", [32], source="table", source_options={"table": "t.csv", "label": ["Mass"]})
    assert not (tmp_path / "set").exists()


def test_a_label_that_is_named_twice_is_refused(tree):
    write(tree, path=["1.png", "2.png"], patient_id=list("ab"), Mass=["1", "0"])
    with pytest.raises(ShardError, match="label 'Mass' is named twice: name it once"):
        read_source("table", Tree(tree), {"table": "t.csv", "label": ["Mass", "Mass"]})


# Spreadsheets as people export them


EXPORT = """\ufeffFilename;PatientNr;Age;Sex;Scanner;Pneumonia;Mass
i00.jpg;7,0;5,7;F;Canon;1,0;yes
i01.jpg;8,0;;M;;0,0;no
i02.jpg;8,0;61;F;Canon;;
;;;;;;
"""


def exported(tree: Path, **options):
    (tree / "export.csv").write_text(EXPORT, encoding="utf-8")
    return read_source("table", tree, {"table": "export.csv", **options})


def test_a_semicolon_export_with_decimal_commas_and_a_bare_last_line_is_read(tree):
    source = exported(tree, label=["Pneumonia", "Mass"], keep=["Age", "Sex", "Scanner"])
    frame = source.images
    assert frame["patient_id"].tolist() == ["7", "8", "8"]
    np.testing.assert_array_equal(frame["Pneumonia"], np.float32([1, 0, np.nan]))
    np.testing.assert_array_equal(frame["Mass"], np.float32([1, 0, np.nan]))
    np.testing.assert_array_equal(frame["kept/Age"], [5.7, np.nan, 61])
    assert frame["kept/Sex"].tolist() == ["F", "M", "F"]
    assert frame["kept/Scanner"].isna().tolist() == [False, True, False]
    assert source.labels == ("Pneumonia", "Mass")
    assert "decimal commas read as points: Age" in source.notes
    assert (
        source.notes[-1] == "kept: Age as numbers (blank for 1 image), Sex as text, Scanner as text (blank for 1 image)"
    )


def test_without_labels_the_columns_that_look_like_labels_are_named(tree):
    source = exported(tree)
    assert (source.labels, source.label_like) == ((), ("Pneumonia", "Mass"))
    assert exported(tree, keep=["Mass"]).label_like == ("Pneumonia",)
    assert exported(tree, label="Mass").label_like == ()


def test_a_column_that_cannot_be_read_does_not_matter_where_nothing_is_asked_of_it(tree):
    frame = FRAME[["path", "patient_id", "Mass"]].assign(taken=pd.to_datetime("2024"))
    frame.to_parquet(tree / "t.parquet")
    assert read_source("table", tree, {"table": "t.parquet"}).labels == ()
    with pytest.raises(ShardError, match=r"holds timestamp.* in column taken"):
        read_source("table", tree, {"table": "t.parquet", "keep": ["taken"]})


@pytest.mark.parametrize(("option", "name"), [("label", "Pneumonia,Mass"), ("keep", "Age, Sex")])
def test_several_columns_in_one_option_are_told_how_to_be_given(tree, option, name):
    parts = [part.strip() for part in name.split(",")]
    with pytest.raises(
        ShardError, match=f"--{option} '{name}' is not a column.*: --{option} {parts[0]} --{option} {parts[1]}$"
    ):
        exported(tree, **{option: [name]})


def test_a_comma_may_be_part_of_a_column_s_name(tree):
    write(tree, path=["1.png"], patient_id=["a"], **{"Mass, any": ["1"], "Mass": ["0"], "any": ["0"]})
    assert read_source("table", tree, {"table": "t.csv", "label": ["Mass, any"]}).labels == ("Mass, any",)


# Files that are found by their names


def by_name(tree: Path, *names: str) -> list[str]:
    write(tree, path=list(names), patient_id=[f"p{n}" for n in range(len(names))], Mass=["1"] * len(names))
    return simple(tree, find_by_name=True).images["path"].tolist()


def test_files_are_found_by_their_names_in_any_folder(tree):
    for name in ("a/1.jpeg", "b/c/2.JPG", "3.png", "b/1.2.840.7", "b/u\u0308.png", "a/5.txt", "b/5.png"):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_bytes(b"an image")
    (tree / "a" / "loop").symlink_to("..")
    asked = ["1.jpeg", "2", r"D:\export\3.PNG", "1.2.840.7", "\u00fc.png", "5", "absent.png"]
    expected = ["a/1.jpeg", "b/c/2.JPG", "3.png", "b/1.2.840.7", "b/u\u0308.png", "b/5.png", "absent.png"]
    assert by_name(tree, *asked) == expected


def test_a_name_of_several_files_or_a_file_of_several_lines_is_refused(tree):
    for name in ("a/1.png", "b/1.png", "c/2.png"):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_bytes(b"an image")
    with pytest.raises(
        ShardError, match=r"line 3 of t.csv names 1.png, and 2 files are called so: [ab]/1.png, [ab]/1.png"
    ):
        by_name(tree, "2.png", "1.png")
    with pytest.raises(ShardError, match=r"t.csv names c/2.png in lines 2, 3: keep one line per image"):
        by_name(tree, "2.png", "2")


def test_a_message_leads_to_find_by_name_where_folders_differ(tree, tmp_path):
    for name in ("a/1.jpg", "b/2.jpg"):
        (tree / name).parent.mkdir()
        (tree / name).write_bytes(b"an image")
    write(tree, path=["1.jpg", "2.jpg"], patient_id=["a", "b"], Mass=["1", "0"])
    with pytest.raises(ShardError, match=r"2 of 2 images looked for are there, in other folders .*--find-by-name$"):
        build(tree, tmp_path / "set", [32], source="table", source_options={"table": "t.csv", "label": ["Mass"]})
