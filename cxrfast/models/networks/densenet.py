"""torchvision's DenseNet with forward passes that keep less for the backward pass: same layers, same function, less memory.

`lean` takes torchvision's network and replaces its `features` (Huang et al. 2017, "Densely Connected Convolutional
Networks"). Parameters, names and first weights stay torchvision's. What differs is what is computed and what autograd keeps:

- Transitions average 2 × 2 pixels before their 1×1 convolution instead of after it. Both are linear and act on different
  axes, so they commute; the convolution then computes and keeps a quarter of the pixels. In the stem, likewise, the
  maximum over 3 × 3 pixels is taken before the ReLU, which is monotonic.
- With `recompute`, everything between two convolutions (concatenation, BatchNorm, ReLU, pooling) is recomputed in the
  backward pass instead of kept, as in Pleiss et al. 2017, "Memory-Efficient Implementation of DenseNets". Only the outputs
  of convolutions are kept, each once, so memory grows with the depth of a block and not with its square.
  No convolution runs twice, and BatchNorm's running statistics move once per step, as without.
"""

from collections.abc import Callable
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any

import torch
import torchvision
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint as recomputed

ARCHITECTURES = ("densenet121", "densenet161", "densenet169", "densenet201")
"""torchvision's architectures of this family."""

Features = tuple[torch.Tensor, ...]
"""Feature maps (N, c, H, W) of one size, not yet concatenated along c."""

Layer = Callable[[torch.Tensor], torch.Tensor]


def lean(net: torchvision.models.DenseNet, recompute: bool = False) -> torchvision.models.DenseNet:
    """Replace the `features` of `net` by ours, which take over its layers, and return it.

    `features` gives the last feature map (N, C, H/32, W/32), before its ReLU; C is 1024 for densenet121. Channels-last
    images stay channels last. `recompute` trades time for memory (`cxrfast bench ladder` measures how much); it changes no
    logit, gradient or running statistic, and does nothing where no gradient is recorded.
    """
    net.features = _Features(net.features, recompute)
    return net


class _Adopted(nn.Module):
    """Has the layers of one of torchvision's modules, under their names."""

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...

    def __init__(self, theirs: nn.Module, recompute: bool) -> None:
        super().__init__()
        self.recompute = recompute
        for name, child in theirs.named_children():
            self.add_module(name, child)


class _Features(_Adopted):
    """Image (N, 3, H, W) → feature map (N, C, H/32, W/32)."""

    def __init__(self, theirs: nn.Module, recompute: bool) -> None:
        super().__init__(theirs, recompute)
        for name, child in theirs.named_children():
            if name.startswith("denseblock"):
                layers = {n: _DenseLayer(layer, recompute) for n, layer in child.named_children()}
                self._modules[name] = _DenseBlock(layers)
            elif name.startswith("transition"):
                self._modules[name] = _Transition(child, recompute)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        # one map before a block, a tuple of them after it
        features: Any = _run(self._pool, self.norm0, self.recompute, self.conv0(image))
        for module in self.children():
            if isinstance(module, (_DenseBlock, _Transition)):
                features = module(features)
        return self.norm5(torch.cat(features, 1))

    def _pool(self, norm: Layer, stem: torch.Tensor) -> torch.Tensor:
        return self.relu0(self.pool0(norm(stem)))


class _DenseBlock(nn.ModuleDict):
    """Feature map → the same map and one more per layer; each layer sees all maps before it."""

    def forward(self, first: torch.Tensor) -> Features:
        features: Features = (first,)
        for layer in self.values():
            features = (*features, layer(features))
        return features


class _DenseLayer(_Adopted):
    """Feature maps → one new feature map (N, growth rate, H, W)."""

    def forward(self, features: Features) -> torch.Tensor:
        narrow = _run(self._narrow, self.norm1, self.recompute, *features)
        return _run(self._grow, self.norm2, self.recompute, narrow)

    def _narrow(self, norm: Layer, *features: torch.Tensor) -> torch.Tensor:
        # cat would copy even a single map
        return self.conv1(self.relu1(norm(torch.cat(features, 1) if len(features) > 1 else features[0])))

    def _grow(self, norm: Layer, narrow: torch.Tensor) -> torch.Tensor:
        return self.conv2(self.relu2(norm(narrow)))


class _Transition(_Adopted):
    """Feature maps → one feature map (N, C/2, H/2, W/2)."""

    def forward(self, features: Features) -> torch.Tensor:
        return _run(self._shrink, self.norm, self.recompute, *features)

    def _shrink(self, norm: Layer, *features: torch.Tensor) -> torch.Tensor:
        return self.conv(self.pool(self.relu(norm(torch.cat(features, 1)))))


# Recomputation


def _run(
    function: Callable[..., torch.Tensor], norm: nn.Module, recompute: bool, *inputs: torch.Tensor
) -> torch.Tensor:
    """`function(norm, *inputs)`, which draws no random numbers.

    With `recompute` only the inputs are kept for the backward pass. Recomputation ends at the last tensor that the
    backward pass reads: the input of the convolution that `function` ends with. Raises RuntimeError if the mode (train,
    eval) changed between the two passes.
    """
    if not (recompute and torch.is_grad_enabled()):
        return function(norm, *inputs)
    if torch.compiler.is_compiling():  # a compiled graph writes buffers once, whatever it recomputes
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
    """`norm(features)` that updates copies of its running statistics: the forward pass has already updated them."""
    return functional_call(norm, {name: buffer.clone() for name, buffer in norm.named_buffers()}, features)
