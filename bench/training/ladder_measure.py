"""The measurements of `cxrfast bench ladder`: rungs, a scale and a micro-batch come in, rates and memory go out.

`rates` and `alone` each run in their own process, on a synthetic uint8 batch. Nothing is compared or loaded here.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torchvision
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from cxrfast.bench.harness import (
    Budget,
    gpu_used_bytes,
    interleave,
    limit_memory,
    no_time,
    peak_resident_bytes,
    rate,
    saved_bytes,
)
from cxrfast.bench.process import tell
from cxrfast.distributed import pick_device
from cxrfast.errors import RunError, is_out_of_memory
from cxrfast.labels import MIMIC
from cxrfast.models.classifier import Classifier, Normalise
from cxrfast.models.precision import autocast, compiled, resolve_precision, use_tf32
from cxrfast.training.loss import masked_bce_sum

ARCH = "densenet121"
ROUNDS = 5
PROFILED_STEPS = 3


@dataclass(frozen=True)
class Rung:
    """A way to train: the one before it plus one thing, except `recompute`, which trades time for memory."""

    name: str
    """Short, as typed after --only."""
    what: str
    precision: str = "auto"
    """An argument of `resolve_precision`."""
    channels_last: bool = True
    ours: bool = True
    """Our DenseNet, else torchvision's."""
    recompute: bool = False
    compile: str | None = None
    """Mode of torch.compile."""


RUNGS = (
    Rung("torchvision", "torchvision's, float32, NCHW, eager", precision="fp32", channels_last=False, ours=False),
    Rung("tf32", "+ TF32", precision="tf32", channels_last=False, ours=False),
    Rung("autocast", "+ autocast to bf16 or fp16", channels_last=False, ours=False),
    Rung("channels-last", "+ channels last", ours=False),
    Rung("ours", "+ our DenseNet"),
    Rung("recompute", "our DenseNet, activations computed again", recompute=True),
    Rung("compile", "our DenseNet, compiled", compile="default"),
    Rung("autotune", "our DenseNet, compiled, max-autotune-no-cudagraphs", compile="max-autotune-no-cudagraphs"),
)


def rungs_of(device: torch.device) -> dict[str, Rung]:
    """The rungs that exist on a device, by name."""
    return {rung.name: rung for rung in RUNGS if rung.precision != "tf32" or device.type == "cuda"}


def pick_rungs(names: list[str], device: torch.device) -> list[Rung]:
    """The rungs with these names, in the order of the ladder. Raises RunError for one that does not exist on the device."""
    known = rungs_of(device)
    for name in names:
        if name not in known:
            raise RunError(f"rung {name!r} does not exist on a {device.type} device: use one of {', '.join(known)}")
    return [rung for name, rung in known.items() if name in names]


class TorchvisionNet(nn.Module):
    """torchvision's DenseNet121 as users train it, after our normalisation: uint8 (N, 1, H, W) → logits (N, 14)."""

    def __init__(self, layout: torch.memory_format) -> None:
        super().__init__()
        self.layout, self.normalise = layout, Normalise()
        self.net = torchvision.models.get_model(ARCH, weights=None, num_classes=len(MIMIC))
        self.to(memory_format=layout)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.net(self.normalise(image).contiguous(memory_format=self.layout))


def make_net(rung: Rung, device: torch.device) -> nn.Module:
    """The rung's network in training mode, not compiled yet."""
    layout = torch.channels_last if rung.channels_last else torch.contiguous_format
    net: nn.Module = Classifier(ARCH, len(MIMIC), rung.recompute) if rung.ours else TorchvisionNet(layout)
    return net.to(device).train()


def make_step(rung: Rung, scale: int, micro_batch: int, device: torch.device) -> Callable[[], int]:
    """A training step that returns its number of images, `micro_batch`."""
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True  # as in training
    net = make_net(rung, device)
    forward = compiled(net, rung.compile) if rung.compile else net
    precision = resolve_precision(rung.precision, device)
    optimizer = torch.optim.Adam(net.parameters(), fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    image = torch.randint(0, 256, (micro_batch, 1, scale, scale), dtype=torch.uint8, device=device)
    target = torch.randint(0, 2, (micro_batch, len(MIMIC)), device=device).float()
    mask = torch.ones_like(target, dtype=torch.bool)

    def step() -> int:
        use_tf32(precision)  # a setting of the process, which all rungs share
        with autocast(device, precision):
            logits = forward(image)
        scaler.scale(masked_bce_sum(logits.float(), target, mask) / mask.numel()).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        return micro_batch

    return step


def rates(
    scale: int, micro_batch: int, device: str, rungs: list[str], seconds: float, budget: Budget
) -> dict[str, dict[str, Any]]:
    """Rung → its rounds, all timed in turns, or why it failed. No rung but the first starts after the budget's end."""
    where = pick_device(device)
    limit_memory(where)
    found: dict[str, dict[str, Any]] = {}
    steps: dict[str, Callable[[], int]] = {}
    for rung in pick_rungs(rungs, where):
        if steps and not budget.left:
            found[rung.name] = {"failed": no_time(0, 0)}
            continue
        try:
            steps[rung.name] = make_step(rung, scale, micro_batch, where)
            steps[rung.name]()  # compiles
        except torch.AcceleratorError:  # the device is lost to this process: one rung per process then
            raise
        except (RuntimeError, MemoryError) as error:
            steps.pop(rung.name, None)
            found[rung.name] = {"failed": ": ".join([type(error).__name__, *str(error).splitlines()[:1]])}
        tell(f"{rung.name}, first step")

    def turn(step: Callable[[], int], seconds: float) -> float:
        step()  # the rungs share one allocator: this one takes back what the last one had
        return rate(step, seconds, where)

    turns = {name: partial(turn, step) for name, step in steps.items()}
    figures = interleave(turns, seconds, ROUNDS, budget) if turns else {}
    return found | {name: {"rounds": figure.rounds} for name, figure in figures.items()}


def alone(
    scale: int, micro_batch: int, device: str, rung: str, start: int, with_profile: bool, budget: Budget
) -> dict[str, Any]:
    """Memory of a step, time by kind of kernel, and the largest micro-batch, searched for from `start`.

    There is no search after the budget's end, nor for compiled rungs, which would compile every size.
    """
    where = pick_device(device)
    limit_memory(where)
    is_gpu = where.type == "cuda"
    (climbed,) = pick_rungs([rung], where)
    step = make_step(climbed, scale, micro_batch, where)
    step()  # makes Adam's state, and compiles
    if is_gpu:
        torch.cuda.reset_peak_memory_stats(where)
    step()
    found: dict[str, Any] = {
        "peak_bytes": torch.cuda.max_memory_allocated(where) if is_gpu else peak_resident_bytes(),
        "gpu_used_bytes": gpu_used_bytes(where),
        "kinds": by_kind(step, where) if with_profile else None,
    }
    del step  # and its memory
    found["saved_bytes"] = None
    if not climbed.compile:
        with autocast(where, resolve_precision(climbed.precision, where)):  # without it nothing needs to be computed
            net = make_net(climbed, where if climbed.precision == "auto" else torch.device("meta"))
            found["saved_bytes"] = saved_bytes(net, scale)
    is_sought = is_gpu and not climbed.compile and budget.left > 0
    found["largest"] = largest(lambda n: make_step(climbed, scale, n, where), start) if is_sought else None
    return found


def largest(make: Callable[[int], Callable[[], int]], start: int) -> int | None:
    """The largest of start · 2^k images whose steps fit, for any integer k; None if none does."""

    def fits(images: int) -> bool:
        torch.cuda.empty_cache()
        try:
            step = make(images)
            step()
            step()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return False
        return True

    size = start
    while size and not fits(size):
        size //= 2
    while size >= start and fits(2 * size):
        size *= 2
    return size or None


# Kinds of kernels

KINDS = {
    "copy": r"^(?!triton).*(memcpy|copy|nchwtonhwc|nhwctonchw|converttensor|catarray|::cat$)",
    "convolution": r"^triton_tem|^(?!triton).*(conv|gemm|cutlass|xmma|wgrad|dgrad|winograd|nvjet|::addmm|::mm$)",
    "batch norm": r"batch_?norm|bn_(fw|bw)",
    "elementwise": r"elementwise|vectorized|relu|threshold|clamp|::(add|mul|div|sub)_?$|triton",
}
"""Kind → pattern of lower-case names of kernels (GPU) and operations (CPU); the first match counts.

Triton names a kernel after everything fused in it: a batch norm with what goes before and after, else elementwise;
`triton_tem` are its templates of convolutions and matrix products.
"""


def kind(name: str) -> str:
    """One of KINDS, or `other`: pooling, reductions, the optimiser."""
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name.lower())), "other")


def by_kind(step: Callable[[], int], device: torch.device) -> dict[str, float]:
    """Device time of each kind, µs per image."""
    is_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if is_gpu else ProfilerActivity.CPU]) as found:
        images = sum(step() for _ in range(PROFILED_STEPS))
        if is_gpu:
            torch.cuda.synchronize(device)
    times = dict.fromkeys((*KINDS, "other"), 0.0)
    for event in found.key_averages():
        if is_gpu == (event.device_type == DeviceType.CUDA):
            times[kind(event.key)] += (event.self_device_time_total if is_gpu else event.self_cpu_time_total) / images
    return times
