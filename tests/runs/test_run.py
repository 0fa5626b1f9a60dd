import contextlib
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console
from runs import make_run

from cxrfast.config import PRESETS, TrainConfig, learning_rate, preset
from cxrfast.errors import RunError
from cxrfast.pipelines.order import TrainOrder
from cxrfast.runs.folder import RunFolder
from cxrfast.runs.run import Predictions, Run
from cxrfast.runs.status import status, status_table

CONFIG = TrainConfig(
    set_id="abc", scale=64, labels=("A", "B"), views=("AP",), global_batch=8, micro_batch=4, learning_rate=1e-4
)
ROWS = pd.DataFrame(
    [[3, "x", "p", "val", 1.0, 0.0], [5, "y", "q", "test", np.nan, -1.0]],
    columns=["row", "image_id", "patient_id", "part", "A", "B"],
)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run.start(tmp_path / "densenet121-64" / "fold-0", CONFIG, tmp_path, ROWS)


def test_a_run_read_back_is_the_run_that_was_started(run: Run) -> None:
    again = Run.open(run.folder)
    assert again.config == CONFIG
    assert again.config.hash == CONFIG.hash
    pd.testing.assert_frame_equal(again.rows(), ROWS)
    assert [r.config for r in Run.find(run.folder.parent.parent)] == [CONFIG]


def test_metrics_of_a_resumed_run_hold_each_epoch_once_and_no_torn_line(run: Run) -> None:
    for epoch in range(3):
        run.add_metrics({"epoch": epoch, "loss": epoch})
    run.add_metrics({"epoch": 1, "loss": 10})
    assert [m["loss"] for m in run.metrics()] == [0, 10]
    with open(run.folder / "metrics.jsonl", "a") as file:
        file.write('{"epoch": 2, "lo')
    assert [m["loss"] for m in run.metrics()] == [0, 10]
    run.cut_metrics(1)
    assert [m["loss"] for m in run.metrics()] == [0]


def test_a_checkpoint_comes_back_bitwise_and_another_runs_is_refused(run: Run, tmp_path: Path) -> None:
    weights = torch.randn(3, 4)
    run.write_checkpoint({"model": weights, "epoch": 2})
    checkpoint = run.read_checkpoint()
    assert checkpoint is not None
    assert torch.equal(checkpoint["model"], weights)
    other = Run.start(tmp_path / "other" / "fold-0", replace(CONFIG, seed=1), tmp_path, ROWS)
    (other.folder / "last.pt").write_bytes((run.folder / "last.pt").read_bytes())
    with pytest.raises(RunError, match="belongs to another configuration"):
        other.read_checkpoint()


def test_predictions_come_back_sorted_by_row_and_replace_the_old_ones_whole(run: Run) -> None:
    assert not run.has_predictions
    with pytest.raises(RunError, match="cxrfast predict"):
        run.read_predictions("val")
    logits = np.arange(6, dtype=np.float32).reshape(3, 2)
    run.write_predictions({"val": Predictions(np.array([9, 2, 4]), logits)})
    run.write_predictions(
        {"val": Predictions(np.array([9, 2, 4]), logits), "test": Predictions(np.array([1]), logits[:1])}
    )
    found = run.read_predictions("val")
    np.testing.assert_array_equal(found.row, [2, 4, 9])
    np.testing.assert_array_equal(found.logits, logits[[1, 2, 0]])
    with pytest.raises(RunError, match="no part 'train'"):
        run.read_predictions("train")
    with pytest.raises(RunError, match="twice"):
        run.write_predictions({"val": Predictions(np.array([1, 1]), logits[:2])})
    changed = replace(run, config=replace(CONFIG, seed=7))
    with pytest.raises(RunError, match="belongs to another run"):
        changed.read_predictions("val")


@pytest.mark.parametrize("change", [{"labels": ["B", "A"]}, {"policy": "u_ones"}, {"fold": 1}, {"epochs": 7}])
def test_a_configuration_that_was_changed_by_hand_is_refused(run: Run, change: dict[str, object]) -> None:
    stored = json.loads(run.config_path.read_text())
    run.config_path.write_text(json.dumps({**stored, "config": {**stored["config"], **change}}))
    with pytest.raises(RunError, match=r"config\.json is damaged .*not the one that it was started with"):
        Run.open(run.folder)


@pytest.mark.parametrize("text", ["{", "{}", '{"attributes": 1, "zarr_format": 3, "node_type": "group"}'])
def test_an_array_of_predictions_whose_description_is_damaged_is_refused(run: Run, text: str) -> None:
    run.write_predictions({"val": Predictions(np.array([1]), np.zeros((1, 2), np.float32))})
    (run.predictions_path / "val" / "zarr.json").write_text(text)  # of the group, which nothing needs
    assert run.read_predictions("val").row.tolist() == [1]
    (run.predictions_path / "val" / "row" / "zarr.json").write_text(text)
    with pytest.raises(RunError, match="predict again"):
        run.read_predictions("val")


def test_presets_can_be_shared_by_the_numbers_of_gpus_that_they_promise() -> None:
    for scale, sizes in PRESETS.items():
        assert preset(scale) == sizes
        assert preset(scale - 1) == sizes
        assert learning_rate(sizes.global_batch) == pytest.approx(1e-4 * sizes.global_batch / 32)
        for world in (1, 2, 3, 4, 6, 12) if scale >= 256 else (1, 2):
            TrainOrder(
                rows=np.arange(1000), global_batch=sizes.global_batch, micro_batch=sizes.micro_batch, world=world
            )
    assert preset(4096) == PRESETS[2048]


def test_a_lost_chunk_is_not_read_as_zeros_and_new_best_weights_remove_what_was_made_of_the_old_ones(run: Run) -> None:
    run.write_predictions({"val": Predictions(np.array([3]), np.zeros((1, 2), np.float32))})
    (run.folder / "gradcam-A.png").write_bytes(b"")
    (run.folder / "predictions.zarr" / "val" / "logits" / "c" / "0" / "0").unlink()
    with pytest.raises(RunError, match="has lost values"):
        run.read_predictions("val")
    run.write_weights({"w": torch.zeros(1)})
    assert not run.has_predictions
    assert not (run.folder / "gradcam-A.png").exists()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        *(("config.json", text) for text in ("", "{", "[]", '{"config": {}}', '{"config": [], "shards": "x"}')),
        *(("config.json", f'{{"config": {{{text}}}, "shards": "x"}}') for text in ('"unknown": 1', '"fold": "x"')),
        *(("state.json", text) for text in ("", "junk", "[]", "7", "\0")),
        *(("metrics.jsonl", text) for text in ("junk\n", "7\n", "[]\n", "{}\n", '{"epoch": "x"}\n')),
        ("rows.parquet", "junk"),
    ],
)
def test_a_damaged_file_of_a_run_is_named(run: Run, name: str, text: str) -> None:
    (run.folder / name).write_text(text)
    with pytest.raises(RunError, match=rf"{name} is .*damaged|configuration is"):
        read_all(run.folder)


@pytest.mark.parametrize(
    ("column", "values"), [("row", ["0", "1"]), ("A", ["x", "1"]), ("A", [None, None]), ("row", [0.5, 1])]
)
def test_rows_of_another_type_are_refused(run: Run, column: str, values: list[object]) -> None:
    rows = pd.read_parquet(run.rows_path).iloc[:2]
    rows.assign(**{column: values}).to_parquet(run.rows_path, index=False)
    with pytest.raises(RunError, match=r"rows.parquet is missing or damaged"):
        run.rows()


def read_all(folder: Path) -> tuple[Run, dict[str, Any], list[dict[str, Any]]]:
    run = Run.open(folder)
    run.rows()
    return run, run.state(), run.metrics()


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(["config.json", "state.json", "metrics.jsonl"]), st.data())
def test_a_mutated_file_of_a_run_is_read_or_refused_and_never_hides_it_from_status(run: Run, name: str, data) -> None:  # type: ignore[no-untyped-def]
    run.set_state("running", epoch=2, images_per_s=75.5, eta_seconds=3700)
    run.cut_metrics(0, {"epoch": 0, "val_loss": 0.5, "val_auroc": 0.6}, {"epoch": 1, "val_loss": float("nan")})
    path = run.folder / name
    whole = path.read_bytes()
    try:
        at, length = data.draw(st.integers(0, len(whole))), data.draw(st.integers(0, 20))
        new = data.draw(st.binary(max_size=4) | st.sampled_from([b"[]", b"{}", b"null", b"-1", b'"x"', b"1e999", b","]))
        path.write_bytes(whole[:at] + new + whole[at + length :])
        with contextlib.suppress(RunError):
            read_all(run.folder)
        lines = status(run.folder.parents[1])
        assert [line.name for line in lines] == ["densenet121-64/fold-0"]
        console = Console(file=io.StringIO(), width=200)
        console.print(status_table(lines, run.folder.parents[1]))
    finally:
        path.write_bytes(whole)


def test_folders_of_runs_are_found_from_text_too_and_by_either_class(tmp_path: Path) -> None:
    folder = RunFolder.of(tmp_path, "densenet121", 32, 1)
    assert folder == Run.of(tmp_path, "densenet121", 32, 1)
    assert (folder.name, RunFolder.below(tmp_path)) == ("densenet121-32/fold-1", [])
    folder.folder.mkdir(parents=True)
    folder.state_path.write_text("{}")
    assert RunFolder.below(tmp_path) == Run.below(tmp_path) == [folder]
    with pytest.raises(RunError, match="no runs in"):
        Run.find(str(tmp_path))


def test_a_run_in_place_of_the_folder_of_all_runs_is_named(tmp_path):
    run = make_run(tmp_path, 32)
    for folder, what in ((run.folder, "a run"), (run.folder.parent, "one scale of a study")):
        for read in (Run.find, status):
            with pytest.raises(RunError, match=f"{folder} is {what}: give the folder of all runs"):
                read(folder)


def test_runs_are_found_from_all_runs_one_scale_and_one_run_also_from_inside(tmp_path, monkeypatch):
    folds = [tmp_path / "runs" / "densenet121-64" / f"fold-{fold}" for fold in (0, 1)]
    for fold in folds:
        fold.mkdir(parents=True)
        (fold / "config.json").write_text("{}")
    scale = folds[0].parent

    def found(folder: str) -> list[Path]:
        return [run.folder for run in RunFolder.within(Path(folder))]

    assert found(str(scale.parent)) == found(str(scale)) == folds
    assert found(str(folds[1])) == [folds[1]]
    assert found(str(tmp_path / "gone")) == []
    monkeypatch.chdir(scale)
    assert found(".") == folds
    assert found("fold-1") == [folds[1]], "with the name of its scale"
    assert found("..") == folds
    monkeypatch.chdir(folds[0])
    assert RunFolder.within(Path("."))[0].name == "densenet121-64/fold-0"
    monkeypatch.chdir(tmp_path)
    assert found("runs")[0] == Path("runs/densenet121-64/fold-0"), "otherwise as it was given"
