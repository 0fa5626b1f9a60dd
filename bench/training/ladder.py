"""`cxrfast bench ladder`: what each means of training faster is worth, one on top of the other, by scale.

A synthetic uint8 batch lies on the device; a step is forward pass, loss, backward pass and a fused Adam. Every rung of
the ladder is timed in turn with the others, and then has a process of its own that says how much memory its step takes,
how many images fit and where the time goes. A rung that fails costs its lines alone. Nothing is loaded here.
"""

import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure as Plot

from cxrfast.bench.harness import (
    Budget,
    Figure,
    announce,
    answer,
    in_own_process,
    least_seconds,
    no_time,
    provenance,
    write_results,
)
from cxrfast.bench.training.ladder_measure import ARCH, KINDS, ROUNDS, RUNGS, Rung, alone, pick_rungs, rates, rungs_of
from cxrfast.config import preset
from cxrfast.distributed import pick_device
from cxrfast.errors import RunError
from cxrfast.progress import progress
from cxrfast.tables import Section, to_markdown

SCALES = {"cuda": [256, 512, 1024, 2048], "cpu": [64, 128]}

START_SECONDS = 10.0
"""A process that trains takes about so long to start; for the plan alone."""

H200_BANDWIDTH = 4.8e12
"""Bytes/s, NVIDIA's data sheet."""
MOVED = {256: (841, 585), 512: (3_364, 2_340), 1024: (13_457, 9_362), 2048: (53_828, 37_447)}
"""MB that a step of densenet121 in bf16 moves an image, eager and at best compiled; computed, by scale."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """One rung at one scale; None for what was not, or could not be, measured."""

    scale: int
    rung: str
    """Its name."""
    micro_batch: int
    rounds: list[float] | None = None
    """Training, images/s."""
    ratio: float | None = None
    """To the first rung, round by round where they were timed in turn."""
    peak_bytes: int | None = None
    """During a step: of torch's allocator on a GPU, of the whole process on a CPU."""
    gpu_used_bytes: int | None = None
    """GPU memory in use after a step, as the driver reports it: all of the process, and other processes; None on a CPU."""
    saved_bytes: int | None = None
    """That autograd keeps between forward and backward for each image; of rungs that are not compiled."""
    largest: int | None = None
    """Micro-batch that fits, its double does not; on a GPU, of rungs that are not compiled."""
    bound: float | None = None
    """Rate / what an H200's memory bandwidth allows (MOVED); on an H200."""
    kinds: dict[str, float] | None = None
    """Device time of an image by kind of kernel, µs; at the largest scale, if asked for."""
    failed: str | None = None


@dataclass(frozen=True)
class Result:
    lines: list[Line]
    provenance: dict[str, Any]
    what: dict[str, str]
    """The rungs by name."""
    left_out: dict[str, str] = field(default_factory=dict)
    """What there was no time for, and what to do."""


def bench(
    scales: list[int],
    out: Path,
    *,
    seconds: float = 2.0,
    micro_batch: int | None = None,
    device: str = "auto",
    with_compile: bool = False,
    with_profile: bool = False,
    only: list[str] | None = None,
    minutes: float | None = None,
) -> Result:
    """Measure every rung at every scale, write ladder.json, ladder.md and ladder.png into `out`.

    `seconds` a figure and round. `micro_batch`: images of a step, by default the preset's of each scale.
    `with_compile`: the rungs of torch.compile, too. `with_profile`: time by kind of kernel at the largest scale.
    `only`: these rungs, and the first one, to which the ratios are. `minutes`: about so long; rates come first.
    Raises RunError if nothing could be measured, or for a rung that does not exist.
    """
    budget, chosen = Budget.of(minutes), pick_device(device)
    rungs = _chosen(only or [], with_compile, chosen)
    given = [
        {"scale": scale, "micro_batch": micro_batch or preset(scale).micro_batch, "device": device}
        for scale in sorted(scales or SCALES[chosen.type])
    ]
    _announce(given, rungs, chosen, seconds, minutes)
    out.mkdir(parents=True, exist_ok=True)
    lines, left_out = _all_rates(given, [rung.name for rung in rungs], seconds, budget)
    lines, missing = _all_extras(given, lines, with_profile, budget)
    if all(line.rounds is None for line in lines):
        reasons = [*(line.failed for line in lines), *left_out.values()]
        raise RunError(f"no rung could be measured; first: {reasons[0]}")
    origin = provenance(chosen)
    result = Result(
        [replace(line, bound=bound(line, origin["gpu"])) for line in lines],
        origin,
        {rung.name: rung.what for rung in rungs},
        left_out | missing,
    )
    write_results(out, "ladder", asdict(result), to_markdown(sections(result)), plot(result))
    return result


def _chosen(only: list[str], with_compile: bool, device: torch.device) -> list[Rung]:
    names = only or [rung.name for rung in rungs_of(device).values() if with_compile or not rung.compile]
    return pick_rungs([RUNGS[0].name, *names], device)


def _announce(
    given: list[dict[str, Any]], rungs: list[Rung], device: torch.device, seconds: float, minutes: float | None
) -> None:
    absent = [rung.name for rung in rungs_of(device).values() if rung not in rungs]
    processes = len(given) * (1 + len(rungs))
    announce(
        f"bench ladder: training steps of {ARCH} on a synthetic batch ({device.type})",
        minutes,
        processes * START_SECONDS + len(given) * len(rungs) * seconds * (ROUNDS + 1 / 4),
        "scales: " + ", ".join(f"{one['scale']} px × {one['micro_batch']} images" for one in given),
        f"rungs: {', '.join(rung.name for rung in rungs)}; ratios are to {RUNGS[0].name}, which is always measured",
        f"first the rates, {ROUNDS} rounds × {seconds:g} s each; then memory, one process per rung",
        *([f"left out: {', '.join(absent)} (--only NAME; --compile for compiled ones)"] if absent else []),
    )


def _all_rates(
    given: list[dict[str, Any]], rungs: list[str], seconds: float, budget: Budget
) -> tuple[list[Line], dict[str, str]]:
    """The lines of every scale that there was time for, with rates alone; and the other scales."""
    lines: list[Line] = []
    left_out: dict[str, str] = {}
    wall = 0.0
    for n, one in enumerate(given):
        least = [_least(lines[-len(rungs) :], wall, seconds, later) for later in given[n:]]
        share = budget.share(least)
        if share is None:
            left_out[f"{one['scale']} px"] = no_time(least[0], budget.left)
            continue
        begun = budget.clock()
        lines += _rates(one, rungs, seconds, share)
        wall = budget.clock() - begun
    return lines, left_out


def _least(lines: list[Line], wall: float, seconds: float, given: dict[str, Any]) -> float:
    """Seconds that the rates of a scale take at least, judging by the lines of another one; 0 if nothing is known."""
    timed = [line for line in lines if line.rounds]
    if not timed:
        return 0.0
    first = timed[0]
    growth = given["scale"] ** 2 * given["micro_batch"] / (first.scale**2 * first.micro_batch)
    steps = [line.micro_batch / Figure(line.rounds or []).median for line in timed]
    return least_seconds(wall, len(first.rounds or []), steps, seconds, growth)


def _rates(given: dict[str, Any], rungs: list[str], seconds: float, budget: Budget) -> list[Line]:
    """The lines of one scale: from one process that holds all rungs, or from one per rung if that one crashes."""
    lines = {rung: Line(scale=given["scale"], rung=rung, micro_batch=given["micro_batch"]) for rung in rungs}
    for together in (rungs, *([rung] for rung in rungs)):
        if any(lines[rung].rounds or lines[rung].failed for rung in together):
            continue
        try:
            with progress(f"{given['scale']} px", len(together) * (ROUNDS + 2), unit="figures") as advance:
                options = {"what": "rates", **given, "rungs": together, "seconds": seconds}
                found = in_own_process("cxrfast.bench.training.ladder", options, budget, advance)
        except (RunError, MemoryError) as error:
            if len(together) == 1 or not budget.left_of_all:
                lines |= {rung: replace(lines[rung], failed=str(error)) for rung in together}
        else:
            lines |= {rung: replace(lines[rung], **more) for rung, more in found.items()}
    base = lines[rungs[0]].rounds
    for rung, line in lines.items():
        if line.rounds and base:
            lines[rung] = replace(line, ratio=Figure(line.rounds).ratio(Figure(base)))
    return list(lines.values())


def _all_extras(
    given: list[dict[str, Any]], lines: list[Line], with_profile: bool, budget: Budget
) -> tuple[list[Line], dict[str, str]]:
    """The lines with memory, and with kernels at the last scale; and what there was no time for."""
    found: list[Line] = []
    missing: dict[str, list[str]] = {}
    took = 0.0
    largest = {one["scale"]: one["micro_batch"] for one in given}
    for line in lines:
        if line.rounds is None:
            found.append(line)
            continue
        if budget.left <= took:
            found.append(line)
            missing.setdefault(f"memory at {line.scale} px", []).append(line.rung)
            continue
        print(f"{line.scale} px: memory of {line.rung}", file=sys.stderr, flush=True)
        options = {
            **next(one for one in given if one["scale"] == line.scale),
            "what": "alone",
            "rung": line.rung,
            "start": largest[line.scale],
            "with_profile": with_profile and line.scale == given[-1]["scale"],
        }
        begun = budget.clock()
        try:
            more = in_own_process("cxrfast.bench.training.ladder", options, budget)
        except (RunError, MemoryError) as error:
            more = {"failed": str(error)}
        took = budget.clock() - begun
        largest[line.scale] = more.get("largest") or largest[line.scale]  # the next rung's is near it
        found.append(replace(line, **more))
    return found, {what: f"{', '.join(rungs)}: {no_time(took, budget.left)}" for what, rungs in missing.items()}


# Results


def bound(line: Line, gpu: str | None) -> float | None:
    """The rate as a share of what an H200's bandwidth allows for an eager or a compiled step in bf16."""
    if line.rounds is None or "H200" not in (gpu or "") or line.scale not in MOVED:
        return None
    eager, compiled = MOVED[line.scale]
    is_compiled = any(rung.compile for rung in RUNGS if rung.name == line.rung)
    moved = compiled if is_compiled else eager
    return Figure(line.rounds).median * moved * 1e6 / H200_BANDWIDTH


NOTES = {
    "images/s": "a training step of a batch that is on the device already: median of the rounds",
    "× first": "ratio to the first rung, round by round",
    "peak GiB": "of a step, in a process of its own: torch's allocator on a GPU, the whole process on a CPU",
    "GPU GiB": "in use after a step, as the driver reports it: the whole process, and other ones",
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
        "GPU GiB": [
            "-" if line.gpu_used_bytes is None else f"{line.gpu_used_bytes / 2**30:.2f}" for line in result.lines
        ],
        "saved MiB": ["-" if line.saved_bytes is None else f"{line.saved_bytes / 2**20:,.1f}" for line in result.lines],
        "largest": ["-" if line.largest is None else str(line.largest) for line in result.lines],
        "of H200": ["-" if line.bound is None else f"{line.bound:.2f}" for line in result.lines],
    }
    cells = {name: column for name, column in cells.items() if set(column) != {"-"}}
    notes = [f"{name}: {note}." for name, note in NOTES.items() if name in cells]
    failed = [f"{line.rung}, {line.scale} px: {line.failed}" for line in result.lines if line.failed]
    failed += [f"Left out: {what} ({why})." for what, why in result.left_out.items()]
    table = list(map(list, zip(*cells.values(), strict=True)))
    found = [Section(f"Ladder of training {ARCH} ({where})", list(cells), table, "\n".join(notes + failed))]
    found.append(Section("The rungs", ["rung", "what it does"], list(map(list, result.what.items())), ""))
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
    """Rates as ratios to the first rung's, one line per scale."""
    figure = Plot(figsize=(9, 4), layout="constrained")
    axes = figure.subplots()
    rungs = list(dict.fromkeys(line.rung for line in result.lines))
    for scale in dict.fromkeys(line.scale for line in result.lines):
        ratios = [line.ratio for line in result.lines if line.scale == scale]
        axes.plot(range(len(rungs)), [float("nan") if r is None else r for r in ratios], "o-", label=f"{scale} px")
    axes.set_xticks(range(len(rungs)), rungs, fontsize=8)
    axes.set(ylabel="training, images/s,\n× the first rung's", ylim=(0, None))
    axes.legend(frameon=False)
    return figure


if __name__ == "__main__":
    jobs: dict[str, Callable[..., Any]] = {"rates": rates, "alone": alone}
    answer(lambda what, **options: jobs[what](**options))
