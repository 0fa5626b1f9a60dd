import dataclasses
import gzip
import hashlib
import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import cv2
import fsspec
import numpy as np
import pandas as pd
import pytest
import torch
from click.testing import CliRunner
from conftest import REAL
from damage import contents, copy_set, flip_bit
from hypothesis import given
from hypothesis import strategies as st

from cxrfast.analysis.evaluate import evaluate
from cxrfast.cli.main import cli
from cxrfast.distributed import World
from cxrfast.errors import RunError, ShardError
from cxrfast.labels import MIMIC
from cxrfast.pipelines.reader import Reader
from cxrfast.runs.run import Run
from cxrfast.shards.build import build
from cxrfast.shards.format.info import read_set
from cxrfast.shards.format.lock import Lock
from cxrfast.shards.format.names import RELABELLING, shard_path
from cxrfast.shards.format.rows import (
    COLUMNS,
    REFERENCE,
    label_names,
    read_info,
    read_rows,
    reference_names,
    write_rows,
)
from cxrfast.shards.upkeep.match import match_ids, shared_tail
from cxrfast.shards.upkeep.relabel import Relabelled
from cxrfast.shards.upkeep.relabel import relabel as replace_labels
from cxrfast.shards.upkeep.verify import verify
from cxrfast.training.predict import predict
from cxrfast.training.train import Place, make_config, select_rows, train

WRITTEN = {"rows.parquet", "set.json", "SHA256SUMS"}


MIMIC_CHEXPERT = "mimic-cxr-2.0.0-chexpert.csv.gz"


def relabel(folder: Path, table: str | Path, **options) -> Relabelled:
    return replace_labels(folder, table, quiet=True, **options)


def rows_of(folder: Path) -> pd.DataFrame:
    return read_rows(folder / "rows.parquet")


def chexpert(tree: Path) -> pd.DataFrame:
    return pd.read_csv(tree / "mimic-cxr-2.0.0-chexpert.csv.gz")


def is_as_planned(folder: Path, tiny_set: Path, table: str | Path) -> bool:
    """Is the set what it was before it was relabelled with its own labels, but for where they are from?"""
    name = str(table).partition("::")[0].rpartition("/")[2]
    info = read_set(folder)
    file, _, digest = info.labels_from.partition(" sha256:")
    if "://" not in str(table):
        assert digest == hashlib.sha256(Path(table).read_bytes()).hexdigest()
    tars = [{n: d for n, d in contents(f).items() if n not in WRITTEN} for f in (folder, tiny_set)]
    return (
        (file, len(digest)) == (name, 64)
        and dataclasses.replace(info, labels_from="") == read_set(tiny_set)
        and rows_of(folder).equals(rows_of(tiny_set))
        and tars[0] == tars[1]
        and verify(folder, quiet=True).problems == []
    )


def other_labels(table: pd.DataFrame) -> pd.DataFrame:
    """The same studies, with other values for every label."""
    rng = np.random.default_rng(7)
    return table.assign(**{name: rng.choice([1.0, 0.0, -1.0, np.nan], len(table)) for name in MIMIC})


@pytest.fixture
def copy(tiny_set: Path, tmp_path: Path) -> Path:
    return copy_set(tiny_set, tmp_path / "set")


@pytest.fixture(scope="module")
def other(phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CSV with other values of the fourteen labels for all studies."""
    path = tmp_path_factory.mktemp("other") / "other.csv"
    other_labels(chexpert(phantoms)).to_csv(path, index=False)
    return path


# What changes


def test_relabelling_with_the_labels_it_has_changes_only_where_they_are_from(phantoms, tiny_set, copy):
    assert read_set(copy).labels_from == ""
    result = relabel(copy, phantoms / MIMIC_CHEXPERT)
    assert is_as_planned(copy, tiny_set, phantoms / MIMIC_CHEXPERT)
    listed = rows_of(copy)["study_id"].isin(chexpert(phantoms)["study_id"].astype(str))
    assert (result.by, result.key, result.matched) == ("study_id", "study_id", listed.sum())
    assert result.unmatched["images"].sum() == (~listed).sum() > 0, "MIMIC has studies without a line, too"


def test_labels_become_those_of_the_table_and_nothing_else_changes(other, tiny_set, copy):
    result = relabel(copy, other)
    before, after = rows_of(tiny_set), rows_of(copy)
    table = pd.read_csv(other, dtype={"study_id": str})
    expected = after[["study_id"]].merge(table, how="left", on="study_id")[list(MIMIC)]
    pd.testing.assert_frame_equal(after[list(MIMIC)], expected.astype(np.float32))
    assert not after[list(MIMIC)].equals(before[list(MIMIC)])
    pd.testing.assert_frame_equal(after[list(COLUMNS)], before[list(COLUMNS)])
    assert result.labelled == expected.notna().any(axis=1).sum()
    changed = {name for name, data in contents(copy).items() if data != contents(tiny_set)[name]}
    assert changed == WRITTEN
    assert verify(copy, quiet=True).problems == []
    assert dataclasses.replace(read_set(copy), labels_from="") == read_set(tiny_set)


def test_doing_it_twice_gives_the_same_bytes(other, copy):
    relabel(copy, other)
    once = contents(copy)
    relabel(copy, other)
    assert contents(copy) == once
    assert read_info(copy / "rows.parquet") == read_set(copy)


def test_other_names_replace_all_former_ones_in_the_set_s_description_too(phantoms, tiny_set, copy, tmp_path):
    table = chexpert(phantoms)[["study_id"]].assign(Zebra=1, Apple=[0, -1] * (len(chexpert(phantoms)) // 2))
    table.to_csv(tmp_path / "t.csv", index=False)
    result = relabel(copy, tmp_path / "t.csv")
    assert label_names(rows_of(copy)) == tuple(read_set(copy).labels) == ("Zebra", "Apple")
    assert (result.before, result.left) == (MIMIC, [])
    assert dataclasses.replace(read_set(copy), labels=list(MIMIC), labels_from="") == read_set(tiny_set)
    assert verify(copy, quiet=True).problems == []
    relabel(copy, tmp_path / "t.csv", labels=["Apple", "Zebra"])
    assert read_set(copy).labels == ["Zebra", "Apple"], "in the table's order"
    relabel(copy, phantoms / MIMIC_CHEXPERT)
    assert is_as_planned(copy, tiny_set, phantoms / MIMIC_CHEXPERT), "and back again"


def test_of_a_table_with_known_findings_those_alone_are_taken_and_the_others_named(phantoms, copy, tmp_path):
    chexpert(phantoms)[["study_id", "Pneumonia"]].assign(Zebra=1, Weight=64).to_csv(tmp_path / "t.csv")
    arguments = ["relabel", str(copy), str(tmp_path / "t.csv")]
    done = CliRunner().invoke(cli, arguments)
    assert "not taken: Zebra, Weight (name them with --label)" in done.stdout
    assert read_set(copy).labels == ["Pneumonia"]
    done = CliRunner().invoke(cli, [*arguments, "--label", "Zebra"])
    assert "not taken" not in done.stdout
    done = CliRunner().invoke(cli, arguments)
    assert read_set(copy).labels == ["Pneumonia", "Zebra"], "labels of the set are known, too"
    assert "not taken: Weight (" in done.stdout


def test_columns_that_number_the_lines_are_no_labels(phantoms, copy, tmp_path):
    table = chexpert(phantoms)[["study_id"]].assign(ill=1).reset_index()
    assert table.columns[0] == "index"
    table.assign(**{"Unnamed: 0": 7, "Unnamed: 0.1": 7, "": 7, "肺炎": 0}).to_csv(tmp_path / "t.csv", index=False)
    relabel(copy, tmp_path / "t.csv")
    assert read_set(copy).labels == ["ill", "肺炎"]


@pytest.mark.parametrize("asked", [None, ["Airspace Opacity"], ["Lung Opacity"]])
def test_airspace_opacity_is_lung_opacity_unless_the_table_has_both(asked, phantoms, tiny_set, copy, tmp_path):
    table = chexpert(phantoms).rename(columns={"Lung Opacity": "Airspace Opacity"})
    table.to_csv(tmp_path / "t.csv", index=False)
    relabel(copy, tmp_path / "t.csv", labels=asked)
    assert read_set(copy).labels == (["Lung Opacity"] if asked else list(MIMIC))
    assert rows_of(copy)["Lung Opacity"].equals(rows_of(tiny_set)["Lung Opacity"])
    table.assign(**{"Lung Opacity": 0}).to_csv(tmp_path / "t.csv", index=False)
    relabel(copy, tmp_path / "t.csv", labels=asked)
    expected = {None: list(MIMIC), "Lung Opacity": ["Lung Opacity"], "Airspace Opacity": ["Airspace Opacity"]}
    assert read_set(copy).labels == expected[asked[0] if asked else None]


def test_the_fourteen_of_mimic_keep_their_order_whatever_the_table_s(phantoms, tiny_set, copy, tmp_path):
    chexpert(phantoms)[[*reversed(MIMIC), "study_id"]].to_csv(tmp_path / "t.csv", index=False)
    relabel(copy, tmp_path / "t.csv")
    assert is_as_planned(copy, tiny_set, tmp_path / "t.csv")


def test_reference_labels_stay(phantoms, other, tiny_set, copy):
    name = f"{REFERENCE}Pneumonia"
    rows = rows_of(copy).assign(**{name: np.float32(1)})
    write_rows(copy / "rows.parquet", rows, read_set(copy))
    (copy / "SHA256SUMS").unlink()
    relabel(copy, other)
    assert reference_names(rows_of(copy)) == (name,)
    assert rows_of(copy)[name].eq(1).all()
    assert label_names(rows_of(copy)) == MIMIC


# Tables as they come


def save_as(kind: str, table: pd.DataFrame, folder: Path) -> str:
    if kind == "parquet":
        table.to_parquet(folder / "t.parquet")
    elif kind == "parquet, indexed by study":
        table.set_index("study_id").to_parquet(folder / "t.parquet")
    elif kind == "parquet, studies as floats, labels as whole numbers":
        table.astype({"study_id": float, **dict.fromkeys(MIMIC, "Int8")}).to_parquet(folder / "t.parquet")
    elif kind == "studies as floats":
        table.astype({"study_id": float}).to_csv(folder / "t.csv", index=False)
        assert ".0," in (folder / "t.csv").read_text().splitlines()[1]
    elif kind == "byte order mark, Windows line ends":
        table.to_csv(folder / "t.csv", index=False, encoding="utf-8-sig", lineterminator="\r\n")
    elif kind == "an index without a name":
        table.to_csv(folder / "t.csv")
    elif "tsv" in kind:
        table.to_csv(folder / f"t.{kind}", sep="\t", index=False)
    elif kind == "memory":
        with fsspec.open("memory://tables/t.csv.gz", "wb") as file:
            file.write(gzip.compress(table.to_csv(index=False).encode()))
        return "memory://tables/t.csv.gz"
    elif kind == "zip":
        with zipfile.ZipFile(folder / "t.zip", "w") as archive:
            archive.writestr("labels/t.csv", table.to_csv(index=False))
        return f"zip://labels/t.csv::{folder / 't.zip'}"
    return str(next(folder.glob("t.*")))


@pytest.mark.parametrize(
    "kind",
    [
        "tsv",
        "tsv.gz",
        "parquet",
        "parquet, indexed by study",
        "parquet, studies as floats, labels as whole numbers",
        "studies as floats",
        "byte order mark, Windows line ends",
        "an index without a name",
        "memory",
        "zip",
    ],
)
def test_the_same_table_in_another_form_gives_the_same_labels(kind, phantoms, tiny_set, copy, tmp_path):
    table = save_as(kind, chexpert(phantoms), tmp_path)
    relabel(copy, table)
    assert is_as_planned(copy, tiny_set, table)


@pytest.mark.parametrize("name", ["image_id", "dicom_id", "Image Index", "file"])
def test_a_table_may_be_keyed_by_image(name, tiny_set, copy, tmp_path):
    images = rows_of(tiny_set)[["image_id", *MIMIC]].rename(columns={"image_id": name}).sample(frac=1, random_state=1)
    images.to_csv(tmp_path / "t.csv", index=False)
    result = relabel(copy, tmp_path / "t.csv", key="file" if name == "file" else None)
    assert (result.by, result.key) == ("image_id", name)
    assert is_as_planned(copy, tiny_set, tmp_path / "t.csv")


def test_true_and_false_are_labels_and_known_columns_of_other_kinds_are_none(tiny_set, copy, tmp_path):
    studies = rows_of(tiny_set)[["study_id", "patient_id"]].drop_duplicates("study_id")
    table = studies.rename(columns={"patient_id": "Patient ID"})
    table = table.assign(split="train", ViewPosition="AP", Rows=3056, ill=[i % 2 == 0 for i in range(len(table))])
    for name in ("t.csv", "t.parquet"):
        table.to_csv(tmp_path / name, index=False) if name == "t.csv" else table.to_parquet(tmp_path / name)
        relabel(copy, tmp_path / name)
        assert read_set(copy).labels == ["ill"]
        ill = rows_of(copy).groupby("study_id")["ill"].first()[table["study_id"]]
        assert ill.tolist() == table["ill"].astype(float).tolist()


# Ids


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
    with pytest.raises(ShardError, match=r"leading zeros alone \(0 is 0000 there\): write them as text"):
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
    build(tree, tree.parent / "set", [16], source="nih", workers=1, quiet=True)
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
    build(tmp_path / "tree", tmp_path / "set", [16], source="chexpert", workers=1, quiet=True)
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


# What does not match


def test_ids_of_one_side_alone_are_counted_listed_and_blank(phantoms, copy, tmp_path):
    table = chexpert(phantoms).astype({"study_id": str})
    kept = table.iloc[30:]
    gone = sorted(set(rows_of(copy)["study_id"]) - set(kept["study_id"]))
    added = [f"9{i:07d}" for i in range(25)]
    strangers = table.iloc[:25].assign(study_id=added)
    pd.concat([kept, strangers]).sample(frac=1, random_state=3).to_csv(tmp_path / "t.csv", index=False)
    done = CliRunner().invoke(
        cli, ["relabel", str(copy), str(tmp_path / "t.csv"), "--unmatched", str(tmp_path / "out.csv")]
    )
    assert done.exit_code == 0, done.output
    rows = rows_of(copy)
    lost = rows["study_id"].isin(gone)
    assert rows.loc[lost, list(MIMIC)].isna().all().all()
    assert f"{(~lost).sum()} of 150 images found" in done.stdout
    assert (
        f"in the set alone, blank now: {len(gone)} studies: {', '.join(gone[:20])} and {len(gone) - 20} more"
        in done.stdout
    )
    assert f"in the table alone: 25 studies: {', '.join(added[:20])} and 5 more" in done.stdout
    listed = pd.read_csv(tmp_path / "out.csv", dtype={"study_id": str})
    assert listed.query("only_in == 'set'")["study_id"].tolist() == gone
    assert listed.query("only_in == 'table'")["study_id"].tolist() == added
    assert listed["images"].sum() == lost.sum()
    assert verify(copy, quiet=True).problems == []


def test_negbio_takes_the_place_of_chexpert_on_real_radiographs(real_set, real_tree, tmp_path):
    folder = copy_set(real_set, tmp_path / "set")
    negbio = pd.read_csv(real_tree / "mimic-cxr-2.0.0-negbio.csv.gz", dtype={"study_id": str})
    negbio.loc[negbio["Pneumonia"] == 1, "Pneumonia"] = -1
    dropped = negbio["study_id"].sort_values().iloc[[5, 50]].tolist()
    negbio = negbio[~negbio["study_id"].isin(dropped)]
    (tmp_path / "mimic-cxr-2.0.0-negbio.csv.gz").write_bytes(gzip.compress(negbio.to_csv(index=False).encode()))
    result = relabel(folder, tmp_path / "mimic-cxr-2.0.0-negbio.csv.gz")
    assert result.unmatched["study_id"].tolist() == dropped
    assert result.unmatched["only_in"].tolist() == ["set", "set"]
    before, after = rows_of(real_set)["Pneumonia"], rows_of(folder)["Pneumonia"]
    listed = ~rows_of(folder)["study_id"].isin(dropped)
    assert (after[listed & (before == 1)] == -1).all()
    assert (after[listed & (before != 1)].fillna(9) == before[listed & (before != 1)].fillna(9)).all()
    tars = {n: d for n, d in contents(real_set).items() if n not in WRITTEN}
    assert {n: d for n, d in contents(folder).items() if n not in WRITTEN} == tars
    assert verify(folder, quiet=True).problems == []


def test_more_than_half_of_the_images_without_a_label_are_warned_of(phantoms, copy, tmp_path):
    studies = rows_of(copy)["study_id"].drop_duplicates()
    for keep, warns in ((0.2, True), (0.9, False)):
        studies.sample(frac=keep, random_state=1).to_frame().assign(ill=1).to_csv(tmp_path / "t.csv", index=False)
        done = CliRunner().invoke(cli, ["relabel", str(copy), str(tmp_path / "t.csv")])
        blank = rows_of(copy)["ill"].isna().sum()
        assert bool(blank > 75) is warns
        assert (f"warning: {blank} of 150 images have no label now" in done.stdout.splitlines()[-1]) is warns


# Refused


def plain(table: pd.DataFrame) -> pd.DataFrame:
    return table[["study_id", "Edema", "Fracture"]]


REFUSED = {
    "no id column (Edema, Fracture): name that of image ids, study ids or paths with --key": lambda t: t.drop(
        columns="study_id"
    ),
    "has the id columns dicom_id, study_id: ": lambda t: t.assign(dicom_id="x")[["dicom_id", *t.columns]],
    "only 1, 0, -1 and blank are known; choose the columns that are labels with --label": lambda t: t.rename(
        columns={"Edema": "a", "Fracture": "b"}
    ).assign(Weight=64),
    "holds '0.5' for Edema in line 4": lambda t: t.assign(Edema=[1, 0, 0.5, *[1] * (len(t) - 3)]),
    "holds 'yes' for Fracture in line 2": lambda t: t.assign(Fracture=["yes", *["1"] * (len(t) - 1)]),
    "holds 'inf' for Fracture": lambda t: t.assign(Fracture=np.inf),
    "holds no lines": lambda t: t.iloc[:0],
    "has no label columns (study_id)": lambda t: t[["study_id"]],
    "study_id is blank in line 2": lambda t: t.assign(study_id=[None, *t["study_id"].iloc[1:].astype(str)]),
    "the table's are like '1', the study_ids of the set like '": lambda t: t.assign(study_id=range(1, len(t) + 1)),
    "'radiologist/Edema'": lambda t: t.rename(columns={"Edema": "radiologist/Edema"})[
        ["study_id", "radiologist/Edema"]
    ],
    "too long for ids": lambda t: t.assign(study_id=[f"12345678901234567{i}.0" for i in range(len(t))]),
}


@pytest.mark.parametrize("message", REFUSED)
def test_a_table_that_cannot_be_right_is_refused_and_nothing_written(message, phantoms, copy, tmp_path):
    REFUSED[message](plain(chexpert(phantoms))).to_csv(tmp_path / "t.csv", index=False)
    before = contents(copy)
    with pytest.raises(ShardError) as caught:
        relabel(copy, tmp_path / "t.csv", unmatched=tmp_path / "unmatched.csv")
    assert message in str(caught.value)
    assert str(tmp_path / "t.csv") in str(caught.value)
    assert contents(copy) == before
    assert not (tmp_path / "unmatched.csv").exists()


@pytest.mark.parametrize("form", ["{}", "{}.0"])
def test_a_study_listed_twice_is_refused_and_named(form, phantoms, copy, tmp_path):
    table = plain(chexpert(phantoms))
    again = table.iloc[[3, 7, 9, 11]]
    twice = pd.concat(
        [table.astype(str), again.astype(str).assign(study_id=[form.format(i) for i in again["study_id"]])]
    )
    twice.replace("nan", "").to_csv(tmp_path / "t.csv", index=False)
    named = ", ".join(str(i) for i in again["study_id"].iloc[:3])
    with pytest.raises(
        ShardError, match=f"study_id of .* lists {named} and 1 more more than once: keep one line for each"
    ):
        relabel(copy, tmp_path / "t.csv")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"key": "accession"}, "has no column 'accession' (--key): its columns are study_id, Edema, Fracture"),
        ({"labels": ["Oedema"]}, "has no column 'Oedema' (--label)"),
        ({"labels": ["study_id"]}, "'study_id' of "),
    ],
)
def test_options_that_fit_no_column_are_refused(options, message, phantoms, copy, tmp_path):
    plain(chexpert(phantoms)).to_csv(tmp_path / "t.csv", index=False)
    with pytest.raises(ShardError) as caught:
        relabel(copy, tmp_path / "t.csv", **options)
    assert message in str(caught.value)


@pytest.mark.parametrize("name", ["none.csv", "set.json", "broken.parquet", "broken.csv.gz"])
def test_a_table_that_cannot_be_read_is_one_message(name, copy, tmp_path):
    (tmp_path / "set.json").write_text("{}")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and no more")
    (tmp_path / "broken.csv.gz").write_bytes(gzip.compress(b"study_id,a\n" * 99)[:-9])
    done = CliRunner().invoke(cli, ["relabel", str(copy), str(tmp_path / name)])
    assert done.exit_code == 2, done.output
    assert isinstance(done.exception, SystemExit)
    assert name in done.stderr


def test_a_table_that_is_not_in_this_folder_is_said_so(copy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("here.csv").write_text("study_id,ill\n")
    with pytest.raises(ShardError, match=r"no nope\.csv in \. \(its tables: here\.csv\)"):
        relabel(copy, "nope.csv")
    with pytest.raises(ShardError, match=r"here\.csv holds no lines"):
        relabel(copy, "here.csv")


def test_a_table_is_fetched_once(phantoms, tiny_set, copy, tmp_path):
    """Over HTTP, as from a data server."""
    asked = []

    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=phantoms)

        def do_GET(self):
            asked.append(self.path)
            super().do_GET()

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/{MIMIC_CHEXPERT}"
        relabel(copy, url)
        server.shutdown()
    assert asked == [f"/{MIMIC_CHEXPERT}"]
    assert is_as_planned(copy, tiny_set, url)


def test_a_set_behind_a_url_is_refused_as_it_was_typed(other):
    for command in (["relabel", "s3://bucket/set", str(other)], ["describe", "s3://bucket/set"]):
        done = CliRunner().invoke(cli, command)
        assert done.exit_code == 2
        message = " ".join(done.stderr.split())
        assert "s3://bucket/set is a URL, and only local paths are read and written: `cxrfast stage` copies" in message


def test_the_list_of_unmatched_ids_is_never_written_into_the_set(other, tiny_set, copy):
    with pytest.raises(ShardError, match="lies in the set"):
        relabel(copy, other, unmatched=copy / "32" / "unmatched.csv")
    assert contents(copy) == contents(tiny_set)


@pytest.mark.parametrize(("where", "message"), [("", "is a folder: name a file"), ("none/u.csv", "there is no folder")])
def test_a_list_of_unmatched_ids_that_cannot_be_written_is_refused_first(where, message, tiny_set, copy, tmp_path):
    done = CliRunner().invoke(cli, ["relabel", str(copy), "no-table.csv", "--unmatched", str(tmp_path / where)])
    assert done.exit_code == 2
    assert message in done.stderr
    assert str(tmp_path / where) in done.stderr
    assert ".tmp" not in done.stderr
    assert contents(copy) == contents(tiny_set)


def test_damage_is_not_signed_anew(other, copy):
    flip_bit(copy / "rows.parquet", 2000)
    before = contents(copy)
    with pytest.raises(ShardError, match=r"rows\.parquet is not as it was written: `cxrfast verify` lists"):
        relabel(copy, other)
    assert contents(copy) == before


def test_damage_elsewhere_stays_visible(other, copy):
    path = shard_path(copy, 32, 1, "idx")
    flip_bit(path, 5)
    relabel(copy, other)
    assert [(p.path, p.what) for p in verify(copy, quiet=True).problems] == [
        ("32/000001.idx", "its bytes have changed")
    ]


def test_a_set_that_somebody_writes_into_is_left_alone(other, tiny_set, copy):
    with Lock(copy), pytest.raises(ShardError, match="is being built by process"):
        relabel(copy, other)
    assert contents(copy) == contents(tiny_set)


# Killed


AT_EVERY_INSTANT = """
import os, shutil, signal, sys
from cxrfast.shards.upkeep.relabel import relabel

start, table, out = sys.argv[1:]
for n in range(1, 100):
    folder = f"{out}/{n:02d}"
    shutil.copytree(start, folder)
    child = os.fork()
    if child == 0:
        seen = 0

        def hook(event, args):
            global seen
            write = event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR)
            if (write or event in ("os.rename", "os.remove")) and str(args[0]).startswith(folder):
                seen += 1
                if seen == n:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        relabel(folder, table, quiet=True)
        os._exit(0)
    if os.waitpid(child, 0)[1] == 0:
        break
"""
"""Relabels copies of a set, the n-th of which is killed before it opens, renames or removes its n-th file."""


@pytest.mark.parametrize("finished", [True, False])
def test_killed_at_any_instant_it_is_finished_by_the_same_call_and_taken_for_nothing_else(
    finished, phantoms, tiny_set, tmp_path
):
    start, table = copy_set(tiny_set, tmp_path / "start"), tmp_path / "t.csv"
    if not finished:
        (start / "SHA256SUMS").unlink()
    studies = chexpert(phantoms)
    studies[["study_id"]].assign(Pneumonia=1, Zebra=0).to_csv(table, index=False)
    relabel(copy_set(start, tmp_path / "whole"), table)
    before, after = contents(start), contents(tmp_path / "whole")
    (tmp_path / "killed").mkdir()
    command = [sys.executable, "-c", AT_EVERY_INSTANT, start, table, tmp_path / "killed"]
    subprocess.run(command, check=True, cwd=Path(__file__).parents[3], timeout=100)
    *killed, last = sorted((tmp_path / "killed").iterdir())
    assert len(killed) >= 6
    assert contents(last) == after
    unsettled = 0
    for folder in killed:
        if (folder / RELABELLING).exists():
            unsettled += 1
            for read in (rows_of, verify, lambda f: build(phantoms, f, [32, 64], workers=1, quiet=True)):
                with pytest.raises(ShardError, match="run the same `cxrfast relabel` command again"):
                    read(folder)
            assert len(Reader(folder, 32).rows) == 150, "images can be read all the time"
        else:
            there = {n: d for n, d in contents(folder).items() if not n.endswith(".tmp") and not n.startswith("lease")}
            assert there in (before, after)
        relabel(folder, table)
        assert contents(folder) == after
    assert unsettled >= 4


def test_a_set_that_is_half_built_stays_so_and_its_build_goes_on(other, phantoms, tiny_set, copy):
    (copy / "SHA256SUMS").unlink()
    for scale in (32, 64):
        for suffix in ("tar", "idx", "json"):
            shard_path(copy, scale, 1, suffix).unlink()
    relabel(copy, other)
    assert not (copy / "SHA256SUMS").exists()
    assert not (copy / RELABELLING).exists()
    assert build(phantoms, copy, [32, 64], workers=1, quiet=True).complete
    assert verify(copy, quiet=True).problems == []
    whole = copy_set(tiny_set, copy.parent / "whole")
    relabel(whole, other)
    assert rows_of(copy).equals(rows_of(whole))
    assert read_set(copy) == read_set(whole)


# Runs


def test_runs_stay_valid_with_the_labels_they_were_trained_on_and_later_ones_use_the_new(
    phantoms, other, tiny_set, tmp_path
):
    folder, runs = copy_set(tiny_set, tmp_path / "set"), tmp_path / "runs"

    def trained(fold: int) -> Run:
        config = make_config(
            folder,
            32,
            device="cpu",
            arch="resnet18",
            fold=fold,
            weights="none",
            epochs=1,
            global_batch=4,
            precision="fp32",
            limit=12,
        )
        run = train(config, Place(shards=folder, runs=runs, device="cpu", quiet=True))
        predict(run, World(torch.device("cpu")), quiet=True)
        return run

    old = trained(0)
    rows, evaluated = old.rows(), evaluate(runs)
    shutil.rmtree(old.folder / "predictions.zarr")
    relabel(folder, other)
    predict(old, World(torch.device("cpu")), quiet=True)
    pd.testing.assert_frame_equal(evaluate(runs).table, evaluated.table)
    pd.testing.assert_frame_equal(old.rows(), rows)
    new = trained(1)
    now, table = new.rows(), rows_of(folder).set_index("row")
    pd.testing.assert_frame_equal(now[list(MIMIC)], table.loc[now["row"], list(MIMIC)].reset_index(drop=True))
    with pytest.raises(RunError, match=r"fold-0 and resnet18-32/fold-1 cannot be joined: [\d,]+ labels of shared"):
        evaluate(runs)


def test_a_configuration_from_before_the_relabelling_is_refused(tiny_set, copy, tmp_path):
    config = make_config(copy, 32, device="cpu", weights="none", global_batch=8, precision="fp32")
    rows_of(tiny_set)[["image_id"]].assign(ill=1).to_csv(tmp_path / "t.csv", index=False)
    relabel(copy, tmp_path / "t.csv")
    with pytest.raises(RunError, match="has no label Atelectasis any more, it was relabelled"):
        select_rows(rows_of(copy), config, np.arange(150))
