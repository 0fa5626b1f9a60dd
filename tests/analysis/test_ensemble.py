"""The stacked ensemble of runs: what it writes, and what it refuses to combine."""

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from rich.console import Console

from cxrfast import metrics
from cxrfast.analysis.ensemble import ensemble, ensemble_table
from cxrfast.analysis.join import read_answers
from cxrfast.analysis.mixture import combine, fit_weights, vote
from cxrfast.config import TrainConfig
from cxrfast.errors import RunError
from cxrfast.runs.run import Predictions, Run

LABELS = ("Edema", "Fracture", "Lung Lesion", "Pneumonia")
N = 500


def rows_of(fold: int) -> pd.DataFrame:
    """The same images and labels in every fold. Nobody has a Fracture; no validation row of folds 0 and 1 a Lung Lesion."""
    rng = np.random.default_rng(0)
    raw = rng.choice([1.0, 0.0, np.nan], size=(N, len(LABELS)), p=[0.3, 0.3, 0.4]).astype(np.float32)
    deal = (np.arange(N) + fold) % 5
    raw[raw[:, 1] == 1, 1] = 0
    raw[np.isin(np.arange(N) % 5, (1, 2)) & (raw[:, 2] == 1), 2] = 0
    return pd.DataFrame(
        {
            "row": np.arange(N, dtype=np.int64),
            "image_id": [f"i{i}" for i in range(N)],
            "patient_id": [f"p{i // 2}" for i in range(N)],
            "part": np.where(deal == 0, "test", np.where(deal == 2, "val", "train")),
            **dict(zip(LABELS, raw.T, strict=True)),
        }
    )


def make_run(
    runs: Path,
    scale: int,
    fold: int,
    quality: float = 1.0,
    rows: pd.DataFrame | None = None,
    arch: str = "densenet121",
    name: str | None = None,
    set_id: str = "a1",
    weights: str = "imagenet",
) -> Run:
    config = TrainConfig(
        set_id=set_id,
        scale=scale,
        labels=LABELS,
        fold=fold,
        arch=arch,
        global_batch=8,
        micro_batch=8,
        learning_rate=1e-4,
        weights=weights,
    )
    folder = runs / (name or f"{arch}-{scale}") / f"fold-{fold}"
    run = Run.start(folder, config, Path("shards"), rows_of(fold) if rows is None else rows)
    rng, parts = np.random.default_rng(scale + fold), {}
    for part in ("val", "test"):
        mine = run.rows().query(f"part == '{part}'").sample(frac=1, random_state=scale)  # any order may be written
        positive = (mine[list(LABELS)] == 1).to_numpy()
        parts[part] = Predictions(
            mine["row"].to_numpy(), quality * (2 * positive - 1) + rng.normal(size=positive.shape)
        )
    run.write_predictions(parts)
    return run


@pytest.fixture
def study(tmp_path: Path) -> Path:
    for fold in (0, 1):
        for scale, quality in ((256, 0.3), (1024, 0.4), (2048, 2.0)):
            make_run(tmp_path, scale, fold, quality)
    return tmp_path


def test_the_better_scale_leads_in_every_table(study):
    result = ensemble(study)
    assert result.names == ("densenet121-256", "densenet121-1024", "densenet121-2048")
    assert result.folds == (0, 1)
    weights = result.mean_weights()
    for j in (0, 3):
        assert weights[j].argmax() == 2
        assert result.best_single()[j] == "densenet121-2048"
        assert result.matrix("stacked")[:, j].mean() > result.matrix("voting")[:, j].mean()
    fitted = result.bce.dropna()
    assert (fitted["optimum"] <= fitted["stacked"] + 1e-6).all()
    assert (fitted["stacked"] <= fitted["voting"] + 1e-6).all()


def test_test_scores_are_those_of_weights_fitted_on_validation(study):
    result = ensemble(study)
    runs = [Run.open(study / name / "fold-1") for name in result.names]
    val, test = ([read_answers(run, part) for run in runs] for part in ("val", "test"))
    weights = fit_weights(np.stack([a.logits for a in val]), *val[0].targets())
    logits, (targets, mask) = np.stack([a.logits for a in test]), test[0].targets()
    np.testing.assert_array_equal(result.matrix("stacked")[1], metrics.auroc(combine(logits, weights), targets, mask))
    np.testing.assert_array_equal(result.matrix("voting")[1], metrics.auroc(vote(logits), targets, mask))
    np.testing.assert_array_equal(result.matrix("densenet121-1024")[1], metrics.auroc(logits[1], targets, mask))
    lines = result.weights.query("fold == 1 and label == 'Edema'")
    np.testing.assert_array_equal(lines["weight"], weights[0])


def test_files_hold_the_result_and_the_same_bytes_every_time(study):
    result = ensemble(study)
    folder = study / "ensemble"
    weights, auroc = pd.read_csv(folder / "weights.csv"), pd.read_csv(folder / "auroc.csv")
    assert list(weights) == ["label", "name", "scale", "start", "fold", "weight", "em_weight"]
    assert list(auroc) == ["fold", "label", "method", "auroc"]
    assert set(auroc["method"]) == {*result.names, "voting", "stacked"}
    pd.testing.assert_frame_equal(weights, result.weights, check_dtype=False)
    text = (folder / "summary.md").read_text()
    assert "Validation logits served both early stopping and the ensemble's fit" in text
    assert "2 folds (0, 1)" in text
    with Image.open(folder / "weights.png") as image:
        assert image.width == 900
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    assert set(before) == {"weights.csv", "auroc.csv", "summary.md", "summary.tex", "weights.png"}
    ensemble(study)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_undefined_findings_are_never_numbers(study):
    result = ensemble(study)
    assert result.auroc.query("label == 'Fracture'")["auroc"].isna().all()
    assert result.weights.query("label in ('Fracture', 'Lung Lesion')")[["weight", "em_weight"]].isna().all(axis=None)
    text = (study / "ensemble" / "summary.md").read_text()
    assert "Undefined everywhere: Fracture (no positive or no negative test row)." in text
    assert "Undefined everywhere: Fracture, Lung Lesion (no positive or no negative validation row)." in text
    assert "| Fracture" not in text
    assert "validation rows lack positives or negatives of Fracture, Lung Lesion; no weights can be fitted" in text
    lesion = result.matrix("stacked")[:, 2]
    np.testing.assert_array_equal(lesion, result.matrix("voting")[:, 2])  # not fitted, yet defined on test rows
    assert not np.isnan(lesion).any()


def test_the_table_for_a_terminal_has_every_method(study):
    console = Console(file=io.StringIO(), width=200)
    console.print(ensemble_table(ensemble(study)).rich())
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for word in ("256 px", "voting", "stacked", "gain", "Undefined", "Mean"):
        assert word in text


def test_only_shared_folds_are_used_and_the_others_named(study):
    make_run(study, 256, 2)
    result = ensemble(study)
    assert result.folds == (0, 1)
    assert result.left_out == {"densenet121-256": [2]}
    assert "not every scale has them: densenet121-256: 1 fold (2)" in (study / "ensemble" / "summary.md").read_text()


def test_named_groups_alone_are_combined(study):
    make_run(study, 512, 0, set_id="other")  # not named, so not in the way
    assert ensemble(study, ["densenet121-2048", "densenet121-256"]).names == ("densenet121-256", "densenet121-2048")


def test_one_scale_is_no_ensemble(tmp_path):
    run = make_run(tmp_path, 256, 0)
    Run.start(tmp_path / "densenet121-512" / "fold-0", replace(run.config, scale=512), Path("shards"), rows_of(0))
    for names in (None, ["densenet121-256"]):
        with pytest.raises(RunError, match=r"two scales .* only those of densenet121-256 .*densenet121-512/fold-0"):
            ensemble(tmp_path, names)


def test_scales_without_a_common_fold_are_refused(tmp_path):
    make_run(tmp_path, 256, 0)
    make_run(tmp_path, 512, 1)
    with pytest.raises(RunError, match=r"densenet121-256: 1 fold \(0\); densenet121-512: 1 fold \(1\)"):
        ensemble(tmp_path)


def test_two_architectures_need_names(study):
    make_run(study, 256, 0, arch="resnet50")
    assert len(ensemble(study).names) == 3  # one scale of another architecture is not in question
    make_run(study, 512, 0, arch="resnet50")
    with pytest.raises(RunError, match=r"several architectures.*resnet50-512"):
        ensemble(study)


def test_one_scale_twice_needs_names(study):
    make_run(study, 256, 0, name="again-256")
    with pytest.raises(RunError, match=r"one scale twice.*again-256"):
        ensemble(study)


def test_unknown_names_are_refused(study):
    with pytest.raises(RunError, match=r"no predictions of densenet121-300 .*densenet121-256"):
        ensemble(study, ["densenet121-300", "densenet121-256"])


def test_runs_with_other_rows_labels_or_set_are_refused(study):
    make_run(study, 512, 0, rows=rows_of(0).iloc[:-10])
    with pytest.raises(RunError, match=r"densenet121-256/fold-0 and densenet121-512/fold-0 .*2 val rows are in one"):
        ensemble(study)
    rows = rows_of(0)
    at = rows.index[(rows["part"] == "test") & (rows["Edema"] == 1)][0]
    rows.loc[at, "Edema"] = 0
    make_run(study, 128, 0, rows=rows)
    with pytest.raises(RunError, match=rf"shared rows differ.*Edema of row {at}"):
        ensemble(study, ["densenet121-128", "densenet121-256"])
    make_run(study, 64, 0, set_id="b2")
    with pytest.raises(RunError, match="set id b2 is not a1"):
        ensemble(study, ["densenet121-64", "densenet121-256"])


def test_a_scale_that_started_from_another_run_is_marked(study):
    for fold in (0, 1):
        make_run(study, 512, fold, weights=f"runs/densenet121-256/fold-{fold}")
    result = ensemble(study)
    note = "† weights started from the run of a smaller scale: densenet121-512 from densenet121-256."
    console = Console(file=io.StringIO(), width=200)
    console.print(ensemble_table(result).rich())
    for text in ((study / "ensemble" / "summary.md").read_text(), console.file.getvalue()):  # type: ignore[attr-defined]
        assert note in text
        assert "512 px†" in text
        assert "256 px†" not in text
    weights = pd.read_csv(study / "ensemble" / "weights.csv")
    assert weights.groupby("name")["start"].first()["densenet121-512"] == "from densenet121-256/fold-0"
