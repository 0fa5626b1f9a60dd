"""Networks of one's own: `--arch package.module:factory`."""

import sys

import mynets
import pytest
import torch
from runs import noise

from cxrfast.errors import RunError
from cxrfast.models.classifier import Classifier
from cxrfast.models.networks.factories import ANY, trusted


def made(name: str, outputs: int = 3, side: int = 64) -> Classifier:
    torch.manual_seed(0)
    with trusted(f"mynets:{name}"):
        return Classifier(f"mynets:{name}", outputs, side=side)


def test_the_network_is_the_factorys_behind_its_own_normalisation():
    model = made("Small").eval()
    torch.manual_seed(0)
    oracle = mynets.Small(3).eval()
    images = noise(2, 64)
    pixels = (images.expand(-1, 3, -1, -1).float() / 255 - 0.5) / 0.25
    with torch.no_grad():
        torch.testing.assert_close(model(images), oracle(pixels))
    assert model.normalise.mean.flatten().tolist() == [0.5] * 3
    assert model.state_dict()["normalise.std"].flatten().tolist() == [0.25] * 3
    model.check_size(64)
    model.check_micro_batch(64, 1)


def test_the_last_layer_is_the_one_that_is_called_last_and_computes_in_float32():
    model = made("Small").eval()
    assert model.head == "out"
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        assert model(noise(2, 64)).dtype == torch.float32


@pytest.mark.parametrize("side", [32, 64])
def test_a_factory_that_asks_for_it_is_told_the_side_of_the_images(side):
    model = made("flat", side=side)
    model.check_size(side)
    assert model(noise(2, side)).shape == (2, 3)
    with pytest.raises(RunError, match=rf"mynets:flat cannot be trained on images of {side + 16} px: its forward pass"):
        model.check_size(side + 16)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent", "the network mynets:absent cannot be imported (AttributeError: "),
        ("NUMBER", "mynets:NUMBER is int: name a function that returns a network, or a class"),
        (
            "without_arguments",
            "mynets:without_arguments has no argument num_classes, the number of logits; it has none: write",
        ),
        ("wants_more", "mynets:wants_more needs depth, and is called with num_classes alone: give it a default"),
        ("raises", "mynets:raises failed at "),
        ("not_a_module", "mynets:not_a_module returned function: it must return a torch.nn.Module"),
        ("without_weights", "mynets:without_weights returned a network without weights"),
        ("half", "mynets:half returned weights in float16: return them in float32"),
        ("wrong_mean", "its attribute mean must be one number or three, for pixels in [0, 1], not list"),
        ("wrong_std", "mynets:wrong_std: std must be above 0, not 0.0"),
        ("one_output_too_many", "but a tensor of shape (2, 4) for 2 images and 3 findings"),
        ("probabilities", "mynets:probabilities does not return logits: none of its outputs is below 0"),
        ("several_outputs", "mynets:several_outputs has more outputs than its logits"),
        ("ends_in_batch_norm", "does not end in a linear layer or a convolution"),
        ("ends_in_a_layer_of_its_own", "does not end in a linear layer or a convolution"),
        (
            "forgets_the_size",
            "mynets:forgets_the_size cannot be trained on images of 64 px: its forward pass failed at ",
        ),
        ("fails_in_its_forward_pass", "AttributeError: 'Broken' object has no attribute 'absent'"),
    ],
)
def test_what_is_wrong_with_a_network_is_said(name, message):
    with pytest.raises(RunError) as caught:
        made(name).check_size(64)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_error_of_a_factory_names_its_line():
    with pytest.raises(RunError, match=r"failed at .*mynets.py:\d+: KeyError: 'no such layer'"):
        made("raises")


def test_one_image_in_a_batch_is_refused_where_batch_norm_sees_one_value():
    model = made("shrinks_to_a_pixel")
    model.check_size(64)
    model.check_micro_batch(64, 2)
    with pytest.raises(RunError, match="use a micro-batch of 2 images or more"):
        model.check_micro_batch(64, 1)


@pytest.mark.parametrize(
    "name", ["nowhere_at_all:make", "mynets.absent:make", ":", "mynets:", "../x:y", "mynets:Small:x"]
)
def test_a_name_that_leads_nowhere_is_a_message(name):
    with trusted(name), pytest.raises(RunError, match=r"cannot be imported|is module"):
        Classifier(name, 3, side=64)


def test_code_is_imported_only_where_it_is_trusted(tmp_path, monkeypatch):
    (tmp_path / "intruder.py").write_text(f"import pathlib; pathlib.Path({str(tmp_path / 'was_here')!r}).touch()\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RunError, match=r"the network intruder:make is code .* add --trust-arch if you trust it"):
        Classifier("intruder:make", 3, side=64)
    with trusted("another:make"), trusted(None), pytest.raises(RunError, match="--trust-arch"):
        Classifier("intruder:make", 3, side=64)
    assert "intruder" not in sys.modules
    assert not (tmp_path / "was_here").exists()
    with trusted(ANY), pytest.raises(RunError, match="cannot be imported"):
        Classifier("intruder:make", 3, side=64)
    assert (tmp_path / "was_here").exists()
    with pytest.raises(RunError, match="--trust-arch"):
        Classifier("intruder:make", 3, side=64)
    sys.modules.pop("intruder")
