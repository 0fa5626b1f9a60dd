import gzip
import io
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sets import REAL

from cxrfast.errors import ShardError
from cxrfast.labels import MIMIC
from cxrfast.shards.building.layout import assign_rows
from cxrfast.shards.sources.read import read_source

HEADER = (
    "Path,Sex,Age,Frontal/Lateral,AP/PA,No Finding,Enlarged Cardiomediastinum,Cardiomegaly,Lung Opacity,Lung Lesion,Edema,"
    "Consolidation,Pneumonia,Atelectasis,Pneumothorax,Pleural Effusion,Pleural Other,Fracture,Support Devices"
)
PART = {"train": "train", "valid": "validate", "test": "test"}


def chexpert_rows(part: str, dataset: str) -> list[str]:
    """Lines of a table: three patients of one or two studies, values that tell lines and labels apart."""
    first = {"train": 1, "valid": 64541, "test": 64741}[part]
    lines = []
    for patient in (first, first + 1, first + 30000):
        for study in range(1, 2 + patient % 2):
            for view, position in (
                ("view1_frontal", "Frontal,AP"),
                ("view2_frontal", "Frontal,PA"),
                ("view3_lateral", "Lateral,"),
            ):
                n = len(lines)
                values = [("1.0", "0.0", "-1.0", "")[(n + k) % 4] for k in range(14)]
                path = f"{dataset}/{part}/patient{patient:05}/study{study}/{view}.jpg"
                lines.append(",".join([path, "Female", "60", position, *values]))
    return lines


def write_chexpert(tables: Path, folders: dict[str, Path], dataset: str, packed: bool = False) -> None:
    """train.csv and valid.csv into `tables`, an image for each line into the folder that `folders` has for its patient."""
    tables.mkdir(parents=True, exist_ok=True)
    for part in ("train", "valid"):
        lines = chexpert_rows(part, dataset)
        data = "\n".join([HEADER, *lines, ""]).encode()
        (tables / f"{part}.csv{'.gz' if packed else ''}").write_bytes(gzip.compress(data) if packed else data)
        for line in lines:
            patient, study, view = line.split(",")[0].split("/")[-3:]
            image = folders.get(patient, folders[part]) / patient / study / view
            image.parent.mkdir(parents=True, exist_ok=True)
            image.write_bytes(b"an image")


@pytest.fixture
def small(tmp_path: Path) -> Path:
    root = tmp_path / "data" / "CheXpert-v1.0-small"
    write_chexpert(root, {part: root / part for part in PART}, "CheXpert-v1.0-small")
    return root


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dataset", ["CheXpert-v1.0-small", "CheXpert-v1.0", "renamed"])
def test_chexpert_is_found_in_its_folder_and_in_the_folder_above(tmp_path, dataset, packed):
    root = tmp_path / "data" / dataset
    published = dataset.replace("renamed", "CheXpert-v1.0")
    write_chexpert(root, {part: root / part for part in PART}, published, packed)
    for place in [root] if dataset == "renamed" else [root, root.parent]:
        images = read_source("chexpert", place).images
        assert len(images) == len(chexpert_rows("train", "") + chexpert_rows("valid", ""))
        assert all((place / path).is_file() for path in images["path"])


def test_chexpert_s_batches_are_searched_for_the_patients(tmp_path):
    batch = {
        n: tmp_path / f"CheXpert-v1.0 batch {n} ({what})"
        for n, what in ((1, "validate & csv"), (2, "train 1"), (4, "train 3"))
    }
    folders = {"train": batch[2], "valid": batch[1] / "valid", "patient30001": batch[4]}
    write_chexpert(batch[1], folders, "CheXpert-v1.0")
    images = read_source("chexpert", tmp_path).images
    assert all((tmp_path / path).is_file() for path in images["path"])
    assert images["path"].str.split("/").str[0].nunique() == 3
    shutil.rmtree(batch[4])
    missing = read_source("chexpert", tmp_path).images["path"].map(lambda path: not (tmp_path / path).is_file())
    assert missing.sum() == images["patient_id"].eq("patient30001").sum() > 0, (
        "still listed: the build counts them as missing"
    )


def test_chexpert_s_ids_views_splits_and_labels_are_those_of_the_tables(small):
    source = read_source("chexpert", small)
    assert source.labels == MIMIC, "a model trained on MIMIC can be tried here"
    images = source.images.set_index("image_id")
    for part in ("train", "valid"):
        table = pd.read_csv(small / f"{part}.csv")
        for row in table.to_dict("records"):
            _, _, patient, study, file = row["Path"].split("/")
            image = images.loc[f"{patient}/{study}/{file.removesuffix('.jpg')}"]
            assert (image["patient_id"], image["study_id"]) == (patient, f"{patient}/{study}")
            assert image["split"] == PART[part]
            assert image["view"] == (row["AP/PA"] if row["Frontal/Lateral"] == "Frontal" else "LATERAL")
            np.testing.assert_array_equal(image[list(MIMIC)].to_numpy(float), [row[label] for label in MIMIC])
    assert len(images) == sum(len(pd.read_csv(small / f"{part}.csv")) for part in ("train", "valid"))
    assert images[["height", "width"]].isna().all(axis=None)


def test_chexpert_s_test_table_has_no_views_but_those_in_the_names(small):
    """Its paths begin with test/, without the data set's name."""
    columns = [c for c in HEADER.split(",") if c not in ("Sex", "Age", "Frontal/Lateral", "AP/PA")]
    table = pd.read_csv(io.StringIO("\n".join([HEADER, *chexpert_rows("test", "x")])))
    table["Path"] = table["Path"].str.removeprefix("x/")
    table[columns].fillna(0).to_csv(small / "test_labels.csv", index=False)
    (small / "test.csv").write_text("Path\nnot this one\n")
    images = read_source("chexpert", small).images
    tested = images[images["split"] == "test"]
    assert len(tested) == len(table)
    assert tested["path"].tolist() == table["Path"].tolist()
    assert set(tested["view"][tested["path"].str.contains("lateral")]) == {"LATERAL"}
    assert tested["view"][tested["path"].str.contains("frontal")].isna().all()
    assign_rows(images, MIMIC, 0)
    for gone in ("train.csv", "valid.csv"):
        (small / gone).unlink()
    pd.testing.assert_frame_equal(
        read_source("chexpert", small).images, tested.reset_index(drop=True), check_dtype=False
    )


def test_two_chexperts_in_one_folder_are_refused_unless_the_tables_lie_in_it_and_so_is_none(small):
    (small.parent / "none").mkdir()
    (small.parent / "none" / "labels.csv").write_text("Path\n")
    with pytest.raises(
        ShardError, match=r"none of train.csv, valid.csv, .*its tables: labels.csv.*give --data the folder"
    ):
        read_source("chexpert", small.parent / "none")
    other = small.parent / "CheXpert-v1.0"
    write_chexpert(other, {part: other / part for part in PART}, "CheXpert-v1.0")
    with pytest.raises(ShardError, match=r"has CheXpert-v1.0/train.csv and CheXpert-v1.0-small/train.csv: give --data"):
        read_source("chexpert", small.parent)
    write_chexpert(small.parent, {part: small.parent / part for part in PART}, "CheXpert-v1.0")
    assert set(read_source("chexpert", small.parent).images["path"].str.split("/").str[0]) == {"train", "valid"}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("patient00002", "person2", r"train.csv lists CheXpert-v1.0-small/train/person2/.* in line \d+, which is not"),
        (
            "Edema",
            "Oedema",
            r"train.csv lacks the columns Edema: did you mean 'Oedema'\? is it the train table of CheXpert\?",
        ),
        ("Frontal,AP,1.0", "Frontal,AP,1.5", r"train.csv holds '1.5' for No Finding in line \d+"),
        ("view2_frontal", "view1_frontal", "twice"),
    ],
)
def test_a_chexpert_table_that_is_wrong_is_named_with_its_line(small, old, new, message):
    text = (small / "train.csv").read_text()
    assert old in text
    (small / "train.csv").write_text(text.replace(old, new, 1))
    with pytest.raises(ShardError, match=message):
        read_source("chexpert", small)


@pytest.mark.slow
def test_all_of_chexpert_is_listed_as_plain_pandas_counts_it(tmp_path):
    published = REAL / "tables" / "chexpert_train.csv.gz"
    if not published.exists():
        pytest.skip("the real tables are not here")
    (tmp_path / "train.csv.gz").symlink_to(published)
    source = read_source("chexpert", tmp_path)
    images, table = source.images, pd.read_csv(published)
    parts = table["Path"].str.split("/")
    assert len(images) == len(table) == 223_414
    assert images["patient_id"].nunique() == parts.str[2].nunique()
    assert images["study_id"].nunique() == (parts.str[2] + parts.str[3]).nunique()
    for label in MIMIC:
        for value in (1.0, 0.0, -1.0):
            assert images[label].eq(value).sum() == table[label].eq(value).sum()
        assert images[label].isna().sum() == table[label].isna().sum()
    expected = table["AP/PA"].value_counts().to_dict() | {"LATERAL": table["Frontal/Lateral"].eq("Lateral").sum()}
    assert images["view"].value_counts().to_dict() == expected
    assert (images["path"] == table["Path"].str.removeprefix("CheXpert-v1.0-small/")).all()
    assert source.counts["images whose labels are all blank"] == table[list(MIMIC)].isna().all(axis=1).sum()


def test_columns_of_the_tables_can_be_kept_and_are_blank_where_a_table_lacks_them(small):
    text = (small / "valid.csv").read_text().splitlines()
    header = text[0].split(",")
    without = [",".join(v for n, v in zip(header, line.split(","), strict=True) if n != "Sex") for line in text]
    (small / "valid.csv").write_text("\n".join(without) + "\n")
    source = read_source("chexpert", small, {"keep": ["Age", "Sex", "AP/PA"]})
    frame = source.images
    assert frame["kept/Age"].eq(60).all()
    assert frame.loc[frame["split"] == "train", "kept/Sex"].eq("Female").all()
    assert frame.loc[frame["split"] == "validate", "kept/Sex"].isna().all()
    assert set(frame["kept/AP/PA"].dropna()) == {"AP", "PA"}
    with pytest.raises(ShardError, match=r"no table of CheXpert in .* has the column Weight"):
        read_source("chexpert", small, {"keep": ["Weight"]})
    with pytest.raises(ShardError, match="--keep Edema: this column is a label already"):
        read_source("chexpert", small, {"keep": ["Edema"]})
