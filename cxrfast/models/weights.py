"""First weights of a classifier: ImageNet's, a file's or another run's."""

import re
from pathlib import Path

import torch
import torchvision
from safetensors.torch import load_file

from cxrfast.errors import RunError
from cxrfast.models.classifier import Classifier, check_arch


def imagenet_file(arch: str) -> tuple[str, Path]:
    """URL of torchvision's ImageNet weights and the path where torch keeps them on this machine."""
    check_arch(arch)
    url = str(torchvision.models.get_model_weights(arch).DEFAULT.url)
    return url, Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[1]


def fetch_weights(arch: str, to: Path | None = None) -> Path:
    """Download torchvision's ImageNet weights if they are missing, and check the hash in their name.

    Raises RunError without a network.
    """
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


def load_weights(model: Classifier, path: Path, option: str | None = None) -> None:
    """Load a .pth or .safetensors file into `model`; `option`: the value of --weights, for messages.

    The last layer stays random if the file has another number of outputs. Raises RunError if the file is not a
    checkpoint of this architecture.
    """
    weights = option or path
    try:
        given = (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
        given = {_modern(name): tensor for name, tensor in given.items()}
    except Exception as error:  # torch and safetensors raise half a dozen unrelated classes for other files
        raise RunError(f"--weights {weights}: {path} is not a checkpoint ({type(error).__name__})") from error
    own = model.state_dict()
    usable = {name: tensor for name, tensor in given.items() if name in own and own[name].shape == tensor.shape}
    # older files have no num_batches_tracked, which nothing reads
    optional = r"normalise\.|.*num_batches_tracked$"
    missing = [name for name in own if name not in usable and not re.match(optional, name)]
    last = {name for name, _ in list(model.named_parameters())[-2:]}  # weight and bias of the last layer
    if set(missing) - last:
        raise RunError(
            f"--weights {weights}: {path} does not fit {model.arch}: "
            f"{len(missing)} of {len(own)} tensors are absent or of another shape, first {missing[0]}"
        )
    model.load_state_dict(usable, strict=False)


def _modern(name: str) -> str:
    """Key of a torchvision file → key of `Classifier`; old densenet files write `norm.1` for `norm1`."""
    if name.startswith(("net.", "normalise.")):
        return name
    return "net." + re.sub(r"(denselayer\d+\.(?:norm|relu|conv))\.([12])\.", r"\1\2.", name)
