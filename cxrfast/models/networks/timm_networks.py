"""Networks of timm, PyTorch Image Models (Wightman 2019): `timm/NAME`. timm is imported when one is asked for."""

import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from cxrfast.errors import RunError, did_you_mean
from cxrfast.files import replacing
from cxrfast.models.networks.architecture import TIMM, Architecture

FILES = ("model.safetensors", "pytorch_model.bin")
"""Names of weights in a repository of the Hugging Face hub, in timm's order of preference."""


def timm_module() -> ModuleType:
    """Raises RunError if timm is not installed."""
    try:
        import timm
    except ImportError as error:
        raise RunError(
            "an architecture timm/NAME needs timm: pip install 'cxrfast[timm]'"
            + (f" ({error})" if error.name != "timm" else "")
        ) from error
    return timm


def check_name(arch: str) -> str:
    """timm's name of `timm/NAME`. Raises RunError if timm does not know it."""
    timm, name = timm_module(), arch.removeprefix(TIMM)
    base, _, tag = name.partition(".")
    if not re.fullmatch(r"[\w.-]+", name) or not timm.is_model(base):
        known = [TIMM + one for one in timm.list_models()]
        raise RunError(
            f"architecture {arch!r} is unknown: {did_you_mean([TIMM + base], known)}use a name of "
            "`timm.list_models()` after timm/, such as timm/convnext_tiny"
        )
    if tag and name not in (known := timm.list_pretrained(f"{base}.*")):
        raise RunError(
            f"architecture {arch!r} is unknown: timm has no weights {tag!r} of {base}; it has "
            f"{', '.join(one.partition('.')[2] for one in known) or 'none'}"
        )
    return name


def _settings(arch: str) -> Any:
    """What timm knows about the weights of a network: size, mean, standard deviation, where they are."""
    name = check_name(arch)
    found = timm_module().get_pretrained_cfg(name)
    if found is None:
        raise RunError(f"timm does not say how images for {arch} are prepared: use another network")
    return found


def has_fixed_size(arch: str) -> bool:
    """Whether a network is made for images of one size, as ViT and Swin are."""
    return bool(_settings(arch).fixed_input_size)


def make_timm(arch: str, outputs: int, side: int | None) -> Architecture:
    """A network of timm with random weights. Raises RunError if it cannot be made for images of `side` px."""
    settings, exact = _settings(arch), has_fixed_size(arch)
    name, own = arch.removeprefix(TIMM), settings.input_size[-1]
    create, given = timm_module().create_model, {"num_classes": outputs, "in_chans": 3}
    try:
        if exact and side is not None:
            try:
                net = create(name, img_size=side, **given)
            except TypeError:  # it cannot be told a size
                if side != own:
                    raise RunError(
                        f"{arch} takes images of {own} px alone, not of {side} px: use --scale {own}, or another network"
                    ) from None
                net = create(name, **given)
        else:
            net = create(name, **given)
    except (RuntimeError, ValueError, AssertionError, ZeroDivisionError) as error:
        raise RunError(
            f"{arch} cannot be made for images of {side or own} px ({type(error).__name__}: {_one_line(error)}): it was "
            f"designed for {own} px; use another scale, or a network that takes any, such as timm/convnext_tiny"
        ) from error
    if exact and side is not None:
        _check_patches(arch, net, side)
    head = settings.classifier
    is_layer = isinstance(head, str) and isinstance(_submodule(net, head), (nn.Linear, nn.Conv2d))
    return Architecture(
        net=net,
        head=head if is_layer else None,
        mean=tuple(settings.mean),
        std=tuple(settings.std),
        exact=exact,
    )


def _check_patches(arch: str, net: nn.Module, side: int) -> None:
    """Raises RunError if patches do not cover the image: timm would leave out its right and lower edge."""
    patch = getattr(getattr(net, "patch_embed", None), "patch_size", None)
    if patch and side % max(patch):
        raise RunError(
            f"{arch} cuts images into patches of {max(patch)} px, which do not cover {side} px: use a scale that is a multiple of "
            f"{max(patch)}, or another network"
        )


def _submodule(net: nn.Module, name: str) -> nn.Module | None:
    try:
        return net.get_submodule(name)
    except AttributeError:
        return None


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]


# Weights


def _place(arch: str) -> tuple[str, str, str]:
    """Repository on the Hugging Face hub and URL of a network's weights, "" where there are none, and their own name."""
    settings = _settings(arch)
    name = f"{settings.architecture}.{settings.tag}" if settings.tag else settings.architecture
    if not (settings.hf_hub_id or settings.url):
        raise RunError(f"timm has no pretrained weights for {arch}: train from scratch with --weights none")
    return settings.hf_hub_id or "", settings.url or "", name


def cached_weights(arch: str) -> Path | None:
    """The file of pretrained weights in the cache of this machine; None if they were not downloaded yet."""
    repository, url, _ = _place(arch)
    if not repository:
        path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[1]
        return path if path.exists() else None
    from huggingface_hub import try_to_load_from_cache

    for file in FILES:
        if isinstance(found := try_to_load_from_cache(repository, file), str):
            return Path(found)
    return None


def fetch_timm(arch: str, to: Path | None = None) -> Path:
    """Download the pretrained weights that timm has for a network, unless they are here. Returns their path.

    `to`: folder for a copy, which `--weights FILE` takes on a machine without a network. Raises RunError without one.
    """
    repository, url, name = _place(arch)
    cached = cached_weights(arch) or _download(arch, repository, url, name)
    if to is None:
        return cached
    target = to / f"{name}{cached.suffix}"
    if not target.exists():
        to.mkdir(parents=True, exist_ok=True)
        with open(cached, "rb") as file, replacing(target) as copy:
            shutil.copyfileobj(file, copy)
    return target


def _download(arch: str, repository: str, url: str, name: str) -> Path:
    where = f"https://huggingface.co/{repository}" if repository else url
    try:
        if repository:
            return _from_hub(repository)
        target = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[1]
        target.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(target), progress=False)
        return target
    except Exception as error:  # the hub's client raises a dozen classes, among them httpx's
        raise RunError(
            f"pretrained weights for {arch} could not be downloaded from {where} ({type(error).__name__}: {_one_line(error)}). "
            f"On a machine with a network run `cxrfast fetch-weights --arch {arch} --to DIR`, copy DIR here and give --weights "
            f"DIR/{name}.safetensors; or train from scratch with --weights none"
        ) from error


def _from_hub(repository: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    for file in FILES[:-1]:
        try:
            return Path(hf_hub_download(repository, file))
        except LocalEntryNotFoundError:  # there is no network
            raise
        except EntryNotFoundError:
            continue
    return Path(hf_hub_download(repository, FILES[-1]))


def converted(arch: str, net: nn.Module, tensors: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    """Tensors of a file of timm's as `net` names and shapes them, position embeddings resampled to its size.

    Uses what timm itself converts with; a file that it cannot convert comes back as it is.
    """
    module = sys.modules[timm_module().models.model_entrypoint(check_name(arch).partition(".")[0]).__module__]
    convert = getattr(module, "checkpoint_filter_fn", None)
    if convert is None:
        return tensors
    try:
        result: Mapping[str, torch.Tensor] = convert(dict(tensors), net)
    except Exception:  # a file of another network: `load_weights` names the tensors that do not fit
        return tensors
    return result
