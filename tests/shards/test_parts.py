"""The rows and labels of a part are those that `cxrfast train` uses with the same options."""

import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from damage import copy_set

from cxrfast import EvalOrder, Loader, Reader, ShardSet
from cxrfast.errors import RunError, ShardError
from cxrfast.labels import targets
from cxrfast.shards.build import build
from cxrfast.shards.format.info import read_set
from cxrfast.shards.format.rows import write_rows
from cxrfast.shards.parts import LabelledRows
from cxrfast.splits import FOLDS, PARTS
from cxrfast.training.setup import make_config, select_rows


def options_of_train(options: dict) -> dict:
    """The options of `cxrfast train` for those of `part`."""
    given = dict(options)
    for name in ("policy", "blank"):
        if isinstance(value := given.get(name), dict):
            given["label_policies" if name == "policy" else name] = tuple(value.items())
            if name == "policy":
                del given[name]
        elif name == "blank" and value:
            given[name] = (("", value),)
    return given


def check_as_trained(part: LabelledRows, folder, options: dict) -> None:
    shards, config = ShardSet(folder), make_config(folder, 32, device="cpu", **options_of_train(options))
    with Reader(folder, 32) as reader:
        chosen = select_rows(shards.rows(), config, reader.rows)
    mine = chosen[chosen["part"] == part.name]
    assert part.rows.dtype == np.int64
    assert part.rows.tolist() == mine["row"].tolist()
    raw = mine[list(config.labels)].to_numpy(np.float32)
    target, counts = targets(raw, config.policies, config.blanks, config.unlabelled)
    assert (part.labels.shape, part.labels.dtype) == ((shards.info.images, len(config.labels)), np.float32)
    np.testing.assert_array_equal(part.labels[part.rows], np.where(counts, target, np.nan))
    others = np.setdiff1d(np.arange(shards.info.images), part.rows)
    assert np.isnan(part.labels[others]).all()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"fold": 3},
        {"split": "official"},
        {"views": ("PA", "AP")},
        {"policy": "u_ones", "blank": "ignore"},
        {"policy": {"Lung Lesion": "u_ignore", "Cardiomegaly": "u_ones"}, "blank": {"Pneumonia": "ignore"}},
        {"unlabelled": "negative"},
    ],
)
@pytest.mark.parametrize("name", PARTS)
def test_a_part_is_what_train_selects_with_the_same_options(tiny_set, name, options):
    check_as_trained(ShardSet(tiny_set).part(name, scale=32, **options), tiny_set, options)


def test_every_policy_changes_labels_of_the_phantoms(tiny_set):
    """Else the comparison above would say nothing about it."""
    shards = ShardSet(tiny_set)
    usual = shards.part("train")
    assert set(usual.labels[usual.rows].ravel()) == {0, 1}
    for options in (
        {"policy": "u_ones"},
        {"policy": "u_ignore"},
        {"blank": "ignore"},
        {"policy": {"Cardiomegaly": "u_ones"}},
    ):
        assert not np.array_equal(shards.part("train", **options).labels, usual.labels, equal_nan=True)
    assert len(shards.part("train", unlabelled="negative").rows) > len(usual.rows)


def test_parts_of_a_fold_share_no_patient_and_the_test_parts_hold_every_labelled_row_once(tiny_set):
    shards = ShardSet(tiny_set)
    table, tested = shards.rows(), []
    for fold in range(FOLDS):
        rows = {name: shards.part(name, fold=fold).rows for name in PARTS}
        patients = [set(table["patient_id"].iloc[rows[name]]) for name in PARTS]
        assert not any(a & b for a, b in zip(patients, (*patients[1:], patients[0]), strict=True))
        tested += rows["test"].tolist()
    labelled = table[shards.info.labels].notna().any(axis=1)
    assert sorted(tested) == table.loc[labelled, "row"].tolist()


def test_labels_are_looked_up_by_the_rows_of_a_batch(tiny_set):
    part = ShardSet(tiny_set).part("val", scale=32)
    labels, raw = torch.from_numpy(part.labels), ShardSet(tiny_set).rows()[ShardSet(tiny_set).info.labels]
    with Reader(tiny_set, 32) as reader:
        loader = Loader(reader, EvalOrder(rows=part.rows, micro_batch=4), threads=1)
        batches = list(loader)
    assert len(batches) == len(loader) == -(-len(part.rows) // 4)
    for batch in batches:
        assert labels[batch.row].tolist() == (raw.iloc[batch.row.tolist()] == 1).to_numpy().astype(float).tolist()


def test_rows_that_are_not_built_are_left_out_and_that_is_said(folder, caplog):
    shards = ShardSet(folder)
    whole = shards.part("train").rows
    assert not caplog.records
    shards.path(32, 2, "json").unlink()
    left = set(whole) - set(shards.info.rows_of(2))
    with caplog.at_level(logging.WARNING):
        assert set(shards.part("train", scale=32).rows) == set(shards.part("train").rows) == left < set(whole)
    assert f"{folder}: 2 of 3 shards are built at 32 px; the rows of the others are left out" in caplog.text
    check_as_trained(shards.part("test", scale=32), folder, {})
    assert shards.part("train", scale=64).rows.tolist() == whole.tolist()


def test_the_split_of_a_set_that_was_built_with_one_is_used(folder):
    info = replace(read_set(folder), source_options={"split_column": "part"})
    write_rows(folder / "rows.parquet", ShardSet(folder).rows(), info)
    check_as_trained(ShardSet(folder).part("val", scale=32), folder, {"split": "official"})
    check_as_trained(
        ShardSet(folder).part("val", scale=32, split="folds", fold=2), folder, {"split": "folds", "fold": 2}
    )
    with pytest.raises(RunError, match="built with --split-column, and its split is used, which has no folds"):
        ShardSet(folder).part("val", fold=2)


def changed(folder, **columns) -> ShardSet:
    """The set with other values in columns of its table."""
    write_rows(folder / "rows.parquet", ShardSet(folder).rows().assign(**columns), read_set(folder))
    return ShardSet(folder)


def test_a_part_without_rows_is_an_error_that_names_it(folder):
    shards = changed(folder, split="train")
    assert len(shards.part("train", split="official").rows) > 100
    for name, lacking in (("val", "no val and no test rows"), ("test", "no val and no test rows")):
        with pytest.raises(RunError, match=f"the set's own split has {lacking}"):
            shards.part(name, split="official")
    shards = changed(folder, view=np.where(shards.rows()["fold"] == 1, "PA", "LATERAL"))
    assert len(shards.part("test", fold=1, views=["PA"]).rows)
    with pytest.raises(
        RunError, match="split folds, fold 1, views PA: the train part has no rows among the 150 of 150"
    ):
        shards.part("train", fold=1, views="PA")


def test_a_patient_in_two_parts_is_refused(folder):
    shards = changed(folder, patient_id="one")
    with pytest.raises(RunError, match=r"1 patient with .* images is in more than one part.*--allow-shared-patients"):
        shards.part("train")
    assert len(shards.part("train", allow_shared_patients=True).rows)


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"name": "validation"}, RunError, "part 'validation' is unknown: use one of train, val, test"),
        ({"fold": 5}, RunError, "--fold 5 does not exist: folds are 0 to 4"),
        ({"fold": -1}, RunError, "--fold -1 does not exist"),
        ({"fold": 1, "split": "official"}, RunError, "--fold 1 with --split official"),
        ({"split": "patients"}, RunError, "split 'patients' is unknown"),
        ({"scale": 48}, ShardError, r"holds no shards at 48 px \(scales there: 32, 64\)"),
        ({"views": ("frontal",)}, RunError, "--view 'frontal': no image of the set has this view position"),
        ({"policy": "u_zero"}, RunError, "label policy 'u_zero' is unknown"),
        ({"policy": {"Oedema": "u_ones"}}, RunError, "the set has no label 'Oedema': its labels are 'Atelectasis', "),
        ({"blank": "drop"}, RunError, "policy for blank labels 'drop' is unknown"),
        ({"unlabelled": "negatives"}, RunError, "policy for images without any label 'negatives' is unknown"),
        ({"unlabelled": "negative", "blank": "ignore"}, RunError, "images without any label would have no label"),
    ],
)
def test_options_that_mean_nothing_are_named(tiny_set, options, error, says):
    with pytest.raises(error, match=says):
        ShardSet(tiny_set).part(**{"name": "train", **options})


def test_a_row_in_quarantine_is_in_no_part(tmp_path, phantoms):
    tree = copy_set(phantoms, tmp_path / "tree")
    (image,) = sorted(tree.rglob("*.jpg"))[:1]
    image.write_bytes(b"no image")
    build(tree, tmp_path / "set", [32], workers=1)
    shards = ShardSet(tmp_path / "set")
    (row,) = set(range(150)) - set(shards.held(32))
    everywhere = [shards.part(name, unlabelled="negative").rows for name in PARTS]
    assert sorted(np.concatenate(everywhere)) == sorted(set(range(150)) - {row})
