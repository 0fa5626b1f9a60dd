"""The classifier: a uint8 grey batch in, logits out. Normalisation is its first layer and part of every checkpoint."""

import copy
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torchvision
from safetensors.torch import load_file
from torch import nn

from cxrfast.errors import RunError
from cxrfast.models.densenet import SHAPES, DenseNet

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet, as torchvision's weights expect."""

SMALL = 64
"""Side in px from which on no convolutional classifier runs out of pixels; smaller images are tried at their size."""


class Normalise(nn.Module):
    """uint8 (N, 1, H, W) → float32 (N, 3, H, W), channels last: scaled to [0, 1], copied to three channels, normalised."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(STD).view(1, 3, 1, 1))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        grey = image.to(torch.float32) / 255
        return ((grey - self.mean) / self.std).contiguous(memory_format=torch.channels_last)


def check_arch(arch: str) -> None:
    if arch not in torchvision.models.list_models(module=torchvision.models):
        raise RunError(f"architecture {arch!r} is unknown: use a torchvision classifier (densenet121, resnet50, …)")


class Classifier(nn.Module):
    """`normalise`, then a torchvision classifier `net` with one logit a finding: float (N, L).

    The DenseNets are ours, which are torchvision's but for what they keep in memory. `checkpoint` has them keep less
    still, for more time. Raises RunError for an unknown architecture, and for one that `checkpoint` is unknown to.
    """

    def __init__(self, arch: str, outputs: int, checkpoint: bool = False) -> None:
        super().__init__()
        check_arch(arch)
        if checkpoint and arch not in SHAPES:
            raise RunError(f"{arch} knows no activation checkpointing: use {', '.join(SHAPES)}, or train without it")
        self.arch = arch
        self.normalise = Normalise()
        self.net = (
            DenseNet(SHAPES[arch], outputs, checkpoint)
            if arch in SHAPES
            else torchvision.models.get_model(arch, weights=None, num_classes=outputs)
        )
        self.to(memory_format=torch.channels_last)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.net(self.normalise(image))

    def check_size(self, side: int) -> None:
        """Raises RunError if images of `side` px are too small for the network, or if it takes no size but its own."""
        trial = copy.deepcopy(self).train()  # a copy, since a forward pass moves BatchNorm's statistics
        try:
            with torch.no_grad():
                logits = trial(torch.zeros((2, 1, min(side, SMALL), min(side, SMALL)), dtype=torch.uint8))
        except (RuntimeError, ValueError, AssertionError) as error:
            raise RunError(
                f"{self.arch} cannot be trained on images of {side} px: use a convolutional classifier such as "
                "densenet121 or resnet50, and a scale of 32 px or more"
            ) from error
        if not isinstance(logits, torch.Tensor):
            raise RunError(f"{self.arch} has more outputs than its logits: use another classifier")

    @property
    def feature_layers(self) -> nn.Module:
        """The layers whose output is the last convolutional feature map, (N, C, h, w)."""
        if hasattr(self.net, "features") and not self.arch.startswith("swin"):  # those put channels last
            return self.net.features
        if hasattr(self.net, "layer4"):
            layers = list(self.net.children())
            return nn.Sequential(*layers[: layers.index(self.net.layer4) + 1])
        raise RunError(f"no last feature map is known for {self.arch}")


# Weights


def imagenet_file(arch: str) -> tuple[str, Path]:
    """Address of torchvision's ImageNet weights and where torch keeps them on this machine."""
    check_arch(arch)
    url = str(torchvision.models.get_model_weights(arch).DEFAULT.url)
    return url, Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[1]


def fetch_weights(arch: str, to: Path | None = None) -> Path:
    """Download torchvision's ImageNet weights, checked against the hash in their name; kept ones are not fetched again.

    Raises RunError without a network, naming what to do.
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


def load_weights(model: Classifier, weights: str) -> None:
    """Fill `model` from `imagenet`, `none`, a .pth or .safetensors file, or the folder of a run.

    The last layer is kept random where the file has another number of outputs. Raises RunError for a file that is no
    checkpoint of this architecture.
    """
    if weights == "none":
        return
    path = fetch_weights(model.arch) if weights == "imagenet" else Path(weights)
    if path.is_dir():
        path = path / "best.safetensors"
    if not path.exists():
        raise RunError(
            f"--weights {weights}: {path} does not exist; use imagenet, none, a .pth or .safetensors file, or a run"
        )
    try:
        given = (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
        given = {_modern(name): tensor for name, tensor in given.items()}
    except Exception as error:  # torch and safetensors raise half a dozen unrelated classes for files that are none
        raise RunError(f"--weights {weights}: {path} is no checkpoint ({type(error).__name__})") from error
    own = model.state_dict()
    usable = {name: tensor for name, tensor in given.items() if name in own and own[name].shape == tensor.shape}
    # older files have no num_batches_tracked, which nothing reads
    optional = ("normalise.", "num_batches_tracked")
    missing = [
        name
        for name in own
        if name not in usable and not name.startswith(optional[0]) and not name.endswith(optional[1])
    ]
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


# Precision


def resolve_precision(precision: str, device: torch.device) -> str:
    """`auto` → bf16 where the hardware computes in it, else fp16 on a GPU and fp32 on a CPU.

    Raises RunError for tf32 on a CPU, which would be fp32 under another name.
    """
    if precision == "tf32" and device.type != "cuda":
        raise RunError("--precision tf32 works on NVIDIA GPUs only: use fp32, or --device cuda")
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    features: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()  # absent before torch 2.12
    return "bf16" if any(features.get(name) for name in ("avx512_bf16", "amx_bf16", "arm_bf16")) else "fp32"


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context in which a forward pass of that precision runs; for tf32 and fp32 see `use_tf32`, too."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    return torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)


def use_tf32(precision: str) -> None:
    """Let float32 convolutions and matrix products of this process use TF32 if `precision` is tf32, and only then.

    torch computes float32 convolutions in TF32 (10 bits of mantissa) by default, so that fp32 would not be float32 on a GPU.
    """
    # the older of torch's two settings: inductor reads it, and fails where the newer one was set
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Please use the new API settings to control TF32")
        torch.backends.cudnn.allow_tf32 = precision == "tf32"
        torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"


@contextmanager
def without_tf32() -> Iterator[None]:
    """Float32 means float32 in here, on GPUs too; afterwards torch's settings are as they were."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    use_tf32("fp32")
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def compiled(module: nn.Module, mode: str) -> nn.Module:
    """`module` under torch.compile, for inputs of one shape; `mode` is one of `config.COMPILE_MODES`."""
    if mode.startswith("max-autotune"):
        torch._inductor.config.conv_1x1_as_mm = True  # two thirds of DenseNet's convolutions are matrix products
    return torch.compile(module, mode=mode, dynamic=False)  # type: ignore[return-value]
