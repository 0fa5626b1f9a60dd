"""The last feature map of timm's networks and of one's own: Grad-CAM against captum, positions of patches, fields."""

import numpy as np
import pytest
import torch
from captum.attr import LayerGradCam
from runs import noise
from torch import nn
from torch.nn import functional

from cxrfast.analysis.gradcam import gradcam
from cxrfast.errors import NotDefined, RunError
from cxrfast.models.classifier import Classifier
from cxrfast.models.feature_map import last_map, map_and_logits
from cxrfast.models.networks.factories import trusted
from cxrfast.models.receptive_field import effective_receptive_field, squared_gradients, theoretical_receptive_field


def made(arch: str, side: int = 64) -> Classifier:
    torch.manual_seed(0)
    with trusted(arch):
        return Classifier(arch, 3, side=side).double().eval()


@pytest.mark.parametrize(
    ("arch", "layer"),
    [
        ("timm/test_convnext", "norm_pre"),
        ("timm/test_efficientnet", "bn2"),
        ("timm/test_resnet", "layer4"),
        ("mynets:Small", "body"),
    ],
)
def test_maps_are_captums(arch, layer):
    model, images, shown = made(arch), noise(2, 64), 0
    pixels = model.normalise(images).requires_grad_()
    for label in range(3):
        oracle = LayerGradCam(model.net, getattr(model.net, layer)).attribute(pixels, label, relu_attributions=True)
        oracle = functional.interpolate(oracle.detach(), size=(64, 64), mode="bilinear")[:, 0]
        largest = oracle.amax((1, 2), keepdim=True)
        maps, logits = gradcam(model, images, label)
        torch.testing.assert_close(maps, torch.where(largest > 0, oracle / largest, 0).float(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(logits, model(images)[:, label].detach(), rtol=1e-4, atol=1e-5)
        shown += int((largest > 0).sum())
    assert shown, "maps of zeros would agree too"


@pytest.mark.parametrize("arch", ["timm/test_vit", "timm/test_vit2", "timm/test_vit4"])
def test_maps_of_a_transformer_are_those_of_the_patches_that_enter_the_last_attention(arch):
    """As pytorch-grad-cam does it: blocks[-1].norm1, prefix tokens dropped, patches put back where they were."""
    model, images = made(arch), noise(2, 64)
    tokens: list[torch.Tensor] = []
    hook = model.net.blocks[-1].norm1.register_forward_hook(lambda *given: tokens.append(given[-1]))
    logits = model(images)
    hook.remove()
    (gradient,) = torch.autograd.grad(logits[:, 1].sum(), tokens[0])
    patches, slopes = (t[:, 1:].reshape(2, 4, 4, -1).detach().numpy() for t in (tokens[0], gradient))
    oracle = np.maximum((patches * slopes.mean((1, 2), keepdims=True)).sum(-1), 0)
    assert oracle.any()
    maps, found = gradcam(model, images, 1)
    large = functional.interpolate(torch.from_numpy(oracle)[:, None], size=(64, 64), mode="bilinear")[:, 0]
    largest = large.amax((1, 2), keepdim=True)
    torch.testing.assert_close(maps, torch.where(largest > 0, large / largest, 0).float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found, logits[:, 1].detach())


def test_a_patch_of_the_map_lies_where_it_was_in_the_image():
    model = made("timm/test_vit")
    net = model.net
    net.forward_features = lambda pixels: net._pos_embed(net.patch_embed(pixels))  # before patches exchange anything
    pixels = model.normalise(noise(1, 64)).double().requires_grad_()
    found = last_map(model, pixels)
    assert found.shape == (1, 64, 4, 4)
    (gradient,) = torch.autograd.grad(found[0, :, 1, 2].sum(), pixels)
    reached = gradient[0].abs().sum(0).nonzero()
    assert (reached.amin(0).tolist(), reached.amax(0).tolist()) == ([16, 32], [31, 47])


@pytest.mark.parametrize(
    ("arch", "shape"),
    [
        ("timm/test_convnext", (64, 2, 2)),
        ("timm/test_mambaout", (64, 2, 2)),
        ("timm/test_vit", (64, 4, 4)),
        ("mynets:Small", (8, 8, 8)),
    ],
)
def test_maps_have_channels_first_and_fields_cover_the_image(arch, shape):
    model, images = made(arch), noise(2, 64)
    found, logits = map_and_logits(model, images)
    assert found.shape == (2, *shape)
    torch.testing.assert_close(logits, model(images))
    assert last_map(model, model.normalise(images).double()).shape == (2, *shape)
    field = effective_receptive_field(model, [images])
    assert (field.shape, field.max()) == ((64, 64), 1.0)
    assert squared_gradients(model, images).shape == (2, 64, 64)


def test_the_field_of_a_transformer_is_the_whole_image():
    field = effective_receptive_field(made("timm/test_vit"), [noise(2, 64)])
    assert (field > 0).all()


@pytest.mark.parametrize(
    ("arch", "why"),
    [
        ("mynets:without_a_map", "it has no forward_features and forward_head"),
        ("mynets:says_another_map", r"its forward pass is not forward_head\(forward_features\(x\)\)"),
    ],
)
def test_a_network_without_a_map_is_named(arch, why):
    with pytest.raises(NotDefined, match=f"receptive fields and Grad-CAM are not defined for {arch}: {why}"):
        gradcam(made(arch), noise(1, 64), 0)


@pytest.mark.parametrize(
    ("arch", "field"),
    [
        ("timm/densenet121", (2071, 32)),
        ("timm/resnet50", (427, 32)),
        ("timm/efficientnet_b0", (851, 32)),
        ("timm/convnext_tiny", (1688, 32)),
    ],
)
def test_theoretical_fields_of_timm_are_those_of_the_same_network_in_torchvision(arch, field):
    assert theoretical_receptive_field(arch) == theoretical_receptive_field(arch.removeprefix("timm/")) == field


@pytest.mark.parametrize(
    "arch", ["timm/test_vit", "timm/test_mambaout", "timm/test_maxvit", "timm/convnextv2_atto", "mynets:Small"]
)
def test_no_theoretical_field_is_made_up(arch):
    with pytest.raises(RunError, match=arch):
        theoretical_receptive_field(arch, 64)


def test_a_head_that_changes_its_input_in_place_leaves_the_map_alone():
    model = made("mynets:Small")
    relu = nn.ReLU(inplace=True)
    head = model.net.forward_head
    model.net.body = model.net.body[:-1]
    model.net.forward_head = lambda features: head(relu(features))
    found, _ = map_and_logits(model, noise(2, 64))
    assert found.min() < 0
