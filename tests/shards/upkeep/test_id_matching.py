import shutil
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from damage import contents, copy_set
from hypothesis import given
from hypothesis import strategies as st
from sets import REAL, is_as_planned, other_labels, relabel, rows_of

from cxrfast.cli.main import cli
from cxrfast.errors import ShardError
from cxrfast.labels import MIMIC
from cxrfast.shards.build import build
from cxrfast.shards.format.info import read_set
from cxrfast.shards.format.rows import (
    write_rows,
)
from cxrfast.shards.upkeep.id_matching import match_ids, shared_tail


@pytest.fixture
def copy(tiny_set: Path, tmp_path: Path) -> Path:
    return copy_set(tiny_set, tmp_path / "set")


def set_of_ids(tiny_set: Path, to: Path, study: Callable[[int], str]) -> Path:
    """A copy whose studies have the ids that `study` gives their numbers."""
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


def test_leading_zeros_count_and_are_never_guessed(tiny_set, tmp_path):
    folder = set_of_ids(tiny_set, tmp_path / "set", lambda n: f"{n:04d}")
    n = rows_of(folder)["study_id"].nunique()
    pd.DataFrame({"study_id": [f"{i:04d}" for i in range(n)], "ill": 1}).to_csv(tmp_path / "text.csv", index=False)
    assert relabel(folder, tmp_path / "text.csv").matched == 150
    before = contents(folder)
    pd.DataFrame({"study_id": range(n), "ill": 0}).to_parquet(tmp_path / "numbers.parquet")
    with pytest.raises(ShardError, match=r"only in leading zeros \(0 is 0000 there\): write them as text"):
        relabel(folder, tmp_path / "numbers.parquet")
    assert contents(folder) == before


def test_ids_that_end_in_a_point_and_zero_in_the_set_itself_are_matched_as_they_are(tiny_set, tmp_path):
    folder = set_of_ids(tiny_set, tmp_path / "set", lambda n: f"1.{n}")
    n = rows_of(folder)["study_id"].nunique()
    table = pd.DataFrame({"study_id": [f"1.{i}" for i in range(n)], "ill": 1})
    table.to_csv(tmp_path / "t.csv", index=False)
    assert relabel(folder, tmp_path / "t.csv").matched == 150


# Files and paths


def write_image(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (24, 24), np.uint8)
    path.write_bytes(cv2.imencode(path.suffix, pixels)[1].tobytes())


NIH_NAMES = [f"{patient:08d}_{visit:03d}.png" for patient in (1, 2, 27426, 30805) for visit in range(2)]


NIH_HEAD = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
    "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]"
)


@pytest.fixture(scope="module")
def nih_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ChestX-ray14's layout, eight images; two are real radiographs where they are at hand."""
    tree = tmp_path_factory.mktemp("nih") / "tree"
    lines = [NIH_HEAD]
    for n, name in enumerate(NIH_NAMES):
        path = tree / f"images_{1 + n % 2:03d}" / "images" / name
        write_image(path, n)
        if (real := REAL / "single" / name).exists():
            shutil.copy(real, path)
        patient, visit = name.removesuffix(".png").split("_")
        lines.append(f"{name},No Finding,{int(visit)},{int(patient)},58,M,PA,24,24,0.143,0.143")
    (tree / "Data_Entry_2017_v2020.csv").write_text("\n".join([*lines, ""]))
    build(tree, tree.parent / "set", [16], source="nih", workers=1)
    return tree.parent / "set"


@pytest.mark.parametrize("form", ["{}.png", "{}", "{}.dcm"])
def test_an_image_s_id_may_have_the_suffix_of_its_file(form, nih_set, tmp_path):
    folder = copy_set(nih_set, tmp_path / "set")
    stems = [name.removesuffix(".png") for name in NIH_NAMES]
    table = pd.DataFrame({"Image Index": [form.format(s) for s in stems], "Nodule": [i % 2 for i in range(len(stems))]})
    table.to_csv(tmp_path / "t.csv", index=False)
    result = relabel(folder, tmp_path / "t.csv")
    assert (result.by, result.matched, len(result.unmatched)) == ("image_id", len(stems), 0)
    assert rows_of(folder).set_index("image_id")["Nodule"][stems].tolist() == table["Nodule"].tolist()


def test_ids_that_end_like_files_in_the_set_itself_are_matched_as_they_are():
    known = pd.Series(["a.png", "a", "b"], name="image_id")
    assert match_ids(pd.Series(["a.png", "b.jpg", "c.png"]), known, 0, "t").tolist() == ["a.png", "b", "c.png"]
    with pytest.raises(ShardError, match=r"t lists b more than once"):
        match_ids(pd.Series(["b.jpg", "b.png"]), known, 0, "t")
    study = pd.Series(["a", "b"], name="study_id")
    assert match_ids(pd.Series(["a.png"]), study, 0, "t").tolist() == ["a.png"], "a study is no file"


CHEXPERT_IMAGES = [
    f"{part}/patient{first + n:05d}/study{study}/view1_frontal.jpg"
    for part, first in (("train", 1), ("valid", 64541))
    for n in range(6)
    for study in (1, 2)
]


def chexpert_table(dataset: str) -> pd.DataFrame:
    """Lines as in CheXpert's own tables and those of later labellers."""
    rng = np.random.default_rng(3)
    table = pd.DataFrame({"Path": [f"{dataset}/{path}" for path in CHEXPERT_IMAGES]})
    table = table.assign(**{"Sex": "Female", "Age": 60, "Frontal/Lateral": "Frontal", "AP/PA": "AP"})
    return table.assign(**{name: rng.choice([1.0, 0.0, -1.0, np.nan], len(table)) for name in MIMIC})


def chexpert_tree(tree: Path, layout: str) -> None:
    """`small`: train/ and valid/; `above`: the same in a folder; `batches`: as the full download unpacks."""
    root = {
        "small": tree,
        "above": tree / "CheXpert-v1.0-small",
        "batches": tree / "CheXpert-v1.0 batch 1 (validate & csv)",
    }
    table = chexpert_table("CheXpert-v1.0-small")
    for part, file in (("train", "train.csv"), ("valid", "valid.csv")):
        root[layout].mkdir(parents=True, exist_ok=True)
        table[table["Path"].str.contains(f"/{part}/")].to_csv(root[layout] / file, index=False)
    for n, path in enumerate(CHEXPERT_IMAGES):
        if layout == "batches" and path.startswith("train/"):
            write_image(tree / "CheXpert-v1.0 batch 2 (train 1)" / path.removeprefix("train/"), n)
        else:
            write_image(root[layout] / path, n)


@pytest.mark.parametrize(("layout", "tail"), [("small", 4), ("above", 5), ("batches", 3)])
def test_chexpert_s_images_are_found_by_the_ends_of_their_paths(layout, tail, tmp_path):
    chexpert_tree(tmp_path / "tree", layout)
    build(tmp_path / "tree", tmp_path / "set", [16], source="chexpert", workers=1)
    table = other_labels(chexpert_table("CheXpert-v1.0-small"))
    table.to_csv(tmp_path / "chexbert.csv", index=False)
    result = relabel(tmp_path / "set", tmp_path / "chexbert.csv")
    assert (result.by, result.key, result.tail) == ("path", "Path", tail)
    assert (result.matched, len(result.unmatched)) == (len(CHEXPERT_IMAGES), 0)
    rows = rows_of(tmp_path / "set").set_index("image_id")
    images = [path.partition("/")[2].removesuffix(".jpg") for path in CHEXPERT_IMAGES]
    np.testing.assert_array_equal(rows.loc[images, list(MIMIC)].to_numpy(), table[list(MIMIC)].to_numpy(np.float32))


def test_paths_count_only_where_the_table_has_no_other_ids(tiny_set, copy, tmp_path):
    rows = rows_of(tiny_set)
    table = rows[["image_id", *MIMIC]].assign(path="mimic-cxr-jpg/" + rows["path"])
    table.assign(path="nowhere.jpg").to_csv(tmp_path / "t.csv", index=False)
    assert relabel(copy, tmp_path / "t.csv").by == "image_id"
    table.drop(columns="image_id").to_csv(tmp_path / "t.csv", index=False)
    assert relabel(copy, tmp_path / "t.csv").by == "path"
    assert is_as_planned(copy, tiny_set, tmp_path / "t.csv")
    table.rename(columns={"path": "location"}).drop(columns="image_id").to_csv(tmp_path / "t.csv", index=False)
    done = CliRunner().invoke(cli, ["relabel", str(copy), str(tmp_path / "t.csv"), "--key", "location"])
    assert "150 of 150 images found" in done.stdout, done.output
    assert "by location (by the last 5 parts of each path)" in done.stdout


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
