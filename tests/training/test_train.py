"""Whole trainings: what they leave behind, when they end, what they refuse."""

import json
import subprocess
from dataclasses import replace
from itertools import groupby, pairwise
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from sets import relabel_rows
from trainings import FAST, OPTIONS, command, run_to_the_end

import cxrfast.training.train
from cxrfast.config import Runtime
from cxrfast.models.classifier import Classifier
from cxrfast.training.setup import make_config
from cxrfast.training.train import train


@pytest.mark.slow
def test_ranks_that_share_a_cache_of_pixels_train_bitwise_as_without_it(tiny_set, tmp_path):
    cache = tmp_path / "cache"
    for name, more in (("plain", []), ("cached", [f"--cache={cache}"])):
        run_to_the_end([*command(tiny_set, tmp_path / name, 2, epochs=1, order="block"), *more])
    weights = [load_file(next((tmp_path / name).glob("*/fold-0")) / "best.safetensors") for name in ("plain", "cached")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert {path.suffix for path in cache.iterdir()} == {".pixels", ".sums"}
    assert next(cache.glob("*.pixels")).stat().st_blocks > 0


def test_a_training_leaves_what_the_next_steps_need_and_says_which_engine_it_chose_and_why(tiny_set, tmp_path, caplog):
    caplog.set_level("INFO")
    config = make_config(tiny_set, 32, device="cpu", **{**FAST, "precision": "auto", "limit": 40})
    run = train(config, Runtime(shards=tiny_set, runs=tmp_path, device="cpu"))
    assert caplog.text.count("engine host: on a CPU its threads are several times as fast as DALI's") == 1
    files = "best.safetensors config.json last.pt metrics.jsonl rows.parquet state.json"
    assert sorted(p.name for p in run.folder.iterdir()) == files.split()
    lines = run.metrics()
    assert [line["epoch"] for line in lines] == [0, 1]
    for line in lines:
        assert line["train_loss"] > 0
        assert line["val_loss"] > 0
        assert set(line["val_auroc_by_label"]) == set(config.labels)
        assert line["val_auroc_by_label"]["Edema"] is None, "no phantom has edema: undefined, not 0.5"
    assert run.state()["state"] == "done"
    stored = json.loads((run.folder / "config.json").read_text())
    assert stored["hash"] == replace(config, precision=stored["config"]["precision"]).hash
    assert stored["config"]["precision"] in ("fp32", "bf16"), "auto is resolved when the run starts"
    again = train(config, Runtime(shards=tiny_set, runs=tmp_path, device="cpu"))
    assert again.metrics() == lines, "a run that is done is not trained again"


def test_a_run_whose_set_was_relabelled_keeps_its_labels_and_says_so(folder, tmp_path, caplog):
    config = make_config(folder, 32, device="cpu", **{**FAST, "epochs": 1, "limit": 16})
    runtime = Runtime(shards=folder, runs=tmp_path / "runs", device="cpu")
    rows = train(config, runtime).rows()
    row = int(rows["row"][rows["Support Devices"] == 1].iloc[0])
    assert "relabelled" not in caplog.text
    relabel_rows(folder, tmp_path, {(row, "Support Devices"): 0.0})
    pd.testing.assert_frame_equal(train(config, runtime).rows(), rows)
    assert (
        f"such as Support Devices of row {row}: 1 then, 0 now; to use the new labels, train in another" in caplog.text
    )


@pytest.mark.slow
def test_training_stops_when_the_validation_loss_gets_no_better(tiny_set, tmp_path):
    options = {**OPTIONS, "epochs": 30, "learning_rate": 0.05, "stop_after": 2, "patience": 1, "limit": 40}
    config = make_config(tiny_set, 32, device="cpu", **options)
    run = train(config, Runtime(shards=tiny_set, runs=tmp_path, device="cpu"))
    losses = [line["val_loss"] for line in run.metrics()]
    best = int(np.argmin(losses))
    assert len(losses) == best + 3 < 30
    rates = [line["learning_rate"] for line in run.metrics()]
    assert rates[0] == 0.05
    assert all(b in (a, a / 2) for a, b in pairwise(rates))


@pytest.mark.slow
def test_a_failure_of_the_first_rank_ends_all_ranks_with_one_message(tiny_set, tmp_path):
    arguments = command(tiny_set, tmp_path, 2, weights="/nowhere.pth")
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=150)
    assert done.returncode != 0
    assert done.stderr.count("/nowhere.pth does not exist") == 1
    traceback = 'Traceback (most recent call last):\n  File "' + str(Path(__file__).parents[2] / "cxrfast")
    assert traceback not in done.stderr
    assert not (tmp_path / "densenet121-32").exists()


def test_sizes_change_between_epochs_and_validation_keeps_the_scale(tiny_set, tmp_path):
    config = make_config(tiny_set, 64, device="cpu", **{**FAST, "epochs": 3, "limit": 16}, sizes=((32, 1), (48, 1)))
    assert [config.size_at(epoch) for epoch in range(4)] == [32, 48, 64, 64]
    seen = []

    class Seen(Classifier):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            seen.append((self.training, image.shape[-1]))
            return super().forward(image)

    with patch.object(cxrfast.training.train, "Classifier", Seen):
        run = train(config, Runtime(shards=tiny_set, runs=tmp_path, device="cpu"))
    assert [line["size"] for line in run.metrics()] == [32, 48, 64]
    runs = [key for key, _ in groupby(seen[3:])]  # the first three are trials of the sizes
    assert runs == [(True, 32), (False, 64), (True, 48), (False, 64), (True, 64), (False, 64)]


def test_a_profile_is_a_trace_of_steps(tiny_set, tmp_path):
    config = make_config(tiny_set, 32, device="cpu", **{**FAST, "epochs": 1, "limit": 60, "global_batch": 4})
    run = train(config, Runtime(shards=tiny_set, runs=tmp_path, device="cpu", profile=True))
    names = {event.get("name") for event in json.loads((run.folder / "profile.json").read_text())["traceEvents"]}
    assert any("convolution" in str(name) for name in names)
    assert any(str(name).startswith("ProfilerStep") for name in names)
