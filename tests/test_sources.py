import gzip
import shutil
from pathlib import Path

import pandas as pd
import pytest

from cxrfast.errors import ShardError
from cxrfast.labels import MIMIC
from cxrfast.shards.sources import read_source


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
    with pytest.raises(ShardError, match=r"absent does not exist: give --data DIR or set CXRFAST_DATA"):
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
