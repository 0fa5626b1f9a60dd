import re
import urllib.request

import pytest
import torch
import torchvision
from commands import invoke
from runs import noise
from safetensors.torch import save_file

from cxrfast.errors import RunError
from cxrfast.models.classifier import Classifier, Normalise
from cxrfast.models.weights import load_weights
from cxrfast.training.loss import masked_bce_sum


def test_the_classifier_is_torchvisions_densenet_behind_its_normalisation_of_the_copied_grey_channel():
    normalise = torchvision.transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    pixels = normalise(noise(2, 64).expand(-1, 3, -1, -1).float() / 255)
    ours = Normalise()(noise(2, 64))
    torch.testing.assert_close(ours, pixels)
    assert ours.is_contiguous(memory_format=torch.channels_last)
    model = Classifier("densenet121", 3).eval()
    oracle = torchvision.models.densenet121(num_classes=3).eval()
    oracle.load_state_dict({k.removeprefix("net."): v for k, v in model.state_dict().items() if k.startswith("net.")})
    assert {"normalise.mean", "normalise.std"} <= model.state_dict().keys(), "part of every checkpoint"
    with torch.no_grad():
        torch.testing.assert_close(model(noise(2, 64)), oracle(pixels), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "arch", ["densenet121", "efficientnet_b0", "resnet18", pytest.param("convnext_tiny", marks=pytest.mark.slow)]
)
def test_architectures_train_from_scratch_on_channels_last_batches(arch):
    torch.manual_seed(0)
    model = Classifier(arch, 3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for name, weight in model.named_parameters():
        assert weight.ndim != 4 or weight.is_contiguous(memory_format=torch.channels_last), name
    features: list[torch.Tensor] = []
    list(model.feature_layers.children())[-1].register_forward_hook(lambda *given: features.append(given[-1]))
    optimizer = torch.optim.Adam(model.parameters())
    target = torch.tensor([[0.0, 1.0, 0.0]] * 3)
    loss = masked_bce_sum(model(noise(3, 64)), target, torch.ones(3, 3, dtype=torch.bool))
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    optimizer.step()
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters() if p.grad.any())
    assert features[0].shape == (3, model.feature_layers(model.normalise(noise(3, 64))).shape[1], 2, 2), "stride 32"
    assert features[0].is_contiguous(memory_format=torch.channels_last)


def test_checkpointing_is_for_densenets_and_changes_no_logit():
    plain, checkpointed = Classifier("densenet121", 3), Classifier("densenet121", 3, recompute=True)
    checkpointed.load_state_dict(plain.state_dict())
    assert torch.equal(checkpointed(noise(2, 64)), plain(noise(2, 64)))
    message = "resnet50 does not support activation checkpointing: use densenet121, densenet161"
    with pytest.raises(RunError, match=message):
        Classifier("resnet50", 3, recompute=True)
    with pytest.raises(RunError, match="densenet999"):
        Classifier("densenet999", 2)


def test_a_torchvision_file_loads_except_its_last_layer(tmp_path):
    file = torchvision.models.densenet121(num_classes=10).state_dict()
    # as torchvision's published file spells them: denselayer1.norm.1.weight
    old = {re.sub(r"(norm|conv)([12])\.", r"\1.\2.", k): v for k, v in file.items() if "num_batches" not in k}
    assert len(old.keys() - file.keys()) == 2 * 58 * 5
    save_file(old, tmp_path / "weights.safetensors")
    torch.save(old, tmp_path / "weights.pth")
    model = Classifier("densenet121", 5)
    for path in sorted(tmp_path.iterdir()):
        model.load_state_dict({name: torch.zeros_like(value) for name, value in model.state_dict().items()})
        load_weights(model, path)
        for name in old.keys() & file.keys() - {"classifier.weight", "classifier.bias"}:
            assert torch.equal(model.state_dict()["net." + name], file[name]), name
    assert model.net.classifier.out_features == 5


def test_a_checkpoint_of_another_architecture_and_a_file_that_is_not_one_are_refused(tmp_path):
    model = Classifier("resnet18", 5)
    torch.save(torchvision.models.squeezenet1_1(num_classes=5).state_dict(), tmp_path / "other.pth")
    with pytest.raises(RunError, match="does not fit resnet18"):
        load_weights(model, tmp_path / "other.pth")
    for name, content in (("empty.pth", b""), ("bad.pth", b"not one"), ("bad.safetensors", b"not one")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(RunError, match="is not a checkpoint"):
            load_weights(model, tmp_path / name)


def test_imagenet_weights_without_a_network_say_what_to_do(tmp_path, monkeypatch):
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setattr(urllib.request, "_opener", None)  # one that has not seen these proxies
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    done = invoke("fetch-weights")
    assert done.exit_code == 2
    assert "cxrfast fetch-weights --arch densenet121 --to DIR" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.rglob("*.pth"))
