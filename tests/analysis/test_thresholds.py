"""Thresholds of a study: chosen on validation rows alone, kept with the runs, and counted on test rows."""

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from commands import invoke
from runs import LABELS, make_run, predict, read_csv, shown, study_rows
from sklearn.metrics import confusion_matrix

from cxrfast.analysis import mixture
from cxrfast.analysis.answers import read_answers
from cxrfast.analysis.join import join_logits
from cxrfast.analysis.report import report
from cxrfast.analysis.thresholds import (
    FEW,
    RATIOS,
    ThresholdResult,
    choose_thresholds,
    ensemble_thresholds,
    evaluate_thresholds,
    thresholds_table,
)
from cxrfast.errors import RunError
from cxrfast.runs.run import Run
from cxrfast.thresholds import YOUDEN, Rule, choose

SCALES = {256: 0.3, 1024: 0.4, 2048: 2.0}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three scales × two folds with thresholds by Youden. No Fracture; no Lung Lesion in the validation rows."""
    runs = tmp_path_factory.mktemp("study")
    for fold in (0, 1):
        for scale, quality in SCALES.items():
            make_run(runs, scale, fold, quality=quality)
    choose_thresholds(runs)
    return runs


@pytest.fixture(scope="module")
def result(made: Path) -> ThresholdResult:
    return evaluate_thresholds(made)


@pytest.fixture
def study(made: Path, tmp_path: Path) -> Path:
    """A copy of the runs to change."""
    return Path(shutil.copytree(made, tmp_path / "study"))


def files(runs: Path) -> dict[str, bytes]:
    return {str(path.relative_to(runs)): path.read_bytes() for path in runs.rglob("thresholds.json")}


def test_each_run_gets_the_thresholds_of_its_own_validation_rows(made: Path) -> None:
    found = Run.find(made)
    assert len(found) == 6
    for run in found:
        val = read_answers(run, "val")
        assert run.read_thresholds() == choose(val.logits, *val.targets())


def test_counts_and_ratios_are_scikit_learns_at_the_stored_threshold(made: Path, result: ThresholdResult) -> None:
    run = Run.open(made / "densenet121-1024" / "fold-1")
    thresholds = run.read_thresholds()
    for part in ("val", "test"):
        answers = read_answers(run, part)
        targets, mask = answers.targets()
        for j in (0, 3):
            positive = answers.logits[mask[:, j], j] >= thresholds.logits[j]
            tn, fp, fn, tp = confusion_matrix(targets[mask[:, j], j], positive).ravel()
            (line,) = result.table.query(
                f"name == 'densenet121-1024' and fold == 1 and label == '{LABELS[j]}'"
            ).to_dict("records")
            assert [line[f"{part}_{name}"] for name in ("tp", "fp", "tn", "fn")] == [tp, fp, tn, fn]
            ratios = [tp / (tp + fn), tn / (tn + fp), tp / (tp + fp), tn / (tn + fn)]
            assert [line[f"{part}_{name}"] for name in RATIOS] == pytest.approx(ratios)
            assert (line[f"{part}_positives"], line[f"{part}_negatives"]) == (tp + fn, tn + fp)


def test_the_ensembles_thresholds_are_those_of_each_folds_stacked_log_odds(made: Path, result: ThresholdResult) -> None:
    for fold in (0, 1):
        runs = [Run.open(made / f"densenet121-{scale}" / f"fold-{fold}") for scale in SCALES]
        logits, targets, mask = join_logits(runs, "val")
        fitted = mixture.fit_weights(logits, targets, mask)
        expected = choose(mixture.log_odds(logits, fitted), targets, mask)
        weights, found = ensemble_thresholds(runs, YOUDEN)
        np.testing.assert_array_equal(weights, fitted)
        assert found == expected
        lines = result.table.query("name == 'ensemble' and fold == @fold")
        np.testing.assert_array_equal(lines["threshold_logit"], expected.array)
        verdicts = expected.verdicts(mixture.log_odds(join_logits(runs, "test")[0], fitted))
        assert lines["test_tp"].iloc[0] == (verdicts[:, 0] * join_logits(runs, "test")[1][:, 0]).sum()


def test_the_ensemble_of_one_scale_is_that_scale(made: Path) -> None:
    run = Run.open(made / "densenet121-256" / "fold-0")
    weights, found = ensemble_thresholds([run], YOUDEN)
    assert found == run.read_thresholds()
    np.testing.assert_array_equal(weights, 1.0)


@pytest.mark.parametrize("rule", ["youden", "sensitivity=0.9", "specificity=0.95"])
def test_no_test_row_enters_the_choice(study: Path, rule: str) -> None:
    for scale in SCALES:
        shutil.rmtree(study / f"densenet121-{scale}" / "fold-1")  # whose other rows these are
    choose_thresholds(study, Rule.parse(rule))
    before, lines = files(study), evaluate_thresholds(study).table
    for run in Run.find(study):
        rows = run.rows()
        is_test = rows["part"] == "test"
        rows.loc[is_test, list(LABELS)] = 1 - rows.loc[is_test, list(LABELS)].clip(0, 1)
        rows.to_parquet(run.rows_path, index=False)
        val, test = run.read_predictions("val"), run.read_predictions("test")
        test.logits[:] = -test.logits[::-1] + 1
        run.write_predictions({"val": val, "test": test})
    choose_thresholds(study, Rule.parse(rule))
    assert files(study) == before
    after = evaluate_thresholds(study).table
    chosen = [name for name in lines if "test" not in name]
    pd.testing.assert_frame_equal(after[chosen], lines[chosen])
    assert not after["test_tp"].equals(lines["test_tp"])


def test_changed_validation_labels_do_change_the_choice(study: Path) -> None:
    before = files(study)
    for run in Run.find(study):
        rows = run.rows()
        is_val = rows["part"] == "val"
        rows.loc[is_val, "Edema"] = 1 - rows.loc[is_val, "Edema"].clip(0, 1)
        rows.to_parquet(run.rows_path, index=False)
    choose_thresholds(study)
    assert all(files(study)[name] != content for name, content in before.items())


def test_entries_that_the_policies_leave_out_do_not_count(tmp_path: Path) -> None:
    run = make_run(tmp_path, 256, policy="u_ignore", label_policies=(("Pneumonia", "u_ones"),), blank=(("", "ignore"),))
    choose_thresholds(tmp_path)
    raw = run.rows().query("part == 'val'").sort_values("row")[list(LABELS)].to_numpy()
    thresholds = run.read_thresholds()
    assert thresholds.positives[0] == (raw[:, 0] == 1).sum()
    assert thresholds.negatives[0] == (raw[:, 0] == 0).sum()
    assert thresholds.positives[3] == np.isin(raw[:, 3], (1, -1)).sum()
    assert thresholds.negatives[3] == (raw[:, 3] == 0).sum()


def test_the_table_says_what_was_chosen_and_what_was_not(made: Path, result: ThresholdResult) -> None:
    terminal = shown(thresholds_table(result), 140)
    for text in (
        "Thresholds by the rule youden, chosen on validation rows; mean over 2 folds (0, 1)",
        "ensemble",
        "2048 px",
        "PPV and NPV hold for the prevalence among the test rows",
        "No verdict, since no validation row is positive: Fracture (folds 0, 1), Lung Lesion (folds 0, 1).",
        f"§ Fewer than {FEW} validation positives or negatives",
        "Edema (16 positives in fold 0)",
    ):
        assert " ".join(text.split()) in " ".join(terminal.split())
    assert "Fracture§" not in terminal
    lines = result.table.query("name == 'densenet121-256' and label == 'Edema'")
    cells = thresholds_table(result).rows[0]
    assert cells[:2] == ["Edema§", "256 px"]
    logit = lines["threshold_logit"].mean()
    assert cells[2] == f"{1 / (1 + np.exp(-logit)):.3f}"
    assert cells[5].text == f"{lines['test_sensitivity'].mean():.3f}"
    assert cells[9] == "/".join(str(lines[f"test_{name}"].sum()) for name in ("tp", "fp", "tn", "fn"))


def test_files_hold_the_result_and_the_same_bytes_every_time(study: Path) -> None:
    result, folder = evaluate_thresholds(study), study / "evaluation"
    table = read_csv(folder / "thresholds.csv")
    assert list(table) == list(result.table)
    assert len(table) == (3 + 1) * 2 * len(LABELS)
    assert table.query("label == 'Fracture'")[["threshold", "test_tp", "test_sensitivity"]].isna().all(axis=None)
    assert table.query("name == 'ensemble'")["scale"].isna().all()
    for name in ("thresholds.md", "thresholds.tex"):
        text = (folder / name).read_text()
        assert "Edema" in text
        assert "±" in text
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert set(before) == {"thresholds.csv", "thresholds.md", "thresholds.tex"}
    evaluate_thresholds(study)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_threshold_that_only_some_folds_have_says_so(tmp_path: Path) -> None:
    for fold in (0, 1):
        rows = study_rows(fold)
        if fold == 1:
            rows.loc[rows["part"] == "val", "Edema"] = 0.0
        make_run(tmp_path, 256, fold, rows)
    with pytest.raises(RunError, match="labels of shared rows differ"):  # the runs of one study have the same labels
        choose_thresholds(tmp_path), evaluate_thresholds(tmp_path)
    shutil.rmtree(tmp_path / "densenet121-256")
    for fold in (0, 1):
        run = make_run(tmp_path, 256, fold, quality=1.0)
        if fold == 1:  # ranks Edema backwards on validation rows
            val, test = run.read_predictions("val"), run.read_predictions("test")
            val.logits[:, 0] = -10 * (read_answers(run, "val").targets()[0][:, 0])
            run.write_predictions({"val": val, "test": test})
    choose_thresholds(tmp_path)
    terminal = " ".join(shown(thresholds_table(evaluate_thresholds(tmp_path)), 200).split())
    assert "(1 of 2 folds)" in terminal
    assert "no threshold is better than chance (J > 0): Edema, 256 px (fold 1)." in terminal


def test_without_a_rule_the_runs_keep_theirs_and_mixed_rules_are_refused(study: Path) -> None:
    choose_thresholds(study, Rule.parse("sensitivity=0.9"))
    choose_thresholds(study)
    assert evaluate_thresholds(study).rule == Rule.parse("sensitivity=0.9")
    assert (evaluate_thresholds(study).table["val_sensitivity"].dropna() >= 0.9).all()
    one = Run.open(study / "densenet121-256" / "fold-0")
    val = read_answers(one, "val")
    one.write_thresholds(choose(val.logits, *val.targets()), len(val.row))
    before = files(study)
    for refused in (choose_thresholds, evaluate_thresholds):
        with pytest.raises(RunError, match=r"by different rules: .* --rule"):
            refused(study)
    assert files(study) == before
    choose_thresholds(study, YOUDEN)
    assert evaluate_thresholds(study).rule == YOUDEN


def test_nothing_is_written_while_another_process_writes_into_a_run_or_if_one_run_is_damaged(study: Path) -> None:
    before, runs = files(study), Run.find(study)
    with runs[-1].lock("predicting"), pytest.raises(RunError, match=r"is in use .*predicting"):
        choose_thresholds(study, Rule.parse("sensitivity=0.5"))
    assert files(study) == before
    predict(runs[-1], 1.0, drop=3)
    with pytest.raises(RunError, match="3 have no prediction"):
        choose_thresholds(study, Rule.parse("sensitivity=0.5"))
    assert files(study) == before
    assert not list(study.rglob("lease.lock"))


def test_runs_without_thresholds_are_named_with_the_command(study: Path) -> None:
    (study / "densenet121-1024" / "fold-1" / "thresholds.json").unlink()
    with pytest.raises(RunError, match=r"densenet121-1024/fold-1 has no thresholds: .*`cxrfast thresholds .*study`"):
        evaluate_thresholds(study)


def test_what_makes_no_ensemble_has_none_and_says_so_where_one_is_expected(study: Path, tmp_path: Path) -> None:
    make_run(tmp_path / "one", 256)
    choose_thresholds(tmp_path / "one")
    single = evaluate_thresholds(tmp_path / "one")
    assert single.ensemble is None
    assert single.notes == ()
    make_run(study, 256, arch="resnet50")
    make_run(study, 512, arch="resnet50")
    choose_thresholds(study)
    several = evaluate_thresholds(study)
    assert several.ensemble is None
    assert "No ensemble; `cxrfast ensemble` says why." in several.notes


def test_folds_that_not_every_scale_has_are_left_out_of_the_means(study: Path) -> None:
    make_run(study, 256, 2)
    choose_thresholds(study)
    result = evaluate_thresholds(study)
    assert set(result.lines["fold"]) == {0, 1}
    assert set(result.table["fold"]) == {0, 1, 2}
    assert "Left out, since not every scale has them: densenet121-256: 1 fold (2)." in result.notes


def test_a_group_called_ensemble_is_not_mixed_up_with_the_ensemble(study: Path) -> None:
    for fold in (0, 1):
        make_run(study, 512, fold, name="ensemble")
    choose_thresholds(study)
    result = evaluate_thresholds(study)
    assert result.ensemble == "stacked ensemble"
    assert len(result.table.query("name == 'ensemble'")) == len(result.table.query("name == 'stacked ensemble'"))


def test_unfinished_runs_are_marked_or_left_out(study: Path) -> None:
    for fold in (0, 1):
        Run.open(study / "densenet121-256" / f"fold-{fold}").set_state("running", epoch=1)
    assert "256 px‡" in shown(thresholds_table(evaluate_thresholds(study)), 140)
    result = evaluate_thresholds(study, finished_only=True)
    assert "densenet121-256" not in result.names
    assert "Left out, unfinished: densenet121-256/fold-0, densenet121-256/fold-1." in result.notes


# The command and the report


def test_the_command_chooses_writes_and_shows(study: Path) -> None:
    done = invoke("thresholds", study, "--rule", "specificity=0.95")
    assert done.exit_code == 0, done.output
    assert "Thresholds by the rule specificity=0.95" in done.output
    assert f"tables: {study / 'evaluation'}" in done.output
    assert {run.read_thresholds().rule for run in Run.find(study)} == {Rule.parse("specificity=0.95")}
    assert "specificity=0.95" in invoke("thresholds", study).output


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--rule=best"], "'best' is not a rule for thresholds: use youden, sensitivity=VALUE or specificity=VALUE"),
        (["--rule=sensitivity=90"], "above 0 and at most 1"),
        (["--rule=sensitivity"], "needs a value"),
        (["--rule="], "is not a rule"),
    ],
)
def test_a_rule_that_is_none_is_one_message(study: Path, words: list[str], why: str) -> None:
    before = files(study)
    done = invoke("thresholds", study, *words)
    assert done.exit_code == 2
    assert why in " ".join(done.stderr.split())
    assert files(study) == before


def test_runs_without_predictions_are_one_message(tmp_path: Path) -> None:
    make_run(tmp_path, 256, quality=None)
    done = invoke("thresholds", tmp_path)
    assert done.exit_code == 2
    assert "the only run in" in done.stderr
    assert "cxrfast predict" in done.stderr


def test_the_report_shows_the_thresholds_or_how_to_choose_them(study: Path) -> None:
    def chapter() -> str:
        return report(study).read_text().split("<h2>Thresholds</h2>")[1].split("</section>")[0]

    text = chapter()
    assert "Thresholds by the rule youden" in text
    assert "<td>Edema§</td>" in text
    path = study / "densenet121-256" / "fold-0" / "thresholds.json"
    content = path.read_bytes()
    path.write_text("{")
    assert "RUNS/densenet121-256/fold-0/thresholds.json is damaged" in chapter()
    path.unlink()
    assert "Not chosen yet: <code>cxrfast thresholds RUNS</code>" in chapter()
    assert not path.exists()
    path.write_bytes(content)
    assert chapter() == text
