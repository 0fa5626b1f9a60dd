import gzip
import io
import re
import shutil
import tarfile
import uuid
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from conftest import REAL

from cxrfast.cli.main import cli
from cxrfast.errors import ShardError
from cxrfast.labels import MIMIC
from cxrfast.shards.build import build
from cxrfast.shards.building.layout import assign_rows
from cxrfast.shards.format.manifest import read_manifest
from cxrfast.shards.format.rows import REFERENCE, read_rows, reference_names, write_rows
from cxrfast.shards.images.decode import encode
from cxrfast.shards.sources.nih import NIH
from cxrfast.shards.sources.read import read_source
from cxrfast.shards.storage import Tree


def name(kind: str, packed: bool = True) -> str:
    return f"mimic-cxr-2.0.0-{kind}.csv" + (".gz" if packed else "")


def change(tree: Path, kind: str, edit) -> None:
    """Apply `edit` to the lines of one packed table."""
    path = tree / name(kind)
    lines = gzip.decompress(path.read_bytes()).decode().splitlines()
    path.write_bytes(gzip.compress("".join(f"{line}\n" for line in edit(lines)).encode()))


@pytest.fixture
def tree(phantoms: Path, tmp_path: Path) -> Path:
    """The tables of the phantoms, which can be spoiled, without images."""
    (tmp_path / "mimic" / "files").mkdir(parents=True)
    for path in phantoms.glob("*.csv.gz"):
        shutil.copy(path, tmp_path / "mimic")
    return tmp_path / "mimic"


def test_every_published_image_is_listed_with_the_path_it_has(phantoms):
    source = read_source("mimic", phantoms)
    published = (phantoms / "IMAGE_FILENAMES").read_text().split()
    assert sorted(source.images["path"]) == sorted(published)
    assert all((phantoms / path).is_file() for path in source.images["path"])
    for row in source.images.to_dict("records"):
        _, _, patient, study, file = Path(row["path"]).parts
        assert (patient, study, file) == (f"p{row['patient_id']}", f"s{row['study_id']}", f"{row['image_id']}.jpg")


def test_labels_views_sizes_and_splits_are_those_of_the_tables(phantoms):
    images = read_source("mimic", phantoms).images.set_index("image_id")
    labels = pd.read_csv(phantoms / name("chexpert")).set_index("study_id")
    metadata = pd.read_csv(phantoms / name("metadata")).set_index("dicom_id").loc[images.index]
    split = pd.read_csv(phantoms / name("split")).set_index("dicom_id").loc[images.index]
    assert images["view"].tolist() == metadata["ViewPosition"].tolist()
    assert images["height"].tolist() == metadata["Rows"].tolist()
    assert images["width"].tolist() == metadata["Columns"].tolist()
    assert images["split"].tolist() == split["split"].tolist()
    expected = labels.reindex(metadata["study_id"])[list(MIMIC)]
    pd.testing.assert_frame_equal(
        images[list(MIMIC)].reset_index(drop=True), expected.reset_index(drop=True), check_dtype=False
    )
    assert images[list(MIMIC)].isna().all(axis=1).any(), "studies without labels stay, blank"


def test_studies_without_labels_and_blank_ones_are_counted(phantoms):
    counts = read_source("mimic", phantoms).counts
    labels = pd.read_csv(phantoms / name("chexpert"))
    studies = set(pd.read_csv(phantoms / name("metadata"))["study_id"])
    assert counts["studies without a label row"] == len(studies - set(labels["study_id"])) > 0
    assert counts["label rows that are all blank"] == labels[list(MIMIC)].isna().all(axis=1).sum() > 0


def test_unpacked_tables_and_those_of_a_later_release_read_the_same(tree):
    before = read_source("mimic", tree)
    for path in list(tree.glob("*.csv.gz")):
        path.with_name(path.name.removesuffix(".gz").replace("2.0.0", "2.1.0")).write_bytes(
            gzip.decompress(path.read_bytes())
        )
        path.unlink()
    after = read_source("mimic", tree)
    pd.testing.assert_frame_equal(before.images, after.images)
    assert (before.labels, before.counts) == (after.labels, after.counts)


def test_a_folder_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(
        ShardError, match=r"absent does not exist, or is no folder: give --data DIR or set CXRFAST_DATA"
    ):
        read_source("mimic", tmp_path / "absent")


def test_a_tree_without_images_is_refused(tree):
    (tree / "files").rmdir()
    with pytest.raises(ShardError, match="has no folder files/"):
        read_source("mimic", tree)


@pytest.mark.parametrize("kind", ["chexpert", "metadata", "split"])
def test_a_table_that_is_missing_or_renamed_is_named_beside_those_that_are_there(tree, kind):
    (tree / name(kind)).rename(tree / f"{kind}.csv.gz")
    with pytest.raises(
        ShardError, match=rf"no mimic-cxr-2.0.0-{kind}.csv or .csv.gz in .*its tables: .*\b{kind}.csv.gz"
    ):
        read_source("mimic", tree)


@pytest.mark.parametrize(("kind", "column"), [("chexpert", "Edema"), ("metadata", "subject_id"), ("split", "split")])
def test_a_column_that_is_missing_is_named(tree, kind, column):
    change(tree, kind, lambda lines: [lines[0].replace(column, "other"), *lines[1:]])
    with pytest.raises(ShardError, match=rf"{name(kind)} lacks the columns {column}: is it the {kind} table"):
        read_source("mimic", tree)


@pytest.mark.parametrize("kind", ["chexpert", "metadata", "split"])
def test_an_entry_that_is_listed_twice_is_refused(tree, kind):
    change(tree, kind, lambda lines: [*lines, lines[5]])
    with pytest.raises(ShardError, match="twice"):
        read_source("mimic", tree)


@pytest.mark.parametrize("kind", ["chexpert", "metadata", "split"])
@pytest.mark.parametrize("keep", [0, 5, 0.5])
def test_a_packed_table_cut_short_is_named(tree, kind, keep):
    data = (tree / name(kind)).read_bytes()
    (tree / name(kind)).write_bytes(data[: keep if isinstance(keep, int) else int(keep * len(data))])
    with pytest.raises(ShardError, match=rf"{name(kind)} cannot be read as a CSV table"):
        read_source("mimic", tree)


def test_tables_that_list_nothing_are_refused(tree):
    change(tree, "metadata", lambda lines: lines[:1])
    with pytest.raises(ShardError, match="list no images"):
        read_source("mimic", tree)


def test_an_image_without_official_split_stays_without_one(tree):
    gone = []
    change(tree, "split", lambda lines: gone.append(lines.pop(7)) or lines)
    images = read_source("mimic", tree).images.set_index("image_id")
    assert images["split"].isna().sum() == 1
    assert pd.isna(images.loc[gone[0].split(",")[0], "split"])


# MIMIC-CXR-JPG: labellers, versions, the radiologist


def test_the_labels_are_chexpert_s_or_on_request_negbio_s(tree):
    change(tree, "negbio", lambda lines: [lines[0], *(re.sub(r",1\.0", ",-1.0", line) for line in lines[1:])])
    chexpert, negbio = (read_source("mimic", tree, options) for options in (None, {"labels": "negbio"}))
    pd.testing.assert_frame_equal(chexpert.images, read_source("mimic", tree, {"labels": "chexpert"}).images)
    positive = chexpert.images[list(MIMIC)].eq(1).to_numpy()
    assert positive.any()
    assert (negbio.images[list(MIMIC)].to_numpy()[positive] == -1).all()
    np.testing.assert_array_equal(
        negbio.images[list(MIMIC)].to_numpy()[~positive], chexpert.images[list(MIMIC)].to_numpy()[~positive]
    )
    (tree / name("negbio")).unlink()
    read_source("mimic", tree)
    with pytest.raises(ShardError, match=r"no mimic-cxr-2.0.0-negbio.csv"):
        read_source("mimic", tree, {"labels": "negbio"})
    with pytest.raises(ShardError, match="--labels 'radgraph' is unknown: use chexpert or negbio"):
        read_source("mimic", tree, {"labels": "radgraph"})


def test_of_several_copies_of_a_table_the_latest_is_read_and_unpacked_rather_than_packed(tree):
    lines = gzip.decompress((tree / name("metadata")).read_bytes()).decode().splitlines()
    column = lines[0].split(",").index("ViewPosition")

    def write(file: str) -> None:
        """The table, saying in every line which file it is."""
        rows = [lines[0], *(",".join([*(f := line.split(","))[:column], file, *f[column + 1 :]]) for line in lines[1:])]
        data = ("\n".join(rows) + "\n").encode()
        (tree / file).write_bytes(gzip.compress(data) if file.endswith(".gz") else data)

    for better in (
        "2.0.0-metadata.csv.gz",
        "2.0.0-metadata.csv",
        "2.1.0-metadata.csv.gz",
        "2.1.0-metadata.csv",
        "2.10.0-metadata.csv.gz",
    ):
        write(f"mimic-cxr-{better}")
        assert set(read_source("mimic", tree).images["view"]) == {f"mimic-cxr-{better}"}


RADIOLOGIST = (
    "study_id,No Finding,Enlarged Cardiomediastinum,Cardiomegaly,Lung Lesion,Airspace Opacity,Edema,Consolidation,Pneumonia,"
    "Atelectasis,Pneumothorax,Pleural Effusion,Pleural Other,Fracture,Support Devices"
)
"""The header of mimic-cxr-2.1.0-test-set-labeled.csv."""


def read_by_radiologist(tree: Path, studies: list[str], packed: bool = False) -> pd.DataFrame:
    """Write the radiologist's table for `studies`, with values of every kind; the values by study."""
    rng = np.random.default_rng(0)
    values = rng.choice([1.0, 0.0, -1.0, np.nan], (len(studies), 14))
    table = pd.DataFrame(values, index=pd.Index(studies, name="study_id"), columns=RADIOLOGIST.split(",")[1:])
    table.to_csv(tree / ("mimic-cxr-2.1.0-test-set-labeled.csv" + (".gz" if packed else "")))
    return table


@pytest.mark.parametrize("packed", [False, True])
def test_the_radiologist_s_labels_stand_beside_the_others_for_all_images_of_a_study(tree, packed):
    before = read_source("mimic", tree)
    assert not reference_names(before.images)
    studies = before.images["study_id"].drop_duplicates().sample(20, random_state=0).tolist()
    several = before.images["study_id"].value_counts().idxmax()
    studies = list(dict.fromkeys([several, *studies]))
    table = read_by_radiologist(tree, [*studies, "59999998", "59999999"], packed)
    source = read_source("mimic", tree)
    assert source.labels == MIMIC
    assert reference_names(source.images) == tuple(REFERENCE + label for label in MIMIC)
    pd.testing.assert_frame_equal(source.images[before.images.columns], before.images)
    for row in source.images.to_dict("records"):
        for label in MIMIC:
            there = "Airspace Opacity" if label == "Lung Opacity" else label
            expected = table[there].get(row["study_id"], np.nan)
            np.testing.assert_equal(row[REFERENCE + label], np.float32(expected))
    assert source.images["study_id"].eq(several).sum() > 1
    assert source.counts["studies read by a radiologist"] == len(studies)
    assert source.counts["studies read by a radiologist, without an image"] == 2


def test_the_radiologist_s_labels_reach_the_rows_table(tree, tmp_path):
    read_by_radiologist(tree, read_source("mimic", tree).images["study_id"].unique()[:30].tolist())
    source = read_source("mimic", tree)
    rows = assign_rows(source.images, source.labels, 0)
    rows["bytes"] = 1
    write_rows(tmp_path / "rows.parquet", rows)
    back = read_rows(tmp_path / "rows.parquet").set_index("image_id")
    expected = source.images.set_index("image_id").loc[back.index, list(reference_names(source.images))]
    assert expected.notna().any(axis=None)
    pd.testing.assert_frame_equal(back[list(reference_names(back))], expected)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("study_id,Edema\n5,1\n5,0\n", "lists 1 entries twice"),
        ("study_id,Edema\n5,1\n6,maybe\n", r"holds 'maybe' for Edema in line 3"),
        ("study_id,Edema\n5,1\n,1\n", "study_id is blank in line 3"),
        ("study_id,reader\n5,1\n", "has no column of a label"),
        ("study,Edema\n5,1\n", "lacks the columns study_id"),
        ("", "cannot be read as a CSV table"),
    ],
)
def test_a_radiologist_s_table_that_is_wrong_is_named(tree, text, message):
    (tree / "mimic-cxr-2.1.0-test-set-labeled.csv").write_text(text)
    with pytest.raises(ShardError, match=rf"test-set-labeled.csv.*{message}"):
        read_source("mimic", tree)


def test_a_view_that_is_blank_is_unknown(tree):
    gone = []

    def blank(lines: list[str]) -> list[str]:
        column = lines[0].split(",").index("ViewPosition")
        fields = lines[3].split(",")
        gone.append(fields[0])
        return [*lines[:3], ",".join([*fields[:column], "", *fields[column + 1 :]]), *lines[4:]]

    change(tree, "metadata", blank)
    views = read_source("mimic", tree).images.set_index("image_id")["view"]
    assert views.isna().sum() == 1
    assert pd.isna(views[gone[0]])


def test_a_tree_in_an_archive_reads_as_the_folder_does(phantoms, tmp_path):
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        for path in [*phantoms.glob("*.csv.gz"), next(phantoms.glob("files/*/*/*/*.jpg"))]:
            archive.write(path, f"mimic/{path.relative_to(phantoms)}")
    packed = read_source("mimic", f"zip://mimic::{tmp_path / 'all.zip'}")
    folder = read_source("mimic", Tree(phantoms))
    pd.testing.assert_frame_equal(packed.images, folder.images)
    assert packed.counts == folder.counts


# CheXpert

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


def test_two_chexperts_in_one_folder_are_refused_unless_the_tables_lie_in_it(small):
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
        ("Edema", "Oedema", r"train.csv lacks the columns Edema: is it the train table of CheXpert\?"),
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


def test_a_folder_without_chexpert_tables_is_refused(tmp_path):
    (tmp_path / "labels.csv").write_text("Path\n")
    with pytest.raises(
        ShardError, match=r"none of train.csv, valid.csv, .*its tables: labels.csv.*give --data the folder"
    ):
        read_source("chexpert", tmp_path)


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


# NIH ChestX-ray14

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
        assert (image["patient_id"], image["study_id"], image["view"]) == (
            fields[2],
            f"{fields[2]}_{fields[1]}",
            fields[5],
        )
        assert (image["width"], image["height"]) == (int(fields[6]), int(fields[7]))
    assert images["split"].isna().all()
    assert source.counts == {}


def test_the_newer_nih_table_is_read_where_both_are(tmp_path):
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
    assert read_source("nih", tmp_path).images["path"].tolist() == [
        f"{p}/{n}" for p, n in zip(places, NIH_ROWS, strict=True)
    ]
    (tmp_path / places[-1] / "00030805_000.png").unlink()
    assert read_source("nih", tmp_path).images["path"].iloc[-1] == "images/00030805_000.png"
    for flat in ("images", "."):
        other = write_nih(tmp_path / f"flat {flat}")
        (other / flat).mkdir(exist_ok=True)
        for name_ in NIH_ROWS:
            (other / flat / name_).write_bytes(b"an image")
        assert all((other / path).is_file() for path in read_source("nih", other).images["path"])


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_nih_s_lists_are_its_official_split(tmp_path, newline):
    write_nih(tmp_path)
    first, second, third, fourth = NIH_ROWS
    (tmp_path / "train_val_list.txt").write_bytes((first + newline + second).encode())
    (tmp_path / "test_list.txt").write_bytes(newline.join([fourth, "00099999_000.png", ""]).encode())
    source = read_source("nih", tmp_path)
    split = dict(zip(source.images["image_id"] + ".png", source.images["split"], strict=True))
    assert {first: "train", second: "train", fourth: "test"}.items() <= split.items()
    assert pd.isna(split[third])
    assert source.counts == {"images in no list of the split": 1, "listed images that the table lacks": 1}
    (tmp_path / "train_val_list.txt").write_text(f"{first} {fourth}")
    with pytest.raises(ShardError, match=rf"1 images \(first: {fourth}\) are in both lists"):
        read_source("nih", tmp_path)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("|Nodule", "|Nodules", r"names the finding 'Nodules' in line 5: known are Atelectasis"),
        ("|Nodule", "|", r"names the finding '' in line 5"),
        ("No Finding", "", r"Finding Labels is blank in line 4"),
        (",0,2,80", ",0,,80", r"Patient ID is blank in line 4"),
        ("00000002_000", "00000001_000", "list image 00000001_000 twice"),
        ("2682,2749", "2682,tall", r"holds 'tall' for Height\] in line 2"),
        ("Finding Labels", "Findings", r"lacks the columns Finding Labels: is it the table of NIH"),
        ("No Finding,0", "No Finding,really,0", r"cannot be read as a CSV table \(.*line 4"),
    ],
)
def test_an_nih_table_that_is_wrong_is_named_with_its_line(tmp_path, old, new, message):
    path = write_nih(tmp_path) / "Data_Entry_2017_v2020.csv"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(ShardError, match=message):
        read_source("nih", tmp_path)


def test_a_folder_without_an_nih_table_is_refused(tmp_path):
    with pytest.raises(ShardError, match=r"no Data_Entry_2017_v2020.csv or Data_Entry_2017.csv .*its tables: none"):
        read_source("nih", tmp_path)


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


# Any of them


def test_a_tree_may_be_given_as_text_path_or_tree(phantoms):
    frames = [
        read_source("mimic", tree).images for tree in (str(phantoms), phantoms, Tree(phantoms), f"file://{phantoms}")
    ]
    for frame in frames[1:]:
        pd.testing.assert_frame_equal(frame, frames[0])


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("padchest", {}, r"source 'padchest' is unknown: use mimic, chexpert, nih, table or package.module:function"),
        ("nih", {"labels": "negbio"}, r"--labels is no option of source nih \(its options: none\)"),
        ("chexpert", {"table": "t.csv"}, r"--table is no option of source chexpert"),
        ("mimic", {"label": ["a"]}, r"--label is no option of source mimic \(its options: --labels\)"),
        ("mimic", {"view_column": "v"}, r"--view-column is no option of source mimic"),
        ("table", {}, r"source table needs --table and --label"),
        ("table", {"table": "t.csv"}, r"source table needs --label"),
        ("table", {"tree": "x", "table": "t.csv", "label": ["a"]}, r"--tree is no option of source table"),
    ],
)
def test_a_source_or_an_option_that_does_not_exist_is_named(phantoms, source, options, message):
    with pytest.raises(ShardError, match=message):
        read_source(source, phantoms, options)


def test_the_command_line_passes_the_options_that_were_given_to_the_source(phantoms, tmp_path):
    def run(*arguments: str) -> tuple[int, str]:
        places = ["--data", str(phantoms), "--out", str(tmp_path / "set"), "--scale", "32", "--dry-run"]
        done = CliRunner().invoke(cli, ["shard", *places, *arguments])
        return done.exit_code, done.output

    assert run("--source", "nih", "--labels", "negbio")[0] == 2
    assert "--labels is no option of source nih" in run("--source", "nih", "--labels", "negbio")[1]
    assert "--split-column is no option of source mimic" in run("--split-column", "split")[1]
    assert "source 'x' is unknown" in run("--source", "x")[1]
    assert "source table needs --table and --label" in run("--source", "table")[1]
    code, output = run("--labels", "negbio")
    assert code == 0, output
    assert "150 images" in output


# Functions of others


def module(folder: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module of a name that no other test has used; its name."""
    called = f"source_{uuid.uuid4().hex}"
    (folder / f"{called}.py").write_text(text)
    monkeypatch.syspath_prepend(folder)
    return called


GOOD = """
import pandas as pd
from cxrfast.shards.sources import Source
def images(n=3):
    ids = [f"i{i}" for i in range(n)]
    return pd.DataFrame({"image_id": ids, "study_id": ids, "patient_id": "0007", "path": [f"{i}.png" for i in ids], "Mass": 1.0})
def good(tree, n: int = 3):
    return Source(images=images(n), labels=("Mass",), counts={})
def bad(tree):
    return Source(images=images().assign(Mass=2.0), labels=("Mass",), counts={})
def raises(tree):
    return images()["Masses"]
def wrong(tree):
    return images()
def refuses(tree):
    from cxrfast.errors import ShardError
    raise ShardError("no such clinic")
number = 3
"""


def test_a_function_of_one_s_own_is_a_source(tmp_path, monkeypatch):
    own = module(tmp_path, GOOD, monkeypatch)
    source = read_source(f"{own}:good", tmp_path, {"n": 5})
    assert len(source.images) == 5
    assert source.images["patient_id"].tolist() == ["0007"] * 5
    assert source.images["Mass"].dtype == np.float32
    assert source.images[["view", "split", "height", "width"]].isna().all(axis=None), "what it does not say is unknown"
    assign_rows(source.images, source.labels, 0)


@pytest.mark.parametrize(
    ("function", "options", "message"),
    [
        ("{own}:bad", {}, r"hold 2\.0 for Mass: only 1, 0, -1 and blank"),
        ("{own}:raises", {}, r"failed at .*{own}.py:12: KeyError: 'Masses'"),
        ("{own}:wrong", {}, r"returned DataFrame: it must return a cxrfast.shards.sources.Source"),
        ("{own}:refuses", {}, r"^no such clinic$"),
        ("{own}:number", {}, r"is no function but int"),
        ("{own}:absent", {}, r"cannot be imported \(AttributeError"),
        ("{own}.more:good", {}, r"cannot be imported \(ModuleNotFoundError.*name its folder in PYTHONPATH"),
        ("no_such_package:good", {}, r"cannot be imported \(ModuleNotFoundError: No module named 'no_such_package'\)"),
        ("{own} :good", {}, r"cannot be imported \(ValueError"),
        ("{own}:good", {"m": 1}, r"--m is no option of source {own}:good \(its options: --n\)"),
    ],
)
def test_a_function_that_fails_is_a_message_that_says_where(tmp_path, monkeypatch, function, options, message):
    own = module(tmp_path, GOOD, monkeypatch)
    with pytest.raises(ShardError, match=message.format(own=own)):
        read_source(function.format(own=own), tmp_path, options)


def test_a_module_with_a_mistake_is_a_message(tmp_path, monkeypatch):
    own = module(tmp_path, "def good(tree:\n", monkeypatch)
    with pytest.raises(ShardError, match=r"cannot be imported \(SyntaxError"):
        read_source(f"{own}:good", tmp_path)


@pytest.mark.parametrize("real", [False, True])
def test_the_example_of_the_docs_works(tmp_path, monkeypatch, real):
    """On real radiographs in the layout that it describes, and on phantoms where those are not at hand."""
    text = (Path(__file__).parents[3] / "docs" / "sources.md").read_text()
    (example,) = re.findall(r"```python\n# clinic.py\n(.*?)```", text, re.DOTALL)
    own = module(tmp_path, example, monkeypatch)
    data = tmp_path / "data"
    (data / "images").mkdir(parents=True)
    if real:
        if not (REAL / "hires.csv").exists():
            pytest.skip("the real radiographs are not here")
        table = pd.read_csv(REAL / "hires.csv", dtype=str)
        with tarfile.open(REAL / "hires.tar") as archive:
            archive.extractall(data / "images", filter="data")
    else:
        findings = ["COVID-19", "No finding", "inconclusive"] * 4
        table = pd.DataFrame(
            {"file": [f"{i}.jpg" for i in range(12)], "patient_id": "001", "finding": findings, "view": "AP"}
        )
        for file in table["file"]:
            (data / "images" / file).write_bytes(encode(np.full((32, 32), 90, np.uint8), 95))
    table.to_csv(data / "2024.csv", index=False)
    build(
        data,
        tmp_path / "set",
        [32],
        source=f"{own}:clinic",
        source_options={"readings": "2024.csv"},
        workers=1,
        quiet=True,
    )
    rows = read_rows(tmp_path / "set" / "rows.parquet").set_index("image_id")
    assert len(rows) == len(table)
    for line in table.to_dict("records"):
        row = rows.loc[line["file"].removesuffix(".jpg")]
        assert (row["patient_id"], row["view"], row["path"]) == (
            line["patient_id"],
            line["view"],
            f"images/{line['file']}",
        )
        assert row["Pneumonia"] == {"COVID-19": 1, "No finding": 0, "inconclusive": -1}[line["finding"]]
        assert row["No Finding"] == (line["finding"] == "No finding")
    assert not read_manifest(tmp_path / "set", 32, 0).quarantined
