import copy
import urllib.request

import pytest
import torch
import torchvision
from commands import invoke
from runs import noise

from cxrfast.errors import RunError
from cxrfast.models.classifier import Classifier, Normalise
from cxrfast.models.head import check_outputs, use_float32
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


# The last layer


def heads(arch: str = "resnet18", labels: int = 3) -> Classifier:
    torch.manual_seed(0)
    return Classifier(arch, labels)


@pytest.mark.parametrize(
    "arch", ["resnet18", "densenet121", "mobilenet_v3_small", "vgg11", "maxvit_t", "squeezenet1_1"]
)
def test_the_last_layer_is_the_one_that_gives_a_number_per_finding_under_the_names_of_torchvision(arch):
    torch.manual_seed(0)
    oracle = torchvision.models.get_model(arch, num_classes=3).state_dict()
    model = heads(arch)
    own = {name.removeprefix("net."): value for name, value in model.state_dict().items() if name.startswith("net.")}
    assert list(own) == list(oracle)
    assert all(torch.equal(own[name], oracle[name]) for name in oracle), "the same random numbers"
    assert own[f"{model.head}.weight"].shape[0] == 3
    assert (f"{model.head}.bias" in own) == (arch != "maxvit_t")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("arch", ["resnet18", "densenet121"])
def test_the_last_layer_computes_in_float32_under_autocast_with_gradients(arch, dtype):
    model = heads(arch).eval()
    seen: list[torch.Tensor] = []
    model.net.get_submodule(model.head).register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    with torch.autocast("cpu", dtype=dtype):
        logits = model(noise(2, 32))
        assert torch.is_autocast_enabled("cpu"), "on again after the last layer"
    assert seen[0].dtype == dtype, "the layers before it compute in half precision"
    assert logits.dtype == torch.float32
    head = model.net.get_submodule(model.head)
    assert torch.equal(logits, torch.nn.functional.linear(seen[0].float(), head.weight, head.bias))
    logits.sum().backward()
    assert head.weight.grad is not None
    assert head.weight.grad.dtype == torch.float32
    assert model(noise(2, 32)).dtype == torch.float32


def test_a_copy_of_a_model_computes_with_its_own_last_layer():
    model = heads().eval()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.net.fc.bias += 5
        torch.testing.assert_close(twin(noise(2, 32)), model(noise(2, 32)) + 5)


def test_logits_of_rare_findings_are_not_rounded_together():
    """At a prevalence of 1 in 1,000 logits lie near -7, where bfloat16 has one value per 1/32."""
    torch.manual_seed(0)
    features = torch.randn(20_000, 64, dtype=torch.bfloat16)
    fc = torch.nn.Linear(64, 1)
    with torch.no_grad():
        fc.bias.fill_(-7)
    holder = torch.nn.Sequential(fc)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        rounded = holder(features).unique().numel()
        use_float32(holder, "0")
        exact = holder(features).unique().numel()
    assert rounded < 200
    assert exact > 15_000


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("arch", "message"),
    [
        (
            "squeezenet1_1",
            "squeezenet1_1 does not return logits: none of its outputs is below 0, because an activation follows the last layer",
        ),
        ("vit_b_32", "vit_b_32 cannot be trained on images of 64 px"),
    ],
)
def test_classifiers_without_logits_are_refused(arch, message, device):
    with torch.device(device):
        model = Classifier(arch, 2)
        with pytest.raises(RunError, match=message):
            model.check_size(64)


class _Ends(torch.nn.Module):
    """A network whose last layer is followed by something."""

    def __init__(self, *after: torch.nn.Module, outputs: int = 2) -> None:
        super().__init__()
        self.body = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, outputs), *after)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.body(image)


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (_Ends(torch.nn.ReLU()), "none of its outputs is below 0"),
        (_Ends(torch.nn.Sigmoid()), "none of its outputs is below 0"),
        (_Ends(torch.nn.Softmax(1)), "none of its outputs is below 0"),
        (_Ends(torch.nn.Tanh()), "its outputs are not those of its last layer"),
        (_Ends(torch.nn.LogSoftmax(1)), "its outputs are not those of its last layer"),
        (_Ends(torch.nn.GELU()), "none of its outputs is below 0"),
        (_Ends(outputs=3), "does not return one logit per finding and image"),
        (_Ends(torch.nn.Unflatten(1, (2, 1))), "does not return one logit per finding and image"),
        (_Ends(torch.nn.BatchNorm1d(2)), "does not end in a linear layer or a convolution"),
    ],
)
def test_what_follows_the_last_layer_is_found_by_a_forward_pass(net, message):
    with pytest.raises(RunError, match=message):
        check_outputs(net, "ours", 2, 8)


def test_a_dropout_or_an_average_after_the_last_layer_leaves_logits():
    check_outputs(_Ends(torch.nn.Dropout(0.5)), "ours", 2, 8)
    pooled = torch.nn.Sequential(torch.nn.Conv2d(3, 2, 1), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    check_outputs(pooled, "ours", 2, 8)


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
