"""Checks of gradients: loss and gradient on the device match float32 on the CPU, and compiled ones match eager ones.

A device, and a reader where images are needed, come in; each check returns what it measured, in words, or raises
RunError.
"""

import copy
import logging
import os
import shutil
import sysconfig
from collections.abc import Callable
from contextlib import ExitStack, closing, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchvision.models import DenseNet

from cxrfast.errors import RunError
from cxrfast.models.classifier import Classifier
from cxrfast.models.networks.densenet import lean
from cxrfast.models.precision import autocast, compiled, resolve_precision, use_tf32, without_tf32
from cxrfast.pipelines.loader import Loader
from cxrfast.pipelines.order import EvalOrder
from cxrfast.pipelines.reader import Reader
from cxrfast.training.loss import masked_bce_sum

ARCH = "densenet121"

LIMITS = {"fp32": (1e-4, 1e-3), "tf32": (2e-3, 0.1), "bf16": (1e-2, 0.5), "fp16": (1e-2, 0.5)}
"""By precision: tolerated relative errors of the loss and of the smooth network's gradient.

Measured on a CPU: 1e-6 and 1e-5 in fp32, 2e-3 and 0.2 in bf16; 2e-4 and 0.04 with operands rounded as in TF32.
"""

IMAGES = 8
"""Number of images whose gradients are compared; copies of fewer would leave BatchNorm nothing to normalise."""

SCALING = 1024
"""Factor of the loss in the backward pass, so that small gradients are not zero in fp16."""

SAME = 1e-3
"""Tolerated relative difference of gradients computed in two ways in float32."""


def gradients(reader: Reader, device: torch.device) -> str:
    """Losses and gradients of 8 images on the device agree with float32 on the CPU; see LIMITS.

    Gradients are taken of a network with smooth ReLUs: where rounding moves an input of a ReLU across zero, its
    gradient jumps, which puts float32 gradients of DenseNet121 1 to 4 % off float64 ones. On a CPU, activations are
    recomputed, and fp32 runs on one thread, so that it is not compared with itself.
    """
    gpu = device.type == "cuda"
    order = EvalOrder(rows=reader.rows[:IMAGES], micro_batch=IMAGES)
    side = 256 if gpu else 64  # at 32 px BatchNorm sees too few pixels for bf16 to be near float32
    with closing(Loader(reader, order, scale=side, engine="host")) as loader:
        image = next(iter(loader)).image
    precisions = ["fp32", "tf32"] if gpu else ["fp32"]
    if (lower := resolve_precision("auto", device)) != "fp32":
        precisions.append(lower)
    with without_tf32():
        expected = _loss_and_gradient(image, torch.device("cpu"), "fp32", recompute=False)
        measured, wrong = [], []
        for precision in precisions:
            with ExitStack() as stack:
                if precision == "fp32" and not gpu:
                    stack.callback(torch.set_num_threads, torch.get_num_threads())
                    torch.set_num_threads(1)
                found = _loss_and_gradient(image, device, precision, recompute=not gpu)
            errors, words = _errors(found, expected)
            measured.append(f"{precision}: {words}")
            if not all(error <= limit for error, limit in zip(errors, LIMITS[precision], strict=True)):
                wrong.append("{}: {} (at most {:g} and {:g})".format(precision, words, *LIMITS[precision]))
    if wrong:
        raise RunError(
            f"{'; '.join(wrong)} of float32 on the CPU: torch or a library under it computes wrongly on {device}"
        )
    return "; ".join(measured)


def _errors(found: tuple[float, torch.Tensor], expected: tuple[float, torch.Tensor]) -> tuple[tuple[float, float], str]:
    """Relative errors of loss and gradient, and the same in words."""
    errors = abs(found[0] / expected[0] - 1), relative_error(found[1], expected[1])
    return errors, f"loss off by {errors[0]:.0e}, gradient by {errors[1]:.0e}"


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm of `expected`; NaN if either is not finite."""
    return ((found - expected).norm() / expected.norm()).item()


def _loss_and_gradient(
    image: torch.Tensor, device: torch.device, precision: str, recompute: bool
) -> tuple[float, torch.Tensor]:
    """Loss of the real network, and gradient of the smooth one: float64 (parameters,) on the CPU. Same weights each time."""
    use_tf32(precision)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Classifier(ARCH, 14, recompute)
        target = torch.randint(0, 2, (len(image), 14)).float().to(device)
    image, mask = image.to(device), torch.ones_like(target, dtype=torch.bool)

    def loss_of(model: nn.Module) -> torch.Tensor:
        with autocast(device, precision):
            logits = model.to(device)(image)
        return masked_bce_sum(logits.float(), target, mask) / target.numel()

    with torch.no_grad():
        loss = loss_of(copy.deepcopy(model)).item()
    smooth = smoothed(model)
    (SCALING * loss_of(smooth)).backward()
    return loss, _gradient(smooth) / SCALING


def _gradient(model: nn.Module) -> torch.Tensor:
    """float64 (parameters,) on the CPU."""
    return torch.cat([p.grad.flatten().cpu().double() for p in model.parameters() if p.grad is not None])


def smoothed(model: nn.Module) -> nn.Module:
    """`model` itself with each ReLU module replaced by SiLU, which is close to it and smooth."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.ReLU):
                setattr(parent, name, nn.SiLU())
    return model


def tiny_network(device: torch.device) -> nn.Module:
    """A DenseNet with one of each part of a large one, in training mode, with the same weights each time."""
    use_tf32("fp32")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return lean(DenseNet(4, (1, 1), 8, num_classes=3)).to(device).to(memory_format=torch.channels_last)


def accumulated(
    model: nn.Module, micro_batches: int, unsynced: Callable[[], Any] = nullcontext
) -> tuple[float, torch.Tensor]:
    """Summed loss, and gradient float64 (parameters,) on the CPU, of micro-batches of 4 images of 32 px."""
    device, total = next(model.parameters()).device, 0.0
    for i in range(micro_batches):
        image = torch.rand((4, 3, 32, 32), generator=torch.Generator().manual_seed(i)).to(device)
        with nullcontext() if i == micro_batches - 1 else unsynced():
            loss = model(image.contiguous(memory_format=torch.channels_last)).square().sum()
            loss.backward()
        total += loss.item()
    return total, _gradient(model)


def compiled_step(device: torch.device) -> str:
    """Two accumulated micro-batches of a small DenseNet give the same loss and gradient compiled and eager."""
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it warns where there is no GPU
    with without_tf32():
        eager = accumulated(tiny_network(device), 2)
        errors, words = _errors(accumulated(compiled(tiny_network(device), "default"), 2), eager)
    if not max(errors) <= SAME:
        raise RunError(f"{words} when compiled (at most {SAME:g}): train without --compile")
    return f"{words} (at most {SAME:g})"


def no_compiler() -> str:
    """Why torch.compile cannot work here; empty if nothing is known to be missing."""
    compilers = [os.environ.get("CXX") or os.environ.get("CC"), "g++", "clang++", "gcc", "clang"]
    if not any(name and shutil.which(name) for name in compilers):
        return "no C++ compiler, so --compile cannot be used"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "Python's headers are not installed (Python.h), so --compile cannot be used"
    return ""
