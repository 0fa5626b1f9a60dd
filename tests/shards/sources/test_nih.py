import gzip
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sets import REAL

from cxrfast.errors import ShardError
from cxrfast.shards.sources.nih import NIH
from cxrfast.shards.sources.read import read_source

NIH_HEADER = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
    "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]"
)
NIH_ROWS = {
    "00000001_000.png": "Cardiomegaly,0,1,57,M,PA,2682,2749,0.143,0.143",
    "00000001_001.png": "Cardiomegaly|Emphysema,1,1,58,M,PA,2894,2729,0.143,0.143",
    "00000002_000.png": "No Finding,0,2,80,M,AP,2500,2048,0.171,0.171",
    "00030805_000.png": "Pleural_Thickening|Mass|Nodule,0,30805,27,M,PA,2048,2500,0.171,0.171",
}


def write_nih(root: Path, table: str = "Data_Entry_2017_v2020.csv", header: str = NIH_HEADER, end: str = "") -> Path:
    root.mkdir(parents=True, exist_ok=True)
    data = "".join(f"{line}{end}\n" for line in (header, *(f"{k},{v}" for k, v in NIH_ROWS.items()))).encode()
    (root / table).write_bytes(gzip.compress(data) if table.endswith(".gz") else data)
    return root


@pytest.mark.parametrize(
    ("table", "end"),
    [
        ("Data_Entry_2017_v2020.csv", ""),
        ("Data_Entry_2017_v2020.csv.gz", ""),
        ("Data_Entry_2017.csv", ","),  # as first published: with a comma at the end of every line
        ("Data_Entry_2017.csv.gz", ","),
    ],
)
def test_nih_s_findings_are_one_where_named_and_zero_elsewhere(tmp_path, table, end):
    source = read_source("nih", write_nih(tmp_path, table, end=end))
    images = source.images.set_index("image_id")
    assert source.labels == NIH
    assert len(NIH) == 15
    for file, line in NIH_ROWS.items():
        image, fields = images.loc[file.removesuffix(".png")], line.split(",")
        assert {label for label in NIH if image[label] == 1} == set(fields[0].split("|"))
        assert sum(image[label] == 0 for label in NIH) == 15 - len(fields[0].split("|"))
        assert (image["patient_id"], image["study_id"]) == (fields[2], f"{fields[2]}_{fields[1]}")
        assert (image["view"], image["width"], image["height"]) == (fields[5], int(fields[6]), int(fields[7]))
    assert images["split"].isna().all()
    assert source.counts == {}


def test_the_newer_nih_table_is_read_where_both_are_and_a_folder_without_any_is_refused(tmp_path):
    with pytest.raises(ShardError, match=r"no Data_Entry_2017_v2020.csv or Data_Entry_2017.csv .*its tables: none"):
        read_source("nih", tmp_path)
    write_nih(tmp_path)
    (tmp_path / "Data_Entry_2017.csv").write_text("not this one")
    assert len(read_source("nih", tmp_path).images) == 4
    (tmp_path / "Data_Entry_2017_v2020.csv").unlink()
    with pytest.raises(ShardError, match=r"Data_Entry_2017.csv lacks the columns Image Index.*NIH ChestX-ray14"):
        read_source("nih", tmp_path)


def test_nih_s_images_are_found_in_twelve_folders_in_one_or_in_none(tmp_path):
    write_nih(tmp_path)
    guessed = read_source("nih", tmp_path).images["path"].tolist()
    assert guessed == [f"images/{name}" for name in NIH_ROWS], "tables alone: images may still come"
    places = ["images_001/images", "images_001/images", "images_002/images", "images_012/images"]
    for place, name_ in zip(places, NIH_ROWS, strict=True):
        (tmp_path / place).mkdir(parents=True, exist_ok=True)
        (tmp_path / place / name_).write_bytes(b"an image")
    found = read_source("nih", tmp_path).images["path"].tolist()
    assert found == [f"{place}/{name}" for place, name in zip(places, NIH_ROWS, strict=True)]
    (tmp_path / places[-1] / "00030805_000.png").unlink()
    assert read_source("nih", tmp_path).images["path"].iloc[-1] == "images/00030805_000.png"
    for flat in ("images", "."):
        other = write_nih(tmp_path / f"flat {flat}")
        (other / flat).mkdir(exist_ok=True)
        for name_ in NIH_ROWS:
            (other / flat / name_).write_bytes(b"an image")
        assert all((other / path).is_file() for path in read_source("nih", other).images["path"])


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r", "\n\n \n", "\n\ufeff"])
def test_nih_s_lists_are_its_official_split(tmp_path, newline):
    write_nih(tmp_path)
    first, second, third, fourth = NIH_ROWS
    other_name = f"images_001/images/{second.removesuffix('.png')}"
    (tmp_path / "train_val_list.txt").write_bytes((first + newline + other_name).encode("utf-8-sig"))
    (tmp_path / "test_list.txt").write_bytes(newline.join([fourth, "00099999_000.png", ""]).encode())
    source = read_source("nih", tmp_path)
    split = dict(zip(source.images["image_id"] + ".png", source.images["split"], strict=True))
    assert {first: "train", second: "train", fourth: "test"}.items() <= split.items()
    assert pd.isna(split[third])
    assert source.counts == {"images in no list of the split": 1, "listed images that the table lacks": 1}
    (tmp_path / "train_val_list.txt").write_text(f"{first} {fourth}")
    with pytest.raises(ShardError, match=r"1 images \(first: 00030805_000\) are in both lists"):
        read_source("nih", tmp_path)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("|Nodule", "|Nodules", r"names the finding 'Nodules' in line 5: known are Atelectasis"),
        ("|Nodule", "|", r"names the finding '' in line 5"),
        ("No Finding", "", r"Finding Labels is blank in line 4"),
        (",0,2,80", ",0,,80", r"Patient ID is blank in line 4"),
        ("00000001_001", "00000001_000", "list image 00000001_000 twice, in lines 2, 3: keep"),
        ("|Nodule", "|No Finding", r"names 'Pleural_Thickening\|Mass\|No Finding' in line 5, a finding and none"),
        (
            "00000002_000",
            "00000001_002",
            "gives 00000001_002.png the Patient ID 2 in line 4: the name of the image says 1",
        ),
        ("2682,2749", "2682,tall", r"holds 'tall' for Height\] in line 2"),
        (
            "Finding Labels",
            "Findings",
            r"lacks the columns Finding Labels: did you mean 'Findings'\? is it the table of NIH",
        ),
        ("No Finding,0", "No Finding,really,0", r"cannot be read as a CSV table \(.*line 4"),
    ],
)
def test_an_nih_table_that_is_wrong_is_named_with_its_line(tmp_path, old, new, message):
    path = write_nih(tmp_path) / "Data_Entry_2017_v2020.csv"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(ShardError, match=message):
        read_source("nih", tmp_path)


@pytest.mark.parametrize("patient", ["1", "00001", " 1", "1.0", "00000001"])
def test_a_patient_is_the_one_in_the_image_s_name_however_the_table_writes_the_number(tmp_path, patient):
    path = write_nih(tmp_path) / "Data_Entry_2017_v2020.csv"
    path.write_text(path.read_text().replace("Emphysema,1,1,", f"Emphysema,1,{patient},"))
    images = read_source("nih", tmp_path).images
    assert images["patient_id"].tolist() == ["1", "1", "2", "30805"]
    assert images["study_id"].tolist() == ["1_0", "1_1", "2_0", "30805_0"]


def test_lists_that_name_other_images_are_refused_unless_that_is_allowed(tmp_path):
    write_nih(tmp_path)
    (tmp_path / "train_val_list.txt").write_text("\n".join(f"{n:08d}_000.png" for n in range(100, 200)))
    with pytest.raises(
        ShardError, match=r"4 of the 4 images in the table are not in the lists .*, and 100 of the 100 images"
    ):
        read_source("nih", tmp_path)
    assert read_source("nih", tmp_path, {"allow_unmatched": True}).counts["images in no list of the split"] == 4


def test_nih_s_images_are_found_in_a_folder_in_a_folder_of_the_same_name(tmp_path):
    write_nih(tmp_path)
    (tmp_path / "images-224" / "images-224").mkdir(parents=True)
    for name in NIH_ROWS:
        (tmp_path / "images-224" / "images-224" / name).write_bytes(b"an image")
    assert read_source("nih", tmp_path).images["path"].tolist() == [
        f"images-224/images-224/{name}" for name in NIH_ROWS
    ]


@pytest.mark.slow
def test_all_of_nih_is_listed_as_plain_pandas_counts_it(tmp_path):
    published = REAL / "tables" / "nih_Data_Entry_2017_v2020.csv.gz"
    if not published.exists():
        pytest.skip("the real tables are not here")
    (tmp_path / "Data_Entry_2017_v2020.csv.gz").symlink_to(published)
    images, table = read_source("nih", tmp_path).images, pd.read_csv(published)
    assert len(images) == len(table) == 112_120
    assert images["patient_id"].nunique() == table["Patient ID"].nunique() == 30_805
    assert images["study_id"].nunique() == len(table[["Patient ID", "Follow-up #"]].drop_duplicates())
    expected = table["Finding Labels"].str.get_dummies("|")
    assert set(expected) == set(NIH)
    np.testing.assert_array_equal(images[list(NIH)], expected[list(NIH)])
    assert images["view"].value_counts().to_dict() == table["View Position"].value_counts().to_dict()
    assert images["height"].sum() == table["Height]"].sum()
    assert images["image_id"].tolist() == table["Image Index"].str.removesuffix(".png").tolist()


def test_columns_of_the_table_can_be_kept(tmp_path):
    source = read_source("nih", write_nih(tmp_path), {"keep": ["Patient Age", "Patient Gender"]})
    assert source.images["kept/Patient Age"].tolist() == [57.0, 58.0, 80.0, 27.0]
    assert source.images["kept/Patient Gender"].tolist() == ["M"] * 4
    assert source.labels == NIH
    with pytest.raises(ShardError, match="lacks the columns Patient Sex: did you mean 'Patient Age'"):
        read_source("nih", write_nih(tmp_path), {"keep": ["Patient Sex"]})
