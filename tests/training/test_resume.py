"""What a run keeps when it is trained again: its precision, the rules of its version; more epochs go on, fewer do not."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from commands import invoke
from damage import copy_set
from torch.nn import functional as F
from trainings import FAST, assert_same

from cxrfast.config import AUTO, Runtime
from cxrfast.errors import RunError
from cxrfast.runs.run import Run
from cxrfast.shards.build import build
from cxrfast.study.forecast import forecast
from cxrfast.study.plan import make_plan
from cxrfast.training import resume
from cxrfast.training.loss import weighted_bce
from cxrfast.training.resume import as_started, kept, micro_batch_of_other_folds, stale_epochs
from cxrfast.training.setup import make_config
from cxrfast.training.train import train

CPU = torch.device("cpu")
SMALL = {**FAST, "limit": 16}
NAME = "shufflenet_v2_x0_5-32"


def trained(shards: Path, runs: Path, **options: Any) -> Run:
    config = make_config(shards, 32, device="cpu", **{**SMALL, **options})
    return train(config, Runtime(shards=shards, runs=runs, device="cpu"))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


# Epochs


def test_more_epochs_go_on_from_the_last_checkpoint_as_if_they_had_been_asked_for_at_once(tiny_set, tmp_path, caplog):
    caplog.set_level("INFO")
    whole = trained(tiny_set, tmp_path / "whole", epochs=4)
    first = trained(tiny_set, tmp_path / "more", epochs=2)
    stored = json.loads(first.config_path.read_bytes())
    run = trained(tiny_set, tmp_path / "more", epochs=4)
    assert "resuming in epoch 3 after 0 images" in caplog.text
    assert_same(whole.folder, run.folder)
    again = Run.open(run.folder)
    assert (again.is_done, again.state()["epoch"], again.state()["epochs"], again.config.epochs) == (True, 4, 4, 4)
    now = json.loads(run.config_path.read_bytes())
    config = {**stored["config"], "epochs": 4}
    assert now == {**stored, "config": config, "first_epochs": 2}, "all else is kept, the hash too"
    assert again.hash == first.hash == torch.load(run.checkpoint_path, weights_only=True)["config_hash"]
    assert len(again.read_weights()) > 0


def test_no_more_epochs_than_are_done_leave_the_run_as_it_is_and_say_so(tiny_set, tmp_path, caplog):
    caplog.set_level("INFO")
    run = trained(tiny_set, tmp_path)
    before = contents(run.folder)
    for epochs, says in ((2, "2 epochs are trained; its weights"), (1, "2 epochs are trained, more than --epochs 1")):
        caplog.clear()
        trained(tiny_set, tmp_path, epochs=epochs)
        assert f"is done already: {says}" in caplog.text
    assert contents(run.folder) == before


def test_a_run_that_stopped_early_stays_done_however_many_epochs_are_asked_for(tiny_set, tmp_path, caplog):
    caplog.set_level("INFO")
    options = {"learning_rate": 0.05, "stop_after": 1, "epochs": 30}
    run = trained(tiny_set, tmp_path, **options)
    epochs = run.state()["epoch"]
    assert epochs < 30
    before = contents(run.folder)
    trained(tiny_set, tmp_path, **{**options, "epochs": 60})
    stale = f"it stopped early after {epochs} epochs, 1 of them without a lower validation loss, so --epochs 60 changes"
    assert stale in caplog.text
    assert contents(run.folder) == before
    run.metrics_path.unlink()
    caplog.clear()
    trained(tiny_set, tmp_path, **{**options, "epochs": 60})
    assert f"it stopped early after {epochs} epochs, so --epochs 60 changes nothing" in caplog.text


def test_more_epochs_without_a_checkpoint_are_refused(tiny_set, tmp_path):
    run = trained(tiny_set, tmp_path)
    run.checkpoint_path.unlink()
    before = contents(run.folder)
    assert trained(tiny_set, tmp_path).is_done, "no more are asked for"
    with pytest.raises(
        RunError, match=r"is done after 2 epochs, and last.pt, from which --epochs 3 would go on, is missing"
    ):
        trained(tiny_set, tmp_path, epochs=3)
    assert contents(run.folder) == before


def test_a_forecast_and_a_study_take_up_the_epochs_that_are_left(tiny_set, tmp_path):
    run = trained(tiny_set, tmp_path)

    def outlook(epochs: int) -> Any:
        plan = make_plan(tiny_set, tmp_path, [32], [0], device="cpu", options={**SMALL, "epochs": epochs})
        result = forecast(plan)
        result.check()
        return result.outlooks[0]

    assert [outlook(epochs).what for epochs in (1, 2, 5)] == ["done", "done", "resume in epoch 3"]
    assert outlook(5).work == pytest.approx(3 * outlook(3).work)
    words = ("study", tiny_set, tmp_path, "--scale=32", "--fold=0", "--device=cpu", "--epochs=3")
    options = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items() if name != "epochs"]
    done = invoke(*words, *options)
    assert done.exit_code == 0, done.output
    assert [line["epoch"] for line in run.metrics()] == [0, 1, 2]
    assert "3/3" in invoke("status", tmp_path).output


@pytest.mark.parametrize(
    ("losses", "stale"),
    [([], 0), ([1.0], 0), ([1.0, 0.9], 0), ([0.9, 1.0, 0.9], 2), ([1.0, 0.8, 0.9], 1), ([0.8, None, 0.9], 2)],
)
def test_stale_epochs_are_counted_from_the_first_of_the_lowest_losses(losses, stale):
    assert stale_epochs([{"val_loss": loss} for loss in losses]) == stale


# Precision


@pytest.fixture
def config(tiny_set):
    return make_config(tiny_set, 32, device="cpu", **{**SMALL, "precision": "auto"})


def test_auto_is_resolved_when_a_run_starts_and_then_stays_with_it(tiny_set, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict, raising=False)
    run = trained(tiny_set, tmp_path, precision="auto", epochs=1)
    assert Run.open(run.folder).config.precision == "fp32"
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    again = trained(tiny_set, tmp_path, precision="auto", epochs=2)
    assert (again.is_done, again.config.precision, len(again.metrics())) == (True, "fp32", 2)
    assert "goes on in fp32, in which it was started; a new run would take bf16 here" in caplog.text
    with pytest.raises(RunError, match=r"another configuration \(precision: bf16, not fp32\)"):
        trained(tiny_set, tmp_path, precision="bf16")


def test_a_machine_without_the_precision_of_a_run_says_so(config, tmp_path):
    run = Run.start(tmp_path / NAME / "fold-0", replace(config, precision="tf32"), tmp_path, rows_of_nothing())
    with pytest.raises(RunError, match=r"was started in tf32, which this machine \(cpu\) does not have: resume it on"):
        as_started(run, config, CPU)
    run.set_state("failed")
    assert as_started(run, config, CPU).precision in ("fp32", "bf16"), "a run with nothing to lose starts again"


def rows_of_nothing() -> Any:
    return pd.DataFrame({"row": np.zeros(0, np.int64)})


def test_a_micro_batch_left_to_the_machine_is_taken_from_folds_in_another_precision(config, tmp_path):
    other = replace(config, fold=1, precision="fp16", micro_batch=2, epochs=7)
    Run.start(tmp_path / NAME / "fold-1", other, tmp_path, rows_of_nothing())
    different = replace(config, fold=2, precision="bf16", micro_batch=1, seed=5)
    Run.start(tmp_path / NAME / "fold-2", different, tmp_path, rows_of_nothing())
    folder = Run.of(tmp_path, "shufflenet_v2_x0_5", 32, 0)
    assert micro_batch_of_other_folds(folder, replace(config, micro_batch=AUTO)) == 2


# The validation loss


def test_positive_weights_weigh_the_validation_loss_that_selects_and_stops(tiny_set, tmp_path):
    options = {"positive_weights": True, "epochs": 1, "limit": 40}
    run = trained(tiny_set, tmp_path / "now", **options)
    (line,) = run.metrics()
    assert run.config.weighted_validation
    assert line["val_loss"] != pytest.approx(line["val_loss_unweighted"], rel=0.01)
    assert run.state()["best_val_loss"] == line["val_loss"]
    plain = trained(tiny_set, tmp_path / "plain", epochs=1, limit=40)
    assert "val_loss_unweighted" not in plain.metrics()[0]


def test_a_run_that_an_earlier_version_started_goes_on_by_its_rule(tiny_set, tmp_path):
    options = {"positive_weights": True, "epochs": 1, "limit": 40}
    now = trained(tiny_set, tmp_path / "now", **options)
    config = make_config(tiny_set, 32, device="cpu", **{**SMALL, **options})
    runtime = Runtime(shards=tiny_set, runs=tmp_path / "earlier", device="cpu")
    earlier = train(replace(config, weighted_validation=False), runtime)
    assert earlier.metrics()[0]["val_loss"] == now.metrics()[0]["val_loss_unweighted"]
    stored = json.loads(earlier.config_path.read_bytes())
    del stored["config"]["weighted_validation"], stored["config"]["allow_partial"]  # as it was written
    earlier.config_path.write_text(json.dumps(stored))
    more = trained(tiny_set, tmp_path / "earlier", **{**options, "epochs": 2})
    assert [("val_loss_unweighted" in line) for line in more.metrics()] == [False, False]
    assert not more.config.weighted_validation


def test_a_weighted_loss_is_that_of_torch():
    rng = np.random.default_rng(0)
    logits, target = rng.normal(size=(20, 3)).astype(np.float32), rng.integers(0, 2, (20, 3)).astype(np.float32)
    mask, weights = rng.random((20, 3)) < 0.7, np.array([1.0, 4.0, 0.5], np.float32)
    tensors = [torch.from_numpy(array) for array in (logits, target, weights)]
    losses = F.binary_cross_entropy_with_logits(*tensors[:2], reduction="none", pos_weight=tensors[2]).numpy()
    assert weighted_bce(logits, target, mask, weights) == pytest.approx(float(losses[mask].mean()), rel=1e-6)
    assert math.isnan(weighted_bce(logits, target, np.zeros((20, 3), bool), weights))
    assert weighted_bce(np.full((1, 3), 1e4), np.zeros((1, 3)), np.ones((1, 3), bool), weights) == 1e4


# Sets that are not whole


@pytest.fixture
def partial(tiny_set, tmp_path):
    """The tiny set without its last shard at 32 px, as a build leaves it that was stopped."""
    folder = copy_set(tiny_set, tmp_path / "partial")
    for path in (folder / "32").glob("000002.*"):
        path.unlink()
    return folder


def test_a_set_whose_build_is_not_finished_is_refused_before_anything_is_written(partial, tmp_path):
    words = ("--scale=32", "--device=cpu", "--weights=none", "--global-batch=8", "--micro-batch=8", "--limit=8")
    for command in (("train", "--shards", partial, "--runs", tmp_path / "runs"), ("study", partial, tmp_path / "runs")):
        done = invoke(*command, *words)
        text = " ".join(done.output.split())
        assert done.exit_code == 2, text
        assert "of 150 rows at 32 px, since its build is not finished: finish it with the command that began it" in text
        assert (
            f"`cxrfast shard --out {partial} --scale 32 …`), or train on the rows that are there with --allow-partial"
            in text
        )
    assert not (tmp_path / "runs").exists()


def test_a_partly_built_set_trains_if_it_is_allowed_and_the_run_says_so(partial, tiny_set, tmp_path, caplog):
    run = trained(partial, tmp_path, allow_partial=True, epochs=1)
    assert "the set's build is not finished: only the rows that are there take part" in caplog.text
    assert Run.open(run.folder).config.allow_partial
    assert trained(tiny_set, tmp_path, epochs=1).is_done, "the build was finished: the run goes on with its rows"
    whole = trained(tiny_set, tmp_path / "whole", allow_partial=True, epochs=1)
    assert not whole.config.allow_partial, "nothing was missing"
    with pytest.raises(RunError, match="--allow-partial"):
        trained(partial, tmp_path / "new", epochs=1)


def test_quarantined_rows_are_not_missing(phantoms, tmp_path):
    tree = Path(shutil.copytree(phantoms, tmp_path / "tree"))
    next(tree.rglob("*.jpg")).write_bytes(b"no image")
    build(tree, tmp_path / "set", [32], workers=1)
    run = trained(tmp_path / "set", tmp_path / "runs", epochs=1)
    assert run.is_done
    assert not run.config.allow_partial


def test_what_a_run_keeps_is_what_was_left_to_the_machine_and_no_more(config):
    earlier = replace(config, precision="fp16", micro_batch=2, allow_partial=True, epochs=9)
    assert kept(replace(config, micro_batch=AUTO), earlier) == replace(earlier, epochs=config.epochs)
    asked = replace(config, precision="bf16", micro_batch=8)
    assert kept(asked, earlier).differences(earlier) == ["micro_batch: 8, not 2", "precision: bf16, not fp16"]
    assert resume.earlier_run(Run.of(Path("/absent"), "x", 32, 0)) is None
