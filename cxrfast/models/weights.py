"""First weights of a classifier: ImageNet's are fetched; those of a file or of another run are fitted to it."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torchvision

from cxrfast.errors import RunError
from cxrfast.models.classifier import Classifier
from cxrfast.models.networks.architecture import kind_of
from cxrfast.models.networks.make import check_arch
from cxrfast.models.networks.timm_networks import cached_weights, converted, fetch_timm
from cxrfast.models.weights_file import WeightsFile

OPTIONAL = re.compile(r"normalise\.|.*num_batches_tracked$")
"""Names of tensors that a file may lack: torchvision's do not normalise, and nothing reads num_batches_tracked."""

SHOWN, LONGEST = 3, 80
"""Names in a message, and characters of each."""


def imagenet_file(arch: str) -> tuple[str, Path]:
    """URL of torchvision's ImageNet weights and the path where torch keeps them on this machine."""
    check_arch(arch)
    url = str(torchvision.models.get_model_weights(arch).DEFAULT.url)
    return url, Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[1]


def has_imagenet(arch: str) -> bool:
    """Whether pretrained weights of an architecture are on this machine. Raises RunError if there are none anywhere."""
    match kind_of(arch):
        case "timm":
            return cached_weights(arch) is not None
        case "own":
            raise _own_weights(arch)
    return imagenet_file(arch)[1].exists()


def _own_weights(arch: str) -> RunError:
    return RunError(
        f"--weights imagenet: there are no ImageNet weights for {arch}, a network of your own: give --weights none (its factory may "
        "load weights itself) or --weights FILE"
    )


def fetch_weights(arch: str, to: Path | None = None) -> Path:
    """Download the ImageNet weights of torchvision or timm if they are missing. Torchvision's hold a hash in their name.

    Raises RunError without a network.
    """
    match kind_of(arch):
        case "timm":
            return fetch_timm(arch, to)
        case "own":
            raise _own_weights(arch)
    url, cached = imagenet_file(arch)
    target = to / cached.name if to else cached
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    prefix = target.stem.rsplit("-", 1)[1]
    try:
        torch.hub.download_url_to_file(url, str(target), hash_prefix=prefix, progress=False)
    except (OSError, RuntimeError) as error:  # RuntimeError: the hash is wrong
        raise RunError(
            f"ImageNet weights for {arch} could not be downloaded from {url} ({error}). On a machine with a network "
            f"run `cxrfast fetch-weights --arch {arch} --to DIR`, copy DIR here and give --weights DIR/{target.name}; "
            "or train from scratch with --weights none"
        ) from error
    return target


def load_weights(
    model: Classifier, file: WeightsFile, labels: Sequence[str] = (), theirs: Sequence[str] | None = None
) -> list[str]:
    """Load weights into `model`, of findings `labels`; return the findings whose outputs came from the file.

    `theirs`: findings of the file's outputs, in their order; None if it does not say. Outputs are taken over by finding;
    the others stay as they are. Raises RunError if the weights are not finite, or not of the model's architecture.
    """
    is_ours = any(name.startswith("net.") for name in file.tensors)
    is_timms = kind_of(model.arch) == "timm" and not is_ours
    tensors = converted(model.arch, model.net, file.tensors) if is_timms else file.tensors
    own, given = model.state_dict(), _by_our_names(replace(file, tensors=dict(tensors)))
    head = [name for name in own if name.rpartition(".")[0] == f"net.{model.head}"]
    expected = {name: tensor for name, tensor in own.items() if name not in head}
    if theirs is not None:
        expected |= {name: own[name].new_empty((len(theirs), *own[name].shape[1:])) for name in head}
    usable = {name: given[name] for name in expected if name in given and _fits(given[name], expected[name])}
    if missing := [name for name in expected if name not in usable and not OPTIONAL.match(name)]:
        raise RunError(f"{file.name} does not fit {model.arch}: {_misfit(missing, given, expected)}")
    usable = {name: tensor.to(expected[name].dtype) for name, tensor in usable.items()}
    if wrong := [name for name, tensor in usable.items() if not tensor.isfinite().all()]:
        raise RunError(
            f"{file.name}: {_short(wrong[0])} holds NaN or infinite values, so the training that wrote it diverged: use "
            "other weights"
        )
    number = {label: i for i, label in enumerate(theirs or ())}
    shared = [label for label in labels if label in number]
    for name in head if theirs is not None else ():
        merged = own[name].clone()
        for i, label in enumerate(labels):
            if label in number:
                merged[i] = usable[name][number[label]]
        usable[name] = merged
    model.load_state_dict(usable, strict=False)
    return shared


def _by_our_names(file: WeightsFile) -> dict[str, torch.Tensor]:
    """Tensors of a file by the names of `Classifier`. Raises RunError if two of them are one."""
    given: dict[str, torch.Tensor] = {}
    for name, tensor in file.tensors.items():
        if given.setdefault(our := _modern(name), tensor) is not tensor:
            raise RunError(f"{file.name} holds {_short(our)} twice, as {name[:LONGEST]} too: give a file of one model")
    return given


def _modern(name: str) -> str:
    """Name of a tensor in a file → its name in `Classifier`.

    Wrappers prefix names: DataParallel with `module.`, torch.compile with `_orig_mod.`, others with `model.`. torchvision's
    old densenet files write `norm.1` for `norm1`.
    """
    name = re.sub(r"^(?:(?:module|model|net)\.)+", "", re.sub(r"(^|\.)_orig_mod\.", r"\1", name))
    if name.startswith("normalise."):
        return name
    return "net." + re.sub(r"(denselayer\d+\.(?:norm|relu|conv))\.([12])\.", r"\1\2.", name)


def _fits(tensor: torch.Tensor, own: torch.Tensor) -> bool:
    """Whether a tensor can be copied into another: its shape, and plain numbers of the same kind."""
    is_plain = tensor.layout == torch.strided and not tensor.is_quantized and tensor.device.type != "meta"
    return is_plain and tensor.shape == own.shape and tensor.is_floating_point() == own.is_floating_point()


def _misfit(missing: list[str], given: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> str:
    """Why tensors of a file cannot be used, with the first few names."""
    if given.keys().isdisjoint(name for name in expected if not OPTIONAL.match(name)):
        return f"none of its {len(given):,} tensors is one of the model; it holds {_first(given)}, expected were {_first(missing)}"
    shapes = [
        f"{_short(name)} is {_kind(given[name])}, not {_kind(expected[name])}"
        if name in given
        else f"{_short(name)} is absent"
        for name in missing[:SHOWN]
    ]
    more = f" and {len(missing) - SHOWN:,} more" if len(missing) > SHOWN else ""
    return f"{'; '.join(shapes)}{more}; it holds {_first(given)}"


def _kind(tensor: torch.Tensor) -> str:
    """Shape and number format of a tensor."""
    return f"{'x'.join(map(str, tensor.shape)) or 'a number'} {str(tensor.dtype).removeprefix('torch.')}"


def _first(names: Iterable[str]) -> str:
    """The first few names, and how many there are."""
    names = [_short(name) for name in names]
    return ", ".join(names[:SHOWN]) + (", …" if len(names) > SHOWN else "")


def _short(name: str) -> str:
    """A name as torchvision spells it, cut for a message."""
    return name.removeprefix("net.")[:LONGEST]
