"""Splits that leak are refused or said, and so are labels that are blank everywhere: by `shard`, `describe` and `verify`."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from commands import invoke
from sets import build, rows_of, table_arguments, write_table

from cxrfast.errors import ShardError
from cxrfast.shards.building.cautions import doubtful_patients
from cxrfast.shards.format.info import read_set
from cxrfast.shards.format.rows import write_rows
from cxrfast.shards.repair.repair import repair
from cxrfast.shards.sources.read import read_source
from cxrfast.shards.sources.source import Source
from cxrfast.shards.storage import Tree
from cxrfast.shards.upkeep.relabel import relabel
from cxrfast.shards.upkeep.stage import stage
from cxrfast.shards.upkeep.verify import verify
from cxrfast.splits import deal

PARTS = ["train"] * 6 + ["val"] * 3 + ["test"] * 3
LEAKING = [f"p{n % 4}" for n in range(12)]
APART = [f"p{n}" for n in range(12)]
MASS = [n % 2 for n in range(12)]


def words(result) -> str:
    return " ".join((result.output + str(result.exception or "")).split())


@pytest.fixture
def leaking(tmp_path: Path) -> Path:
    return write_table(tmp_path / "data", LEAKING, Mass=MASS, split=PARTS)


def test_a_split_with_patients_in_two_parts_is_refused_before_anything_is_written(leaking, tmp_path):
    command = ["shard", *table_arguments(leaking, tmp_path / "set", "Mass"), "--split-column=split"]
    for more in ([], ["--dry-run"]):
        done = invoke(*command, *more)
        assert done.exit_code == 2
        assert (
            "hold a split in which 4 patients with 12 images are in more than one part, such as line 2 (patient p0) in train "
            "and line 10 (patient p0) in validate; line 3 (patient p1) in train and line 11 (patient p1) in test; "
        ) in words(done)
        assert "continue with --allow-shared-patients" in words(done)
        assert not (tmp_path / "set" / "rows.parquet").exists()
    assert invoke("shard", *table_arguments(leaking, tmp_path / "plain", "Mass")).exit_code == 0, (
        "the split is not used"
    )


def test_a_split_that_is_allowed_to_leak_is_described_with_a_warning(leaking, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ["shard", *table_arguments(leaking, tmp_path / "set", "Mass"), "--split-column=split"]
    done = invoke(*command, "--allow-shared-patients")
    assert done.exit_code == 0
    row = rows_of(tmp_path / "set").sort_values("row").set_index("image_id")["row"]
    warning = "warning: official split: 4 patients with 12 images are in more than one part, such as row "
    assert warning in words(done)
    assert "`cxrfast train` refuses it without --allow-shared-patients" in words(done)
    described = invoke("describe", tmp_path / "set")
    assert warning in words(described)
    assert warning[9:] in (tmp_path / "set-description" / "describe.md").read_text()
    assert "patient p" not in words(described), "reports name rows only"
    assert sorted(row) == list(range(12))
    again = invoke(*command, "--scale=64")
    assert again.exit_code == 0, "a set that is there is extended, with the warning"
    assert warning in words(again)


@pytest.mark.parametrize("suffix", ["tsv", "parquet"])
def test_other_tables_are_refused_likewise(leaking, tmp_path, suffix):
    frame = pd.read_csv(leaking / "t.csv")
    frame.to_parquet(leaking / "t.parquet") if suffix == "parquet" else frame.to_csv(
        leaking / "t.tsv", sep="\t", index=False
    )
    options = {"table": f"t.{suffix}", "label": ["Mass"], "split_column": "split"}
    first = 1 if suffix == "parquet" else 2
    with pytest.raises(
        ShardError, match=rf"such as line {first} \(patient p0\) in train and line {first + 8} \(patient p0\)"
    ):
        build(leaking, tmp_path / "set", [32], source="table", source_options=options)


def test_the_published_datasets_are_refused_likewise(phantoms, tmp_path):
    """MIMIC's split table, with one image of a patient moved to the test part."""
    tree = Path(shutil.copytree(phantoms, tmp_path / "mimic"))
    table = tree / "mimic-cxr-2.0.0-split.csv.gz"
    split = pd.read_csv(table, dtype=str)
    patient = split["subject_id"].value_counts().index[0]
    at = split.index[split["subject_id"] == patient]
    split.loc[at[0], "split"] = "test" if split["split"][at[0]] == "train" else "train"
    split.to_csv(table, index=False)
    with pytest.raises(
        ShardError, match=rf"1 patient with {len(at)} images is in more than one part, such as line \d+ \(pat"
    ):
        build(tree, tmp_path / "set", [32])
    assert (
        build(tree, tmp_path / "set", [32], allow_shared_patients=True, limit=1)
        .cautions[0]
        .startswith("official split: 1")
    )
    assert build(phantoms, tmp_path / "other", [32], limit=1, dry_run=True).cautions == []


def two_patients(tree: Tree) -> Source:
    """A user's source."""
    source = read_source("table", tree, {"table": "t.csv", "label": ["Mass"]})
    return Source(images=source.images.assign(split=["train", "test"] * 6), labels=("Mass",), counts={})


def test_a_user_s_source_is_refused_likewise(leaking, tmp_path, monkeypatch):
    write_table(leaking, ["a", "a", *APART[2:]], Mass=MASS)
    monkeypatch.syspath_prepend(Path(__file__).parent)
    with pytest.raises(
        ShardError, match=r"such as image i00 \(patient a\) in train and image i01 \(patient a\) in test"
    ):
        build(leaking, tmp_path / "set", [32], source="test_cautions:two_patients")


def test_blanks_are_no_part_and_images_in_none_are_counted(tmp_path):
    parts = ["train", "train", "", "val", "", "test", "test", "train", "train", "train", "train", "train"]
    tree = write_table(tmp_path / "data", ["a", "a", "a", "b", "b", *APART[5:]], Mass=MASS, split=parts)
    done = invoke("shard", *table_arguments(tree, tmp_path / "set", "Mass"), "--split-column=split")
    assert done.exit_code == 0
    assert "images in no part (split is blank): 2" in words(done)
    assert "warning" not in done.output
    assert rows_of(tmp_path / "set")["split"].value_counts(dropna=False).to_dict() == {
        "train": 7,
        "test": 2,
        "validate": 1,
        np.nan: 2,
    }


def test_a_split_without_a_part_is_said(tmp_path):
    tree = write_table(tmp_path / "data", APART, Mass=MASS, split=["train"] * 8 + ["dev"] * 4)
    done = invoke("shard", *table_arguments(tree, tmp_path / "set", "Mass"), "--split-column=split")
    assert done.exit_code == 0
    assert (
        "warning: official split: no image is in test; `cxrfast train` needs train, validate, test, or --split fo"
        in words(done)
    )


def test_relabel_stage_and_repair_keep_the_split(tmp_path):
    tree = write_table(tmp_path / "data", APART, Mass=MASS, split=PARTS)
    options = {"table": "t.csv", "label": ["Mass"], "split_column": "split"}
    build(tree, tmp_path / "set", [32], source="table", source_options=options)
    split = rows_of(tmp_path / "set")["split"].tolist()
    assert sorted(split) == sorted(["train"] * 6 + ["validate"] * 3 + ["test"] * 3)
    new = pd.DataFrame({"image_id": [f"i{n:02d}" for n in range(12)], "Nodule": MASS})
    new.to_csv(tmp_path / "new.csv", index=False)
    relabel(tmp_path / "set", tmp_path / "new.csv")
    stage(str(tmp_path / "set"), str(tmp_path / "copy"))
    for folder in ("set", "copy"):
        assert rows_of(tmp_path / folder)["split"].tolist() == split
        assert read_set(tmp_path / folder).source_options == options


# Folds of the user's own


def folds_tree(tree: Path, folds: list, patients: list[str] | None = None) -> Path:
    return write_table(
        tree, patients or [f"p{n:02d}" for n in range(len(folds))], Mass=[n % 2 for n in range(len(folds))], part=folds
    )


OWN = [f"fold{n % 5}" for n in range(30)]
OPTIONS = {"source": "table", "source_options": {"table": "t.csv", "label": ["Mass"], "split_column": "part"}}


def test_folds_of_the_user_s_own_become_the_set_s(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tree = folds_tree(tmp_path / "data", OWN)
    build(tree, tmp_path / "set", [32], **OPTIONS)
    rows, info = rows_of(tmp_path / "set"), read_set(tmp_path / "set")
    assert info.own_folds
    assert [f"fold{fold}" for fold in rows.sort_values("image_id")["fold"]] == OWN
    assert (rows["block"] == deal(rows["patient_id"].tolist(), 0, rows["fold"].to_numpy())[1]).all()
    assert rows["split"].isna().all()
    assert verify(tmp_path / "set", deep=True).problems == []
    assert "Folds are the source's own." in words(invoke("describe", tmp_path / "set"))
    (tmp_path / "set" / "rows.parquet").write_bytes(b"damaged")
    repair(tmp_path / "set", Tree(tree))
    assert verify(tmp_path / "set").problems == []
    pd.testing.assert_frame_equal(rows_of(tmp_path / "set"), rows)


@pytest.mark.slow
def test_other_folds_are_another_set(tmp_path):
    """Runs of two sets with one id would be joined, and their test parts might overlap."""
    ids = []
    for name, folds in (("own", OWN), ("other", [*OWN[1:], OWN[0]]), ("dealt", ["train", "val", "test"] * 10)):
        tree = folds_tree(tmp_path / name, folds)
        build(tree, tmp_path / f"{name}-set", [32], **OPTIONS)
        ids.append(read_set(tmp_path / f"{name}-set").id)
    assert len(set(ids)) == 3
    for name in ("other", "dealt"):
        with pytest.raises(ShardError, match=r"was built from other input \(its images or folds differ\)"):
            build(tmp_path / name, tmp_path / "own-set", [64], **OPTIONS)
    with pytest.raises(ShardError, match=r"its images or folds differ"):
        build(tmp_path / "own", tmp_path / "dealt-set", [64], **OPTIONS)


def test_folds_that_were_changed_in_a_set_are_a_problem(tmp_path):
    build(folds_tree(tmp_path / "data", OWN), tmp_path / "set", [32], **OPTIONS)
    folder, info = tmp_path / "set", read_set(tmp_path / "set")
    for column, what in (("fold", "does not match the set id"), ("block", "assigns patients to other folds")):
        copy = Path(shutil.copytree(folder, tmp_path / column))
        rows = rows_of(folder)
        rows[column] = np.roll(rows[column], 1)
        write_rows(copy / "rows.parquet", rows, info)
        sign(copy)
        assert what in verify(copy).problems[0].what


def sign(folder: Path) -> None:
    """Sign rows.parquet as it is now."""
    from cxrfast.files import sha256
    from cxrfast.shards.format.checksums import listed_sums, sums_bytes

    sums = listed_sums(folder) | {"rows.parquet": sha256(folder / "rows.parquet")}
    (folder / "SHA256SUMS").write_bytes(sums_bytes(sums))


def test_a_patient_in_two_folds_is_refused_unless_allowed(tmp_path):
    tree = folds_tree(tmp_path / "data", OWN, ["a", "a", *(f"p{n:02d}" for n in range(2, 30))])
    with pytest.raises(ShardError, match=r"line 2 \(patient a\) in fold 0 and line 3 \(patient a\) in fold 1"):
        build(tree, tmp_path / "set", [32], **OPTIONS)
    report = build(tree, tmp_path / "set", [32], allow_shared_patients=True, **OPTIONS)
    assert report.cautions[0].startswith("folds: 1 patient with 2 images is in more than one part, such as row ")
    assert verify(tmp_path / "set").problems == []


def test_a_set_whose_folds_the_seed_decides_says_nothing_about_them(tmp_path):
    """As the sets of earlier versions, which know no other folds."""
    tree = write_table(tmp_path / "data", APART, Mass=MASS)
    build(tree, tmp_path / "set", [32], source="table", source_options={"table": "t.csv", "label": ["Mass"]})
    assert "own_folds" not in json.loads((tmp_path / "set" / "set.json").read_text())
    assert read_set(tmp_path / "set").own_folds is False


# Blank labels


def test_a_label_that_is_blank_everywhere_is_said_by_shard_and_describe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tree = write_table(tmp_path / "data", APART, Mass=MASS, Edema=[""] * 12, Hernia=["", "0"] * 6)
    warning = "warning: blank for every image: Edema; such a label is trained as negative everywhere, unless `cxrfast train --blank"
    assert warning in words(invoke("shard", *table_arguments(tree, tmp_path / "set", "Mass", "Edema", "Hernia")))
    assert warning in words(invoke("describe", tmp_path / "set"))


def test_a_set_keeps_its_paths_studies_and_views_too_and_says_so(tmp_path):
    studies, views = [f"s{n}" for n in range(12)], ["PA"] * 12
    ids = [f"a{n:02d}" for n in range(12)]
    data = write_table(tmp_path / "data", APART, Mass=MASS, study=studies, view=views, id=ids)
    more = ["--study-column=study", "--view-column=view", "--image-column=id"]
    command = ["shard", *table_arguments(data, tmp_path / "set", "Mass"), *more]
    assert "the set keeps" not in words(invoke(*command)) + words(invoke(*command))
    before = rows_of(tmp_path / "set")
    write_table(
        data, APART, Mass=[1 - MASS[0], *MASS[1:]], study=["s99", *studies[1:]], view=["AP", *views[1:]], id=ids
    )
    table = pd.read_csv(data / "t.csv", dtype=str)
    table.loc[:1, "path"] = table.loc[1::-1, "path"].tolist()
    table.to_csv(data / "t.csv", index=False)
    row = before["image_id"].tolist().index
    first = f"(first: row {row('a00')})"
    expected = (
        f"warning: the tables now give other labels for 1 image {first}, other views for 1 image {first}, other studies "
        f"for 1 image {first}, other paths for 2 images (first: row {min(row('a00'), row('a01'))}), and the set keeps what it was "
        "built with: `cxrfast relabel` replaces labels, new views need a new --out, new studies and paths need a new --out"
    )
    assert expected in words(invoke(*command, "--dry-run"))
    assert expected in words(invoke(*command))
    pd.testing.assert_frame_equal(rows_of(tmp_path / "set"), before)


def test_a_split_that_is_named_too_late_is_said(tmp_path):
    data = write_table(tmp_path / "data", APART, Mass=MASS, split=PARTS)
    command = ["shard", *table_arguments(data, tmp_path / "set", "Mass")]
    invoke(*command)
    said = "another split for 12 images (first: row 0), and the set keeps what it was built with: a new split needs a new --out"
    assert said in words(invoke(*command, "--split-column=split"))


def test_a_set_whose_tables_have_changed_says_what_it_keeps(tmp_path):
    out = tmp_path / "set"

    def shard(*options: str, scale: int = 32) -> str:
        done = invoke(
            "shard", *table_arguments(data, out, "Mass"), "--split-column=split", f"--scale={scale}", *options
        )
        assert done.exit_code == 0, done.output
        return words(done)

    data = write_table(tmp_path / "data", APART, Mass=MASS, split=PARTS)
    assert "the set keeps" not in shard() + shard()
    write_table(data, APART, Mass=[1 - MASS[0], *MASS[1:-1], ""], split=["test", *PARTS[1:]])
    row = rows_of(out)["image_id"].tolist().index
    changed = min(row("i00"), row("i11"))
    expected = (
        f"warning: the tables now give other labels for 2 images (first: row {changed}), another split for 1 image (first: row "
        f"{row('i00')}), and the set keeps what it was built with: `cxrfast relabel` replaces labels, a new split needs a new "
        "--out"
    )
    assert expected in shard(scale=16)
    before = rows_of(out)
    relabel(out, data / "t.csv", labels=["Mass"])
    assert "another split for 1 image " in shard()
    assert "other labels" not in shard()
    assert before["split"].equals(rows_of(out)["split"])


FINDING = "Mass"


def one_label(tree: Tree) -> Source:
    """A user's source, whose label has another name in another version."""
    source = read_source("table", tree, {"table": "t.csv", "label": ["Mass"]})
    return Source(images=source.images.rename(columns={"Mass": FINDING}), labels=(FINDING,), counts={})


def test_a_source_whose_labels_have_other_names_now_says_that_the_set_keeps_its_own(tmp_path, monkeypatch):
    tree = write_table(tmp_path / "data", APART, Mass=[1, *MASS[1:]])
    monkeypatch.syspath_prepend(Path(__file__).parent)
    build(tree, tmp_path / "set", [32], source="test_cautions:one_label")
    monkeypatch.setattr(sys.modules["test_cautions"], "FINDING", "Nodule")
    report = build(tree, tmp_path / "set", [16], source="test_cautions:one_label")
    assert report.info.labels == ["Mass"]
    assert report.cautions[-1].startswith("the tables now give other labels for 12 images (first: row 0)")


def test_patients_who_are_all_one_or_differ_only_in_case_are_doubted():
    rows = pd.DataFrame({"row": range(6), "patient_id": ["Anna", "b", "anna", "Anna", "c", "B"]})
    assert doubtful_patients(rows) == [
        "4 patients have ids that differ from another's only in capital letters (first: rows 0 and 2): they are taken for "
        "different people, who may be in different folds"
    ]
    assert doubtful_patients(rows.iloc[[0, 1, 4]]) == []
    assert doubtful_patients(rows.iloc[[0]]) == []
    (one,) = doubtful_patients(rows.iloc[[0, 3]])
    assert one.startswith("all 2 images are of one patient")


def test_a_scale_that_is_refused_leaves_no_folder(tmp_path):
    data, out = write_table(tmp_path / "data", APART, Mass=MASS), tmp_path / "set"
    command = ["shard", *table_arguments(data, out, "Mass")]
    assert invoke(*command).exit_code == 0
    for name in ("i03.jpg", "i07.jpg"):
        (data / name).write_bytes((data / "i00.jpg").read_bytes())
    assert invoke(*command, "--scale=16").exit_code == 2
    assert not (out / "16").exists()
    assert verify(out).problems == []
