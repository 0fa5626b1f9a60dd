"""The long table of predictions: the same numbers as the tables of `evaluate`, for every image and finding."""

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from commands import invoke
from others import OTHER_LABELS, other_rows, predict_other
from runs import LABELS, make_run, read_csv, study_rows
from sklearn.metrics import roc_auc_score

from cxrfast.analysis import table as tables
from cxrfast.analysis.ensemble import ensemble
from cxrfast.analysis.evaluate import evaluate, evaluate_on
from cxrfast.analysis.table import write_table
from cxrfast.errors import RunError

HEAD = ["row", "image_id", "part", "fold", "label", "raw", "target", "counts"]
SCORES = [
    f"{kind}_{name}" for name in ("densenet121-256", "densenet121-512", "ensemble") for kind in ("logit", "probability")
]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two scales × two folds with predictions on their own set and on another; fold 2 of one scale only."""
    runs = tmp_path_factory.mktemp("study")
    for scale, folds in {256: (0, 1, 2), 512: (0, 1)}.items():
        for fold in folds:
            predict_other(make_run(runs, scale, fold, policy="u_ignore"))
    return runs


def auroc_from(table: pd.DataFrame, column: str, fold: int, label: str) -> float:
    lines = table[(table["fold"] == fold) & (table["label"] == label) & table["counts"]]
    if lines["target"].nunique() < 2:
        return np.nan
    return float(roc_auc_score(lines["target"], lines[column]))


@pytest.mark.parametrize("part", ["val", "test"])
@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_scores_computed_from_the_table_are_those_of_evaluate_and_ensemble(made, tmp_path, part, suffix):
    out = tmp_path / f"t.{suffix}"
    written = write_table(made, out, part)
    table = pd.read_csv(out) if suffix == "csv" else pd.read_parquet(out)
    assert list(table.columns) == [*HEAD, *SCORES]
    assert len(table) == written.lines == 3 * 60 * len(LABELS)
    evaluate(made, part)
    scores = read_csv(made / "evaluation" / ("auroc.csv" if part == "test" else "auroc-val.csv"))
    for line in scores.itertuples():
        got = auroc_from(table, f"logit_{line.name}", line.fold, line.label)
        assert got == pytest.approx(line.auroc, abs=1e-12, nan_ok=True)
    if part == "test":
        stacked = ensemble(made).auroc.query("method == 'stacked'")
        for line in stacked.itertuples():
            got = auroc_from(table, "logit_ensemble", line.fold, line.label)
            assert got == pytest.approx(line.auroc, abs=1e-12, nan_ok=True)


def test_a_line_holds_the_image_its_raw_label_the_target_and_all_scores(made, tmp_path):
    write_table(made, tmp_path / "t.parquet")
    table = pd.read_parquet(tmp_path / "t.parquet")
    for fold in (0, 1, 2):
        rows = study_rows(fold).query("part == 'test'")
        mine = table[table["fold"] == fold]
        assert mine["row"].tolist() == np.repeat(rows["row"], len(LABELS)).tolist()
        assert mine["image_id"].tolist() == np.repeat(rows["image_id"], len(LABELS)).tolist()
        assert mine["label"].tolist() == list(LABELS) * len(rows)
        raw = rows[list(LABELS)].to_numpy().ravel()
        np.testing.assert_array_equal(mine["raw"].astype(float), raw)
        blank = np.repeat(rows[list(LABELS)].isna().all(axis=1), len(LABELS))
        counts = (raw != -1) & ~blank.to_numpy()
        np.testing.assert_array_equal(mine["counts"], counts)
        np.testing.assert_array_equal(mine["target"].isna(), ~counts)
        np.testing.assert_array_equal(mine["target"][counts].astype(int), raw[counts] == 1)
    probability = 1 / (1 + np.exp(-table["logit_densenet121-256"].astype(float)))
    np.testing.assert_allclose(table["probability_densenet121-256"], probability)
    in_third = table["fold"] == 2
    for name in ("densenet121-512", "ensemble"):
        np.testing.assert_array_equal(table[f"logit_{name}"].isna(), in_third)
        np.testing.assert_array_equal(table[f"probability_{name}"].isna(), in_third)


def test_another_set_has_every_finding_and_those_without_labels_do_not_count(made, tmp_path):
    done = invoke("table", made, "--on", "hospital-b", "--policy", "u_ones", "--out", tmp_path / "t.csv")
    assert done.exit_code == 0, done.output
    table = pd.read_csv(tmp_path / "t.csv")
    assert set(table["part"]) == {"hospital-b"}
    assert len(table) == 3 * 120 * len(LABELS)
    absent = table["label"].isin(["Fracture", "Lung Lesion"])
    assert not table["counts"][absent].any()
    assert table[["raw", "target"]][absent].isna().all(axis=None)
    assert table.loc[absent, "logit_densenet121-256"].notna().all()
    rows = other_rows()
    labelled = ~rows[list(OTHER_LABELS)].isna().all(axis=1)
    edema = table[(table["label"] == "Edema") & (table["fold"] == 1)]
    np.testing.assert_array_equal(edema["counts"], labelled)
    assert edema["target"].sum() == (rows["Edema"].abs() == 1).sum()
    scores = evaluate_on(made, "hospital-b", tables.OtherRules(policy="u_ones"))
    for line in scores.table.itertuples():
        got = auroc_from(table, f"logit_{line.name}", line.fold, line.label)
        assert got == pytest.approx(line.auroc, abs=1e-12)
    stacked = ensemble(made, on="hospital-b", rules=tables.OtherRules(policy="u_ones")).auroc.query(
        "method == 'stacked'"
    )
    assert len(stacked) == 4
    for line in stacked.itertuples():
        assert auroc_from(table, "logit_ensemble", line.fold, line.label) == pytest.approx(line.auroc, abs=1e-12)


def test_a_set_without_labels_has_its_probabilities(tmp_path):
    predict_other(make_run(tmp_path, 256), "bare", other_rows().drop(columns=list(OTHER_LABELS)))
    written = write_table(tmp_path, on="bare")
    assert written.path == tmp_path / "evaluation" / "on-bare" / "predictions.csv"
    table = pd.read_csv(written.path)
    assert len(table) == 120 * len(LABELS)
    assert not table["counts"].any()
    assert table["probability_densenet121-256"].between(0, 1).all()


def test_blocks_change_no_byte_and_neither_does_a_second_time(made, tmp_path, monkeypatch):
    for name in ("a.csv", "b.csv"):
        write_table(made, tmp_path / name)
    monkeypatch.setattr(tables, "BLOCK", 7)
    write_table(made, tmp_path / "c.csv")
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes() == (tmp_path / "c.csv").read_bytes()


def test_patients_are_listed_only_if_asked_for(made, tmp_path):
    write_table(made, tmp_path / "without.csv")
    write_table(made, tmp_path / "with.csv", patient_ids=True)
    assert "patient_id" not in pd.read_csv(tmp_path / "without.csv")
    table = pd.read_csv(tmp_path / "with.csv")
    rows = study_rows(0).set_index("row")
    assert table["patient_id"].tolist() == rows.loc[table["row"], "patient_id"].tolist()


def test_the_default_file_depends_on_the_part_and_notes_say_what_is_missing(made, tmp_path):
    runs = Path(shutil.copytree(made, tmp_path / "study"))
    shutil.rmtree(runs / "densenet121-512")
    make_run(runs, 1024, quality=None)
    for words, name in (([], "predictions.csv"), (["--part", "val"], "predictions-val.csv")):
        done = invoke("table", runs, *words)
        assert done.exit_code == 0, done.output
        assert (runs / "evaluation" / name).exists()
        assert f"720 lines: {runs / 'evaluation' / name}" in done.output
        assert "left out, without predictions: densenet121-1024/fold-0" in done.output
        assert "without an ensemble: an ensemble needs predictions of one architecture at two scales" in done.output


@pytest.mark.parametrize("name", ["t.txt", "t", "t.xlsx"])
def test_another_kind_of_file_is_refused(made, tmp_path, name):
    with pytest.raises(RunError, match=r"ends in \.csv or \.parquet"):
        write_table(made, tmp_path / name)
    assert not (tmp_path / name).exists()


def test_an_id_that_is_a_formula_is_text_in_a_spreadsheet_and_itself_in_parquet(tmp_path):
    """Earlier versions let such ids into sets."""
    rows = study_rows(0)
    rows.loc[0, "image_id"] = "=1+1"
    make_run(tmp_path, 256, rows=rows)
    write_table(tmp_path, tmp_path / "t.csv")
    write_table(tmp_path, tmp_path / "t.parquet")
    assert pd.read_csv(tmp_path / "t.csv").query("row == 0")["image_id"].unique() == ["'=1+1"]
    assert pd.read_parquet(tmp_path / "t.parquet").query("row == 0")["image_id"].unique() == ["=1+1"]


def test_a_table_that_fails_leaves_the_one_that_was_there(made, tmp_path):
    runs = Path(shutil.copytree(made, tmp_path / "study"))
    write_table(runs, tmp_path / "t.csv")
    before = (tmp_path / "t.csv").read_bytes()
    shutil.rmtree(runs / "densenet121-512" / "fold-1" / "predictions.zarr" / "test" / "logits" / "c")
    with pytest.raises(RunError, match="has lost values"):
        write_table(runs, tmp_path / "t.csv")
    assert (tmp_path / "t.csv").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir() if "tmp" in p.name] == []
