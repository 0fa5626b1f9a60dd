"""Theoretical receptive fields against published values; effective ones: supports of small stacks, Gaussians with known radii."""

import math
from collections import OrderedDict

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from runs import noise
from torch import nn
from torchvision.transforms import functional as vision

from cxrfast.analysis.receptive_field import energy_centre, energy_radius, erf_size
from cxrfast.errors import RunError
from cxrfast.models import receptive_field as fields
from cxrfast.models.classifier import Classifier
from cxrfast.models.receptive_field import receptive_field, theoretical_receptive_field


def with_features(layers: nn.Module) -> Classifier:
    """A classifier whose feature layers are `layers`, behind the usual normalisation."""
    model = Classifier("squeezenet1_1", 1)
    model.net = nn.Sequential(OrderedDict(features=layers))
    return model


KERNEL = st.tuples(st.sampled_from(["conv", "mean"]), st.integers(1, 4), st.integers(1, 3), st.integers(1, 2))


def positive_layer(kind: str, kernel: int, stride: int, dilation: int, channels: int) -> nn.Module:
    if kind == "mean":
        return nn.AvgPool2d(kernel, stride)
    conv = nn.Conv2d(channels, channels, kernel, stride, dilation=dilation)
    nn.init.uniform_(conv.weight, 0.5, 1.5)  # positive: no two paths cancel
    return conv


@settings(max_examples=30)
@given(st.lists(KERNEL, min_size=1, max_size=4))
def test_gradients_fill_the_theoretical_field_and_are_zero_outside(kernels: list[tuple[str, int, int, int]]) -> None:
    layers = nn.Sequential(*(positive_layer(*k, channels=3) for k in kernels))
    size, stride = receptive_field(layers)
    assume(size <= 100 and stride <= 24)
    side = size + 3 * stride
    found = fields.squared_gradients(with_features(layers), noise(1, side))[0].numpy()
    first = ((side - size) // stride + 1) // 2 * stride  # without padding, position i starts at i · stride
    for axis in (0, 1):
        reached = np.flatnonzero(found.any(axis=axis))
        assert (reached[0], reached[-1]) == (first, first + size - 1)


def test_the_map_of_one_kernel_is_that_kernel_summed_over_channels_then_squared() -> None:
    conv = nn.Conv2d(3, 2, 3, padding=1)
    kernel = conv.weight.detach().sum((0, 1)).double().numpy()  # channels out and in; cross-correlation: unflipped
    found = fields.effective_receptive_field(with_features(conv), [noise(2, 9)])
    expected = np.zeros((9, 9))
    expected[3:6, 3:6] = kernel**2 / (kernel**2).max()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-9)


def random_stack(activation: type[nn.Module]) -> Classifier:
    torch.manual_seed(1)
    return with_features(
        nn.Sequential(nn.Conv2d(3, 4, 5, stride=2), activation(), nn.Conv2d(4, 4, 3), activation(), nn.AvgPool2d(2))
    )


def test_a_linear_network_sees_the_same_however_images_are_shifted() -> None:
    model, images = random_stack(nn.Identity), noise(4, 32)
    moved = fields.shifted(images, fields.draw_shifts(0, np.arange(4), 32))
    assert not torch.equal(moved, images)
    np.testing.assert_array_equal(
        fields.effective_receptive_field(model, [images]), fields.effective_receptive_field(model, [moved])
    )


def test_batches_do_not_mix_images_and_squares_are_averaged_over_images() -> None:
    model, images = random_stack(nn.ReLU), noise(5, 32)
    single = [fields.squared_gradients(model.eval(), image[None])[0].numpy() for image in images]
    assert not np.array_equal(single[0], single[1])
    mean = np.mean(single, axis=0)
    found = fields.effective_receptive_field(model, [images[:3], images[3:]])
    np.testing.assert_allclose(found, mean / mean.max(), rtol=1e-5, atol=1e-12)
    assert found.max() == 1
    assert found.dtype == np.float64


def test_batch_norm_stays_in_evaluation_mode_and_the_model_is_left_as_it_was() -> None:
    model = with_features(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))).train()
    model.net.features[0].eval()
    model.net.features[0].bias.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fields.effective_receptive_field(model, [noise(2, 16)])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [model.training, *(layer.training for layer in model.net.features)] == [True, False, True]
    assert [p.requires_grad for p in model.parameters()] == [True, False, True, True]
    assert all(p.grad is None for p in model.parameters())


def test_a_unit_that_nothing_reaches_gives_zeros_not_nan() -> None:
    conv = nn.Conv2d(3, 1, 3)
    nn.init.zeros_(conv.weight)
    found = fields.effective_receptive_field(with_features(conv), [noise(1, 8)])
    assert not found.any()
    assert erf_size(found) == energy_radius(found, 0.5) == 0
    with pytest.raises(RunError, match="at least one image"):
        fields.effective_receptive_field(with_features(conv), [])


# Translations


def test_shifts_depend_on_seed_and_row_alone_and_scale_with_the_side() -> None:
    rows = np.arange(400)
    drawn = fields.draw_shifts(3, rows, 1024)
    np.testing.assert_array_equal(fields.draw_shifts(3, rows[[7, 2]], 1024), drawn[[7, 2]])
    assert (fields.draw_shifts(4, rows, 1024) != drawn).any(axis=1).mean() > 0.9
    assert np.abs(fields.draw_shifts(3, rows, 64) - drawn / 16).max() <= 0.5 + 1 / 32
    assert np.abs(drawn).max() <= 512
    np.testing.assert_allclose(drawn.std(axis=0), 1024 / math.sqrt(12), rtol=0.1)  # of a uniform distribution
    assert abs(np.corrcoef(drawn.T)[0, 1]) < 0.15


@settings(max_examples=50)
@given(st.integers(-12, 12), st.integers(-12, 12))
def test_shifted_images_are_torchvisions(down: int, right: int) -> None:
    images = noise(2, 12)
    found = fields.shifted(images, np.array([[down, right], [0, 0]]))
    assert torch.equal(found[0], vision.affine(images[0], 0.0, [right, down], 1.0, [0.0]))
    assert torch.equal(found[1], images[1])


# Numbers


def test_a_square_has_its_own_size() -> None:
    erf_map = np.zeros((40, 40))
    erf_map[5:17, 20:32] = 0.046
    erf_map[10, 25] = 1.0
    erf_map[30:, :] = 0.045  # below 1 - 0.9545
    assert erf_size(erf_map) == 12


@pytest.mark.parametrize("centre", [(100, 100), (90.5, 104)])
def test_a_gaussian_has_its_analytic_size_and_radii(centre: tuple[float, float]) -> None:
    sigma, (y, x) = 12.0, np.indices((201, 201))
    erf_map = np.exp(-((y - centre[0]) ** 2 + (x - centre[1]) ** 2) / (2 * sigma**2))
    assert energy_centre(erf_map) == pytest.approx(centre, abs=1e-3)
    assert erf_size(erf_map) == pytest.approx(sigma * math.sqrt(-2 * math.pi * math.log(0.0455)), rel=0.01)
    assert energy_radius(erf_map, 0.5) == pytest.approx(sigma * math.sqrt(2 * math.log(2)), abs=0.5)
    assert energy_radius(erf_map, 0.95) == pytest.approx(sigma * math.sqrt(2 * math.log(20)), abs=0.5)


# In theory


@pytest.mark.parametrize(
    ("arch", "size", "stride"),
    [
        ("densenet121", 2071, 32),
        ("vgg16", 212, 32),
        ("resnet50", 427, 32),
        ("alexnet", 195, 32),
        ("mobilenet_v2", 491, 32),
        ("efficientnet_b0", 851, 32),
        pytest.param("efficientnet_b4", 1799, 32, marks=pytest.mark.slow),
        ("convnext_tiny", 1688, 32),
    ],
)
def test_theoretical_fields_are_the_published_ones_or_those_summed_by_hand(arch: str, size: int, stride: int) -> None:
    assert theoretical_receptive_field(arch) == (size, stride)


@pytest.mark.parametrize("arch", ["swin_t", "vit_b_16", "not_a_network"])
def test_a_network_without_a_convolutional_feature_map_is_named(arch: str) -> None:
    with pytest.raises(RunError, match=arch):
        theoretical_receptive_field(arch)


class Branches(nn.Module):
    """x + wide(x), gated by a global mean as in squeeze-and-excitation, next to x itself."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Conv2d(3, 3, 5, padding=4, dilation=2)
        self.pool, self.gate = nn.AdaptiveAvgPool2d(1), nn.Conv2d(3, 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.wide(x)
        y = y * torch.relu(self.gate(self.pool(y))) + x
        return torch.cat([y, x], 1)


def test_the_widest_branch_counts_and_a_global_gate_does_not() -> None:
    assert receptive_field(nn.Sequential(nn.MaxPool2d(2), Branches())) == (2 + 2 * 8, 2)


def test_layers_of_unknown_reach_are_named() -> None:
    with pytest.raises(RunError, match="Upsample"):
        receptive_field(nn.Sequential(nn.Conv2d(3, 3, 3), nn.Upsample(scale_factor=2)))
    with pytest.raises(RunError, match="global pool"):
        receptive_field(nn.Sequential(nn.Conv2d(3, 3, 3), nn.AdaptiveAvgPool2d(1)))
