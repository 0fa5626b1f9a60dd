"""Networks of one's own and of timm are handed on like others; code is imported only where it is trusted."""

import json
import re
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from runs import make_run, predict

import cxrfast
from cxrfast.errors import RunError
from cxrfast.exports.export import export
from cxrfast.exports.formats import check_films, export_network, torchscript_runner
from cxrfast.models.classifier import Classifier
from cxrfast.models.networks.factories import trusted
from cxrfast.runs.run import Run
from cxrfast.shards.shard_set import ShardSet

OWN = "mynets:Small"


@pytest.fixture(scope="module")
def run(tiny_set, tmp_path_factory) -> Run:
    """A run of a factory's network at 32 px, done."""
    with trusted(OWN):
        known = {"arch": OWN, "weights": "none", "shards": tiny_set, "set_id": ShardSet(tiny_set).info.id}
        made = make_run(tmp_path_factory.mktemp("own"), 32, quality=None, name="mynets-Small-32", **known)
        torch.manual_seed(0)
        made.write_weights(Classifier.of(made.config).state_dict())
        predict(made, 1.0)
        made.set_state("done", epoch=1)
    return made


@pytest.fixture(scope="module")
def out(run, tmp_path_factory) -> Path:
    with trusted(OWN):
        return export([run], tmp_path_factory.mktemp("model") / "model", formats=("onnx", "torchscript"))


def test_every_format_gives_its_logits_and_needs_none_of_its_code_to_run(out, run):
    films = check_films(32)
    with trusted(OWN), torch.no_grad():
        expected = run.load()(films).numpy()
    assert np.ptp(expected, axis=0).min() > 0.01
    session = onnxruntime.InferenceSession(out / "onnx" / "mynets-Small-32-fold-0.onnx")
    labels = json.loads(session.get_modelmeta().custom_metadata_map["cxrfast"])["labels"]
    assert tuple(labels) == run.config.labels
    (found,) = session.run(["logits"], {"image": films.numpy()})
    np.testing.assert_allclose(found, expected, atol=1e-5)
    traced = torchscript_runner((out / "torchscript" / "mynets-Small-32-fold-0.pt").read_bytes())
    np.testing.assert_allclose(traced(films), expected, atol=1e-6)


def test_the_folder_is_loaded_only_where_its_code_is_trusted(out, run):
    with pytest.raises(RunError, match="mynets:Small"):
        cxrfast.load(out)
    with trusted(OWN):
        loaded, films = cxrfast.load(out), check_films(32)
        with torch.inference_mode():
            (logits,) = loaded({32: films}).logits.values()
            assert torch.equal(logits, run.load()(films))


def test_the_card_says_whose_code_is_needed_and_how_the_network_normalises(out):
    card = (out / "README.md").read_text()
    assert 'with trusted("mynets:Small"):\n    model = cxrfast.load(' in card
    assert "minus 0.5, 0.5, 0.5, over 0.25, 0.25, 0.25 (mean" in card
    (code,) = re.findall(r"```python\n(import cxrfast.*?)```", card, re.DOTALL)
    compile(code, "card", "exec")


def test_the_largest_differences_stand_in_the_card(out):
    card = (out / "README.md").read_text()
    found = re.findall(r"\| mynets-Small-32/fold-0 \| (\w+) \| ([\d.e-]+) \| ([\d.e-]+) \| ([\d.e-]+) \|", card)
    assert [kind for kind, *_ in found] == ["onnx", "torchscript"]
    for _, largest, bound, logit in found:
        assert float(largest) <= float(bound)
        assert float(logit) > 0.01


def test_torchvisions_format_is_refused_for_it_and_nothing_is_left(run, tmp_path):
    with trusted(OWN), pytest.raises(RunError, match="mynets:Small is not an architecture of torchvision: leave out"):
        export([run], tmp_path / "model", formats=("torchvision",))
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["onnx", "torchscript"])
@pytest.mark.parametrize("arch", ["timm/convnext_atto", "timm/vit_tiny_patch16_224", "timm/tf_efficientnetv2_b0"])
def test_networks_of_timm_are_exported_within_the_bound(arch, kind):
    torch.manual_seed(0)
    model = Classifier(arch, 3, side=224).eval()
    for parameter in model.parameters():
        parameter.data += 0.01 * torch.randn_like(parameter)
    difference = export_network(model, 224, kind, {}).difference
    assert difference.logit > 0
    assert difference.largest <= difference.bound
