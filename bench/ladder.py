"""`cxrfast bench ladder`: what each means of training faster is worth, one on top of the other, by scale.

A synthetic uint8 batch lies on the device; a step is forward pass, loss, backward pass and a fused Adam. Every rung of
the ladder is timed in turn with the others, and then has a process of its own that says how much memory its step takes,
how many images fit and where the time goes. A rung that fails costs its lines alone. Nothing is loaded here.
"""

import re
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torchvision
from matplotlib.figure import Figure as Plot
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from cxrfast.bench.harness import (
    Figure,
    answer,
    in_own_process,
    limit_memory,
    peak_resident_bytes,
    provenance,
    rate,
    take_turns,
    write_results,
)
from cxrfast.bench.tables import Section, to_markdown
from cxrfast.config import preset
from cxrfast.densenet import saved_bytes
from cxrfast.distributed import pick_device
from cxrfast.errors import RunError
from cxrfast.labels import MIMIC
from cxrfast.model import Classifier, Normalise, autocast, resolve_precision
from cxrfast.trainer import masked_bce_sum

ARCH = "densenet121"
ROUNDS = 5
SCALES = {"cuda": [256, 512, 1024, 2048], "cpu": [64, 128]}
PROFILED_STEPS = 3

H200_BANDWIDTH = 4.8e12
"""Bytes/s, NVIDIA's data sheet."""
MOVED = {256: (841, 585), 512: (3_364, 2_340), 1024: (13_457, 9_362), 2048: (53_828, 37_447)}
"""MB that a step of densenet121 in bf16 moves an image, eager and at best compiled; computed, by scale."""


@dataclass(frozen=True)
class Rung:
    """A way to train: its predecessor's and one thing more, but for checkpointing, which trades time for memory."""

    name: str
    amp: bool = True
    """Autocast to what `resolve_precision` gives for the device, else fp32."""
    channels_last: bool = True
    ours: bool = True
    """Our DenseNet, else torchvision's."""
    checkpoint: bool = False
    compile: str | None = None
    """Mode of torch.compile."""


RUNGS = (
    Rung("torchvision, fp32, NCHW, eager", amp=False, channels_last=False, ours=False),
    Rung("+ autocast", channels_last=False, ours=False),
    Rung("+ channels last", ours=False),
    Rung("+ our DenseNet"),
    Rung("our DenseNet, checkpointing", checkpoint=True),
    Rung("our DenseNet, compiled", compile="default"),
    Rung("our DenseNet, compiled, max-autotune", compile="max-autotune"),
)


@dataclass(frozen=True, kw_only=True)
class Line:
    """One rung at one scale; None for what was not, or could not be, measured."""

    scale: int
    rung: str
    micro_batch: int
    rounds: list[float] | None = None
    """Training, images/s."""
    ratio: float | None = None
    """To the first rung, round by round where they were timed in turn."""
    peak_bytes: int | None = None
    """During a step: of torch's allocator on a GPU, of the whole process on a CPU."""
    saved_bytes: int | None = None
    """That autograd keeps between forward and backward for each image; of rungs that are not compiled."""
    largest: int | None = None
    """Micro-batch that fits, its double does not; on a GPU."""
    bound: float | None = None
    """Rate / what an H200's memory bandwidth allows (MOVED); on an H200."""
    kinds: dict[str, float] | None = None
    """Device time of an image by kind of kernel, µs; at the largest scale, if asked for."""
    failed: str | None = None


@dataclass(frozen=True)
class Result:
    lines: list[Line]
    provenance: dict[str, Any]


def bench(
    scales: list[int],
    out: Path,
    *,
    seconds: float = 2.0,
    micro_batch: int | None = None,
    device: str = "auto",
    with_compile: bool = False,
    with_profile: bool = False,
) -> Result:
    """Measure every rung at every scale, write ladder.json, ladder.md and ladder.png into `out`.

    `seconds` a figure and round. `micro_batch`: images of a step, by default the preset's of each scale.
    `with_compile`: the rungs of torch.compile, too. `with_profile`: time by kind of kernel at the largest scale.
    Raises RunError if nothing could be measured.
    """
    chosen = pick_device(device)
    scales = sorted(scales or SCALES[chosen.type])
    rungs = [rung.name for rung in RUNGS if with_compile or not rung.compile]
    out.mkdir(parents=True, exist_ok=True)
    lines: list[Line] = []
    for scale in scales:
        given = {"scale": scale, "micro_batch": micro_batch or preset(scale).micro_batch, "device": device}
        lines += _at_scale(given, rungs, seconds, with_profile and scale == scales[-1])
    if all(line.rounds is None for line in lines):
        raise RunError(f"no rung could be measured; first: {lines[0].failed}")
    origin = provenance(chosen)
    result = Result([replace(line, bound=bound(line, origin["gpu"])) for line in lines], origin)
    write_results(out, "ladder", asdict(result), to_markdown(sections(result)), plot(result))
    return result


def _at_scale(given: dict[str, Any], rungs: list[str], seconds: float, with_profile: bool) -> list[Line]:
    """The lines of one scale: rates from one process that holds all rungs, or from one a rung if that one crashes."""
    lines = {rung: Line(scale=given["scale"], rung=rung, micro_batch=given["micro_batch"]) for rung in rungs}
    for together in (rungs, *([rung] for rung in rungs)):
        if any(lines[rung].rounds or lines[rung].failed for rung in together):
            continue
        try:
            found = _job("rates", given, rungs=together, seconds=seconds)
        except (RunError, MemoryError) as error:
            if len(together) == 1:
                lines[together[0]] = replace(lines[together[0]], failed=str(error))
        else:
            lines |= {rung: replace(lines[rung], **more) for rung, more in found.items()}
    base = lines[rungs[0]].rounds
    largest = given["micro_batch"]
    for rung, line in lines.items():
        if line.rounds is None:
            continue
        try:
            more = _job("alone", given, rung=rung, start=largest, with_profile=with_profile)
        except (RunError, MemoryError) as error:
            more = {"failed": str(error)}
        largest = more.get("largest") or largest  # the next rung's is near it
        ratio = Figure(line.rounds).ratio(Figure(base)) if base else None
        lines[rung] = replace(line, ratio=ratio, **more)
    return list(lines.values())


def _job(what: str, given: dict[str, Any], **more: Any) -> Any:
    print(f"{given['scale']} px: {more.get('rung', 'rates')}", file=sys.stderr, flush=True)
    return in_own_process("cxrfast.bench.ladder", {"what": what, **given, **more})


# In a process of their own


class Peer(nn.Module):
    """torchvision's DenseNet121 as users train it, behind our normalisation: uint8 (N, 1, H, W) → logits (N, 14)."""

    def __init__(self, layout: torch.memory_format) -> None:
        super().__init__()
        self.layout, self.normalise = layout, Normalise()
        self.net = torchvision.models.get_model(ARCH, weights=None, num_classes=len(MIMIC))
        self.to(memory_format=layout)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.net(self.normalise(image).contiguous(memory_format=self.layout))


def make_net(rung: Rung, device: torch.device) -> nn.Module:
    """In training mode, not compiled yet."""
    layout = torch.channels_last if rung.channels_last else torch.contiguous_format
    net: nn.Module = Classifier(ARCH, len(MIMIC), rung.checkpoint) if rung.ours else Peer(layout)
    return net.to(device).train()


def precision_of(rung: Rung, device: torch.device) -> str:
    return resolve_precision("auto" if rung.amp else "fp32", device)


def make_step(rung: Rung, scale: int, micro_batch: int, device: torch.device) -> Callable[[], int]:
    """A training step of `micro_batch` images, which it returns."""
    torch.manual_seed(0)
    net = make_net(rung, device)
    forward = torch.compile(net, mode=rung.compile, dynamic=False) if rung.compile else net
    precision = precision_of(rung, device)
    optimizer = torch.optim.Adam(net.parameters(), fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    image = torch.randint(0, 256, (micro_batch, 1, scale, scale), dtype=torch.uint8, device=device)
    target = torch.randint(0, 2, (micro_batch, len(MIMIC)), device=device).float()
    mask = torch.ones_like(target, dtype=torch.bool)

    def step() -> int:
        with autocast(device, precision):
            logits = forward(image)
        scaler.scale(masked_bce_sum(logits.float(), target, mask) / mask.numel()).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        return micro_batch

    return step


def rates(scale: int, micro_batch: int, device: str, rungs: list[str], seconds: float) -> dict[str, dict[str, Any]]:
    """Rung → its rounds, all timed in turn, or why it failed."""
    where, found, steps = pick_device(device), {}, {}
    limit_memory(where)
    for rung in RUNGS:
        if rung.name in rungs:
            try:
                steps[rung.name] = make_step(rung, scale, micro_batch, where)
                steps[rung.name]()  # compiles
            except torch.AcceleratorError:  # the device is lost to this process: one a rung then
                raise
            except (RuntimeError, MemoryError) as error:
                steps.pop(rung.name, None)
                found[rung.name] = {"failed": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
    turns = {name: lambda seconds, step=step: rate(step, seconds, where) for name, step in steps.items()}
    figures = take_turns(f"{scale} px", turns, seconds, ROUNDS) if turns else {}
    return found | {name: {"rounds": figure.rounds} for name, figure in figures.items()}


def alone(
    scale: int, micro_batch: int, device: str, rung: str, start: int, with_profile: bool
) -> dict[str, int | dict[str, float] | None]:
    """Memory of a step, time by kind of kernel, and the largest micro-batch, sought from `start` on."""
    where = pick_device(device)
    limit_memory(where)
    is_gpu = where.type == "cuda"
    climbed = next(r for r in RUNGS if r.name == rung)
    step = make_step(climbed, scale, micro_batch, where)
    step()  # makes Adam's state, and compiles
    if is_gpu:
        torch.cuda.reset_peak_memory_stats(where)
    step()
    peak = torch.cuda.max_memory_allocated(where) if is_gpu else peak_resident_bytes()
    kinds = by_kind(step, where) if with_profile else None
    del step  # and its memory
    saved = None if climbed.compile else saved_by(climbed, scale, where)
    fitting = largest(lambda n: make_step(climbed, scale, n, where), start) if is_gpu else None
    return {"peak_bytes": peak, "saved_bytes": saved, "kinds": kinds, "largest": fitting}


def saved_by(rung: Rung, scale: int, device: torch.device) -> int:
    """Bytes an image that autograd keeps; without autocast, which needs real tensors, nothing is computed."""
    with autocast(device, precision_of(rung, device)):
        return saved_bytes(make_net(rung, device if rung.amp else torch.device("meta")), scale)


def largest(make: Callable[[int], Callable[[], int]], start: int) -> int | None:
    """The largest of start · 2^k images whose steps fit, k any integer; None if not one does."""

    def fits(images: int) -> bool:
        torch.compiler.reset()  # CUDA graphs hold memory
        torch.cuda.empty_cache()
        try:
            step = make(images)
            step()
            step()
        except torch.OutOfMemoryError:
            return False
        return True

    size = start
    if fits(size):
        while fits(2 * size):
            size *= 2
        return size
    while size > 1:
        size //= 2
        if fits(size):
            return size
    return None


# Kinds of kernels

KINDS = {
    "copy": r"^(?!triton).*(memcpy|copy|nchwtonhwc|nhwctonchw|converttensor|catarray|::cat$)",
    "convolution": r"^triton_tem|^(?!triton).*(conv|gemm|cutlass|xmma|wgrad|dgrad|winograd|nvjet|::addmm|::mm$)",
    "batch norm": r"batch_?norm|bn_(fw|bw)",
    "elementwise": r"elementwise|vectorized|relu|threshold|clamp|::(add|mul|div|sub)_?$|triton",
}
"""Kind → pattern of names of kernels (GPU) and operations (CPU), in lower case; the first that is found counts.

Triton's kernels are named after all that was fused in them: a batch norm, with what goes before and after, or else
elementwise; but for `triton_tem`, the templates of convolutions and matrix products.
"""


def kind(name: str) -> str:
    """Of KINDS, or `other`: pooling, reductions, the optimiser."""
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name.lower())), "other")


def by_kind(step: Callable[[], int], device: torch.device) -> dict[str, float]:
    """µs an image, on the device, of each kind."""
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


# Results


def bound(line: Line, gpu: str | None) -> float | None:
    """The rate as a share of what an H200's bandwidth allows for an eager or a compiled step in bf16."""
    if line.rounds is None or "H200" not in (gpu or "") or line.scale not in MOVED:
        return None
    eager, compiled = MOVED[line.scale]
    moved = compiled if "compiled" in line.rung else eager
    return Figure(line.rounds).median * moved * 1e6 / H200_BANDWIDTH


NOTES = {
    "images/s": "a training step of a batch that is on the device already: median of the rounds",
    "× first": "ratio to the first rung, round by round",
    "peak GiB": "of a step, in a process of its own: torch's allocator on a GPU, the whole process on a CPU",
    "saved MiB": "an image: what autograd keeps between forward and backward",
    "largest": "micro-batch that fits, and its double does not",
    "of H200": f"rate / {H200_BANDWIDTH / 1e12} TB/s over the bytes that an eager or a compiled step in bf16 moves",
}


def sections(result: Result) -> list[Section]:
    """Rates and memory of every rung; time by kind of kernel where it was taken."""
    where = result.provenance["gpu"] or f"{result.provenance['processor']}, {result.provenance['cores']} cores"
    cells = {
        "rung": [line.rung for line in result.lines],
        "px": [str(line.scale) for line in result.lines],
        "micro-batch": [str(line.micro_batch) for line in result.lines],
        "images/s": ["-" if line.rounds is None else f"{Figure(line.rounds).median:,.1f}" for line in result.lines],
        "× first": ["-" if line.ratio is None else f"{line.ratio:.2f}" for line in result.lines],
        "peak GiB": ["-" if line.peak_bytes is None else f"{line.peak_bytes / 2**30:.2f}" for line in result.lines],
        "saved MiB": ["-" if line.saved_bytes is None else f"{line.saved_bytes / 2**20:,.1f}" for line in result.lines],
        "largest": ["-" if line.largest is None else str(line.largest) for line in result.lines],
        "of H200": ["-" if line.bound is None else f"{line.bound:.2f}" for line in result.lines],
    }
    cells = {name: column for name, column in cells.items() if set(column) != {"-"}}
    notes = [f"{name}: {note}." for name, note in NOTES.items() if name in cells]
    failed = [f"{line.rung}, {line.scale} px: {line.failed}" for line in result.lines if line.failed]
    table = list(map(list, zip(*cells.values(), strict=True)))
    found = [Section(f"Ladder of training {ARCH} ({where})", list(cells), table, "\n".join(notes + failed))]
    profiled = [(line.rung, line.kinds) for line in result.lines if line.kinds]
    if profiled:
        kinds = [*KINDS, "other"]
        times = [[rung, *(f"{found[name]:,.0f}" for name in kinds)] for rung, found in profiled]
        title = f"Time by kind of kernel, µs an image, at {result.lines[-1].scale} px"
        found.append(
            Section(title, ["rung", *kinds], times, "Summed over kernels, which may overlap; Triton's: see KINDS.")
        )
    return found


def plot(result: Result) -> Plot:
    """Rates as ratios to the first rung's, a line a scale."""
    figure = Plot(figsize=(9, 4), layout="constrained")
    axes = figure.subplots()
    rungs = list(dict.fromkeys(line.rung for line in result.lines))
    for scale in dict.fromkeys(line.scale for line in result.lines):
        ratios = [line.ratio for line in result.lines if line.scale == scale]
        axes.plot(range(len(rungs)), [float("nan") if r is None else r for r in ratios], "o-", label=f"{scale} px")
    axes.set_xticks(range(len(rungs)), [rung.replace(", ", "\n") for rung in rungs], fontsize=8)
    axes.set(ylabel="training, images/s,\n× the first rung's", ylim=(0, None))
    axes.legend(frameon=False)
    return figure


if __name__ == "__main__":
    jobs: dict[str, Callable[..., Any]] = {"rates": rates, "alone": alone}
    answer(lambda what, **options: jobs[what](**options))
