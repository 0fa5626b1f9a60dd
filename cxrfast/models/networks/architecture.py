"""What the classifier must know about a network that was made, and where architectures come from by their names."""

from dataclasses import dataclass
from typing import Literal

from torch import nn

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Mean and standard deviation of ImageNet, as torchvision's weights expect."""

TIMM = "timm/"

Kind = Literal["torchvision", "timm", "own"]


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A network that was made, and what it needs."""

    net: nn.Module
    """float (N, 3, H, W) → logits (N, L)."""
    head: str | None
    """Name of the layer that gives the logits; None if it is not known."""
    mean: tuple[float, ...] = MEAN
    """Mean of its three channels, in [0, 1]."""
    std: tuple[float, ...] = STD
    exact: bool = False
    """Whether it may take images of the side alone that it was made for."""


def kind_of(arch: str) -> Kind:
    """Where an architecture of this name comes from. Looks nothing up."""
    if arch.startswith(TIMM):
        return "timm"
    return "own" if ":" in arch else "torchvision"
