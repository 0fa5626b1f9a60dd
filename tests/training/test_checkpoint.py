"""Checkpoints: restored bitwise, or refused."""

import math
import os
import shutil
import signal

import pytest
import torch
from safetensors.torch import save_file
from trainings import FAST, SHORT, assert_same, command, is_in_second_epoch, run_to_the_end, started, wait_for

from cxrfast.config import Runtime
from cxrfast.errors import RunError
from cxrfast.models.classifier import Classifier
from cxrfast.training.setup import make_config
from cxrfast.training.train import train


def test_a_damaged_checkpoint_is_refused(trained, tiny_set, tmp_path):
    folder = tmp_path / "densenet121-32" / "fold-0"
    shutil.copytree(trained.folder, folder)
    (folder / "state.json").unlink()
    whole = (folder / "last.pt").read_bytes()
    for damaged in (b"", b"junk", whole[:1000]):
        (folder / "last.pt").write_bytes(damaged)
        with pytest.raises(RunError, match=r"last\.pt is damaged"):
            train(trained.config, Runtime(shards=tiny_set, runs=tmp_path, device="cpu"))


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("stale", None, "KeyError: 'stale'"),
        ("epoch", "1", "its progress cannot be"),
        ("consumed", -8, "its progress cannot be"),
        ("spent", math.nan, "its progress cannot be"),
        ("best", math.nan, "its best epoch cannot be"),
        ("best_auroc", "0.9", "its best epoch cannot be"),
        ("losses", None, "KeyError: 'losses'"),
        ("rng", [], "division|modulo"),
        ("model", {"x": torch.zeros(3)}, "Missing key"),
        ("optimizer", {}, "KeyError"),
    ],
)
def test_a_checkpoint_with_another_value_is_refused(trained, tiny_set, tmp_path, name, value, why):
    folder = tmp_path / "densenet121-32" / "fold-0"
    shutil.copytree(trained.folder, folder)
    (folder / "state.json").unlink()
    checkpoint = torch.load(folder / "last.pt", weights_only=True)
    assert name in checkpoint
    checkpoint[name] = value
    if value is None:
        del checkpoint[name]
    torch.save(checkpoint, folder / "last.pt")
    with pytest.raises(RunError, match=rf"last\.pt is damaged \(.*{why}.*\): delete it to restart the run"):
        train(trained.config, Runtime(shards=tiny_set, runs=tmp_path, device="cpu"))


def test_a_resumed_training_no_longer_needs_its_first_weights(tiny_set, tmp_path):
    weights = tmp_path / "first.safetensors"
    runtime = Runtime(shards=tiny_set, runs=tmp_path, device="cpu")
    save_file({k: v.contiguous() for k, v in Classifier(FAST["arch"], 14).state_dict().items()}, weights)
    options = {**SHORT, "arch": FAST["arch"], "weights": str(weights)}
    config = make_config(tiny_set, 32, device="cpu", **options)
    run = train(config, runtime)
    weights.unlink()
    (run.folder / "state.json").unlink()
    assert train(config, runtime).is_done


@pytest.mark.slow
@pytest.mark.parametrize("nproc", [1, 2])
def test_a_network_with_dropout_that_was_stopped_ends_as_if_nothing_had_happened(tiny_set, tmp_path, nproc):
    """The generators of all ranks are part of the checkpoint, and ranks draw different numbers."""
    options = {"arch": "mobilenet_v3_small"}
    whole, run = (tmp_path / name / "mobilenet_v3_small-32" / "fold-0" for name in ("whole", "stopped"))
    run_to_the_end(command(tiny_set, tmp_path / "whole", nproc, **options))
    arguments = command(tiny_set, tmp_path / "stopped", nproc, **options)
    with started(arguments, tmp_path / "log") as process:
        wait_for(lambda: is_in_second_epoch(run), process)
        os.kill(process.pid, signal.SIGTERM)
        process.wait(timeout=40)
    states = [state["cpu"] for state in torch.load(run / "last.pt", weights_only=True)["rng"]]
    assert len(states) == nproc
    assert nproc == 1 or not torch.equal(states[0], states[1])
    run_to_the_end(arguments)
    assert_same(whole, run)
