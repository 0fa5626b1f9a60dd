"""The tree is that of MIMIC-CXR-JPG, with true labels, and the same bytes every time."""

import gzip
import hashlib
import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st

from cxrfast.errors import RunError
from cxrfast.labels import MIMIC
from cxrfast.phantoms import dataset as module
from cxrfast.phantoms.cohort import Image, make_cohort
from cxrfast.phantoms.dataset import synth, tables
from cxrfast.phantoms.findings import FINDINGS

COLUMNS = """
dicom_id subject_id study_id PerformedProcedureStepDescription ViewPosition Rows Columns StudyDate StudyTime
ProcedureCodeSequence_CodeMeaning ViewCodeSequence_CodeMeaning PatientOrientationCodeSequence_CodeMeaning
"""
"""Of mimic-cxr-2.0.0-metadata.csv."""


def contents(tree: Path) -> dict[str, bytes]:
    return {str(path.relative_to(tree)): path.read_bytes() for path in tree.rglob("*") if path.is_file()}


def table(tree: Path, name: str) -> pd.DataFrame:
    return pd.read_csv(tree / f"mimic-cxr-2.0.0-{name}.csv.gz")


def frame(made: list[Image], name: str, seed: int = 0) -> pd.DataFrame:
    text = "\n".join(",".join(row) for row in tables(made, seed)[name])
    return pd.read_csv(io.StringIO(text), dtype={"StudyTime": str})


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("synth") / "tree"
    counts = synth(out, images=40, size=96, seed=3, corrupt=4, workers=1)
    assert (counts["images"], counts["corrupt"]) == (40, 4)
    assert counts["images"] > counts["studies"] > counts["patients"] > 1
    return out


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_any_number_of_workers_gives_the_same_bytes_and_another_seed_other_images(tree, tmp_path, workers):
    synth(tmp_path / "again", images=40, size=96, seed=3, corrupt=4, workers=workers)
    assert contents(tmp_path / "again") == contents(tree)
    synth(tmp_path / "other", images=4, size=96, seed=4, workers=1)
    assert not set(contents(tmp_path / "other").values()) & set(contents(tree).values())


def test_the_layout_is_that_of_mimic(tree):
    metadata, split = table(tree, "metadata"), table(tree, "split")
    paths = {
        f"files/p{str(row.subject_id)[:2]}/p{row.subject_id}/s{row.study_id}/{row.dicom_id}.jpg"
        for row in metadata.itertuples()
    }
    assert paths == {str(path.relative_to(tree)) for path in tree.rglob("*.jpg")}
    assert sorted(paths) == (tree / "IMAGE_FILENAMES").read_text().splitlines()
    assert list(split.columns) == ["dicom_id", "study_id", "subject_id", "split"]
    assert set(split["split"]) == {"train", "validate", "test"}
    assert (split.groupby("subject_id")["split"].nunique() == 1).all()
    assert sorted(split["dicom_id"]) == sorted(metadata["dicom_id"])
    assert list(metadata.columns) == COLUMNS.split()
    for name in ("chexpert", "negbio"):
        assert list(table(tree, name).columns) == ["subject_id", "study_id", *MIMIC]


def test_checksums_cover_the_files_as_written_and_csvs_carry_no_clock_time(tree):
    lines = [line.split() for line in (tree / "SHA256SUMS.txt").read_text().splitlines()]
    assert len(lines) == 40
    for digest, path in lines:
        assert hashlib.sha256((tree / path).read_bytes()).hexdigest() == digest
    for path in tree.glob("*.csv.gz"):
        assert path.read_bytes()[4:8] == bytes(4)
        gzip.decompress(path.read_bytes())


def test_sizes_and_pixels_agree_with_the_metadata(tree):
    read = 0
    for row in table(tree, "metadata").itertuples():
        path = next(tree.rglob(f"{row.dicom_id}.jpg"))
        try:
            pixels = simplejpeg.decode_jpeg(path.read_bytes(), colorspace="GRAY")
        except ValueError:
            continue
        read += 1
        assert simplejpeg.decode_jpeg_header(path.read_bytes())[2] == "Gray"
        assert pixels.shape == (row.Rows, row.Columns, 1)
        assert max(pixels.shape) == 96
        assert pixels.std() > 30
    assert read >= 36  # a truncated file may still decode, with grey where its end is missing


def test_corrupt_files_are_truncated_empty_and_text_in_turn(tree):
    made = [image for image in make_cohort(40, 96, 3, corrupt=4) if image.damage]
    assert sorted(image.damage for image in made) == ["empty", "not a JPEG", "truncated", "truncated"]
    for image in made:
        data = (tree / image.path).read_bytes()
        whole = module.encode(replace(image, damage=""), 3)
        if image.damage == "truncated":
            assert 0 < len(data) < len(whole)
            assert whole.startswith(data)
        else:
            assert len(data) == 0 if image.damage == "empty" else not data.startswith(b"\xff\xd8")
    clean = make_cohort(40, 96, 3)
    assert [replace(image, damage="") for image in make_cohort(40, 96, 3, corrupt=4)] == clean


def test_a_tree_of_one_image_is_complete(tmp_path):
    counts = synth(tmp_path, images=1, size=64, workers=3)
    assert counts == {"images": 1, "studies": 1, "patients": 1, "corrupt": 0}
    assert len(table(tmp_path, "metadata")) == len(table(tmp_path, "chexpert")) == 1


@given(images=st.integers(1, 300), size=st.integers(64, 4096), seed=st.integers(0, 2**63 - 1))
@settings(max_examples=25)
def test_cohorts_have_the_asked_number_of_different_images(images, size, seed):
    made = make_cohort(images, size, seed, corrupt=images // 3)
    assert len(made) == images == len({image.dicom_id for image in made})
    assert sum(bool(image.damage) for image in made) == images // 3
    assert all(max(image.height, image.width) == size for image in made)
    assert all(10_000_000 <= image.subject_id < 20_000_000 for image in made)
    assert all(50_000_000 <= image.study_id < 60_000_000 for image in made)
    assert len({(image.study_id, image.subject_id) for image in made}) == 1 + made[-1].study


@pytest.fixture(scope="module")
def cohort() -> list[Image]:
    return make_cohort(4000, 1024, 11)


def test_the_quirks_of_the_original_are_there(cohort):
    metadata, labels = frame(cohort, "metadata"), frame(cohort, "chexpert", 11)
    studies = metadata.groupby("study_id")
    assert set(metadata["ViewPosition"]) == {"AP", "PA", "LATERAL"}
    assert 0.07 < (metadata["ViewPosition"] == "LATERAL").mean() < 0.14
    assert studies.size().max() == 3
    assert metadata.groupby("subject_id")["study_id"].nunique().max() == 4
    assert metadata["StudyTime"].str.split(".").str[0].str.len().min() < 6  # leading zeros are lost
    ratio = metadata["Columns"] / metadata["Rows"]
    assert (ratio < 1).mean() > 0.5 > (ratio > 1).mean() > 0.1
    assert len(set(zip(metadata["Rows"], metadata["Columns"], strict=True))) > 30
    missing = set(metadata["study_id"]) - set(labels["study_id"])
    blank = labels[labels[list(MIMIC)].isna().all(axis=1)]
    assert 0.005 < len(missing) / len(studies) < 0.04
    assert 0.005 < len(blank) / len(studies) < 0.04
    values = labels[list(MIMIC)].to_numpy()
    assert np.isnan(values).mean() > 0.6
    assert {-1.0, 0.0, 1.0} == set(values[~np.isnan(values)])


def test_labels_are_true_and_findings_independent(cohort):
    present = {image.study_id: image.present for image in cohort}
    labels = frame(cohort, "chexpert", 11).set_index("study_id")[list(MIMIC)].dropna(how="all")
    for name, finding in FINDINGS.items():
        truth = np.array([name in present[study] for study in labels.index])
        assert 0.25 <= finding.prevalence <= 0.35
        assert abs(truth.mean() - finding.prevalence) < 0.04
        assert ((labels[name] == 1) <= truth).all()
        assert ((labels[name] == 0) <= ~truth).all()
        assert (labels[name][truth].isin([1, -1])).all()
        assert abs((labels[name] == -1).sum() / truth.sum() - finding.uncertain) < 0.02
    nothing = np.array([not present[study] for study in labels.index])
    assert ((labels["No Finding"] == 1) == nothing).all()
    others = labels.drop(columns=[*FINDINGS, "No Finding"])
    assert others.shape[1] == 6
    assert not ((others == 1) | (others == -1)).any(axis=None)
    truth = np.array([[name in found for name in FINDINGS] for found in present.values()])
    assert np.abs(np.corrcoef(truth.T) - np.eye(len(FINDINGS))).max() < 0.08


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"images": 0}, "images is 0"),
        ({"size": 63}, "size is 63"),
        ({"size": 4097}, "size is 4097"),
        ({"corrupt": -1}, "corrupt is -1"),
        ({"corrupt": 6}, "corrupt is 6"),
        ({"seed": -1}, "seed is -1"),
        ({"workers": 0}, "workers is 0"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_written(tmp_path, wrong, message):
    with pytest.raises(RunError, match=message):
        synth(tmp_path / "out", **{"images": 5, "size": 64, **wrong})
    assert not (tmp_path / "out").exists()


def test_a_folder_that_holds_something_is_left_alone_and_a_place_that_cannot_be_written_is_explained(tmp_path):
    (tmp_path / "mine").write_text("kept")
    for out, says in (
        (tmp_path, r"is not empty.*name a new or empty folder"),
        (tmp_path / "mine", "is a file"),
        (tmp_path / "mine" / "out", "choose another folder"),
    ):
        with pytest.raises(RunError, match=says):
            synth(out, images=1, size=64, workers=1)
    assert contents(tmp_path) == {"mine": b"kept"}
