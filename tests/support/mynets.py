"""Networks of one's own, for `--arch mynets:NAME`: good ones, and each way in which one can be wrong."""

from typing import Any

import torch
from torch import nn


class Small(nn.Module):
    """Layers registered in another order than that in which they are called; it says where its feature map is."""

    def __init__(self, num_classes: int, width: int = 8) -> None:
        super().__init__()
        self.out = nn.Linear(width, num_classes)
        self.body = nn.Sequential(
            nn.Conv2d(3, width, 5, stride=4, padding=2),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, stride=2, padding=1),
            nn.ReLU(),
        )
        self.mean, self.std = 0.5, [0.25, 0.25, 0.25]

    def forward_features(self, image: torch.Tensor) -> torch.Tensor:
        return self.body(image)

    def forward_head(self, features: torch.Tensor) -> torch.Tensor:
        return self.out(features.mean((2, 3)))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(image))


def flat(num_classes: int, image_size: int) -> nn.Module:
    """A network for images of one size."""
    pooled = nn.Sequential(nn.AvgPool2d(8), nn.Flatten())
    return nn.Sequential(pooled, nn.Linear(3 * (image_size // 8) ** 2, num_classes))


def forgets_the_size(num_classes: int) -> nn.Module:
    return flat(num_classes, 224)


def without_arguments() -> nn.Module:
    return Small(3)


def wants_more(num_classes: int, depth: int) -> nn.Module:
    return Small(num_classes, depth)


def raises(num_classes: int) -> nn.Module:
    raise KeyError("no such layer")


def not_a_module(num_classes: int) -> Any:
    return lambda image: image.mean((1, 2, 3))


def without_weights(num_classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten())


def half(num_classes: int) -> nn.Module:
    return Small(num_classes).half()


def one_output_too_many(num_classes: int) -> nn.Module:
    return Small(num_classes + 1)


def probabilities(num_classes: int) -> nn.Module:
    return nn.Sequential(Small(num_classes), nn.Sigmoid())


def several_outputs(num_classes: int) -> nn.Module:
    class Twice(Small):
        def forward(self, image: torch.Tensor) -> Any:
            return super().forward(image), image

    return Twice(num_classes)


def wrong_mean(num_classes: int) -> nn.Module:
    net = Small(num_classes)
    net.mean = [0.5, 0.5]
    return net


def wrong_std(num_classes: int) -> nn.Module:
    net = Small(num_classes)
    net.std = 0.0
    return net


def ends_in_batch_norm(num_classes: int) -> nn.Module:
    return nn.Sequential(Small(num_classes), nn.BatchNorm1d(num_classes))


def shrinks_to_a_pixel(num_classes: int) -> nn.Module:
    pooled = nn.Sequential(nn.Conv2d(3, 4, 1), nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(4), nn.Flatten())
    return nn.Sequential(pooled, nn.Linear(4, num_classes))


def fails_in_its_forward_pass(num_classes: int) -> nn.Module:
    class Broken(Small):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return self.absent(image)

    return Broken(num_classes)


class OwnLinear(nn.Linear):
    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return super().forward(features) * 2


def ends_in_a_layer_of_its_own(num_classes: int) -> nn.Module:
    return nn.Sequential(Small(8), OwnLinear(8, num_classes))


def says_another_map(num_classes: int) -> nn.Module:
    class Other(Small):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return super().forward(image.flip(3) + 1)

    return Other(num_classes)


def without_a_map(num_classes: int) -> nn.Module:
    small = Small(num_classes)
    return nn.Sequential(small.body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), small.out)


NUMBER = 3
