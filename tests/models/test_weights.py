"""Files of weights: what wraps them is unwrapped, outputs are taken over by finding, and what cannot be used is named."""

import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from safetensors.torch import save_file

from cxrfast.errors import RunError
from cxrfast.models.classifier import Classifier
from cxrfast.models.weights import load_weights
from cxrfast.models.weights_file import read_weights_file

SMALL = "shufflenet_v2_x0_5"
HEAD = ("fc.weight", "fc.bias")


def plain(outputs: int = 3) -> dict[str, torch.Tensor]:
    """A state dict of torchvision."""
    torch.manual_seed(1)
    return torchvision.models.get_model(SMALL, num_classes=outputs).state_dict()


@pytest.fixture
def model() -> Classifier:
    torch.manual_seed(0)
    return Classifier(SMALL, 3)


def load(model: Classifier, path: Path, *labels: Any) -> list[str]:
    return load_weights(model, read_weights_file(path), *labels)


def assert_loaded(model: Classifier, weights: dict[str, torch.Tensor]) -> None:
    own = model.state_dict()
    for name in weights.keys() - set(HEAD):
        assert torch.equal(own[f"net.{name}"], weights[name]), name


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
        assert load(model, path) == []
        for name in old.keys() & file.keys() - {"classifier.weight", "classifier.bias"}:
            assert torch.equal(model.state_dict()["net." + name], file[name]), name
    assert model.net.classifier.out_features == 5


@pytest.mark.parametrize(
    "wrap",
    [
        lambda weights: weights,
        lambda weights: {"module." + k: v for k, v in weights.items()},
        lambda weights: {"_orig_mod." + k: v for k, v in weights.items()},
        lambda weights: {"module._orig_mod." + k: v for k, v in weights.items()},
        lambda weights: {"_orig_mod.module." + k: v for k, v in weights.items()},
        lambda weights: {"model." + k: v for k, v in weights.items()} | {"criterion.weight": torch.ones(3)},
        lambda weights: {"net." + k: v for k, v in weights.items()},
        lambda weights: {"module.net." + k: v for k, v in weights.items()},
        lambda weights: {re.sub(r"^stage2\.", "stage2._orig_mod.", k): v for k, v in weights.items()},
        lambda weights: {"epoch": 3, "state_dict": weights, "optimizer": {"state": {}}},
        lambda weights: {"epoch": 3, "model": weights},
        lambda weights: {"model_state_dict": {"module." + k: v for k, v in weights.items()}, "loss": torch.ones(())},
        lambda weights: {"state_dict": {"model": weights}},
    ],
)
@pytest.mark.parametrize("name", ["w.pth", "w.pth.tar", "w.ckpt", "w"])
def test_weights_load_from_whatever_a_training_script_wraps_them_in(model, tmp_path, wrap, name):
    weights = plain()
    torch.save(wrap(weights), tmp_path / name)
    before = {name: model.state_dict()[f"net.{name}"].clone() for name in HEAD}
    assert load(model, tmp_path / name, ("a", "b", "c")) == []
    assert_loaded(model, weights)
    for name, value in before.items():
        assert torch.equal(model.state_dict()[f"net.{name}"], value), "no output is taken over by its position"


def test_a_safetensors_file_is_known_by_its_content(model, tmp_path):
    save_file(plain(), tmp_path / "weights.bin")
    load(model, tmp_path / "weights.bin")
    assert_loaded(model, plain())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_another_precision_are_converted(model, tmp_path, dtype):
    weights = {k: v.to(dtype) if v.is_floating_point() else v for k, v in plain().items()}
    torch.save(weights, tmp_path / "w.pth")
    load(model, tmp_path / "w.pth")
    assert_loaded(model, {k: v.float() if v.is_floating_point() else v for k, v in weights.items()})


@pytest.mark.parametrize(
    ("labels", "theirs", "shared"),
    [
        (("a", "b", "c"), ("a", "b", "c"), ["a", "b", "c"]),
        (("a", "b", "c"), ("c", "a", "b"), ["a", "b", "c"]),
        (("a", "b", "c"), ("b", "new", "a", "other"), ["a", "b"]),
        (("a", "b", "c"), ("x", "y", "z"), []),
    ],
)
def test_outputs_are_taken_over_by_finding_and_others_stay_random(model, tmp_path, labels, theirs, shared):
    weights = plain(len(theirs))
    torch.save(weights, tmp_path / "w.pth")
    random = {name: model.state_dict()[f"net.{name}"].clone() for name in HEAD}
    assert load(model, tmp_path / "w.pth", labels, theirs) == shared
    assert_loaded(model, weights)
    for name in HEAD:
        for i, label in enumerate(labels):
            expected = weights[name][theirs.index(label)] if label in theirs else random[name][i]
            assert torch.equal(model.state_dict()[f"net.{name}"][i], expected), (name, label)


def test_a_layer_without_a_bias_is_taken_over_too(tmp_path):
    torch.manual_seed(0)
    model, weights = Classifier("maxvit_t", 2), torchvision.models.maxvit_t(num_classes=2).state_dict()
    torch.save(weights, tmp_path / "w.pth")
    assert load(model, tmp_path / "w.pth", ("a", "b"), ("b", "a")) == ["a", "b"]
    assert torch.equal(model.state_dict()["net.classifier.5.weight"], weights["classifier.5.weight"].flip(0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda _: torchvision.models.squeezenet1_1(num_classes=3).state_dict(),
            r"does not fit shufflenet_v2_x0_5: none of its 52 tensors is one of the model; it holds features\.0\.weight, .*, …, "
            r"expected were conv1\.0\.weight, ",
        ),
        (
            lambda _: Classifier("squeezenet1_1", 3).state_dict(),
            r"none of its 54 tensors is one of the model; it holds normalise\.mean, ",
        ),
        (
            lambda weights: weights | {"conv1.0.weight": torch.ones(24, 1, 3, 3)},
            r"conv1\.0\.weight is 24x1x3x3 float32, not 24x3x3x3 float32; it holds ",
        ),
        (
            lambda weights: {k: v for k, v in weights.items() if not k.startswith("conv5")},
            r"conv5\.0\.weight is absent; conv5\.1\.weight is absent; conv5\.1\.bias is absent and 2 more; it holds ",
        ),
        (
            lambda weights: weights | {"conv1.0.weight": (weights["conv1.0.weight"] * 99).to(torch.int8)},
            r"conv1\.0\.weight is 24x3x3x3 int8, not 24x3x3x3 float32",
        ),
        (lambda weights: weights | {"conv1.0.weight": weights["conv1.0.weight"].to_sparse()}, r"conv1\.0\.weight is "),
        (lambda weights: weights | {"conv1.0.weight": weights["conv1.0.weight"].to("meta")}, r"conv1\.0\.weight is "),
        (
            lambda weights: (
                weights
                | {"conv5.0.weight": weights["conv5.0.weight"].clone().index_fill_(0, torch.tensor(3), torch.nan)}
            ),
            r"conv5\.0\.weight holds NaN or infinite values",
        ),
        (lambda weights: weights | {"conv5.1.running_var": torch.full((1024,), torch.inf)}, "holds NaN or infinite"),
        (
            lambda weights: weights | {"conv1.0.weight": torch.full((24, 3, 3, 3), 1e300, dtype=torch.float64)},
            "NaN or infinite",
        ),
        (lambda weights: weights | {"module.conv1.0.weight": torch.ones(24, 3, 3, 3)}, r"holds conv1\.0\.weight twice"),
    ],
)
def test_weights_that_do_not_fit_are_refused_with_the_names_that_tell_why(model, tmp_path, change, message):
    torch.save(change(plain()), tmp_path / "w.pth")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(RunError, match=message):
        load(model, tmp_path / "w.pth")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()), "nothing is half loaded"


@pytest.mark.parametrize("outputs", [2, 4])
def test_a_file_that_names_more_or_fewer_findings_than_it_has_outputs_is_refused(model, tmp_path, outputs):
    torch.save(plain(outputs), tmp_path / "w.pth")
    with pytest.raises(RunError, match=rf"fc\.weight is {outputs}x1024 float32, not 3x1024 float32"):
        load(model, tmp_path / "w.pth", ("a", "b", "c"), ("a", "b", "c"))


class _Runs:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("executed",)


def test_what_is_not_a_file_of_weights_is_refused_with_one_message_and_nothing_is_executed(
    model, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    whole = tmp_path / "whole.pth"
    torch.save(plain(), whole)
    data = whole.read_bytes()
    save_file(plain(), "whole.safetensors")
    tensors = Path("whole.safetensors").read_bytes()
    files = {"empty.pth": b"", "bad.pth": b"not one", "bad.safetensors": b"not one", "cut.pth": data[: len(data) // 2]}
    files |= {
        "cut.safetensors": tensors[:-9],
        "head.safetensors": tensors[:40],
        "e.safetensors": b"",
        "big.safetensors": b"\xff" * 99,
    }
    for name, content in files.items():
        Path(name).write_bytes(content)
    values = {"code.pth": {"conv1.0.weight": _Runs()}, "model.pth": torch.nn.Linear(1, 1), "list.pth": [torch.ones(1)]}
    values |= {"tensor.pth": torch.ones(3), "none.pth": {}, "other.pth": {"epoch": 3, "args": {"lr": 1.0}}}
    nested: dict[str, Any] = {}
    nested["model"] = nested
    for name, value in (values | {"endless.pth": nested}).items():
        torch.save(value, name)
    os.mkfifo("pipe.pth")
    Path("folder.pth").mkdir()
    Path("loop.pth").symlink_to("loop.pth")
    expected = {
        "code.pth": "Python objects",
        "model.pth": "Python objects",
        "other.pth": r"it holds \['epoch', 'args'\]",
    }
    expected |= {"pipe.pth": "not a regular file", "folder.pth": "not a regular file", "loop.pth": "symbolic links"}
    expected |= {"empty.pth": "it is empty", "e.safetensors": "it is empty", "list.pth": "it is a list"}
    for path in [Path(n) for n in (*files, *values, "endless.pth", "pipe.pth", "folder.pth", "loop.pth")]:
        with pytest.raises(RunError, match=expected.get(path.name, "is not a checkpoint")) as error:
            read_weights_file(path)
        assert "\n" not in str(error.value), path
    assert not Path("executed").exists()
