"""ONNX, TorchScript and torchvision give the logits of the network that was exported, and their files tell nothing else."""

import io
import json
import re
import warnings
import zipfile

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torchvision
from runs import SMALL
from safetensors.torch import load
from torch import nn

from cxrfast.errors import DeviceError, RunError
from cxrfast.exports import formats
from cxrfast.exports.formats import (
    FORMATS,
    Exported,
    check_films,
    check_libraries,
    compare,
    export_network,
    onnx_runner,
    torchscript_runner,
)
from cxrfast.models.classifier import Classifier

RECORD = {"labels": ["Edema", "Größe *1*"], "scale": 32}


def classifier(arch: str, outputs: int = 2) -> Classifier:
    """Random weights whose logits tell images apart: BatchNorm has the statistics of the films that are compared."""
    torch.manual_seed(0)
    model = Classifier(arch, outputs).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        model(check_films(64))
    return model.eval()


@pytest.fixture(scope="module")
def tiny() -> Classifier:
    """A network of two layers, quick to export."""
    model = classifier(SMALL)
    torch.manual_seed(1)
    model.net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    return model.eval()


@pytest.fixture(scope="module")
def onnx_file(tiny) -> Exported:
    return export_network(tiny, 32, "onnx", RECORD)


def logits(model: Classifier, images: torch.Tensor) -> np.ndarray:
    with torch.no_grad():
        return model(images).numpy()


def test_an_onnx_file_takes_any_number_of_grey_films_and_gives_the_logits(tiny, onnx_file):
    session = onnxruntime.InferenceSession(onnx_file.data, providers=["CPUExecutionProvider"])
    (image,), (output,) = session.get_inputs(), session.get_outputs()
    assert (image.name, image.type, image.shape) == ("image", "tensor(uint8)", ["N", 1, 32, 32])
    assert (output.name, output.type, output.shape) == ("logits", "tensor(float)", ["N", 2])
    for n in (1, 3, 7):
        films = torch.randint(0, 256, (n, 1, 32, 32), dtype=torch.uint8)
        (found,) = session.run(None, {"image": films.numpy()})
        np.testing.assert_allclose(found, logits(tiny, films), atol=1e-5)
    assert onnx_file.difference.largest <= 1e-5


def test_onnx_and_torchscript_files_say_what_they_are(tiny, onnx_file):
    proto = onnx.load_from_string(onnx_file.data)
    assert {entry.key: json.loads(entry.value) for entry in proto.metadata_props} == {"cxrfast": RECORD}
    extra = {"cxrfast": ""}
    with warnings.catch_warnings(action="ignore"):
        torch.jit.load(io.BytesIO(export_network(tiny, 32, "torchscript", RECORD).data), _extra_files=extra)
    assert json.loads(extra["cxrfast"]) == RECORD


@pytest.mark.parametrize("kind", ["onnx", "torchscript"])
def test_no_path_or_line_of_a_program_is_in_the_file(tiny, onnx_file, kind):
    data = onnx_file.data if kind == "onnx" else export_network(tiny, 32, kind, RECORD).data
    if kind == "torchscript":
        names = zipfile.ZipFile(io.BytesIO(data)).namelist()
        assert not [name for name in names if name.endswith(".debug_pkl")]
        data = b"".join(zipfile.ZipFile(io.BytesIO(data)).read(name) for name in names)
    assert not re.search(rb"site-packages|\.py\b|, line \d+", data)


def test_torchscript_gives_the_logits_of_batches_of_any_size(tiny):
    run = torchscript_runner(export_network(tiny, 32, "torchscript", RECORD).data)
    for n in (1, 4):
        films = torch.randint(0, 256, (n, 1, 32, 32), dtype=torch.uint8)
        np.testing.assert_allclose(run(films), logits(tiny, films), atol=1e-6)


def test_torchvisions_own_network_loads_the_weights_strictly_and_gives_the_logits_of_normalised_images():
    model = classifier(SMALL)
    weights = load(export_network(model, 64, "torchvision", RECORD).data)
    network = torchvision.models.get_model(SMALL, num_classes=2).eval()
    network.load_state_dict(weights, strict=True)
    films = check_films(64)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    three = (films.float().expand(-1, 3, -1, -1) / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    with torch.no_grad():
        found = network(three).numpy()
    assert np.ptp(found, axis=0).min() > 0.01
    np.testing.assert_allclose(found, logits(model, films), atol=1e-6)


def test_a_network_that_is_not_torchvisions_has_no_torchvision_format(tiny):
    tiny.arch, arch = "timm/resnet10t", tiny.arch
    try:
        with pytest.raises(RunError, match=r"timm/resnet10t is not an architecture of torchvision: leave out --format"):
            export_network(tiny, 32, "torchvision", RECORD)
    finally:
        tiny.arch = arch


def test_the_films_that_are_compared_are_phantoms_and_noise_the_same_each_time():
    films = check_films(96)
    assert films.shape == (8, 1, 96, 96)
    assert torch.equal(films, check_films(96))
    rough = films.float().diff(dim=3).abs().mean((1, 2, 3))
    assert (rough[1::2] > 80).all()  # noise: neighbours differ by 85 on average
    assert (rough[::2] < 20).all()


def test_a_logit_beyond_the_bound_is_an_error_with_both_numbers(tiny):
    with pytest.raises(RunError, match=r"^tiny differs from the original by 0\.5 in a logit, and at most 0\.0001 is"):
        compare(tiny, 32, lambda films: logits(tiny, films) + np.float32(0.5), "tiny")
    within = compare(tiny, 32, lambda films: logits(tiny, films) + np.float32(5e-5), "tiny")
    assert within.largest == pytest.approx(5e-5, rel=0.01)


@pytest.mark.parametrize(
    "change", [lambda a: a[:, :1], lambda a: a.astype(np.float64), lambda a: a * np.float32("nan")]
)
def test_logits_of_another_shape_or_type_or_not_finite_are_an_error(tiny, change):
    with pytest.raises(RunError, match=r"tiny gives .* expected were finite float32 \(1, 2\)"):
        compare(tiny, 32, lambda films: change(logits(tiny, films)), "tiny")


class Moody(nn.Module):
    """Its layers depend on its input, which no exporter can follow."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if images.mean() > 0:
            raise ValueError("no")
        return images.mean((2, 3))[:, :2]


def test_a_network_that_torch_cannot_export_is_named_with_the_format_to_leave_out(tiny):
    model = classifier(SMALL)
    model.net = Moody()
    with pytest.raises(RunError, match=rf"torch cannot export {SMALL} to onnx \(\w+: .*leave out --format onnx"):
        export_network(model, 32, "onnx", RECORD)


def test_without_onnx_the_message_names_the_extra(monkeypatch):
    monkeypatch.setattr(formats, "find_spec", lambda name: None)
    with pytest.raises(DeviceError, match=r"--format onnx needs onnx and onnxscript: pip install 'cxrfast\[export\]'"):
        check_libraries(["onnx"])
    check_libraries(["torchscript", "torchvision"])


def test_without_onnxruntime_the_file_is_written_and_not_compared(tiny, onnx_file, monkeypatch):
    found = formats.find_spec
    monkeypatch.setattr(formats, "find_spec", lambda name: None if name == "onnxruntime" else found(name))
    assert onnx_runner(onnx_file.data) is None
    assert export_network(tiny, 32, "onnx", RECORD).difference is None


def test_an_unknown_format_names_those_there_are():
    with pytest.raises(RunError, match="format 'tflite' is unknown: use onnx, torchscript, torchvision"):
        check_libraries(["tflite"])


@pytest.mark.slow
@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize(
    "arch",
    [
        *("densenet121", "resnet50", "mobilenet_v3_small", "shufflenet_v2_x0_5", "efficientnet_b0", "convnext_tiny"),
        "vit_b_16",
    ],
)
def test_architectures_are_exported_within_the_bound(arch, kind):
    torch.manual_seed(0)
    model = Classifier(arch, 3).eval()
    for parameter in model.parameters():
        parameter.data += 0.01 * torch.randn_like(parameter)
    difference = export_network(model, 224, kind, RECORD).difference
    assert 0 < difference.logit < 1e6
    assert difference.largest <= difference.bound
