"""The receptive field of the last feature map: the pixels its units can see, in theory, and how strongly each counts.

The theoretical field follows from an architecture's layers. The effective field shows how strongly the map's centre
depends on each input pixel: a model and images come in, a map goes out. Nothing here changes a weight or touches a file.
"""

import operator
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from cxrfast.errors import NotDefined, RunError
from cxrfast.models.classifier import Classifier, frozen
from cxrfast.models.feature_map import last_map, layers_of
from cxrfast.models.networks.architecture import kind_of
from cxrfast.models.precision import without_tf32

_POINTWISE = {operator.add, operator.iadd, operator.mul, operator.imul, torch.add, torch.mul, torch.cat}
_POINTWISE_NAMES = {
    "relu",
    "relu_",
    "sigmoid",
    "sigmoid_",
    "silu",
    "gelu",
    "hardsigmoid",
    "hardswish",
    "mul",
    "mul_",
    "add",
    "add_",
}
_POINTWISE_NAMES |= {"stochastic_depth", "layer_norm", "batch_norm", "permute", "contiguous"}
_NUMBERS = {"getattr", "_assert", "eq", "dim", "numel"}
"""What networks ask about a map without changing it; the result is not a map."""
_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)
_ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.SiLU, nn.GELU, nn.Sigmoid, nn.Hardsigmoid, nn.Hardswish)
_POINTWISE_MODULES = (*_NORMS, *_ACTIVATIONS, nn.Dropout, nn.Identity, nn.Linear)
_GLOBAL = (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)
_KERNELS = (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d)
_KNOWN = (*_POINTWISE_MODULES, *_GLOBAL, *_KERNELS)

Field = tuple[int, int]
"""Side of the field and stride, px."""


def theoretical_receptive_field(arch: str, side: int | None = None) -> Field:
    """Side of the square of input pixels that one unit of the last feature map depends on, and the map's stride, px.

    densenet121: 2071 and 32. `side`: of the images, px, for architectures that are made for one size. Raises RunError for
    architectures without a convolutional feature map (swin_t), and for one's own.
    """
    if kind_of(arch) == "own":
        raise NotDefined(f"no theoretical receptive field is known for {arch}: it is a network of your own")
    with torch.device("meta"):  # shapes alone are enough: no weights are made
        layers = layers_of(Classifier(arch, 1, side=side))
    try:
        return receptive_field(layers)
    except RunError as error:
        raise RunError(f"no theoretical receptive field is known for {arch}: {error}") from error


def receptive_field(layers: nn.Module) -> Field:
    """Field r and stride j of the output of `layers`, px.

    Kernel k with stride s and dilation d turns (r, j) into (r + d·(k - 1)·j, j·s); where branches meet, the
    larger field counts (Araujo, Norris and Sim 2019, "Computing receptive fields of convolutional neural
    networks", Distill). The gate of a squeeze-and-excitation block, which sees the whole image through a
    global mean, is left out. Raises RunError naming a layer that is neither a kernel nor pointwise.
    """
    try:
        graph = fx.GraphModule(layers, _Tracer().trace(layers))
    except (TypeError, ValueError, RuntimeError, AttributeError, fx.proxy.TraceError) as error:
        raise RunError(f"its layers cannot be followed ({' '.join(str(error).split())[:100]})") from error
    fields: dict[fx.Node, Field | None] = {}
    for node in graph.graph.nodes:
        before = [f for n in node.all_input_nodes if (f := fields[n])]
        widest = (max(r for r, _ in before), max(j for _, j in before)) if before else None
        name = getattr(node.target, "__name__", node.target)
        if node.op == "placeholder":
            fields[node] = (1, 1)
        elif not before:  # made of no map, such as a scale per channel
            fields[node] = None
        elif node.op == "call_module":
            fields[node] = _after(graph.get_submodule(str(node.target)), widest)
        elif name in _NUMBERS or _is_global_mean(node):
            fields[node] = None
        elif node.op in ("get_attr", "output") or node.target in _POINTWISE or name in _POINTWISE_NAMES:
            fields[node] = widest
        else:
            raise RunError(f"what {name} does to it is unknown")
    field = fields[node]
    if field is None:
        raise RunError("the layers end in a global pool")
    return field


class _Tracer(fx.Tracer):
    """Follows a network down to layers that are known, also where timm inherits from torch's."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, _KNOWN) or super().is_leaf_module(m, module_qualified_name)


def _is_global_mean(node: fx.Node) -> bool:
    """Whether a node is the mean over both sides of a map, as in a squeeze-and-excitation block."""
    given = node.args[1:] or (node.kwargs.get("dim"),)
    return node.target in ("mean", torch.mean) and given[0] in ((2, 3), [2, 3], (-2, -1), [-2, -1])


def _after(module: nn.Module, field: Field | None) -> Field | None:
    """Receptive field after one layer; None after a global pool, whose output is not a feature map."""
    if isinstance(module, _GLOBAL):
        return None
    if isinstance(module, _KERNELS):
        if field is None:
            return None
        kernel, stride = _largest(module.kernel_size), _largest(module.stride)
        dilation = _largest(getattr(module, "dilation", 1))  # AvgPool2d has none
        return field[0] + dilation * (kernel - 1) * field[1], field[1] * stride
    if isinstance(module, _POINTWISE_MODULES):
        return field
    raise RunError(f"what a {type(module).__name__} does to it is unknown")


def _largest(value: Any) -> int:
    return max(value) if isinstance(value, tuple) else int(value)


# The effective field


def draw_shifts(seed: int, rows: np.ndarray, side: int) -> np.ndarray:
    """Shifts of rows, px down and right: int64 (N, 2), uniform in ±side / 2, a function of seed and row only.

    A row moves by the same fraction of the side at every scale.
    """
    words = [np.random.Philox(key=np.array([seed, row], np.uint64)).random_raw(2) for row in rows.tolist()]
    unit = np.array(words, np.float64).reshape(-1, 2) / 2**64
    return np.rint((unit - 0.5) * side).astype(np.int64)


def shifted(images: torch.Tensor, shifts: np.ndarray) -> torch.Tensor:
    """Images (N, C, H, W), each moved by its own (down, right) px, at most one side; black fills the gap."""
    out = torch.zeros_like(images)
    height, width = images.shape[-2:]
    for source, target, (down, right) in zip(images, out, shifts.tolist(), strict=True):
        target[:, max(down, 0) : height + min(down, 0), max(right, 0) : width + min(right, 0)] = source[
            :, max(-down, 0) : height + min(-down, 0), max(-right, 0) : width + min(-right, 0)
        ]
    return out


def squared_gradients(model: Classifier, images: torch.Tensor) -> torch.Tensor:
    """float64 (N, H, W): squared gradients of the last feature map's centre with respect to the input pixels.

    `images`: uint8 (N, 1, H, W). The centre is position (h // 2, w // 2), summed over its channels; if the number of
    positions is even, it is up to half a stride below and right of the image's centre. The gradient is taken at the
    output of `normalise`, since integers have none, and summed over its three channels before it is squared,
    because they are copies of one grey level and move together. That sum is our reading of the study.
    """
    with torch.enable_grad(), without_tf32():
        pixels = model.normalise(images).detach().requires_grad_()
        features = last_map(model, pixels)
        centre = features[:, :, features.shape[2] // 2, features.shape[3] // 2]
        # In evaluation mode images are independent: the gradient of the sum holds the gradient of each.
        (gradient,) = torch.autograd.grad(centre.sum(), pixels)
    return gradient.sum(1).double().square()


def effective_receptive_field(model: Classifier, batches: Iterable[torch.Tensor]) -> np.ndarray:
    """float64 (H, W), maximum 1: `squared_gradients` averaged over the images of all `batches`.

    `batches`: uint8 (N, 1, H, W) on the model's device, `shifted` by large random translations before, so
    that the mean shows the network rather than the thorax. All zeros if no pixel reaches the centre. Raises
    RunError without images. Source: Luo, Li, Urtasun and Zemel 2016, "Understanding the effective receptive
    field in deep convolutional neural networks"; squares and translations are the study's.
    """
    total, count = None, 0
    with frozen(model):
        for images in batches:
            part = squared_gradients(model, images).sum(0)
            total, count = part if total is None else total + part, count + len(images)
    if total is None or count == 0:
        raise RunError("a receptive field needs at least one image")
    mean = (total / count).cpu().numpy()
    return mean / (mean.max() or 1.0)
