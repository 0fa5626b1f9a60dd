"""The classifier: a uint8 grey batch in, logits out. Normalisation is its first layer and part of every checkpoint."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torchvision
from torch import nn

from cxrfast.errors import RunError
from cxrfast.models.densenet import ARCHITECTURES, lean
from cxrfast.models.head import check_outputs, head_name, use_float32

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Mean and standard deviation of ImageNet, as torchvision's weights expect."""

SMALL = 64
"""Side in px at which no convolutional classifier runs out of pixels; smaller images are tried at their own size."""


class Normalise(nn.Module):
    """uint8 (N, 1, H, W) → float32 (N, 3, H, W), channels last: scale to [0, 1], copy to three channels, normalise."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(STD).view(1, 3, 1, 1))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        grey = image.to(torch.float32) / 255
        return ((grey - self.mean) / self.std).contiguous(memory_format=torch.channels_last)


def check_arch(arch: str) -> None:
    if arch not in torchvision.models.list_models(module=torchvision.models):
        raise RunError(f"architecture {arch!r} is unknown: use a torchvision classifier (densenet121, resnet50, …)")


class Classifier(nn.Module):
    """`normalise`, then a torchvision classifier `net` with one logit per finding: float (N, L).

    The last layer computes in float32, also under autocast (see `head`). DenseNets are torchvision's, made to use less memory
    (see `densenet`); with `recompute` even less, for more time.
    Raises RunError for an unknown architecture, or for `recompute` with one that does not support it.
    """

    def __init__(self, arch: str, outputs: int, recompute: bool = False) -> None:
        super().__init__()
        check_arch(arch)
        if recompute and arch not in ARCHITECTURES:
            raise RunError(
                f"{arch} does not support activation checkpointing: use {', '.join(ARCHITECTURES)}, or train without it"
            )
        self.arch = arch
        self.normalise = Normalise()
        net = torchvision.models.get_model(arch, weights=None, num_classes=outputs)
        self.net = lean(net, recompute) if arch in ARCHITECTURES else net
        self.outputs = outputs
        self.head = head_name(net)
        """Name of the last layer in `net`; None if it is not known."""
        if self.head is not None:
            use_float32(net, self.head)
        self.to(memory_format=torch.channels_last)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.net(self.normalise(image))

    def check_size(self, side: int) -> None:
        """Raise RunError unless the network can be trained on images of `side` px, and its outputs are logits."""
        trial = copy.deepcopy(self).train()  # a copy, since a forward pass updates BatchNorm's statistics
        try:
            with torch.no_grad():
                logits = trial(torch.zeros((2, 1, min(side, SMALL), min(side, SMALL)), dtype=torch.uint8))
        except (RuntimeError, ValueError, AssertionError) as error:
            raise RunError(
                f"{self.arch} cannot be trained on images of {side} px: use a convolutional classifier such as "
                "densenet121 or resnet50, and a scale of 32 px or more"
            ) from error
        if not isinstance(logits, torch.Tensor):
            raise RunError(f"{self.arch} has more outputs than its logits: use another classifier")
        check_outputs(self.net, self.arch, self.outputs, min(side, SMALL))

    def check_micro_batch(self, side: int, images: int) -> None:
        """Raise RunError if BatchNorm would see one value per channel, in micro-batches of one image of `side` px."""
        if images > 1:
            return
        trial = copy.deepcopy(self).train()
        try:
            with torch.no_grad():
                trial(torch.zeros((1, 1, min(side, SMALL), min(side, SMALL)), dtype=torch.uint8))
        except ValueError as error:
            raise RunError(
                f"--micro-batch 1 at {side} px: {self.arch} shrinks an image to one pixel, and BatchNorm cannot take the variance of "
                "one value: use a micro-batch of 2 images or more, or a larger scale"
            ) from error

    @property
    def feature_layers(self) -> nn.Module:
        """The layers whose output is the last convolutional feature map, (N, C, h, w)."""
        if hasattr(self.net, "features") and not self.arch.startswith("swin"):  # those put channels last
            return self.net.features
        if hasattr(self.net, "layer4"):
            layers = list(self.net.children())
            return nn.Sequential(*layers[: layers.index(self.net.layer4) + 1])
        raise RunError(
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
