"""Grad-CAM against captum, against networks whose map is known, and over runs."""

import shlex
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from captum.attr import LayerGradCam
from runs import SMALL, make_untrained, noise
from torch import nn
from torch.nn import functional

from cxrfast.analysis import gradcam as cams
from cxrfast.analysis.receptive_field import erf, read_erf
from cxrfast.errors import RunError
from cxrfast.labels import MIMIC
from cxrfast.models.classifier import MEAN, STD, Classifier
from cxrfast.runs.run import Predictions, Run

LABEL = "Pneumonia"


@pytest.mark.parametrize(
    ("arch", "layer"), [("densenet121", "features"), ("resnet50", "layer4"), ("mobilenet_v2", "features")]
)
def test_maps_are_captums_and_the_same_in_any_batch(arch, layer):
    torch.manual_seed(0)
    model = Classifier(arch, 3).double().eval()
    images = noise(2, 64)
    pixels = model.normalise(images).requires_grad_()
    shown = 0
    for label in range(3):
        oracle = LayerGradCam(model.net, getattr(model.net, layer)).attribute(pixels, label, relu_attributions=True)
        oracle = functional.interpolate(oracle.detach(), size=(64, 64), mode="bilinear")[:, 0]
        largest = oracle.amax((1, 2), keepdim=True)
        maps, logits = cams.gradcam(model, images, label)
        torch.testing.assert_close(maps, (oracle / largest.clamp(min=1e-300)).float(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(logits, model(images)[:, label].detach())
        alone = torch.cat([cams.gradcam(model, image[None], label)[0] for image in images])
        torch.testing.assert_close(maps, alone, rtol=1e-4, atol=1e-5)
        shown += int(maps.flatten(1).any(1).sum())
    assert shown >= 2  # the comparison was not of zeros alone


def brightness(pool: int = 1, weight: float = 1.0) -> Classifier:
    """One feature, three times the mean grey level of pool × pool pixels; the logits are ± its mean."""
    conv = nn.Conv2d(3, 1, 1)
    conv.weight.data = torch.tensor(STD).view(1, 3, 1, 1)
    conv.bias.data = torch.tensor([sum(MEAN)])
    head = nn.Linear(1, 2, bias=False)
    head.weight.data = torch.tensor([[weight], [-weight]])
    model = Classifier("squeezenet1_1", 2)
    model.net = nn.Sequential(
        OrderedDict(
            features=nn.Sequential(conv, nn.AvgPool2d(pool)), pool=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten(), head=head
        )
    )
    return model


def test_the_map_of_a_brightness_detector_is_the_image_and_evidence_against_is_a_map_of_zeros_not_nan():
    images = noise(3, 16) // 2 + 1
    maps, logits = cams.gradcam(brightness(), images, 0)
    grey = images[:, 0].float()
    torch.testing.assert_close(maps, grey / grey.amax((1, 2), keepdim=True), rtol=0, atol=1e-5)
    torch.testing.assert_close(logits, 3 * grey.mean((1, 2)) / 255)
    assert maps.dtype == torch.float32
    assert maps.amax((1, 2)).tolist() == [1, 1, 1]
    against, logits = cams.gradcam(brightness(), images, 1)
    assert not against.any()
    assert (logits < 0).all()


def test_coarse_maps_are_enlarged_bilinearly_between_cell_centres():
    images = torch.zeros(1, 1, 8, 8, dtype=torch.uint8)
    images[:, :, :, 4:] = 200
    maps, _ = cams.gradcam(brightness(pool=4), images, 0)
    ramp = np.clip((np.arange(8) + 0.5 - 2) / 4, 0, 1)  # cells of 4 px have their centres at 2 and 6
    np.testing.assert_allclose(maps[0], np.tile(ramp, (8, 1)), atol=1e-5)


def test_the_model_is_left_as_it_was():
    model = Classifier(SMALL, 2).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():  # as a caller that evaluates would
        cams.gradcam(model, noise(2, 64), 0)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


# Runs


def make_run(folder: Path, shards: Path, raw: list[float]) -> Run:
    """A run whose test part is the first images of the set, with these raw values of LABEL."""
    parts = ["test"] * len(raw) + ["train"] * 2 + ["val"] * 2
    return make_untrained(folder, shards, parts, **{LABEL: [*raw, 0, 0, 0, 0]})


RAW = [1, 0, 1, -1, 1, np.nan, 1, 1]
"""Positive in rows 0, 2, 4, 6 and 7 of the test part."""


@pytest.fixture(scope="module")
def stored(tiny_set, tmp_path_factory):
    """A run with a receptive field and three maps, and these two."""
    run = make_run(tmp_path_factory.mktemp("stored"), tiny_set, RAW)
    with pytest.raises(RunError, match="cxrfast gradcam"):
        cams.read_gradcam(run, LABEL)
    return run, erf(run, images=1), cams.gradcam_run(run, LABEL, images=3)


def test_positives_follow_the_runs_policy_and_come_highest_logit_first_once_predicted(tiny_set, tmp_path):
    run = make_run(tmp_path, tiny_set, RAW)
    for policy, expected in (
        ("u_zeros", [0, 2, 4, 6, 7]),
        ("u_ones", [0, 2, 3, 4, 6, 7]),
        ("u_ignore", [0, 2, 4, 6, 7]),
    ):
        other = replace(run, config=replace(run.config, policy=policy))
        assert cams.positives(other, LABEL, "test").tolist() == expected
    rows = run.rows().query("part == 'test'")["row"].to_numpy()
    logits = np.zeros((len(rows), len(MIMIC)), np.float32)
    logits[:, MIMIC.index(LABEL)] = [0.5, 9, -1, 9, 2, 9, 0.7, -3]
    run.write_predictions({"test": Predictions(rows, logits)})
    assert cams.positives(run, LABEL, "test").tolist() == [4, 6, 0, 2, 7]


def test_maps_are_stored_beside_the_receptive_field(stored):
    run, field, made = stored
    stored = cams.read_gradcam(Run.open(run.folder), LABEL)
    assert made.rows.tolist() == stored.rows.tolist() == [0, 2, 4]
    assert stored.part == "test"
    assert (stored.maps.shape, stored.maps.dtype) == ((3, 64, 64), np.float32)
    np.testing.assert_array_equal(stored.maps, made.maps)
    np.testing.assert_array_equal(stored.logits, made.logits)
    np.testing.assert_array_equal(read_erf(run).map, field.map)
    with pytest.raises(RunError, match="another run"):
        cams.read_gradcam(replace(run, config=replace(run.config, seed=1)), LABEL)


def test_findings_that_are_unknown_or_absent_are_explained(tiny_set, raw_set, tmp_path):
    run = make_run(tmp_path, tiny_set, [0, -1, np.nan])
    with pytest.raises(RunError, match=r"'Gout'.*Atelectasis, Cardiomegaly.*Support Devices"):
        cams.gradcam_run(run, "Gout")
    with pytest.raises(RunError, match=f"none of the 3 images in its test part has {LABEL}$"):
        cams.gradcam_run(run, LABEL)
    with pytest.raises(RunError, match="at least one image"):
        cams.gradcam_run(run, LABEL, images=0)
    with pytest.raises(RunError, match="--shards"):
        cams.gradcam_run(make_run(tmp_path / "b", tiny_set, RAW), LABEL, shards=raw_set)


def test_the_figure_names_images_by_their_row_alone(stored, tiny_set):
    run, _, made = stored
    figure = cams.figure(run, LABEL)
    texts = [text.get_text() for axes in figure.axes for text in (axes.title, axes.xaxis.label, axes.yaxis.label)]
    written = " ".join([*texts, figure.get_suptitle()])
    table = pd.read_parquet(tiny_set / "rows.parquet").set_index("row").loc[made.rows]
    for row, probability in zip(table.itertuples(), torch.sigmoid(torch.from_numpy(made.logits)), strict=True):
        assert f"row {row.Index} " in written
        assert f"probability {probability:.2f}" in written
        for secret in (
            row.image_id,
            row.image_id[:8],
            row.patient_id,
            row.study_id,
            row.path,
            str(tiny_set),
            str(run.folder.parents[1]),
        ):
            assert secret not in written
    overlays = [axes for axes in figure.axes if len(axes.images) == 2]
    np.testing.assert_array_equal(overlays[1].images[1].get_array(), made.maps[1])
    path = cams.save_figure(run, LABEL)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path == run.gradcam_path(LABEL)
    assert path.parent == run.folder


@pytest.mark.parametrize("name", ["../Mass/Nodule", "..", ".", "$x_1$ \\frac{", "_x", "ä" * 200, "'; touch x; '"])
def test_any_name_of_a_finding_is_a_name_in_files_and_figures(stored, tiny_set, tmp_path, name):
    run, _, _ = stored
    renamed = run.rows().rename(columns={LABEL: name})
    labels = tuple(name if label == LABEL else label for label in MIMIC)
    other = Run.start(tmp_path / "x" / "fold-0", replace(run.config, labels=labels), tiny_set, renamed)
    other.write_weights(run.read_weights())
    with pytest.raises(RunError, match="has no Grad-CAM") as missing:
        cams.read_gradcam(other, name)
    assert shlex.split(str(missing.value).split("`")[1])[-1] == name, "the command can be pasted"
    made = cams.gradcam_run(other, name, images=99)
    assert len(made.rows) == 5, "all there are"
    erf(other, images=1)
    np.testing.assert_array_equal(cams.read_gradcam(other, name).maps, made.maps)
    assert cams.save_figure(other, name).parent == other.folder
