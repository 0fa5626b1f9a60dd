"""Theoretical receptive fields against published values, and what is refused."""

import pytest
import torch
from torch import nn

from cxrfast.errors import RunError
from cxrfast.models.theoretical_receptive_field import receptive_field, theoretical_receptive_field


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
