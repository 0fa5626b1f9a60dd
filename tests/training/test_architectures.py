"""A network of timm's and one's own from the command line to the tables: trained, resumed, predicted, evaluated, mapped."""

import json
import os
import shutil
import signal
from pathlib import Path

import pandas as pd
import pytest
import torch
from commands import invoke
from runs import noise
from trainings import FAST, assert_same

from cxrfast.config import Runtime
from cxrfast.errors import RunError
from cxrfast.exports.load import load as cxrfast_load
from cxrfast.models.networks.factories import trusted
from cxrfast.runs.run import Run
from cxrfast.training.setup import make_config
from cxrfast.training.signals import Stopped
from cxrfast.training.train import train

SHORT = {**FAST, "limit": 24}
NAMES = {
    "timm/test_convnext": "timm-test_convnext-64",
    "timm/test_vit": "timm-test_vit-64",
    "mynets:Small": "mynets-Small-64",
    "mynets:flat": "mynets-flat-64",
}


def words(**options) -> list[str]:
    return [f"--{name.replace('_', '-')}={value}" for name, value in {**SHORT, **options}.items()]


def cxrfast(*command: object) -> str:
    """What a command that succeeds prints, on one line."""
    done = invoke(*command)
    assert done.exit_code == 0, (done.output, done.exception)
    return " ".join(done.output.split())


def refused(*command: object) -> str:
    done = invoke(*command)
    assert done.exit_code == 2, (done.output, done.exception)
    return " ".join(done.stderr.split())


@pytest.fixture(scope="module", params=NAMES)
def run(request, tiny_set, tmp_path_factory) -> Run:
    """A run of an architecture that is not torchvision's. Not to be written to."""
    runs = tmp_path_factory.mktemp("runs")
    cxrfast("train", "--shards", tiny_set, "--runs", runs, "--scale=64", "--device=cpu", *words(arch=request.param))
    return Run.open(runs / NAMES[request.param] / "fold-0")


@pytest.fixture
def copy(run, tmp_path) -> Run:
    return Run.open(Path(shutil.copytree(run.folder.parents[1], tmp_path / "runs")) / run.name)


def test_a_stopped_training_goes_on_to_bitwise_the_same_weights(tiny_set, tmp_path, run):
    config = make_config(tiny_set, 64, device="cpu", **{**SHORT, "arch": run.config.arch})
    runtime = Runtime(shards=tiny_set, runs=tmp_path, device="cpu")
    with pytest.raises(Stopped):
        train(config, runtime, lambda line: line["epoch"] or os.kill(os.getpid(), signal.SIGUSR1))
    assert train(config, runtime).is_done
    assert_same(run.folder, tmp_path / run.name)


def test_it_is_predicted_and_evaluated_and_its_maps_are_drawn_or_said_not_to_exist(tiny_set, copy):
    own = ["--trust-arch"] if ":" in copy.config.arch else []
    runs = copy.folder.parents[1]
    cxrfast("predict", copy.folder, "--device=cpu", *own)
    cxrfast("evaluate", runs)
    assert pd.read_csv(runs / "evaluation" / "auroc.csv")["name"].unique().tolist() == [copy.folder.parent.name]
    commands = ("erf", copy.folder, "--images=2"), ("gradcam", copy.folder, "--label=Support Devices", "--images=2")
    for command in commands:
        if copy.config.arch == "mynets:flat":
            assert "are not defined for mynets:flat: it has no forward_features" in refused(*command, *own)
        else:
            cxrfast(*command, *own)
    text = Path(cxrfast("report", runs).split()[-1]).read_text()
    assert copy.folder.parent.name in text
    assert copy.config.arch in text


def test_it_is_exported_and_loaded_with_the_same_logits(copy, tmp_path):
    own = ["--trust-arch"] if ":" in copy.config.arch else []
    runs, out = copy.folder.parents[1], tmp_path / "out"
    cxrfast("predict", copy.folder, "--device=cpu", *own)
    cxrfast("export", runs, out, *own)
    with trusted(copy.config.arch):
        mine, theirs = copy.load(), cxrfast_load(out)
    with torch.no_grad():
        (found,) = theirs({64: noise(2, 64)}).logits.values()
        assert torch.equal(found, mine(noise(2, 64)))
    if own:
        assert "--trust-arch" in refused("export", runs, tmp_path / "other")
        assert not (tmp_path / "other").exists()
        with pytest.raises(RunError, match="--trust-arch"):
            cxrfast_load(out)


def test_a_network_of_ones_own_is_not_imported_for_tables_nor_without_being_trusted(copy):
    if ":" not in copy.config.arch:  # timm is a library, which is imported like torchvision
        assert copy.load().arch == copy.config.arch
        return
    stored = json.loads(copy.config_path.read_text())
    for command in (
        ("predict", copy.folder),
        ("erf", copy.folder),
        ("gradcam", copy.folder, "--label=Support Devices"),
    ):
        assert "is imported only if you say so: add --trust-arch" in refused(*command)
    with pytest.raises(RunError, match="--trust-arch"):
        copy.load()
    with trusted(stored["config"]["arch"]):
        assert copy.load().arch == copy.config.arch
    assert NAMES[copy.config.arch].replace("-64", "") in cxrfast("status", copy.folder.parents[1])


def test_a_study_of_two_scales_goes_on_without_maps_that_do_not_exist(tiny_set, tmp_path):
    text = cxrfast(
        "study", tiny_set, tmp_path, "--scale=32,64", "--fold=0", "--device=cpu", *words(arch="mynets:flat", epochs=1)
    )
    assert (
        "not defined for mynets:flat: it has no forward_features and forward_head; the study goes on without maps"
        in text
    )
    assert (tmp_path / "report.html").exists()
    assert (tmp_path / "mynets-flat-32" / "fold-0" / "predictions.zarr").exists()
    dry = cxrfast(
        "study", tiny_set, tmp_path, "--scale=32,64", "--fold=0", "--dry-run", *words(arch="mynets:flat", epochs=1)
    )
    assert "mynets-flat-64/fold-0" in dry


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (
            {"arch": "mynets:Small", "weights": "imagenet"},
            "there are no ImageNet weights for mynets:Small, a network of your own",
        ),
        ({"arch": "timm/test_vitt"}, "did you mean 'timm/test_vit"),
        (
            {"arch": "timm/test_vit", "sizes": "32x1"},
            "timm/test_vit is made for one size of images, 64 px: leave out --sizes",
        ),
        ({"arch": "mynets:raises"}, "mynets:raises failed at"),
        ({"arch": "mynets:one_output_too_many"}, "does not return one logit per finding and image"),
        ({"arch": "mynets:shrinks_to_a_pixel", "micro_batch": 1}, "BatchNorm cannot take the variance"),
    ],
)
def test_what_cannot_be_trained_is_named_before_a_folder_is_made(tiny_set, tmp_path, option, message):
    arguments = ["--shards", tiny_set, "--runs", tmp_path / "runs", "--scale=64", "--device=cpu", *words(**option)]
    assert message in refused("train", *arguments)
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").glob("*/fold-0/config.json"))


def test_micro_batch_auto_tries_a_network_of_one_size_at_that_size(tiny_set, tmp_path):
    cxrfast(
        *("train", "--shards", tiny_set, "--runs", tmp_path, "--scale=64", "--device=cpu"),
        *words(arch="mynets:flat", micro_batch="auto", epochs=1),
    )
    assert Run.open(tmp_path / "mynets-flat-64" / "fold-0").config.micro_batch == 8


def test_weights_of_timm_start_a_run_from_a_file(tiny_set, tmp_path):
    import timm
    from safetensors.torch import save_file

    torch.manual_seed(3)
    tensors = timm.create_model("test_vit").state_dict()
    save_file({name: value.contiguous() for name, value in tensors.items()}, tmp_path / "vit.safetensors")
    text = cxrfast(
        *("train", "--shards", tiny_set, "--runs", tmp_path / "runs", "--scale=64", "--device=cpu"),
        *words(arch="timm/test_vit", epochs=1, weights=tmp_path / "vit.safetensors", learning_rate=1e-12),
    )
    assert "the last layer starts at random" in text
    weights = Run.open(tmp_path / "runs" / "timm-test_vit-64" / "fold-0").read_weights()
    torch.testing.assert_close(weights["net.blocks.0.attn.qkv.weight"], tensors["blocks.0.attn.qkv.weight"])
