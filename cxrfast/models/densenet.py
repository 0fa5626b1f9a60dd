"""DenseNet that keeps less for the backward pass: torchvision's parameters, names and function, a fraction of its memory.

A float image batch comes in, logits go out (Huang et al. 2017, "Densely Connected Convolutional Networks"). What
differs from torchvision's class is what is computed, and what autograd keeps, to the same end:

- Transitions average 2 × 2 pixels before their 1×1 convolution instead of after it. Both are linear and act on different
  axes, so they commute; the convolution has a quarter of the pixels left to do and to keep. In the stem, likewise, the
  largest of 3 × 3 pixels is taken before the ReLU, which is monotonic.
- With `recompute`, what lies between two convolutions (concatenation, BatchNorm, ReLU, pooling) is computed again in
  the backward pass instead of kept, as in Pleiss et al. 2017, "Memory-Efficient Implementation of DenseNets". Kept are
  the outputs of convolutions alone, each once, so that memory grows with the depth of a block and not with its square.
  No convolution runs twice, and BatchNorm's running statistics move once a step, as without.

Nothing here knows of labels, files or devices.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional
from torch.utils.checkpoint import checkpoint as recomputed

Features = tuple[torch.Tensor, ...]
"""Feature maps (N, c, H, W) of one size, not yet concatenated along c."""

Layer = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Shape:
    """Sizes of a DenseNet-BC (Huang et al. 2017, table 1)."""

    growth_rate: int
    """Channels that each dense layer adds, k in the paper."""
    blocks: tuple[int, ...]
    """Dense layers of each block."""
    stem: int
    """Channels of the first convolution."""


SHAPES = {
    "densenet121": Shape(32, (6, 12, 24, 16), 64),
    "densenet161": Shape(48, (6, 12, 36, 24), 96),
    "densenet169": Shape(32, (6, 12, 32, 32), 64),
    "densenet201": Shape(32, (6, 12, 48, 32), 64),
}
"""torchvision's architectures of this family."""

BOTTLENECK = 4
"""The 1×1 convolution of a dense layer has this many times `growth_rate` channels (section 3, "Bottleneck layers")."""


class DenseNet(nn.Module):
    """Image float (N, 3, H, W) → logits (N, outputs); `state_dict` is torchvision's, both ways, and so are first weights.

    `features` gives the last feature map (N, C, H/32, W/32), before its ReLU; C is 1024 for densenet121. Channels-last
    images stay channels last. `recompute` trades time for memory (`cxrfast bench ladder` says how much); it changes no logit,
    gradient or running statistic, and does nothing where no gradient is recorded.
    """

    def __init__(self, shape: Shape, outputs: int, recompute: bool = False) -> None:
        super().__init__()
        self.features = _Features(shape, recompute)
        self.classifier = nn.Linear(self.features.channels, outputs)
        for module in self.modules():  # in torchvision's order, which fixes who gets which random numbers
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        features = functional.relu(self.features(image), inplace=True)
        return self.classifier(torch.flatten(functional.adaptive_avg_pool2d(features, (1, 1)), 1))


class _Features(nn.Module):
    """Image (N, 3, H, W) → feature map (N, `channels`, H/32, W/32)."""

    def __init__(self, shape: Shape, recompute: bool) -> None:
        super().__init__()
        self.recompute = recompute
        self.conv0 = nn.Conv2d(3, shape.stem, kernel_size=7, stride=2, padding=3, bias=False)
        self.norm0 = nn.BatchNorm2d(shape.stem)
        self.relu0 = nn.ReLU(inplace=True)
        self.pool0 = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        channels = shape.stem
        for i, layers in enumerate(shape.blocks, 1):
            self.add_module(f"denseblock{i}", _DenseBlock(layers, channels, shape.growth_rate, recompute))
            channels += layers * shape.growth_rate
            if i < len(shape.blocks):
                self.add_module(f"transition{i}", _Transition(channels, channels // 2, recompute))
                channels //= 2
        self.norm5 = nn.BatchNorm2d(channels)
        self.channels = channels

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        # one map before a block, a tuple of them behind it
        features: Any = _run(self._pool, self.norm0, self.recompute, self.conv0(image))
        for module in self.children():
            if isinstance(module, (_DenseBlock, _Transition)):
                features = module(features)
        return self.norm5(torch.cat(features, 1))

    def _pool(self, norm: Layer, stem: torch.Tensor) -> torch.Tensor:
        return self.relu0(self.pool0(norm(stem)))


class _DenseBlock(nn.ModuleDict):
    """Feature map → the same and one more of each layer, each of which has seen all before it."""

    def __init__(self, layers: int, channels: int, growth_rate: int, recompute: bool) -> None:
        super().__init__(
            {
                f"denselayer{i + 1}": _DenseLayer(channels + i * growth_rate, growth_rate, recompute)
                for i in range(layers)
            }
        )

    def forward(self, first: torch.Tensor) -> Features:
        features: Features = (first,)
        for layer in self.values():
            features = (*features, layer(features))
        return features


class _DenseLayer(nn.Module):
    """Feature maps, `channels` together → one new feature map (N, growth_rate, H, W)."""

    def __init__(self, channels: int, growth_rate: int, recompute: bool) -> None:
        super().__init__()
        self.recompute = recompute
        narrow = BOTTLENECK * growth_rate
        self.norm1 = nn.BatchNorm2d(channels)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(channels, narrow, kernel_size=1, bias=False)
        self.norm2 = nn.BatchNorm2d(narrow)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(narrow, growth_rate, kernel_size=3, padding=1, bias=False)

    def forward(self, features: Features) -> torch.Tensor:
        narrow = _run(self._narrow, self.norm1, self.recompute, *features)
        return _run(self._grow, self.norm2, self.recompute, narrow)

    def _narrow(self, norm: Layer, *features: torch.Tensor) -> torch.Tensor:
        # cat would copy even a single map
        return self.conv1(self.relu1(norm(torch.cat(features, 1) if len(features) > 1 else features[0])))

    def _grow(self, norm: Layer, narrow: torch.Tensor) -> torch.Tensor:
        return self.conv2(self.relu2(norm(narrow)))


class _Transition(nn.Module):
    """Feature maps, `channels` together → one feature map (N, out, H/2, W/2)."""

    def __init__(self, channels: int, out: int, recompute: bool) -> None:
        super().__init__()
        self.recompute = recompute
        self.norm = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv = nn.Conv2d(channels, out, kernel_size=1, bias=False)
        self.pool = nn.AvgPool2d(kernel_size=2, stride=2)

    def forward(self, features: Features) -> torch.Tensor:
        return _run(self._shrink, self.norm, self.recompute, *features)

    def _shrink(self, norm: Layer, *features: torch.Tensor) -> torch.Tensor:
        return self.conv(self.pool(self.relu(norm(torch.cat(features, 1)))))


# Recomputation


def _run(
    function: Callable[..., torch.Tensor], norm: nn.Module, recompute: bool, *inputs: torch.Tensor
) -> torch.Tensor:
    """`function(norm, *inputs)`, which draws no random numbers.

    With `recompute` only the inputs are kept for the backward pass. Recomputation ends when the last tensor that the
    backward pass reads is there, which is the input of the convolution that `function` ends with. Raises RuntimeError
    if the mode (train, eval) was changed between the two passes.
    """
    if not (recompute and torch.is_grad_enabled()):
        return function(norm, *inputs)
    if torch.compiler.is_compiling():  # a compiled graph writes buffers once, whatever it computes again
        return recomputed(function, norm, *inputs, use_reentrant=False, preserve_rng_state=False)
    passes, training = count(), norm.training

    def run(*inputs: torch.Tensor) -> torch.Tensor:
        if next(passes) == 0:
            return function(norm, *inputs)
        if norm.training != training:
            raise RuntimeError("train() or eval() was called between a forward pass and its backward pass")
        return function(partial(_again, norm), *inputs)

    return recomputed(run, *inputs, use_reentrant=False, preserve_rng_state=False)


def _again(norm: nn.Module, features: torch.Tensor) -> torch.Tensor:
    """`norm(features)` that moves copies of its running statistics: they have moved in the forward pass already."""
    return functional_call(norm, {name: buffer.clone() for name, buffer in norm.named_buffers()}, features)
