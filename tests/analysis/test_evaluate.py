"""Tables from run folders: right numbers, and no join of runs that do not belong together."""

import io
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from rich.console import Console
from sklearn.metrics import average_precision_score, roc_auc_score

from cxrfast.analysis.evaluate import auroc_table, evaluate
from cxrfast.config import TrainConfig
from cxrfast.errors import RunError
from cxrfast.runs.run import Predictions, Run
from cxrfast.tables import Cell, Table

LABELS = ("Edema", "Fracture", "Pneumonia")
N = 240
QUALITY = {256: 1.0, 512: 2.5}


def rows_of(fold: int, n: int = N) -> pd.DataFrame:
    """Rows of one study: the same images and labels in every fold, other parts. Nobody has a Fracture."""
    rng = np.random.default_rng(0)
    raw = rng.choice([1.0, 0.0, -1.0, np.nan], size=(n, len(LABELS)), p=[0.3, 0.2, 0.1, 0.4]).astype(np.float32)
    raw[raw[:, 1] == 1, 1] = 0
    deal = (np.arange(n) + fold) % 5
    return pd.DataFrame(
        {
            "row": np.arange(n, dtype=np.int64),
            "image_id": [f"i{i}" for i in range(n)],
            "patient_id": [f"p{i // 2}" for i in range(n)],
            "part": np.where(deal == 0, "test", np.where(deal == 1, "val", "train")),
            **dict(zip(LABELS, raw.T, strict=True)),
        }
    )


def make_run(
    runs: Path,
    scale: int,
    fold: int,
    rows: pd.DataFrame | None = None,
    predict: bool = True,
    name: str | None = None,
    **changes: object,
) -> Run:
    config = TrainConfig(
        **{
            "set_id": "a1",
            "scale": scale,
            "labels": LABELS,
            "fold": fold,
            "global_batch": 8,  # type: ignore[arg-type]
            "micro_batch": 8,
            "learning_rate": 1e-4,
            **changes,
        }
    )
    rows = rows_of(fold) if rows is None else rows
    run = Run.start(runs / (name or f"densenet121-{scale}") / f"fold-{fold}", config, Path("shards"), rows)
    if predict:
        predict_parts(run, QUALITY.get(scale, 1.5))
    return run


def predict_parts(run: Run, quality: float, drop: int = 0) -> None:
    """Logits that know each finding by `quality`, in a random order of rows; `drop` rows are forgotten."""
    rows, rng = run.rows(), np.random.default_rng(run.config.scale + run.config.fold)
    parts = {}
    for part in ("val", "test"):
        mine = rows[rows["part"] == part].sample(frac=1, random_state=1).iloc[drop:]
        positive = (mine[list(run.config.labels)] == 1).to_numpy()
        logits = quality * positive + rng.normal(size=positive.shape)
        parts[part] = Predictions(mine["row"].to_numpy(), logits)
    run.write_predictions(parts)


def text_of(table: Table) -> str:
    console = Console(file=io.StringIO(), width=160, force_terminal=True, color_system=None)
    console.print(table.rich())
    return console.file.getvalue()  # type: ignore[attr-defined]


@pytest.fixture
def study(tmp_path: Path) -> Path:
    for scale in QUALITY:
        for fold in (0, 1):
            make_run(tmp_path, scale, fold)
    make_run(tmp_path, 1024, 0, predict=False)
    return tmp_path


def test_scores_are_sklearns_joined_by_row(study):
    result = evaluate(study)
    run = Run.open(study / "densenet121-512" / "fold-1")
    predictions = run.read_predictions("test")
    raw = run.rows().set_index("row").loc[predictions.row, list(LABELS)]
    labelled = ~raw.isna().all(axis=1).to_numpy()  # rows blank everywhere were never labelled
    line = result.table.query("name == 'densenet121-512' and fold == 1 and label == 'Edema'").iloc[0]
    target, score = (raw["Edema"] == 1).to_numpy()[labelled], predictions.logits[labelled, 0]
    assert line["auroc"] == pytest.approx(roc_auc_score(target, score))
    assert line["auprc"] == pytest.approx(average_precision_score(target, score))
    assert (line["positives"], line["negatives"]) == (target.sum(), (~target).sum())


def test_files_say_what_the_result_says(study):
    result = evaluate(study)
    table = pd.read_csv(study / "evaluation" / "auroc.csv")
    assert list(table) == [
        "name",
        "scale",
        "start",
        "fold",
        "label",
        "part",
        "auroc",
        "auprc",
        "positives",
        "negatives",
    ]
    pd.testing.assert_frame_equal(table, result.table, check_dtype=False)
    summary = pd.read_csv(study / "evaluation" / "auroc_summary.csv")
    one = summary.query("name == 'densenet121-256' and label == 'Edema'").iloc[0]
    values = result.matrix("densenet121-256")[:, 0]
    assert one["auroc_mean"] == pytest.approx(values.mean())
    assert one["auroc_sd"] == pytest.approx(values.std(ddof=1))
    assert one["folds"] == one["folds_defined"] == 2
    text = (study / "evaluation" / "auroc.md").read_text()
    assert f"{values.mean():.3f} ± {values.std(ddof=1):.3f}" in text
    assert "2 folds (0, 1)" in text
    assert "left out: densenet121-1024/fold-0" in text
    assert result.names == ("densenet121-256", "densenet121-512")


def test_a_finding_nobody_has_is_undefined_never_a_number(study):
    result = evaluate(study)
    assert result.table.query("label == 'Fracture'")[["auroc", "auprc"]].isna().all(axis=None)
    for text in ((study / "evaluation" / "auroc.md").read_text(), text_of(auroc_table(result))):
        assert "Undefined everywhere: Fracture (no positive or no negative test row)." in text
        assert text.count("Fracture") == text.lower().count("undefined") == 1


def test_the_mean_is_over_the_findings_defined_everywhere(study):
    result = evaluate(study)
    lines = (study / "evaluation" / "auroc.md").read_text().splitlines()
    mean = result.matrix("densenet121-512")[:, [0, 2]].mean(axis=1)
    last = [line for line in lines if line.startswith("|")][-1]
    assert last.startswith("| Mean |")
    assert last.endswith(f"| **{mean.mean():.3f} ± {mean.std(ddof=1):.3f}** |")
    assert any("the 2 of 3 findings" in line for line in lines)


def test_positives_count_each_row_once(study):
    """Also where all folds test the same rows, as with the official split."""
    rows = rows_of(0)
    labels = rows[rows["part"] == "test"]
    other = study / "official"
    for fold in (0, 1):
        make_run(other, 256, fold, rows)
    labelled = ~labels[list(LABELS)].isna().all(axis=1)
    assert evaluate(other).positives["Edema"] == ((labels["Edema"] == 1) & labelled).sum()
    assert evaluate(study).positives["Edema"] == sum(
        (r[r["part"] == "test"]["Edema"] == 1).sum() for r in (rows_of(0), rows_of(1))
    )


def test_the_best_scale_is_bold(study):
    result = evaluate(study)
    assert result.matrix("densenet121-512")[:, 0].mean() > result.matrix("densenet121-256")[:, 0].mean()
    first = auroc_table(result).rows[0][2:]
    assert [cell.style for cell in first if isinstance(cell, Cell)] == ["", "bold"]


def test_another_part_does_not_take_the_place_of_the_test_tables(study):
    evaluate(study)
    before = (study / "evaluation" / "auroc.csv").read_bytes()
    assert (evaluate(study, "val").table["part"] == "val").all()
    assert (study / "evaluation" / "auroc.csv").read_bytes() == before
    assert (study / "evaluation" / "auroc-val.csv").exists()


def test_the_same_runs_give_the_same_bytes(study):
    evaluate(study)
    before = {p.name: p.read_bytes() for p in (study / "evaluation").iterdir()}
    evaluate(study)
    assert {p.name: p.read_bytes() for p in (study / "evaluation").iterdir()} == before


def test_u_ignore_masks_the_uncertain(tmp_path):
    run = make_run(tmp_path, 256, 0, policy="u_ignore")
    test = run.rows().query("part == 'test'")
    expected = (test["Edema"] != -1) & ~test[list(LABELS)].isna().all(axis=1)
    line = evaluate(tmp_path).table.query("label == 'Edema'").iloc[0]
    assert line["positives"] + line["negatives"] == expected.sum()


def test_runs_without_predictions_name_the_command(tmp_path):
    make_run(tmp_path, 256, 0, predict=False)
    with pytest.raises(RunError, match="cxrfast predict"):
        evaluate(tmp_path)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"set_id": "b2"}, "set id a1 is not b2"),
        ({"policy": "u_ones"}, "label policy u_zeros is not u_ones"),
        ({"labels": ("Edema", "Pneumonia", "Fracture")}, "labels .* is not .*"),
    ],
)
def test_runs_of_different_studies_are_not_joined(study, changes, what):
    make_run(study, 2048, 3, **changes)
    with pytest.raises(RunError, match=rf"densenet121-256/fold-0 and densenet121-2048/fold-3 .*{what}"):
        evaluate(study)


def test_runs_of_a_fold_with_other_rows_are_not_joined(study):
    make_run(study, 2048, 1, rows_of(1).iloc[:-30])
    with pytest.raises(RunError, match=r"densenet121-256/fold-1 and densenet121-2048/fold-1 .* 6 test rows are in one"):
        evaluate(study)


def test_runs_of_a_fold_with_other_labels_are_not_joined(study):
    rows = rows_of(1)
    at = rows.index[(rows["part"] == "test") & (rows["Edema"] == 1)][0]
    rows.loc[at, "Edema"] = np.nan
    make_run(study, 2048, 1, rows)
    with pytest.raises(RunError, match=rf"fold-1 and densenet121-2048/fold-1 .*Edema of row {at}: 1 is not nan"):
        evaluate(study)


def test_folds_between_which_the_set_was_relabelled_are_not_joined(study):
    rows = rows_of(2)
    at = rows.index[(rows["part"] == "train") & (rows["Edema"] == 1)][0]
    rows.loc[at, "Edema"] = 0
    make_run(study, 512, 2, rows)
    with pytest.raises(
        RunError,
        match=rf"256/fold-0 and densenet121-512/fold-2 .*1 labels of shared rows.*Edema of row {at}: 1 is not 0",
    ):
        evaluate(study)


def test_one_name_cannot_hold_two_scales(study):
    make_run(study, 2048, 3, name="densenet121-256")
    with pytest.raises(RunError, match="scale 256 is not 2048"):
        evaluate(study)


def test_a_copied_fold_is_not_counted_twice(study):
    shutil.copytree(study / "densenet121-256" / "fold-0", study / "densenet121-256" / "fold-0-copy")
    with pytest.raises(RunError, match="both are fold 0"):
        evaluate(study)


def test_rows_predicted_must_be_the_rows_of_the_part(study):
    run = make_run(study, 2048, 0, predict=False)
    predict_parts(run, 1.0, drop=3)
    with pytest.raises(RunError, match=r"densenet121-2048/fold-0: of the 48 test rows 3 have no prediction"):
        evaluate(study)


def test_logits_that_are_not_finite_are_refused(tmp_path):
    run = make_run(tmp_path, 256, 0, predict=False)
    row = run.rows().query("part == 'test'")["row"].to_numpy()
    run.write_predictions({"test": Predictions(row, np.full((len(row), 3), np.nan))})
    with pytest.raises(RunError, match="not finite"):
        evaluate(tmp_path)


def test_a_damaged_table_of_rows_is_an_error_with_a_way_out(tmp_path):
    run = make_run(tmp_path, 256, 0)
    (run.folder / "rows.parquet").write_bytes(b"nothing")
    with pytest.raises(RunError, match=r"rows\.parquet"):
        evaluate(tmp_path)


def test_an_unknown_part_is_refused(study):
    with pytest.raises(RunError, match="part 'tset'"):
        evaluate(study, "tset")


def test_labels_with_markup_survive_both_tables(tmp_path):
    labels = ("A|B", "[bold]x", "C")
    rows = rows_of(0).rename(columns=dict(zip(LABELS, labels, strict=True)))
    make_run(tmp_path, 256, 0, rows, labels=labels)
    assert "[bold]x" in text_of(auroc_table(evaluate(tmp_path)))
    assert "| A\\|B |" in (tmp_path / "evaluation" / "auroc.md").read_text()


def test_one_fold_has_no_deviation(tmp_path):
    make_run(tmp_path, 256, 0)
    result = evaluate(tmp_path)
    assert "±" not in "".join(
        line for line in (tmp_path / "evaluation" / "auroc.md").read_text().splitlines() if line.startswith("|")
    )
    assert result.summary()["auroc_sd"].isna().all()


def test_it_needs_neither_dali_nor_torchvision():
    code = "import sys, cxrfast.analysis.evaluate; print([m for m in ('nvidia.dali', 'torchvision', 'cv2') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_changed_configuration_is_not_read_as_the_old_one(study):
    """Predictions of another configuration stay refused."""
    run = make_run(study, 2048, 0)
    other = Run.start(study / "x" / "fold-0", replace(run.config, seed=1), Path("shards"), rows_of(0))
    shutil.copytree(run.folder / "predictions.zarr", other.folder / "predictions.zarr")
    with pytest.raises(RunError, match="belongs to another run"):
        evaluate(study)


def test_a_scale_that_started_from_another_run_is_marked_in_every_table(study):
    for fold in (0, 1):
        make_run(study, 128, fold, weights=f"runs/densenet121-64/fold-{fold}")
    result = evaluate(study)
    note = "† weights started from the run of a smaller scale: densenet121-128 from densenet121-64."
    text = (study / "evaluation" / "auroc.md").read_text()
    assert "| densenet121-128† | densenet121-256 |" in text
    for shown in (text, text_of(auroc_table(result))):
        assert note in " ".join(shown.split()), "a terminal breaks the line"
    assert "128†" in text_of(auroc_table(result))
    table = pd.read_csv(study / "evaluation" / "auroc.csv")
    starts = table.groupby(["name", "fold"])["start"].unique().str.join("")
    assert starts["densenet121-128", 1] == "from densenet121-64/fold-1"
    assert starts["densenet121-256", 1] == "ImageNet"
    summary = pd.read_csv(study / "evaluation" / "auroc_summary.csv")
    assert set(summary.loc[summary["name"] == "densenet121-128", "start"]) == {"from densenet121-64"}


def test_without_such_a_scale_nothing_is_marked(study):
    result = evaluate(study)
    assert "†" not in (study / "evaluation" / "auroc.md").read_text() + text_of(auroc_table(result))


def test_folds_of_one_group_that_started_from_different_groups_are_not_joined(study):
    for fold, parent in ((0, "densenet121-64"), (1, "densenet121-32")):
        make_run(study, 128, fold, weights=f"runs/{parent}/fold-{fold}")
    with pytest.raises(RunError, match=r"their configurations differ \(weights: "):
        evaluate(study)
