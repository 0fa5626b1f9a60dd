"""The last layer of a torchvision classifier, whose outputs must be the logits. It computes in float32 whatever the precision.

A logit of -7 in bfloat16 is one of -7.03, -7.00, -6.97: most rows of a rare finding would tie.
"""

import copy
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from cxrfast.errors import RunError

SHIFT = 100.0
"""Added to the outputs of the last layer to see whether the logits follow."""


def _float32(features: torch.Tensor) -> AbstractContextManager[object]:
    """Autocast switched off for the device of `features`; the device meta has none."""
    return nullcontext() if features.is_meta else torch.autocast(features.device.type, enabled=False)


class _Float32Linear(nn.Linear):
    def forward(self, features: torch.Tensor) -> torch.Tensor:
        with _float32(features):
            return super().forward(features.to(self.weight.dtype))


class _Float32Conv2d(nn.Conv2d):
    def forward(self, features: torch.Tensor) -> torch.Tensor:
        with _float32(features):
            return super().forward(features.to(self.weight.dtype))


def head_name(net: nn.Module) -> str | None:
    """Name of the last layer with weights, as `classifier.6`; None if it is neither linear nor a convolution."""
    *_, (name, layer) = (
        (name, m) for name, m in net.named_modules() if next(m.parameters(recurse=False), None) is not None
    )
    return name if isinstance(layer, (nn.Linear, nn.Conv2d)) else None


def last_layer(net: nn.Module, side: int | None) -> str | None:
    """Name of the layer with weights that a forward pass calls last; None if it is neither a plain linear layer nor a plain
    convolution, or if images of `side` px cannot be tried.

    For networks whose layers may be registered in any order.
    """
    called: list[str] = []
    trial = copy.deepcopy(net).eval()
    for name, module in trial.named_modules():
        if next(module.parameters(recurse=False), None) is not None:
            module.register_forward_hook(lambda *_, name=name: called.append(name))
    image = torch.zeros((2, 3, side or 64, side or 64))
    for device in ("meta", "cpu"):  # shapes alone are quick, but not every network can do with them
        called.clear()
        try:
            with torch.no_grad():
                trial.to(device)(image.to(device))
            break
        except Exception:  # of a user's code: `check_size` says what is wrong
            trial = trial.to_empty(device="cpu") if device == "meta" else trial
    else:
        return None
    # a class that inherits from these may compute something else
    return called[-1] if called and type(net.get_submodule(called[-1])) in (nn.Linear, nn.Conv2d) else None


def use_float32(net: nn.Module, name: str) -> None:
    """Make the last layer of `net` compute in float32 under autocast. Its parameters stay as they are, with their names."""
    old = net.get_submodule(name)
    new: nn.Linear | nn.Conv2d
    if isinstance(old, nn.Linear):
        new = _Float32Linear(old.in_features, old.out_features, device="meta")
    else:
        assert isinstance(old, nn.Conv2d)
        new = _Float32Conv2d(
            old.in_channels,
            old.out_channels,
            old.kernel_size,  # type: ignore[arg-type]
            old.stride,  # type: ignore[arg-type]
            old.padding,  # type: ignore[arg-type]
            old.dilation,  # type: ignore[arg-type]
            old.groups,
            padding_mode=old.padding_mode,
            device="meta",
        )
    new.weight, new.bias = old.weight, old.bias
    net.set_submodule(name, new)


def check_outputs(net: nn.Module, arch: str, outputs: int, side: int, head: str | None = None) -> None:
    """Raises RunError unless the logits of `net`, for images of `side` px, are the outputs of its last layer, (N, L).

    A layer that follows, such as the ReLU of SqueezeNet, would leave no logit below 0, and a sigmoid would leave
    probabilities. `net` may have no numbers (device meta). `head`: name of the last layer; None: that with the last weights.
    """
    name = head or head_name(net)
    if name is None:
        raise no_last_layer(arch)
    trial = copy.deepcopy(net).to_empty(device="cpu").eval()
    for tensor in (*trial.parameters(), *trial.buffers()):
        tensor.detach().zero_()
    for shift in (-SHIFT, SHIFT):
        hook = trial.get_submodule(name).register_forward_hook(lambda *given, shift=shift: given[-1] + shift)
        with torch.device("cpu"), torch.no_grad():
            logits = trial(torch.zeros((2, 3, side, side)))
        hook.remove()
        if not isinstance(logits, torch.Tensor) or logits.shape != (2, outputs):
            raise RunError(
                f"{arch} does not return one logit per finding and image, but {_kind(logits)} for 2 images and {outputs} findings: "
                "use another classifier"
            )
        if not torch.allclose(logits, torch.full_like(logits, shift)):
            found = (
                "none of its outputs is below 0"
                if shift < 0 <= float(logits.min())
                else "its outputs are not those of its last layer"
            )
            raise RunError(
                f"{arch} does not return logits: {found}, because an activation follows the last layer; use another classifier, such "
                "as densenet121 or resnet50"
            )


def no_last_layer(arch: str) -> RunError:
    return RunError(
        f"{arch} does not end in a linear layer or a convolution of torch's, which would compute in float32: use another "
        "classifier"
    )


def _kind(value: object) -> str:
    """What a network returned, for a message."""
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return f"a {type(value).__name__}"
