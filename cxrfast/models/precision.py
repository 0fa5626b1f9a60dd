"""Number formats and compilation of a training step."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from cxrfast.errors import RunError


def resolve_precision(precision: str, device: torch.device) -> str:
    """Resolve `auto`: bf16 where the hardware computes in it, else fp16 on a GPU and fp32 on a CPU.

    Raises RunError for tf32 on a CPU, where it would just be fp32.
    """
    if precision == "tf32" and device.type != "cuda":
        raise RunError("--precision tf32 works on NVIDIA GPUs only: use fp32, or --device cuda")
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    features: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()  # absent before torch 2.12
    return "bf16" if any(features.get(name) for name in ("avx512_bf16", "amx_bf16", "arm_bf16")) else "fp32"


def inference_precision(precision: str, device: torch.device) -> str:
    """The number format in which a trained network is computed: as `resolve_precision`, but tf32 is fp32 where there is none.

    A network that a GPU trained in tf32 answers on a CPU too, a little more exactly.
    """
    return "fp32" if precision == "tf32" and device.type != "cuda" else resolve_precision(precision, device)


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Context for a forward pass of that precision; see also `use_tf32` for tf32 and fp32."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    return torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)


def use_tf32(precision: str) -> None:
    """Let float32 convolutions and matrix products of this process use TF32 if `precision` is tf32, and only then.

    torch computes float32 convolutions in TF32 (10 bits of mantissa) by default, so that fp32 would not be float32 on a GPU.
    """
    # the older of torch's two settings: inductor reads it, and fails if the newer one was set
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Please use the new API settings to control TF32")
        torch.backends.cudnn.allow_tf32 = precision == "tf32"
        torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"


@contextmanager
def without_tf32() -> Iterator[None]:
    """Compute float32 exactly inside, on GPUs too; torch's settings are restored afterwards."""
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
