"""The theoretical receptive field of an architecture: the input pixels that one unit of its last feature map can see."""

import operator
from typing import Any

import torch
from torch import fx, nn

from cxrfast.errors import RunError
from cxrfast.models.classifier import Classifier

_POINTWISE = {operator.add, operator.iadd, operator.mul, operator.imul, torch.add, torch.mul, torch.cat}
_POINTWISE_NAMES = {"relu", "relu_", "sigmoid", "stochastic_depth", "layer_norm", "permute", "contiguous"}
_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)
_ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.SiLU, nn.GELU, nn.Sigmoid, nn.Hardsigmoid, nn.Hardswish)
_POINTWISE_MODULES = (*_NORMS, *_ACTIVATIONS, nn.Dropout, nn.Identity, nn.Linear)
_GLOBAL = (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)

Field = tuple[int, int]
"""Side of the field and stride, px."""


def theoretical_receptive_field(arch: str) -> Field:
    """Side of the square of input pixels that one unit of the last feature map depends on, and the map's stride, px.

    densenet121: 2071 and 32. Raises RunError for architectures without a convolutional feature map (swin_t).
    """
    with torch.device("meta"):  # shapes alone are enough: no weights are made
        layers = Classifier(arch, 1).feature_layers
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
    graph = fx.symbolic_trace(layers)
    fields: dict[fx.Node, Field | None] = {}
    for node in graph.graph.nodes:
        before = [f for n in node.all_input_nodes if (f := fields[n])]
        widest = (max(r for r, _ in before), max(j for _, j in before)) if before else None
        name = getattr(node.target, "__name__", node.target)
        if node.op == "placeholder":
            fields[node] = (1, 1)
        elif node.op == "call_module":
            fields[node] = _after(graph.get_submodule(str(node.target)), widest)
        elif node.op in ("get_attr", "output") or node.target in _POINTWISE or name in _POINTWISE_NAMES:
            fields[node] = widest
        else:
            raise RunError(f"what {name} does to it is unknown")
    field = fields[node]
    if field is None:
        raise RunError("the layers end in a global pool")
    return field


def _after(module: nn.Module, field: Field | None) -> Field | None:
    """Receptive field after one layer; None after a global pool, whose output is not a feature map."""
    if isinstance(module, _GLOBAL):
        return None
    if isinstance(module, (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d)):
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
