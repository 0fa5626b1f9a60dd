"""Tables from run folders: right numbers, and no join of runs that do not belong together."""

import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from commands import invoke
from runs import LABELS, make_run, predict, read_csv, shown, study_rows
from sklearn.metrics import average_precision_score, roc_auc_score

from cxrfast.analysis.ensemble import ensemble
from cxrfast.analysis.evaluate import auroc_table, evaluate
from cxrfast.errors import RunError
from cxrfast.runs.lineage import Origin
from cxrfast.runs.run import Predictions, Run

DEFINED = [0, 2, 3]
"""Findings that test rows hold."""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two scales × two folds with predictions, and a run without."""
    runs = tmp_path_factory.mktemp("study")
    for scale, quality in {256: 0.5, 512: 1.2}.items():
        for fold in (0, 1):
            make_run(runs, scale, fold, quality=quality)
    make_run(runs, 1024, 0, quality=None)
    evaluate(runs)
    return runs


@pytest.fixture
def study(made, tmp_path):
    """A copy of it to change."""
    return Path(shutil.copytree(made, tmp_path / "study"))


def lines_of(runs: Path) -> list[str]:
    """The table in auroc.md."""
    return [line for line in (runs / "evaluation" / "auroc.md").read_text().splitlines() if line.startswith("|")]


def test_scores_are_sklearns_joined_by_row(made):
    result = evaluate(made)
    run = Run.open(made / "densenet121-512" / "fold-1")
    predictions = run.read_predictions("test")
    raw = run.rows().set_index("row").loc[predictions.row, list(LABELS)]
    labelled = ~raw.isna().all(axis=1).to_numpy()  # rows blank everywhere were never labelled
    line = result.table.query("name == 'densenet121-512' and fold == 1 and label == 'Edema'").iloc[0]
    target, score = (raw["Edema"] == 1).to_numpy()[labelled], predictions.logits[labelled, 0]
    assert line["auroc"] == pytest.approx(roc_auc_score(target, score))
    assert line["auprc"] == pytest.approx(average_precision_score(target, score))
    assert (line["positives"], line["negatives"]) == (target.sum(), (~target).sum())


def test_files_say_what_the_result_says_in_the_same_bytes_each_time(made):
    before = {p.name: p.read_bytes() for p in (made / "evaluation").iterdir()}
    result = evaluate(made)
    assert {p.name: p.read_bytes() for p in (made / "evaluation").iterdir()} == before
    assert set(before) == {"auroc.csv", "auroc_summary.csv", "auroc.md", "auroc.tex"}
    table = read_csv(made / "evaluation" / "auroc.csv")
    assert " ".join(table) == "name scale start fold label part auroc auprc positives negatives compared remark"
    pd.testing.assert_frame_equal(table, result.table, check_dtype=False)
    summary = pd.read_csv(made / "evaluation" / "auroc_summary.csv")
    assert " ".join(summary) == (
        "name scale start label part compared folds folds_defined auroc_mean auroc_sd auprc_mean auprc_sd positives remark"
    )
    assert summary["label"].tolist() == 2 * list(LABELS)
    one = summary.query("name == 'densenet121-256' and label == 'Edema'").iloc[0]
    values = result.matrix("densenet121-256")[:, 0]
    assert one["auroc_mean"] == pytest.approx(values.mean())
    assert one["auroc_sd"] == pytest.approx(values.std(ddof=1))
    assert one["folds"] == one["folds_defined"] == 2
    for name in ("auroc.md", "auroc.tex"):
        text = before[name].decode()
        assert f"{values.mean():.3f} ± {values.std(ddof=1):.3f}" in text
        assert "2 folds (0, 1)" in text
        assert "without predictions: densenet121-1024/fold-0" in text
    assert result.names == ("densenet121-256", "densenet121-512")


def test_another_part_does_not_take_the_place_of_the_test_tables(study):
    before = (study / "evaluation" / "auroc.csv").read_bytes()
    assert (evaluate(study, "val").table["part"] == "val").all()
    assert (study / "evaluation" / "auroc.csv").read_bytes() == before
    assert (study / "evaluation" / "auroc-val.csv").exists()
    with pytest.raises(RunError, match="part 'tset'"):
        evaluate(study, "tset")


def test_scales_are_compared_over_the_folds_that_all_of_them_have(study):
    """Fold 2 of the smaller scale alone would make it the best."""
    before = evaluate(study)
    make_run(study, 256, 2, quality=9.0)
    result = evaluate(study)
    assert result.left_out == {"densenet121-256": [2]}
    assert result.folds == {"densenet121-256": [0, 1], "densenet121-512": [0, 1]}
    assert result.positives == before.positives
    for name in result.names:
        np.testing.assert_array_equal(result.matrix(name), before.matrix(name))
    pd.testing.assert_frame_equal(result.summary(), before.summary())
    table, text = pd.read_csv(study / "evaluation" / "auroc.csv"), (study / "evaluation" / "auroc.md").read_text()
    assert table.groupby(["name", "fold"])["compared"].first().to_dict() == {
        ("densenet121-256", 0): True,
        ("densenet121-256", 1): True,
        ("densenet121-256", 2): False,
        ("densenet121-512", 0): True,
        ("densenet121-512", 1): True,
    }
    assert "over 2 folds (0, 1)." in text
    assert "Left out, since not every column has them: densenet121-256: 1 fold (2)." in text
    assert lines_of(study)[-1].endswith("** |"), "the larger scale is the best of what both have"
    assert table.query("fold == 2 and label == 'Edema'")["auroc"].item() > 0.99


def test_scales_without_a_common_fold_are_shown_but_not_compared(tmp_path):
    for scale, folds in {256: (0,), 512: (1, 2)}.items():
        for fold in folds:
            make_run(tmp_path, scale, fold)
    result = evaluate(tmp_path)
    text = (tmp_path / "evaluation" / "auroc.md").read_text()
    assert not result.is_compared
    assert "No fold is in every column: the columns do not compare, and no value is bold." in text
    assert "densenet121-256: 1 fold (0); densenet121-512: 2 folds (1, 2)" in text
    assert "**" not in text
    assert "textbf" not in (tmp_path / "evaluation" / "auroc.tex").read_text()
    assert result.summary().groupby("name")["folds"].first().to_dict() == {"densenet121-256": 1, "densenet121-512": 2}
    assert not result.summary()["compared"].any()
    assert not pd.read_csv(tmp_path / "evaluation" / "auroc.csv")["compared"].any()


def test_a_finding_that_some_folds_define_says_how_many(tmp_path):
    for fold in range(4):  # fold 3 tests rows without a Lung Lesion
        make_run(tmp_path, 256, fold)
    evaluate(tmp_path)
    (line,) = [line for line in lines_of(tmp_path) if line.startswith("| Lung Lesion")]
    assert line.endswith("(3 of 4 folds) |")
    assert "the 2 of 4 findings" in (tmp_path / "evaluation" / "auroc.md").read_text()


def test_a_finding_without_positives_is_undefined_the_mean_is_over_the_others_and_the_best_scale_is_bold(made):
    result = evaluate(made)
    assert result.table.query("label == 'Fracture'")[["auroc", "auprc"]].isna().all(axis=None)
    for text in ((made / "evaluation" / "auroc.md").read_text(), shown(auroc_table(result))):
        assert "Undefined everywhere: Fracture (no positive or no negative test row)." in text
        assert text.count("Fracture") == text.lower().count("undefined") == 1
    values = result.matrix("densenet121-512")
    mean = values[:, DEFINED].mean(axis=1)
    assert lines_of(made)[-1].startswith("| Mean |")
    assert lines_of(made)[-1].endswith(f"| **{mean.mean():.3f} ± {mean.std(ddof=1):.3f}** |")
    assert "the 3 of 4 findings" in (made / "evaluation" / "auroc.md").read_text()
    assert values[:, 0].mean() > result.matrix("densenet121-256")[:, 0].mean()
    assert [cell.style for cell in auroc_table(result).rows[0][2:]] == ["", "bold"]  # type: ignore[union-attr]


def test_positives_count_each_row_once(made, tmp_path):
    """Also where all folds test the same rows, as with the official split."""
    rows = study_rows(0)
    for fold in (0, 1):
        make_run(tmp_path, 256, fold, rows)
    expected = (rows[rows["part"] == "test"]["Edema"] == 1).sum()
    assert evaluate(tmp_path).positives["Edema"] == expected
    assert evaluate(made).positives["Edema"] == expected + (study_rows(1).query("part == 'test'")["Edema"] == 1).sum()


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"label_policies": (("Edema", "u_ones"),)}, "label policy Edema: u_zeros is not u_ones"),
        ({"policy": "u_ones"}, "label policy u_zeros is not u_ones"),
        ({"blank": (("Pneumonia", "ignore"),)}, "policy for blank Pneumonia: negative is not ignore"),
        ({"blank": (("", "ignore"),)}, "policy for blank Edema: negative is not ignore"),
        ({"unlabelled": "negative"}, "policy for images without any label drop is not negative"),
        ({"split": "official"}, "split folds is not official"),
    ],
)
def test_runs_whose_rows_or_labels_were_chosen_otherwise_are_not_joined(tmp_path, other, message):
    make_run(tmp_path, 256, split="folds")
    make_run(tmp_path, 512, **{"split": "folds", **other})
    for join in (evaluate, ensemble):
        with pytest.raises(RunError, match=message):
            join(tmp_path)


def test_policies_that_say_the_same_in_other_words_are_joined(tmp_path):
    for scale, blank in ((256, ()), (512, (("Edema", "negative"), ("", "negative")))):
        make_run(tmp_path, scale, blank=blank, label_policies=(("Edema", "u_zeros"),) if blank else ())
    assert len(evaluate(tmp_path).names) == 2


def test_the_tables_name_the_split_and_the_policies(tmp_path):
    told = {"policy": "u_ones", "label_policies": (("Edema", "u_ignore"),), "blank": (("Pneumonia", "ignore"),)}
    for scale in (256, 512):
        make_run(tmp_path, scale, split="official", unlabelled="negative", allow_shared_patients=True, **told)
    note = (
        "Split: official; patients may be in two parts (--allow-shared-patients). Uncertain labels: u_ones, Edema u_ignore; "
        "blank labels: negative, Pneumonia ignore; images without any label: negative."
    )
    evaluate(tmp_path)
    ensemble(tmp_path)
    for table in ("evaluation/auroc.md", "ensemble/summary.md"):
        assert note in (tmp_path / table).read_text()


def test_folds_that_ran_on_other_machines_or_for_more_epochs_are_joined_and_the_table_says_so(tmp_path):
    for scale in (256, 512):
        make_run(tmp_path, scale, 0, precision="bf16")
        make_run(tmp_path, scale, 1, precision="bf16")
    make_run(tmp_path, 256, 2, precision="fp16", micro_batch=4, epochs=60)
    note = (
        "Folds of densenet121-256 differ: precision bf16 (folds 0, 1), fp16 (fold 2); micro batch 8 (folds 0, 1), 4 (fold 2); "
        "epochs 100 (folds 0, 1), 60 (fold 2)."
    )
    assert "differ" not in evaluate(tmp_path).rules, "fold 2 does not count yet"
    make_run(tmp_path, 512, 2, precision="bf16")
    assert "differ" not in evaluate(tmp_path).rules.replace(note, "")
    assert note in (tmp_path / "evaluation" / "auroc.md").read_text()
    ensemble(tmp_path)
    assert note in (tmp_path / "ensemble" / "summary.md").read_text()


def test_folds_of_a_study_that_outlived_its_version_and_the_build_of_its_set_are_joined(tmp_path):
    make_run(tmp_path, 256, 0, allow_shared_patients=True, allow_partial=True, positive_weights=True)
    make_run(tmp_path, 256, 1, positive_weights=True, weighted_validation=True)
    rules = evaluate(tmp_path).rules
    for told in (
        "allow shared patients True (fold 0), False (fold 1)",
        "weighted validation False (fold 0), True (fold 1)",
    ):
        assert told in rules
    assert "allow partial" not in rules, "a mark says so"
    assert "‡ trained on a partly built set (--allow-partial): densenet121-256 (fold 0)." in (
        tmp_path / "evaluation" / "auroc.md"
    ).read_text().replace("\\", "")


OTHER_RECIPES = {
    "seed": 1,
    "learning_rate": 3e-4,
    "global_batch": 16,
    "degrees": 0.0,
    "positive_weights": True,
    "limit": 200,
    "views": ("AP",),
    "sizes": ((64, 1),),
    "factor": 0.1,
}


@pytest.mark.parametrize("field", OTHER_RECIPES)
def test_folds_of_another_recipe_are_not_joined(tmp_path, field):
    make_run(tmp_path, 256, 0)
    make_run(tmp_path, 256, 1, **{field: OTHER_RECIPES[field]})
    with pytest.raises(RunError, match=rf"fold-0 and densenet121-256/fold-1 .*configurations differ \({field}: "):
        evaluate(tmp_path)


FILES = [Origin(kind="file", file="w.pth", sha256=digit * 64) for digit in "ab"]
COPIES = [
    Origin(kind="run", file="w.pth", sha256=digit * 64, run=f"densenet121-64/fold-{k}", fold=k)
    for k, digit in enumerate("ab")
]
OLD_COPIES = [Origin(kind="run", file="w.pth", sha256=digit * 64) for digit in "ab"]


@pytest.mark.parametrize(
    ("paths", "origins", "message"),
    [
        (
            ("w.pth", "w.pth"),
            FILES,
            "weights: w.pth held sha256 b{12} for one and a{12} for the other when they started",
        ),
        (("imagenet", "imagenet"), FILES, "weights: imagenet held sha256"),
        (("w.pth", "w.pth"), OLD_COPIES, "weights: w.pth held sha256"),
        (("w.pth", "v.pth"), FILES, "weights: v.pth, not w.pth"),
        (("w.pth", "v.pth"), [FILES[0], FILES[0]], None),
        (("w.pth", "w.pth"), [FILES[0], Origin(kind="file", file="w.pth")], None),
        (("w.pth", "w.pth"), COPIES, None),
    ],
)
def test_first_weights_of_folds_are_compared_by_content(tmp_path, paths, origins, message):
    """One path may have held two files; copies of each fold of one group are as good as its folders."""
    for fold, (path, origin) in enumerate(zip(paths, origins, strict=True)):
        run = make_run(tmp_path, 256, fold, weights=path)
        stored = json.loads(run.config_path.read_bytes())
        run.config_path.write_text(json.dumps(stored | {"origin": origin.json()}))
    if message is None:
        evaluate(tmp_path)
        return
    with pytest.raises(RunError, match=rf"configurations differ \({message}"):
        evaluate(tmp_path)


def test_scales_that_used_other_rows_are_refused_if_they_tested_others_and_named_if_they_trained_on_others(tmp_path):
    whole = study_rows(0)
    make_run(tmp_path, 256, rows=whole)
    trained_on_less = whole[(whole["part"] != "train") | (whole["row"] < 200)]
    make_run(tmp_path, 512, rows=trained_on_less, limit=1200, allow_shared_patients=True)
    evaluate(tmp_path)
    text = (tmp_path / "evaluation" / "auroc.md").read_text()
    assert "Rows differ. densenet121-256: all. densenet121-512: the first 1,200 of each part." in text
    assert "patients of densenet121-512 may be in two parts (--allow-shared-patients)" in text
    make_run(tmp_path, 1024, rows=whole[whole["row"] % 2 == 0], views=("AP", "PA"))
    with pytest.raises(RunError, match=r"30 test rows are in only one.*\(views: \(\), not \('AP', 'PA'\)\)"):
        evaluate(tmp_path)


def test_a_choice_of_rows_that_all_scales_share_is_named(tmp_path):
    for scale in (256, 512):
        make_run(tmp_path, scale, views=("AP", "PA"), subset="0123456789abcdef")
    assert "Rows: only views AP, PA; those of --rows (hash 0123456789abcdef)." in evaluate(tmp_path).rules


def test_folds_that_test_the_same_rows_are_not_joined(tmp_path):
    """Two sets of the same images may deal folds of their own."""
    make_run(tmp_path, 256, 0, split="folds")
    rows = study_rows(1)
    rows.loc[rows["row"] == 5, "part"] = "test"
    make_run(tmp_path, 256, 1, rows, split="folds")
    with pytest.raises(RunError, match="both test 1 row, such as row 5, though their folds differ"):
        evaluate(tmp_path)


def test_blanks_and_unlabelled_rows_are_scored_as_their_policy_says(tmp_path):
    rows = study_rows(0)
    tested = rows.index[rows["part"] == "test"]
    rows.loc[tested[:5], list(LABELS)] = np.nan
    policies = {"ignored": {"blank": (("", "ignore"),)}, "negative": {"unlabelled": "negative"}, "default": {}}
    for name, options in policies.items():
        make_run(tmp_path / name, 256, rows=rows, **options)
    test = rows.loc[tested]
    expected = {
        "ignored": test["Edema"].notna().sum(),
        "negative": len(test),
        "default": (~test[list(LABELS)].isna().all(axis=1)).sum(),
    }
    assert len(set(expected.values())) == 3
    for name, counted in expected.items():
        line = evaluate(tmp_path / name).table.query("label == 'Edema'").iloc[0]
        assert line["positives"] + line["negatives"] == counted


def test_u_ignore_masks_the_uncertain_once_predicted(tmp_path):
    run = make_run(tmp_path, 256, policy="u_ignore", quality=None)
    with pytest.raises(RunError, match="cxrfast predict"):
        evaluate(tmp_path)
    predict(run, 1.0)
    test = run.rows().query("part == 'test'")
    expected = (test["Edema"] != -1) & ~test[list(LABELS)].isna().all(axis=1)
    line = evaluate(tmp_path).table.query("label == 'Edema'").iloc[0]
    assert line["positives"] + line["negatives"] == expected.sum()


def relabelled(fold: int, part: str, value: float) -> tuple[pd.DataFrame, int]:
    """Rows of which one that had Edema has `value` instead, and which."""
    rows = study_rows(fold)
    at = int(rows.index[(rows["part"] == part) & (rows["Edema"] == 1)][0])
    rows.loc[at, "Edema"] = value
    return rows, at


UNLABELLED, TESTED = relabelled(1, "test", np.nan)
NEGATIVE, TRAINED = relabelled(2, "train", 0)


@pytest.mark.parametrize(
    ("given", "what"),
    [
        ({"set_id": "b2"}, "set id a1 is not b2"),
        ({"policy": "u_ones"}, "label policy u_zeros is not u_ones"),
        (
            {"labels": ("Edema", "Pneumonia", "Fracture", "Lung Lesion")},
            "the second has the labels of the first in another order",
        ),
        ({"fold": 1, "rows": study_rows(1).iloc[:-30]}, " 6 test rows are in only one"),
        ({"fold": 1, "rows": UNLABELLED}, rf"Edema of row {TESTED}: 1 is not nan"),
        (
            {"scale": 512, "fold": 2, "rows": NEGATIVE},
            rf"1 label of shared rows differs, Edema of row {TRAINED}: 1 is not 0",
        ),
        ({"name": "densenet121-256"}, "scale 256 is not 2048"),
    ],
)
def test_runs_of_different_studies_or_with_other_rows_or_labels_are_not_joined(study, given, what):
    run = make_run(study, **{"scale": 2048, "fold": 3, **given})
    with pytest.raises(RunError, match=rf"densenet121-256/fold-[01] and {run.name} .*{what}"):
        evaluate(study)


def diverge(run: Run) -> None:
    row = run.rows().query("part == 'test'")["row"].to_numpy()
    run.write_predictions({"test": Predictions(row, np.full((len(row), len(LABELS)), np.inf))})


def predict_another_configuration(run: Run) -> None:
    other = make_run(run.folder.parents[1], 256, name="x", seed=1, quality=None)
    shutil.copytree(run.predictions_path, other.predictions_path)


def start_from_two_groups(run: Run) -> None:
    for fold, parent in ((0, "densenet121-64"), (1, "densenet121-32")):
        make_run(run.folder.parents[1], 128, fold, weights=f"runs/{parent}/fold-{fold}")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda run: shutil.copytree(run.folder, run.folder.with_name("fold-0-copy")), "both are fold 0"),
        (partial(predict, quality=1.0, drop=3), r"densenet121-256/fold-0: of the 60 test rows 3 have no prediction"),
        (diverge, "not finite"),
        (lambda run: run.rows_path.write_bytes(b"nothing"), r"rows\.parquet"),
        (predict_another_configuration, "belongs to another run"),
        (start_from_two_groups, r"their configurations differ \(weights: "),
    ],
)
def test_runs_that_cannot_be_scored_are_explained(study, spoil, message):
    spoil(Run.open(study / "densenet121-256" / "fold-0"))
    with pytest.raises(RunError, match=message):
        evaluate(study)


def test_labels_with_markup_survive_and_one_fold_has_no_deviation(tmp_path):
    labels = ("A|B", "[bold]x", "C", "D")
    rows = study_rows(2).rename(columns=dict(zip(LABELS, labels, strict=True)))
    make_run(tmp_path, 256, 2, rows.assign(**{"[bold]x": rows["C"]}), labels=labels)
    result = evaluate(tmp_path)
    assert "[bold]x" in shown(auroc_table(result))
    assert any(line.startswith("| A\\|B |") for line in lines_of(tmp_path))
    assert "±" not in "".join(lines_of(tmp_path))
    assert result.summary()["auroc_sd"].isna().all()


def test_a_scale_that_started_from_another_run_is_marked_in_every_table(study):
    assert "†" not in (study / "evaluation" / "auroc.md").read_text()
    for fold in (0, 1):
        make_run(study, 128, fold, weights=f"runs/densenet121-64/fold-{fold}")
    result = evaluate(study)
    text = (study / "evaluation" / "auroc.md").read_text()
    assert "| densenet121-128† | densenet121-256 |" in text
    for one in (text, shown(auroc_table(result))):
        assert "† weights started from the run of a smaller scale: densenet121-128 from densenet121-64." in one
    table = pd.read_csv(study / "evaluation" / "auroc.csv")
    starts = table.groupby(["name", "fold"])["start"].unique().str.join("")
    assert starts["densenet121-128", 1] == "from densenet121-64/fold-1"
    assert starts["densenet121-256", 1] == "ImageNet"
    summary = pd.read_csv(study / "evaluation" / "auroc_summary.csv")
    assert set(summary.loc[summary["name"] == "densenet121-128", "start"]) == {"from densenet121-64"}


def test_unfinished_and_partly_trained_runs_are_marked_in_every_table(study):
    Run.open(study / "densenet121-512" / "fold-1").set_state("preempted", epoch=1, epochs=50)
    (study / "densenet121-512" / "fold-0" / "state.json").unlink()
    result = evaluate(study)
    remark = (
        "‡ unfinished, state.json is missing: densenet121-512 (fold 0); unfinished, preempted after 1 of 50 epochs: "
        "densenet121-512 (fold 1)."
    )
    for text in ((study / "evaluation" / "auroc.md").read_text(), shown(auroc_table(result), 400)):
        assert remark in text
        assert "densenet121-512‡" in text
        assert "densenet121-256‡" not in text
    assert "densenet121-512‡" in (study / "evaluation" / "auroc.tex").read_text()
    table = read_csv(study / "evaluation" / "auroc.csv")
    assert table.groupby(["name", "fold"])["remark"].unique().str.join("|").to_dict() == {
        ("densenet121-256", 0): "",
        ("densenet121-256", 1): "",
        ("densenet121-512", 0): "unfinished, state.json is missing",
        ("densenet121-512", 1): "unfinished, preempted after 1 of 50 epochs",
    }
    summary = read_csv(study / "evaluation" / "auroc_summary.csv")
    assert summary.groupby("name")["remark"].unique().str.join("|").to_dict() == {
        "densenet121-256": "",
        "densenet121-512": "unfinished, state.json is missing (fold 0); unfinished, preempted after 1 of 50 epochs (fold 1)",
    }


def test_a_fold_that_does_not_count_marks_nothing(study):
    make_run(study, 256, 2, state="preempted")
    text = (evaluate(study), (study / "evaluation" / "auroc.md").read_text())[1]
    assert "‡" not in text
    table = read_csv(study / "evaluation" / "auroc.csv")
    assert set(table.query("fold == 2")["remark"]) == {"unfinished, preempted after 1 of 100 epochs"}


def test_finished_only_leaves_unfinished_runs_out_and_names_them(study):
    for scale, state in ((256, "failed"), (512, "running")):
        make_run(study, scale, 2, state=state)
    result = evaluate(study, finished_only=True)
    assert result.folds == {"densenet121-256": [0, 1], "densenet121-512": [0, 1]}
    text = (study / "evaluation" / "auroc.md").read_text()
    assert "Left out, unfinished: densenet121-256/fold-2, densenet121-512/fold-2." in text
    assert "‡" not in text
    assert 2 not in set(pd.read_csv(study / "evaluation" / "auroc.csv")["fold"])
    done = invoke("evaluate", study, "--finished-only")
    assert done.exit_code == 0
    assert "Left out, unfinished: densenet121-256/fold-2" in " ".join(done.output.split())
    ensemble(study, finished_only=True)
    assert "Left out, unfinished: densenet121-256/fold-2" in (study / "ensemble" / "summary.md").read_text()
    assert set(pd.read_csv(study / "ensemble" / "weights.csv")["fold"]) == {0, 1}


def test_nothing_finished_is_one_message(tmp_path):
    make_run(tmp_path, 256, state="preempted")
    for command in ("evaluate", "ensemble"):
        done = invoke(command, tmp_path, "--finished-only")
        assert done.exit_code == 2
        assert "is finished (densenet121-256/fold-0: preempted after 1 of 100 epochs): finish" in done.stderr
