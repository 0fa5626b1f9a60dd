"""The classifier: a uint8 grey batch in, logits out. Normalisation is its first layer and part of every checkpoint."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import nn

from cxrfast.config import TrainConfig
from cxrfast.errors import NotDefined, RunError
from cxrfast.models.head import check_outputs, no_last_layer, use_float32
from cxrfast.models.networks.architecture import MEAN, STD, kind_of
from cxrfast.models.networks.factories import where
from cxrfast.models.networks.make import make

__all__ = ["MEAN", "STD", "Classifier", "Normalise", "frozen"]

SMALL = 64
"""Side in px at which no convolutional classifier runs out of pixels; smaller images are tried at their own size."""


class Normalise(nn.Module):
    """uint8 (N, 1, H, W) → float32 (N, 3, H, W), channels last: scale to [0, 1], copy to three channels, normalise.

    `mean`, `std`: of each channel, in [0, 1]; default: ImageNet's.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, mean: Sequence[float] = MEAN, std: Sequence[float] = STD) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        grey = image.to(torch.float32) / 255
        return ((grey - self.mean) / self.std).contiguous(memory_format=torch.channels_last)


class Classifier(nn.Module):
    """`normalise`, then a network `net` with one logit per finding: float (N, L).

    `arch`: a torchvision classifier, `timm/NAME` or `package.module:factory`. `side`: of the images, px; None will do for
    networks that take any. The last layer computes in float32, also under autocast (see `head`). DenseNets are torchvision's,
    made to use less memory (see `densenet`); with `recompute` even less, for more time.
    Raises RunError as `models.make`.
    """

    def __init__(self, arch: str, outputs: int, recompute: bool = False, side: int | None = None) -> None:
        super().__init__()
        made = make(arch, outputs, side, recompute)
        self.arch, self.outputs, self.side = arch, outputs, side
        self.exact = made.exact
        """Whether it may take images of `side` px alone."""
        self.normalise = Normalise(made.mean, made.std)
        self.net = made.net
        self.head = made.head
        """Name of the last layer in `net`; None if it is not known."""
        if self.head is not None:
            use_float32(self.net, self.head)
        self.to(memory_format=torch.channels_last)

    @classmethod
    def of(cls, config: TrainConfig, recompute: bool = False) -> Self:
        """The classifier of a run with this configuration, with random weights."""
        return cls(config.arch, len(config.labels), recompute, side=config.scale)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.net(self.normalise(image))

    def check_size(self, side: int) -> None:
        """Raise RunError unless the network can be trained on images of `side` px, and its outputs are logits."""
        if kind_of(self.arch) == "timm" and self.exact and self.side not in (None, side):
            raise RunError(f"{self.arch} is made for one size of images, {self.side} px: leave out --sizes")
        tried = self._trial_side(side)
        trial = copy.deepcopy(self).train()  # a copy, since a forward pass updates BatchNorm's statistics
        try:
            with torch.no_grad():
                logits = trial(torch.zeros((2, 1, tried, tried), dtype=torch.uint8))
        except Exception as error:  # a network of one's own may raise anything
            raise RunError(self._misfit(side, error)) from error
        if not isinstance(logits, torch.Tensor):
            raise RunError(f"{self.arch} has more outputs than its logits: use another classifier")
        if self.head is None:
            raise no_last_layer(self.arch)
        check_outputs(self.net, self.arch, self.outputs, tried, self.head)

    def _trial_side(self, side: int) -> int:
        return side if self.exact else min(side, SMALL)

    def _misfit(self, side: int, error: Exception) -> str:
        """Why a forward pass failed, for people."""
        match kind_of(self.arch):
            case "own":
                why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
                return f"{self.arch} cannot be trained on images of {side} px: its forward pass failed at {where(error, self.net)}: {why}"
            case "timm" if self.exact:
                return (
                    f"{self.arch} cannot be trained on images of {side} px ({' '.join(str(error).split())[:200]}): use the scale "
                    "that it was designed for, or a network that takes any, such as timm/convnext_tiny"
                )
        return (
            f"{self.arch} cannot be trained on images of {side} px: use a convolutional classifier such as "
            "densenet121 or resnet50, and a scale of 32 px or more"
        )

    def check_micro_batch(self, side: int, images: int) -> None:
        """Raise RunError if BatchNorm would see one value per channel, in micro-batches of one image of `side` px."""
        if images > 1:
            return
        trial, tried = copy.deepcopy(self).train(), self._trial_side(side)
        try:
            with torch.no_grad():
                trial(torch.zeros((1, 1, tried, tried), dtype=torch.uint8))
        except ValueError as error:
            raise RunError(
                f"--micro-batch 1 at {side} px: {self.arch} shrinks an image to one pixel, and BatchNorm cannot take the variance of "
                "one value: use a micro-batch of 2 images or more, or a larger scale"
            ) from error

    @property
    def feature_layers(self) -> nn.Module:
        """The layers of a torchvision classifier whose output is the last convolutional feature map, (N, C, h, w)."""
        net: Any = self.net if kind_of(self.arch) == "torchvision" else None
        if hasattr(net, "features") and not self.arch.startswith("swin"):  # those put channels last
            return net.features
        if hasattr(net, "layer4"):
            layers = list(net.children())
            return nn.Sequential(*layers[: layers.index(net.layer4) + 1])
        raise NotDefined(
            f"cxrfast does not know the last feature map of {self.arch}, which receptive fields and Grad-CAM need: use an "
            "architecture such as densenet121 or resnet50 for them"
        )


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients of the weights, which saves memory; afterwards everything is restored."""
    modes = [(module, module.training) for module in model.modules()]
    wanted = [(p, p.requires_grad) for p in model.parameters()]
    model.eval().requires_grad_(False)
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for p, grad in wanted:
            p.requires_grad_(grad)
