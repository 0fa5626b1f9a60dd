"""The last feature map of a network, (N, C, h, w): where Grad-CAM starts, and whose units have receptive fields.

torchvision's CNNs are known by name. timm's split their forward pass into `forward_features` and `forward_head`; so may one's
own. Maps with channels last and the tokens of a transformer are put in the order (N, C, h, w). Other networks have no such
map: NotDefined says so.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from cxrfast.errors import NotDefined
from cxrfast.models.classifier import Classifier, frozen
from cxrfast.models.networks.architecture import kind_of

Reshape = Callable[[torch.Tensor], torch.Tensor]


def last_map(model: Classifier, pixels: torch.Tensor) -> torch.Tensor:
    """The last feature map, (N, C, h, w), of normalised images (N, 3, H, W). Raises NotDefined for a network without one."""
    if kind_of(model.arch) == "torchvision":
        return model.feature_layers(pixels)
    return _as_map(model, _split(model)[0](pixels))


def map_and_logits(model: Classifier, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A feature map (N, C, h, w), where the graph starts, and the logits (N, L) computed from it; in float32.

    `image`: uint8 (N, 1, H, W). The map is the last one, before the head. In a transformer the classes may be read from one
    token alone, on which the last tokens of the others have no influence: there it is what enters the last attention. Raises
    NotDefined for a network without such a map.
    """
    with frozen(model), torch.autocast(image.device.type, enabled=False):
        if kind_of(model.arch) == "torchvision":
            return _start_after(list(model.feature_layers.children())[-1], model, image)
        if (norm := _last_attention_input(model.net)) is not None:
            return _start_after(norm, model, image)
        features, head = _split(model)
        pixels = model.normalise(image)
        found = _as_map(model, features(pixels)).detach().requires_grad_()
        logits = head(_from_map(model, found).clone())  # a head may begin with an in-place activation
        if kind_of(model.arch) == "own" and not torch.allclose(logits, model.net(pixels), rtol=1e-3, atol=1e-4):
            raise _not_defined(model, "its forward pass is not forward_head(forward_features(x))")
        return found, logits


def _start_after(layer: nn.Module, model: Classifier, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As `map_and_logits`, with the map that a layer gives."""
    found: list[torch.Tensor] = []

    def start_graph(module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        found.append(_as_map(model, output).detach().requires_grad_())
        # a clone: densenet121 continues with an in-place ReLU, which would change the map
        return _from_map(model, found[0], output).clone()

    hook = layer.register_forward_hook(start_graph)
    try:
        logits = model(image)
        return found[0], logits
    finally:
        hook.remove()


def _last_attention_input(net: nn.Module) -> nn.Module | None:
    """The norm before the last attention of a transformer with prefix tokens (ViT, DeiT, EVA, …); None for others."""
    blocks = getattr(net, "blocks", None)
    if not isinstance(getattr(net, "num_prefix_tokens", None), int) or not isinstance(
        blocks, nn.Sequential | nn.ModuleList
    ):
        return None
    norm = getattr(blocks[-1], "norm1", None)
    return norm if isinstance(norm, nn.Module) else None


def _split(model: Classifier) -> tuple[Reshape, Reshape]:
    features, head = (getattr(model.net, name, None) for name in ("forward_features", "forward_head"))
    if not callable(features) or not callable(head):
        raise _not_defined(model, "it has no forward_features and forward_head")
    return features, head


def _as_map(model: Classifier, output: Any) -> torch.Tensor:
    """What `forward_features` or a layer gives as (N, C, h, w)."""
    net: Any = model.net
    if isinstance(output, torch.Tensor) and output.ndim == 4:
        found = output.permute(0, 3, 1, 2) if _is_channels_last(net) else output
        channels = getattr(net, "num_features", None) if kind_of(model.arch) == "timm" else None
        if found.shape[2] == found.shape[3] and channels in (None, found.shape[1]):
            return found
    if isinstance(output, torch.Tensor) and output.ndim == 3 and (grid := _grid(net)):
        prefix = net.num_prefix_tokens
        if output.shape[1] == prefix + grid[0] * grid[1]:
            return output[:, prefix:].transpose(1, 2).unflatten(2, grid)
    shape = tuple(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
    raise _not_defined(model, f"it has no map of features (N, C, h, w), but {shape}")


def _from_map(model: Classifier, found: torch.Tensor, before: torch.Tensor | None = None) -> torch.Tensor:
    """`found` in the order that the network has; `before`: the tokens that it was taken from, for those that are no patches."""
    if before is not None and before.ndim == 3:
        prefix: int = model.net.num_prefix_tokens  # type: ignore[assignment]
        return torch.cat((before[:, :prefix].detach(), found.flatten(2).transpose(1, 2)), 1)
    return found.permute(0, 2, 3, 1) if _is_channels_last(model.net) else found


def _is_channels_last(net: nn.Module) -> bool:
    form = getattr(net, "output_fmt", "NCHW")
    return str(getattr(form, "value", form)) == "NHWC"


def _grid(net: nn.Module) -> tuple[int, int] | None:
    """Patches of an image, down and across; None for a network without patch tokens."""
    grid = getattr(getattr(net, "patch_embed", None), "grid_size", None)
    return (int(grid[0]), int(grid[1])) if grid and isinstance(getattr(net, "num_prefix_tokens", None), int) else None


def _not_defined(model: Classifier, why: str) -> NotDefined:
    return NotDefined(f"receptive fields and Grad-CAM are not defined for {model.arch}: {why}")


class MapLayers(nn.Module):
    """The layers of a network of timm's up to its last feature map (N, C, h, w), to be traced."""

    def __init__(self, model: Classifier) -> None:
        super().__init__()
        self.net = model.net
        self.features = _split(model)[0]

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.features(pixels)


def layers_of(model: Classifier) -> nn.Module:
    """The layers up to the last feature map, in evaluation mode. Raises NotDefined for a network without one."""
    if kind_of(model.arch) == "torchvision":
        return model.feature_layers.eval()
    if _grid(model.net) is not None or _is_channels_last(model.net):
        raise _not_defined(model, "its features are not those of convolutions alone")
    return MapLayers(model).eval()
