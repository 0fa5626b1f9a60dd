import gzip
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from cxrfast.errors import ShardError
from cxrfast.labels import MIMIC
from cxrfast.shards.format.rows import REFERENCE, reference_names
from cxrfast.shards.sources.read import read_source


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


def test_labels_views_sizes_and_splits_are_those_of_the_tables_and_blank_ones_are_counted(phantoms):
    source = read_source("mimic", phantoms)
    images = source.images.set_index("image_id")
    labels = pd.read_csv(phantoms / name("chexpert")).set_index("study_id")
    metadata = pd.read_csv(phantoms / name("metadata")).set_index("dicom_id").loc[images.index]
    assert source.counts["studies without a label row"] == len(set(metadata["study_id"]) - set(labels.index)) > 0
    assert source.counts["label rows that are all blank"] == labels[list(MIMIC)].isna().all(axis=1).sum() > 0
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


def test_a_folder_that_does_not_exist_and_a_tree_without_images_are_refused(tree):
    (tree / "files").rmdir()
    with pytest.raises(ShardError, match="has no folder files/"):
        read_source("mimic", tree)
    with pytest.raises(
        ShardError, match=r"absent does not exist or is not a folder: give --data DIR or set CXRFAST_DATA"
    ):
        read_source("mimic", tree / "absent")


@pytest.mark.parametrize("kind", ["chexpert", "metadata", "split"])
def test_an_entry_listed_twice_and_a_table_missing_or_renamed_are_refused(tree, kind):
    change(tree, kind, lambda lines: [*lines, lines[5]])
    with pytest.raises(ShardError, match="twice"):
        read_source("mimic", tree)
    (tree / name(kind)).rename(tree / f"{kind}.csv.gz")
    with pytest.raises(
        ShardError, match=rf"no mimic-cxr-2.0.0-{kind}.csv or .csv.gz in .*its tables: .*\b{kind}.csv.gz"
    ):
        read_source("mimic", tree)


# Joins


@pytest.mark.parametrize("form", ["{}.0", "s{}", " {} ", "{}.000"])
@pytest.mark.parametrize("kind", ["chexpert", "metadata"])
def test_studies_are_joined_whatever_a_spreadsheet_made_of_their_numbers(tree, kind, form):
    expected = read_source("mimic", tree).images

    def spoil(lines: list[str]) -> list[str]:
        column = lines[0].split(",").index("study_id")
        fields = [line.split(",") for line in lines]
        return [lines[0], *(",".join([*f[:column], form.format(f[column]), *f[column + 1 :]]) for f in fields[1:])]

    change(tree, kind, spoil)
    pd.testing.assert_frame_equal(read_source("mimic", tree).images, expected)


def test_images_are_joined_with_a_split_of_file_names(tree):
    expected = read_source("mimic", tree).images
    change(tree, "split", lambda lines: [lines[0], *(line.replace(",", ".jpg,", 1) for line in lines[1:])])
    pd.testing.assert_frame_equal(read_source("mimic", tree).images, expected)


@pytest.mark.parametrize(("kind", "what"), [("chexpert", "studies"), ("split", "images")])
@pytest.mark.parametrize("share", [0, 0.5, 0.9])
def test_tables_that_do_not_match_are_refused_with_counts_and_examples_unless_that_is_allowed(tree, kind, what, share):
    strangers: list[str] = []

    def spoil(lines: list[str]) -> list[str]:
        kept = 1 + int(share * (len(lines) - 1))
        key = 1 if kind == "chexpert" else 0
        for n, line in enumerate(lines[kept:]):
            fields = line.split(",")
            fields[key] = f"99{n:06d}"
            strangers.append(",".join(fields))
        return [*lines[:kept], *strangers]

    change(tree, kind, spoil)
    message = rf"\d+ of the \d+ {what} in the metadata table are not in the {kind} table \(such as .*--allow-unmatched"
    with pytest.raises(ShardError, match=message) as error:
        read_source("mimic", tree)
    assert f"{len(strangers)} of the " in str(error.value)
    assert f"{what} in the {kind} table are not in the metadata table (such as 99000000, 99000001, 99000002)" in str(
        error.value
    )
    counts = read_source("mimic", tree, {"allow_unmatched": True}).counts
    assert counts["label rows without an image" if kind == "chexpert" else "images without an official split"] > 0


@pytest.mark.parametrize(
    ("kind", "column", "message"),
    [
        (
            "chexpert",
            "subject_id",
            r"the chexpert table in .* gives study_id \d+ the subject_id 10000000 in line 5, and the metadata \d+",
        ),
        ("split", "subject_id", r"the split table in .* gives dicom_id \S+ the subject_id 10000000 in line 5"),
        ("split", "study_id", r"the split table in .* gives dicom_id \S+ the study_id 10000000 in line 5"),
    ],
)
def test_a_row_that_another_table_gives_to_another_patient_or_study_is_refused(tree, kind, column, message):
    def spoil(lines: list[str]) -> list[str]:
        at, fields = lines[0].split(",").index(column), lines[4].split(",")
        return [*lines[:4], ",".join([*fields[:at], "10000000", *fields[at + 1 :]]), *lines[5:]]

    change(tree, kind, spoil)
    with pytest.raises(ShardError, match=message):
        read_source("mimic", tree)


def test_an_image_without_official_split_or_view_stays_without_one(tree):
    gone = []

    def blank(lines: list[str]) -> list[str]:
        column = lines[0].split(",").index("ViewPosition")
        fields = lines[3].split(",")
        gone.append(fields[0])
        return [*lines[:3], ",".join([*fields[:column], "", *fields[column + 1 :]]), *lines[4:]]

    change(tree, "metadata", blank)
    change(tree, "split", lambda lines: gone.append(lines.pop(7).split(",")[0]) or lines)
    images = read_source("mimic", tree).images.set_index("image_id")
    assert images.index[images["view"].isna()].tolist() == gone[:1]
    assert images.index[images["split"].isna()].tolist() == gone[1:]


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
def test_the_radiologist_s_labels_stand_next_to_the_others_for_all_images_of_a_study(tree, packed):
    before = read_source("mimic", tree)
    assert not reference_names(before.images)
    studies = before.images["study_id"].drop_duplicates().sample(20, random_state=0).tolist()
    several = before.images["study_id"].value_counts().idxmax()
    studies = list(dict.fromkeys([several, *studies]))
    table = read_by_radiologist(tree, [*studies, "59999998", "59999999"], packed)
    message = (
        rf"2 of the {len(table)} studies in the radiologist's table are not in the metadata table \(such as 59999998"
    )
    with pytest.raises(ShardError, match=message):
        read_source("mimic", tree)
    source = read_source("mimic", tree, {"allow_unmatched": True})
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


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("study_id,Edema\n5,1\n5,0\n", "lists 1 entries twice"),
        ("study_id,Edema\n5,1\n6,maybe\n", r"holds 'maybe' for Edema in line 3"),
        ("study_id,Edema\n5,1\n,1\n", "study_id is blank in line 3"),
        ("study_id,reader\n5,1\n", "has no label column"),
        ("study,Edema\n5,1\n", "lacks the columns study_id"),
        ("", "cannot be read as a CSV table"),
    ],
)
def test_a_radiologist_s_table_that_is_wrong_is_named(tree, text, message):
    (tree / "mimic-cxr-2.1.0-test-set-labeled.csv").write_text(text)
    with pytest.raises(ShardError, match=rf"test-set-labeled.csv.*{message}"):
        read_source("mimic", tree)


def test_columns_of_the_metadata_can_be_kept(tree):
    change(tree, "metadata", lambda lines: [f"{lines[0]},Dose", *(f"{line},{n / 4}" for n, line in enumerate(lines[1:]))])  # fmt: skip
    source = read_source("mimic", tree, {"keep": ["ViewPosition", "Dose"]})
    assert source.labels == MIMIC
    assert source.images["kept/ViewPosition"].tolist() == source.images["view"].tolist()
    assert source.images["kept/Dose"].tolist() == [n / 4 for n in range(len(source.images))]
    with pytest.raises(ShardError, match="lacks the columns Age"):
        read_source("mimic", tree, {"keep": ["Age"]})
