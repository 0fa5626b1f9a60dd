"""Makes networks by name: torchvision's classifiers, timm's (`timm/NAME`), and one's own (`package.module:factory`).

A name comes in; a network with one logit per finding goes out, with what the classifier must know about it.
"""

import torchvision

from cxrfast.errors import RunError, did_you_mean
from cxrfast.models.head import head_name
from cxrfast.models.networks import factories, timm_networks
from cxrfast.models.networks.architecture import Architecture, kind_of
from cxrfast.models.networks.densenet import ARCHITECTURES, lean


def check_arch(arch: str) -> None:
    """Raise RunError unless the architecture exists. Imports timm for a name of timm's, and nothing for one's own."""
    match kind_of(arch):
        case "timm":
            timm_networks.check_name(arch)
        case "torchvision":
            known = torchvision.models.list_models(module=torchvision.models)
            if arch not in known:
                raise RunError(
                    f"architecture {arch!r} is unknown: {did_you_mean([arch], known)}use a torchvision classifier (densenet121, "
                    "resnet50, …), timm/NAME or package.module:factory"
                )


def make(arch: str, outputs: int, side: int | None = None, recompute: bool = False) -> Architecture:
    """The network of an architecture with random weights and `outputs` logits, for images of `side` px.

    `side` may be None for networks that take any. Raises RunError for an unknown name, one's own that may not be imported
    (see `factories`), a network that cannot be made, or `recompute` with one that does not support it.
    """
    if recompute and arch not in ARCHITECTURES:
        check_arch(arch)
        raise RunError(
            f"{arch} does not support activation checkpointing: use {', '.join(ARCHITECTURES)}, or train without it"
        )
    match kind_of(arch):
        case "timm":
            return timm_networks.make_timm(arch, outputs, side)
        case "own":
            return factories.make_own(arch, outputs, side)
    check_arch(arch)
    net = torchvision.models.get_model(arch, weights=None, num_classes=outputs)
    net = lean(net, recompute) if arch in ARCHITECTURES else net
    return Architecture(net=net, head=head_name(net))


def is_exact(arch: str) -> bool:
    """Whether networks of this architecture may take images of the side alone that they were made for."""
    match kind_of(arch):
        case "timm":
            return timm_networks.has_fixed_size(arch)
        case "own":
            return True
    return False
