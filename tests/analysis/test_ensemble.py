"""The stacked ensemble of runs: what it writes, and what it refuses to combine."""

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from runs import make_run, read_csv, shown, study_rows

from cxrfast import metrics
from cxrfast.analysis.answers import read_answers
from cxrfast.analysis.ensemble import EnsembleResult, ensemble, ensemble_table, weights_figure
from cxrfast.analysis.mixture import fit_weights, log_odds, vote
from cxrfast.errors import RunError
from cxrfast.runs.run import Run


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three scales × two folds; the largest is the best by far."""
    runs = tmp_path_factory.mktemp("study")
    for fold in (0, 1):
        for scale, quality in ((256, 0.3), (1024, 0.4), (2048, 2.0)):
            make_run(runs, scale, fold, quality=quality)
    return runs


@pytest.fixture(scope="module")
def result(made: Path) -> EnsembleResult:
    return ensemble(made)


@pytest.fixture
def study(made: Path, tmp_path: Path) -> Path:
    """A copy of the runs to change."""
    return Path(shutil.copytree(made, tmp_path / "study"))


def test_the_better_scale_leads_in_every_table(result):
    assert result.names == ("densenet121-256", "densenet121-1024", "densenet121-2048")
    assert result.folds == (0, 1)
    weights = result.mean_weights()
    for j in (0, 3):
        assert weights[j].argmax() == 2
        assert result.best_single()[j] == "densenet121-2048"
        assert result.matrix("stacked")[:, j].mean() > result.matrix("voting")[:, j].mean()
        expected = result.matrix("stacked")[:, j] - result.matrix("densenet121-2048")[:, j]
        np.testing.assert_array_equal(result.gains("stacked")[:, j], expected)
    fitted = result.bce.dropna()
    assert (fitted["optimum"] <= fitted["stacked"] + 1e-6).all()
    assert (fitted["stacked"] <= fitted["voting"] + 1e-6).all()
    terminal = shown(ensemble_table(result), 120)
    for word in ("256 px", "voting", "stacked", "Stacked − best", "Undefined", "Mean", "Lung Lesion"):
        assert word in terminal


def test_test_scores_are_those_of_weights_fitted_on_validation(made, result):
    runs = [Run.open(made / name / "fold-1") for name in result.names]
    val, test = ([read_answers(run, part) for run in runs] for part in ("val", "test"))
    weights = fit_weights(np.stack([a.logits for a in val]), *val[0].targets())
    logits, (targets, mask) = np.stack([a.logits for a in test]), test[0].targets()
    np.testing.assert_array_equal(result.matrix("stacked")[1], metrics.auroc(log_odds(logits, weights), targets, mask))
    np.testing.assert_array_equal(result.matrix("voting")[1], metrics.auroc(vote(logits), targets, mask))
    np.testing.assert_array_equal(result.matrix("densenet121-1024")[1], metrics.auroc(logits[1], targets, mask))
    lines = result.weights.query("fold == 1 and label == 'Edema'")
    np.testing.assert_array_equal(lines["weight"], weights[0])


def test_files_hold_the_result_and_the_same_bytes_every_time(study):
    result, folder = ensemble(study), study / "ensemble"
    weights, auroc = (read_csv(folder / name) for name in ("weights.csv", "auroc.csv"))
    assert list(weights) == ["label", "name", "scale", "start", "fold", "weight", "em_weight", "remark"]
    assert list(auroc) == ["fold", "label", "method", "auroc", "remark"]
    assert set(auroc["method"]) == {*result.names, "voting", "stacked"}
    pd.testing.assert_frame_equal(weights, result.weights, check_dtype=False)
    for name in ("summary.md", "summary.tex"):
        text = (folder / name).read_text()
        assert "Validation logits served both early stopping and the ensemble's fit" in text
        assert "2 folds (0, 1)" in text
    with Image.open(folder / "weights.png") as image:
        assert image.width == 900
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    assert set(before) == {"weights.csv", "auroc.csv", "summary.md", "summary.tex", "weights.png"}
    ensemble(study)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_undefined_findings_are_never_numbers_nor_drawn(made, result):
    assert result.auroc.query("label == 'Fracture'")["auroc"].isna().all()
    assert result.weights.query("label in ('Fracture', 'Lung Lesion')")[["weight", "em_weight"]].isna().all(axis=None)
    text = (made / "ensemble" / "summary.md").read_text()
    assert "Undefined everywhere: Fracture (no positive or no negative test row)." in text
    assert "Undefined everywhere: Fracture, Lung Lesion (no positive or no negative validation row)." in text
    assert "| Fracture" not in text
    assert "2 folds (0, 1) lack positives or negatives of Fracture, Lung Lesion: no weights can be fitted" in text
    lesion = result.matrix("stacked")[:, 2]
    np.testing.assert_array_equal(lesion, result.matrix("voting")[:, 2])  # not fitted, yet defined on test rows
    assert not np.isnan(lesion).any()
    (axes,) = weights_figure(result).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["Edema", "Pneumonia"]


def test_only_shared_folds_of_named_groups_are_used_and_the_others_named(study):
    make_run(study, 256, 2)
    result = ensemble(study)
    assert result.folds == (0, 1)
    assert result.left_out == {"densenet121-256": [2]}
    assert "not every scale has them: densenet121-256: 1 fold (2)" in (study / "ensemble" / "summary.md").read_text()
    make_run(study, 512, set_id="other")  # not named, so not in the way
    assert ensemble(study, ["densenet121-2048", "densenet121-256"]).names == ("densenet121-256", "densenet121-2048")
    with pytest.raises(RunError, match=r"no predictions of densenet121-300 .*densenet121-256"):
        ensemble(study, ["densenet121-300", "densenet121-256"])


def test_one_scale_and_scales_without_a_common_fold_are_no_ensemble(tmp_path):
    make_run(tmp_path, 256)
    make_run(tmp_path, 512, quality=None)
    for names in (None, ["densenet121-256"]):
        with pytest.raises(RunError, match=r"two scales .* only for densenet121-256 .*densenet121-512/fold-0"):
            ensemble(tmp_path, names)
    make_run(tmp_path, 512, 1)
    with pytest.raises(RunError, match=r"densenet121-256: 1 fold \(0\); densenet121-512: 1 fold \(1\)"):
        ensemble(tmp_path)


def test_two_architectures_or_one_scale_twice_need_names(study):
    make_run(study, 256, arch="resnet50")
    assert len(ensemble(study).names) == 3  # one scale of another architecture is not in question
    make_run(study, 512, arch="resnet50")
    with pytest.raises(RunError, match=r"several architectures.*resnet50-512"):
        ensemble(study)
    shutil.rmtree(study / "resnet50-512")
    make_run(study, 256, name="again-256")
    with pytest.raises(RunError, match=r"one scale twice.*again-256"):
        ensemble(study)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rows": study_rows(0).iloc[:-10]}, "fold-0 and densenet121-512/fold-0 .*2 val rows are in only one"),
        ({"rows": study_rows(0).assign(Edema=np.float32(0))}, "labels of val rows differ.*Edema of row"),
        ({"set_id": "b2"}, "set id a1 is not b2"),
    ],
)
def test_runs_with_other_rows_labels_or_set_are_refused(study, given, message):
    make_run(study, 512, **given)
    with pytest.raises(RunError, match=message):
        ensemble(study)


def test_a_scale_that_started_from_another_run_is_marked(study):
    for fold in (0, 1):
        make_run(study, 512, fold, weights=f"runs/densenet121-256/fold-{fold}")
    result = ensemble(study)
    for text in ((study / "ensemble" / "summary.md").read_text(), shown(ensemble_table(result))):
        assert "† weights started from the run of a smaller scale: densenet121-512 from densenet121-256." in text
        assert "512 px†" in text
        assert "256 px†" not in text
    weights = pd.read_csv(study / "ensemble" / "weights.csv")
    assert weights.groupby("name")["start"].first()["densenet121-512"] == "from densenet121-256/fold-0"


def test_an_unfinished_scale_is_marked(study):
    Run.open(study / "densenet121-1024" / "fold-1").set_state("preempted", epoch=3, epochs=50)
    result = ensemble(study)
    remark = "unfinished, preempted after 3 of 50 epochs"
    for text in ((study / "ensemble" / "summary.md").read_text(), shown(ensemble_table(result), 300)):
        assert f"‡ {remark}: densenet121-1024 (fold 1)." in text
        assert "1024 px‡" in text
        assert "256 px‡" not in text
    auroc = read_csv(study / "ensemble" / "auroc.csv")
    assert auroc.query("label == 'Edema' and remark != ''").set_index(["fold", "method"])["remark"].to_dict() == {
        (1, "densenet121-1024"): remark,
        (1, "voting"): f"densenet121-1024: {remark}",
        (1, "stacked"): f"densenet121-1024: {remark}",
    }
    weights = read_csv(study / "ensemble" / "weights.csv")
    assert weights[weights["remark"] != ""].groupby(["name", "fold"]).size().to_dict() == {("densenet121-1024", 1): 4}
