"""timm's networks: `--arch timm/NAME`, against timm itself."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import timm
import torch
from commands import invoke
from runs import noise
from safetensors.torch import save_file

from cxrfast.errors import RunError
from cxrfast.models.classifier import Classifier
from cxrfast.models.networks.make import check_arch, is_exact
from cxrfast.models.networks.timm_networks import cached_weights, fetch_timm
from cxrfast.models.weights import has_imagenet, load_weights
from cxrfast.models.weights_file import read_weights_file

NETWORKS = ["test_convnext", "test_efficientnet", "test_vit", "test_resnet", "test_nfnet", "test_mambaout"]


def made(name: str, side: int = 64, outputs: int = 3) -> Classifier:
    torch.manual_seed(0)
    return Classifier(f"timm/{name}", outputs, side=side)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_is_timms_behind_its_own_normalisation(name):
    model = made(name).eval()
    torch.manual_seed(0)
    size = {"img_size": 64} if name == "test_vit" else {}
    oracle = timm.create_model(name, num_classes=3, **size).eval()
    settings = timm.get_pretrained_cfg(name)
    mean, std = (torch.tensor(value).view(1, 3, 1, 1) for value in (settings.mean, settings.std))
    pixels = (noise(2, 64).expand(-1, 3, -1, -1).float() / 255 - mean) / std
    with torch.no_grad():
        torch.testing.assert_close(model(noise(2, 64)), oracle(pixels), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(model.state_dict()["normalise.mean"], mean)
    assert model.head == settings.classifier
    model.check_size(64)


def test_the_mean_of_a_vision_transformer_is_not_imagenets():
    assert made("test_vit").normalise.mean.flatten().tolist() == [0.5, 0.5, 0.5]
    assert made("test_efficientnet").normalise.mean.flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])


@pytest.mark.parametrize("name", ["test_convnext", "test_vit"])
def test_the_last_layer_computes_in_float32_under_autocast_and_gradients_reach_every_weight(name):
    model = made(name)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(noise(2, 64))
    assert logits.dtype == torch.float32
    logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("side", [32, 64, 96])
def test_a_transformer_is_made_for_the_scale(side):
    model = made("test_vit", side)
    model.check_size(side)
    assert model(noise(1, side)).shape == (1, 3)
    with pytest.raises(RunError, match=rf"timm/test_vit is made for one size of images, {side} px: leave out --sizes"):
        model.check_size(side + 16)


def test_a_scale_that_patches_do_not_cover_is_refused():
    with pytest.raises(
        RunError, match="cuts images into patches of 16 px, which do not cover 72 px: use a scale that is a mul"
    ):
        made("test_vit", 72)
    with pytest.raises(RunError, match=r"timm/test_maxvit cannot be .* images of 40 px"):
        made("test_maxvit", 40).check_size(40)


@pytest.mark.parametrize(
    ("arch", "message"),
    [
        (
            "timm/convnext_tinny",
            "architecture 'timm/convnext_tinny' is unknown: did you mean 'timm/convnext_tiny'? use a name of",
        ),
        ("timm/", "architecture 'timm/' is unknown: use a name"),
        ("timm/hf-hub:a/b", "is unknown"),
        ("timm/../x", "is unknown"),
        ("timm/test_vit.r99", "is unknown: timm has no weights 'r99' of test_vit; it has r160_in1k"),
        (
            "densenet12",
            "architecture 'densenet12' is unknown: did you mean 'densenet121'? use a torchvision classifier",
        ),
        ("TIMM/test_vit", "architecture 'TIMM/test_vit' is unknown: use a torchvision classifier"),
    ],
)
def test_a_name_that_does_not_exist_is_refused(arch, message):
    with pytest.raises(RunError) as caught:
        check_arch(arch)
    assert message in str(caught.value)
    with pytest.raises(RunError, match="is unknown"):
        Classifier(arch, 3, side=64)


def test_a_network_with_two_heads_is_refused():
    with pytest.raises(RunError, match="deit_tiny_distilled_patch16_224 "):
        made("deit_tiny_distilled_patch16_224").check_size(64)


def test_checkpointing_is_refused():
    with pytest.raises(RunError, match="timm/test_vit does not support activation checkpointing"):
        Classifier("timm/test_vit", 3, recompute=True, side=64)


def test_without_timm_one_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(RunError, match=r"needs timm: pip install 'cxrfast\[timm\]'"):
        made("test_vit")


def test_networks_that_take_images_of_any_size_are_told_from_those_that_do_not():
    assert [is_exact(arch) for arch in ("timm/test_vit", "timm/test_convnext", "densenet121", "a:b")] == [
        True,
        False,
        False,
        True,
    ]


# Weights


@pytest.fixture
def nowhere(tmp_path, monkeypatch):
    """No network, and an empty cache."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path


@pytest.mark.usefixtures("nowhere")
def test_weights_without_a_network_say_what_to_do(tmp_path):
    done = invoke("fetch-weights", "--arch", "timm/test_vit", "--to", tmp_path / "out")
    assert done.exit_code == 2
    text = " ".join(done.stderr.split())
    assert (
        "pretrained weights for timm/test_vit could not be downloaded from https://huggingface.co/timm/test_vit.r160_in1k"
        in text
    )
    assert (
        "run `cxrfast fetch-weights --arch timm/test_vit --to DIR`, copy DIR here and give --weights DIR/test_vit.r160_in1k.safetensors"
        in text
    )
    assert "Traceback" not in text
    assert not (tmp_path / "out").exists()
    assert not has_imagenet("timm/test_vit")


def of_timm(tmp_path: Path, name: str = "test_vit", **given: int) -> Path:
    """A file as timm publishes it: weights of the network for 160 px and 1,000 classes."""
    torch.manual_seed(5)
    path = tmp_path / f"{name}.safetensors"
    save_file({k: v.contiguous() for k, v in timm.create_model(name, **given).state_dict().items()}, path)
    return path


def test_cached_weights_are_used_and_copied_for_a_machine_without_a_network(nowhere):
    path = of_timm(nowhere)
    snapshot = nowhere / "hub" / "models--timm--test_vit.r160_in1k" / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    shutil.copy(path, snapshot / "model.safetensors")
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("a" * 40)
    assert cached_weights("timm/test_vit") == snapshot / "model.safetensors"
    assert has_imagenet("timm/test_vit")
    copy = fetch_timm("timm/test_vit", nowhere / "out")
    assert copy == nowhere / "out" / "test_vit.r160_in1k.safetensors"
    assert copy.read_bytes() == path.read_bytes()


@pytest.mark.parametrize(("name", "side"), [("test_vit", 64), ("test_vit", 160), ("test_convnext", 64)])
def test_weights_are_converted_as_timm_does_all_but_the_last_layer(tmp_path, name, side):
    path = of_timm(tmp_path, name)
    model = made(name, side)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    load_weights(model, read_weights_file(path), ["A", "B", "C"])
    size = {"img_size": side} if name == "test_vit" else {}
    oracle = timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"file": str(path)}, num_classes=3, **size)
    for key, value in oracle.state_dict().items():
        mine = model.state_dict()[f"net.{key}"]
        if key.startswith(f"{model.head}."):
            assert torch.equal(mine, before[f"net.{key}"])
        else:
            torch.testing.assert_close(mine, value)


def test_a_file_of_another_network_is_refused_with_the_names(tmp_path):
    model = made("test_convnext")
    with pytest.raises(RunError, match=r"test_vit.safetensors does not fit timm/test_convnext: "):
        load_weights(model, read_weights_file(of_timm(tmp_path)))


def test_a_file_of_a_run_is_taken_as_it_is(tmp_path):
    model, other = made("test_vit"), made("test_vit")
    with torch.no_grad():
        other.net.pos_embed += 1
    tensors = {k: v.contiguous() for k, v in other.state_dict().items()}
    save_file(tensors, tmp_path / "best.safetensors", metadata={"cxrfast": json.dumps({"kind": "run"})})
    load_weights(model, read_weights_file(tmp_path / "best.safetensors"))
    assert torch.equal(model.net.pos_embed, other.net.pos_embed)
