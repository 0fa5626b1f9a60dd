"""Runs on another set than their own: right numbers, the rules that were asked for, and no leak left unsaid."""

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from commands import invoke
from others import OTHER_LABELS, other_rows, predict_other
from runs import LABELS, make_run, read_csv
from sklearn.metrics import roc_auc_score

from cxrfast.analysis.evaluate import auroc_table, evaluate, evaluate_on, write
from cxrfast.analysis.join import join_logits
from cxrfast.analysis.mixture import fit_weights, log_odds
from cxrfast.analysis.other_set import OtherRules
from cxrfast.analysis.report import report
from cxrfast.errors import RunError
from cxrfast.runs.external import read_external
from cxrfast.runs.run import Run


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two scales × two folds with predictions on their own set and on another; a run without the latter."""
    runs = tmp_path_factory.mktemp("study")
    for scale in (256, 512):
        for fold in (0, 1):
            predict_other(make_run(runs, scale, fold))
    make_run(runs, 1024, 0)
    return runs


@pytest.fixture
def study(made, tmp_path):
    """A copy of it to change."""
    return Path(shutil.copytree(made, tmp_path / "study"))


def run_of(runs: Path, scale: int = 256, fold: int = 0) -> Run:
    return Run.open(runs / f"densenet121-{scale}" / f"fold-{fold}")


def expected_auroc(run: Run, label: str, counts: np.ndarray, positive: np.ndarray) -> float:
    logits = read_external(run, "hospital-b").logits[:, LABELS.index(label)]
    return roc_auc_score(positive[counts], logits[counts])


def test_scores_are_sklearns_of_the_shared_findings_and_every_network_scores_the_same_rows(made):
    result, rows = evaluate_on(made, "hospital-b"), other_rows()
    assert result.labels == ("Edema", "Pneumonia")
    labelled = ~rows[list(OTHER_LABELS)].isna().all(axis=1).to_numpy()
    assert labelled[7], "it has a label of a finding that the runs do not have"
    assert not labelled[8]
    for _, line in result.table.iterrows():
        positive = (rows[line["label"]] == 1).to_numpy()
        run = Run.open(made / line["name"] / f"fold-{line['fold']}")
        assert line["auroc"] == pytest.approx(expected_auroc(run, line["label"], labelled, positive), abs=1e-12)
        assert (line["positives"], line["negatives"]) == (positive.sum(), labelled.sum() - positive.sum())
    assert len(result.table) == 2 * 2 * 2
    assert result.positives == {label: (rows[label] == 1).sum() for label in result.labels}, "each row counts once"


def test_the_tables_say_what_was_compared_and_what_is_missing(made):
    result = evaluate_on(made, "hospital-b")
    text = auroc_table(result).markdown().replace("\\", "")
    for told in (
        "AUROC on hospital-b",
        "Every network scores the same 120 rows of hospital-b (set bbbbbbbb).",
        "hospital-b has no labels of Fracture, Lung Lesion.",
        "Uncertain labels: u_zeros; blank labels: negative; images without any label: left out.",
        "No patient id or image id of hospital-b is among the rows of the runs.",
        "Left out, without predictions on hospital-b (`cxrfast predict RUN SET --on hospital-b`): densenet121-1024/fold-0.",
        "over 2 folds (0, 1)",
    ):
        assert told in text
    assert "These are not the rules" not in text


def test_tables_of_another_set_leave_those_of_the_own_set_alone(study):
    evaluate(study)
    before = {p.name: p.read_bytes() for p in (study / "evaluation").iterdir()}
    done = invoke("evaluate", study, "--on", "hospital-b")
    assert done.exit_code == 0, done.output
    folder = study / "evaluation" / "on-hospital-b"
    assert f"tables: {folder}" in done.output
    assert {p.name for p in folder.iterdir()} == {"auroc.csv", "auroc_summary.csv", "auroc.md", "auroc.tex"}
    assert {p.name: p.read_bytes() for p in (study / "evaluation").iterdir() if p.is_file()} == before
    pd.testing.assert_frame_equal(
        read_csv(folder / "auroc.csv"), evaluate_on(study, "hospital-b").table, check_dtype=False
    )


@pytest.mark.parametrize(
    ("words", "counts", "positive"),
    [
        (["--policy=u_ones"], lambda raw, all_: all_, lambda raw: abs(raw) == 1),
        (["--policy=u_ignore"], lambda raw, all_: all_ & (raw != -1), lambda raw: raw == 1),
        (["--label-policy=Edema=u_ignore"], lambda raw, all_: all_ & (raw != -1), lambda raw: raw == 1),
        (["--label-policy=Pneumonia=u_ignore"], lambda raw, all_: all_, lambda raw: raw == 1),
        (["--blank=ignore"], lambda raw, all_: ~np.isnan(raw), lambda raw: raw == 1),
        (["--blank=Edema=ignore"], lambda raw, all_: ~np.isnan(raw), lambda raw: raw == 1),
        (["--unlabelled=negative"], lambda raw, all_: np.ones(len(raw), bool), lambda raw: raw == 1),
    ],
)
def test_the_labels_of_the_other_set_follow_the_rules_that_are_given(study, words, counts, positive):
    done = invoke("evaluate", study, "--on", "hospital-b", *words)
    assert done.exit_code == 0, done.output
    table = read_csv(study / "evaluation" / "on-hospital-b" / "auroc.csv")
    line = table.query("name == 'densenet121-256' and fold == 0 and label == 'Edema'").iloc[0]
    raw = other_rows()["Edema"].to_numpy()
    labelled = ~other_rows()[list(OTHER_LABELS)].isna().all(axis=1).to_numpy()
    those, are = counts(raw, labelled), positive(raw)
    assert line["positives"] + line["negatives"] == those.sum()
    assert line["auroc"] == pytest.approx(expected_auroc(run_of(study), "Edema", those, are))
    assert "These are not the rules of the runs." in " ".join(done.output.split())


def test_patients_and_images_that_the_runs_know_are_counted_by_part_and_can_be_left_out(tmp_path):
    runs = [make_run(tmp_path, 256, fold) for fold in (0, 1)]
    rows = other_rows()
    own = runs[0].rows()
    train, test = (own.loc[own["part"] == part, "patient_id"].tolist() for part in ("train", "test"))
    rows.loc[0:2, "patient_id"] = train[0]
    rows.loc[10, "patient_id"] = test[0]
    rows.loc[20, "image_id"] = own.loc[own["part"] == "val", "image_id"].iloc[0]
    for run in runs:
        predict_other(run, rows=rows)
    parts = {part: set(own.loc[own["part"] == part, "patient_id"]) for part in ("train", "val", "test")}
    counted = {part: rows["patient_id"].isin(those).sum() for part, those in parts.items()}
    note = evaluate_on(tmp_path, "hospital-b").rules
    other_parts = {part: set(runs[1].rows().query("part == @part")["patient_id"]) for part in parts}
    for part in parts:
        low, high = sorted((counted[part], rows["patient_id"].isin(other_parts[part]).sum()))
        expected = f"({low} row" if low == high else f"({low} to {high} rows"
        assert expected in note.split(f" {part} ")[1].partition(";")[0].partition(",")[0]
    assert "p0" not in note
    before = evaluate_on(tmp_path, "hospital-b")
    result = evaluate_on(tmp_path, "hospital-b", without_shared_patients=True)
    known = [0, 1, 2, 10, 20]
    kept = rows.drop(index=known)
    assert "115 rows of hospital-b" in result.rules
    assert "5 rows of patients or images that the runs know are left out (--without-shared-patients)" in result.rules
    assert result.positives["Edema"] == (kept["Edema"] == 1).sum()
    line, all_ = (r.table.query("fold == 0 and label == 'Edema'").iloc[0] for r in (result, before))
    assert line["positives"] + line["negatives"] < all_["positives"] + all_["negatives"]
    predict_other(runs[0], rows=rows.assign(patient_id=train[0]))
    predict_other(runs[1], rows=rows.assign(patient_id=train[0]))
    with pytest.raises(RunError, match="leaves no row of hospital-b"):
        evaluate_on(tmp_path, "hospital-b", without_shared_patients=True)


def test_the_ensemble_is_fitted_on_own_validation_rows_and_tested_on_the_other_set(study):
    shutil.rmtree(study / "densenet121-1024")
    done = invoke("ensemble", study, "--on", "hospital-b")
    assert done.exit_code == 0, done.output
    assert "fitted on the validation rows of the runs' own set and tested on hospital-b" in " ".join(
        done.output.split()
    )
    table = read_csv(study / "ensemble" / "on-hospital-b" / "auroc.csv")
    runs = [run_of(study, scale, 1) for scale in (256, 512)]
    weights = fit_weights(*join_logits(runs, "val"))
    mixed = log_odds(np.stack([read_external(run, "hospital-b").logits for run in runs]), weights)
    rows = other_rows()
    labelled = ~rows[list(OTHER_LABELS)].isna().all(axis=1).to_numpy()
    for label in ("Edema", "Pneumonia"):
        got = table.query("fold == 1 and label == @label and method == 'stacked'")["auroc"].item()
        positive = (rows[label] == 1).to_numpy()[labelled]
        assert got == pytest.approx(roc_auc_score(positive, mixed[labelled][:, LABELS.index(label)]))
    assert not (study / "ensemble" / "auroc.csv").exists()
    assert set(table["label"]) == {"Edema", "Pneumonia"}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda run: predict_other(run, set_id="c" * 32), "are of two sets"),
        (lambda run: predict_other(run, rows=other_rows().iloc[:50]), "predicted other rows of hospital-b"),
        (
            lambda run: predict_other(run, rows=other_rows().drop(columns="Mass")),
            "predicted other labels of hospital-b",
        ),
        (
            lambda run: predict_other(run, rows=other_rows().assign(Edema=0.0)),
            "hospital-b was relabelled between them: predict all of them again",
        ),
        (
            lambda run: predict_other(run, rows=other_rows().assign(Mass=0.0)),
            "hospital-b was relabelled between them: predict all of them again",
        ),
    ],
)
def test_predictions_that_do_not_belong_together_are_not_joined(study, spoil, message):
    spoil(run_of(study, 512, 1))
    with pytest.raises(RunError, match=message):
        evaluate_on(study, "hospital-b")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--on", "nowhere"],
            "predictions on 'nowhere' (the other sets that runs were tried on are hospital-b (4 runs))",
        ),
        (["--on", "hospital-b", "--part", "val"], "give one of them"),
        (["--policy", "u_ones"], "need --on"),
        (["--without-shared-patients"], "need --on"),
        (["--on", "hospital-b", "--policy", "u_two"], "'u_two' is unknown"),
        (["--on", "hospital-b", "--label-policy", "edema=u_ones"], "did you mean 'Edema'?"),
        (["--on", "hospital-b", "--blank", "ignore", "--unlabelled", "negative"], "would have no label that counts"),
        (["--on", "hospital-b", "--blank", "Mass=ignore"], "share are 'Edema', 'Pneumonia'"),
    ],
)
def test_options_that_do_not_fit_are_refused(made, words, message):
    done = invoke("evaluate", made, *words)
    assert done.exit_code == 2
    assert message in done.output


def test_a_set_without_a_shared_finding_cannot_be_evaluated_and_a_near_miss_is_named(tmp_path):
    run = make_run(tmp_path, 256)
    rows = other_rows().rename(columns={"Edema": "edema", "Pneumonia": "Infiltrate", "Mass": "lung_lesion"})
    predict_other(run, rows=rows)
    with pytest.raises(RunError, match="so nothing can be evaluated") as caught:
        evaluate_on(tmp_path, "hospital-b")
    assert "'Edema' of the runs is not matched, did you mean 'edema'?" in str(caught.value)
    assert "'Lung Lesion' of the runs is not matched, did you mean 'lung_lesion'?" in str(caught.value)
    predict_other(run, "bare", rows=other_rows().drop(columns=list(OTHER_LABELS)))
    with pytest.raises(RunError, match="it has no labels"):
        evaluate_on(tmp_path, "bare")


def test_another_recipe_a_partly_built_set_and_views_stand_below_the_table(tmp_path):
    run = make_run(tmp_path, 256)
    predict_other(run, recipe="resize pad, not squash", is_partial=True, views=("AP", "PA"))
    note = evaluate_on(tmp_path, "hospital-b").rules
    assert "120 rows of the views AP, PA of hospital-b (set bbbbbbbb), whose build was not finished." in note
    assert "made otherwise than those the runs were trained on: resize pad, not squash." in note


def test_rules_of_the_runs_apply_where_nothing_else_is_said(tmp_path):
    predict_other(make_run(tmp_path, 256, policy="u_ignore", label_policies=(("Edema", "u_ones"),)))
    result = evaluate_on(tmp_path, "hospital-b")
    raw, labelled = other_rows(), ~other_rows()[list(OTHER_LABELS)].isna().all(axis=1)
    line = result.table.set_index("label")
    assert line.loc["Edema", "positives"] == (raw["Edema"].abs() == 1).sum()
    assert line.loc["Pneumonia", ["positives", "negatives"]].sum() == (labelled & (raw["Pneumonia"] != -1)).sum()
    other = evaluate_on(tmp_path, "hospital-b", OtherRules(policy="u_zeros")).table.set_index("label")
    assert other.loc["Edema", "positives"] == (raw["Edema"] == 1).sum()


def test_results_on_another_set_are_not_written_through_a_link(study, tmp_path):
    result = evaluate_on(study, "hospital-b")
    (study / "evaluation").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (study / "evaluation" / "on-hospital-b").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="is a link"):
        write(study / "evaluation", result)


@pytest.mark.parametrize("command", ["ensemble", "table"])
def test_the_ensemble_and_the_table_refuse_what_evaluate_refuses(made, command):
    done = invoke(command, made, "--on", "nowhere")
    assert done.exit_code == 2
    assert "hospital-b (4 runs)" in done.output
    done = invoke(command, made, "--blank", "ignore")
    assert done.exit_code == 2
    assert "need --on" in done.output


def test_the_report_has_a_table_for_each_other_set_and_names_a_damaged_store(tmp_path):
    for scale in (32, 64):
        for fold in (0, 1):
            run = make_run(tmp_path, scale, fold)
            predict_other(run)
            predict_other(run, "hospital-c", set_id="c" * 32)
    (tmp_path / "densenet121-64" / "fold-1" / "external" / "hospital-c.parquet").write_bytes(b"damaged")
    html = report(tmp_path).read_text()
    chapter = html[html.index("<h2>External validation</h2>") :]
    chapter = chapter[: chapter.index("<h2>", 4)]
    table = evaluate_on(tmp_path, "hospital-b").table
    for line in table.groupby(["name", "label"])["auroc"].mean().dropna():
        assert f"{line:.3f}" in chapter
    assert "hospital-c.parquet" in chapter
    assert "p10000" not in html
