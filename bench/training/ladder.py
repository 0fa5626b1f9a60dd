"""`cxrfast bench ladder`: the effect of each way to speed up training, added one by one, by scale.

A synthetic uint8 batch is on the device; a step is forward pass, loss, backward pass and a fused Adam. The rungs of
the ladder are timed in turns. Then each gets its own process, which measures how much memory its step takes, how
many images fit and where the time goes. A rung that fails costs its own lines only. Nothing is loaded here.
"""

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from cxrfast.bench.harness import Budget, Measured, announce, in_time, measure_elsewhere, no_time, provenance
from cxrfast.bench.report import Column, left_out_notes, table, where, write_results
from cxrfast.bench.training.ladder_measure import ARCH, KINDS, ROUNDS, RUNGS, Rung, alone, pick_rungs, rates, rungs_of
from cxrfast.config import preset
from cxrfast.distributed import pick_device
from cxrfast.errors import RunError
from cxrfast.tables import Table

log = logging.getLogger(__name__)

SCALES = {"cuda": [256, 512, 1024, 2048], "cpu": [64, 128]}

START_SECONDS = 10.0
"""Time a process that trains takes to start, roughly; used for the plan only."""


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
) -> "LadderResult":
    """Measure every rung at every scale, write ladder.json, ladder.md and ladder.png into `out`.

    `seconds`: per figure and round. `micro_batch`: images per step, by default the preset's of each scale.
    `with_compile`: include the rungs of torch.compile. `with_profile`: time by kind of kernel at the largest scale.
    `only`: these rungs, and the first one, which the ratios refer to. `minutes`: about how long; rates come first.
    Raises RunError if nothing could be measured, or for a rung that does not exist.
    """
    budget, chosen = Budget.of(minutes), pick_device(device)
    names = only or [rung.name for rung in rungs_of(chosen).values() if with_compile or not rung.compile]
    rungs = pick_rungs([RUNGS[0].name, *names], chosen)
    given = [
        {"scale": scale, "micro_batch": micro_batch or preset(scale).micro_batch, "device": device}
        for scale in sorted(scales or SCALES[chosen.type])
    ]
    _announce(given, rungs, chosen, seconds, minutes)
    out.mkdir(parents=True, exist_ok=True)
    result = LadderResult([], provenance(chosen), {rung.name: rung.what for rung in rungs})
    _measure_rates(given, [rung.name for rung in rungs], seconds, result, budget)
    _measure_alone(given, with_profile, result, budget)
    if not any(line["rounds"] for line in result.lines):
        reasons = [*(line["failed"] for line in result.lines), *result.left_out.values()]
        raise RunError(f"no rung could be measured; first: {reasons[0]}")
    for line in result.lines:
        line["bound"] = bound(line, result.provenance["gpu"])
    write_results(out, "ladder", result)
    return result


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
        f"rungs: {', '.join(rung.name for rung in rungs)}; ratios refer to {RUNGS[0].name}, which is always measured",
        f"first the rates, {ROUNDS} rounds × {seconds:g} s each; then memory, one process per rung",
        *([f"left out: {', '.join(absent)} (--only NAME; --compile for compiled ones)"] if absent else []),
    )


def _measure_rates(
    given: list[dict[str, Any]], rungs: list[str], seconds: float, result: "LadderResult", budget: Budget
) -> None:
    """Add to `result` the lines of every scale that there is time for, with rates alone, and name the other scales."""

    def work(one: dict[str, Any], share: Budget) -> list[list[float]] | None:
        found = _rates(one, rungs, seconds, share)
        result.lines.extend(found)
        return [line["rounds"] for line in found if line["rounds"]] or None

    pieces = {f"{one['scale']} px": (one["scale"], one["micro_batch"], one) for one in given}
    in_time(pieces, work, budget, result.left_out, seconds)


def _rates(given: dict[str, Any], rungs: list[str], seconds: float, budget: Budget) -> list[dict[str, Any]]:
    """The lines of one scale: from one process that holds all rungs, or from one per rung if that one crashes."""
    scale, micro_batch = given["scale"], given["micro_batch"]
    lines = {rung: dict.fromkeys(LINE) | {"scale": scale, "rung": rung, "micro_batch": micro_batch} for rung in rungs}
    for together in (rungs, *([rung] for rung in rungs)):
        if any(lines[rung]["rounds"] or lines[rung]["failed"] for rung in together):
            continue
        try:
            options = {**given, "rungs": together, "seconds": seconds}
            found = measure_elsewhere(rates, options, budget, f"{scale} px", len(together) * (ROUNDS + 2))
        except (RunError, MemoryError) as error:
            if len(together) > 1 and budget.left_of_all:
                continue
            found = {rung: {"failed": str(error)} for rung in together}
        for rung, more in found.items():
            lines[rung] |= more
    base = lines[rungs[0]]["rounds"]
    for line in lines.values():
        if line["rounds"] and base:
            line["ratio"] = Measured(line["rounds"]).ratio(Measured(base))
    return list(lines.values())


def _measure_alone(given: list[dict[str, Any]], with_profile: bool, result: "LadderResult", budget: Budget) -> None:
    """Add memory to the lines that have a rate, and kernels at the last scale; name what there was no time for."""
    missing: dict[str, list[str]] = {}
    took = 0.0
    largest = {one["scale"]: one["micro_batch"] for one in given}
    for line in (line for line in result.lines if line["rounds"]):
        scale, rung = line["scale"], line["rung"]
        if budget.left <= took:
            missing.setdefault(f"memory at {scale} px", []).append(rung)
            continue
        log.info(f"{scale} px: memory of {rung}")
        options = {
            **next(one for one in given if one["scale"] == scale),
            "rung": rung,
            "start": largest[scale],
            "with_profile": with_profile and scale == given[-1]["scale"],
        }
        start = budget.clock()
        try:
            line |= measure_elsewhere(alone, options, budget)
        except (RunError, MemoryError) as error:
            line["failed"] = str(error)
        took = budget.clock() - start
        largest[scale] = line["largest"] or largest[scale]  # the next rung's is near it
    result.left_out.update(
        {what: f"{', '.join(rungs)}: {no_time(took, budget.left)}" for what, rungs in missing.items()}
    )


# Results


H200_BANDWIDTH = 4.8e12
"""Bytes/s, NVIDIA's data sheet."""


MOVED = {256: (841, 585), 512: (3_364, 2_340), 1024: (13_457, 9_362), 2048: (53_828, 37_447)}
"""MB per image that a step of densenet121 in bf16 moves, eager and at best compiled; computed, by scale."""


LINE = (
    "scale",
    "rung",
    "micro_batch",
    "rounds",  # training, images/s
    "ratio",  # rate / the first rung's, round by round where they took turns
    "peak_bytes",
    "gpu_used_bytes",
    "saved_bytes",  # only of rungs that are not compiled
    "largest",  # on a GPU, of rungs that are not compiled
    "bound",  # rate / what an H200's memory bandwidth allows (MOVED); on an H200
    "kinds",  # device time by kind of kernel, µs per image; at the largest scale, with --profile
    "failed",
)
"""Keys of a line, which is one rung at one scale; None for what was not, or could not be, measured. See COLUMNS."""


def rate(line: dict[str, Any]) -> float | None:
    """Median of the rounds, images/s."""
    return Measured(line["rounds"]).median if line["rounds"] else None


def bound(line: dict[str, Any], gpu: str | None) -> float | None:
    """The rate as a fraction of what an H200's bandwidth allows for an eager or a compiled step in bf16 (MOVED)."""
    found = rate(line)
    if found is None or "H200" not in (gpu or "") or line["scale"] not in MOVED:
        return None
    eager, compiled = MOVED[line["scale"]]
    is_compiled = any(rung.compile for rung in RUNGS if rung.name == line["rung"])
    return found * (compiled if is_compiled else eager) * 1e6 / H200_BANDWIDTH


COLUMNS = {
    "rung": Column("rung"),
    "px": Column("scale"),
    "micro-batch": Column("micro_batch"),
    "images/s": Column(
        "rate", ",.1f", note="a training step of a batch that is on the device already: median of the rounds"
    ),
    "× first": Column("ratio", ".2f", note="ratio to the first rung, round by round"),
    "peak GiB": Column(
        "peak_bytes",
        ".2f",
        2**30,
        "of a step, in its own process: torch's allocator on a GPU, the whole process on a CPU",
    ),
    "GPU GiB": Column(
        "gpu_used_bytes",
        ".2f",
        2**30,
        "in use after a step, as the driver reports it: the whole process, and other ones",
    ),
    "saved MiB": Column("saved_bytes", ",.1f", 2**20, "per image: what autograd keeps between forward and backward"),
    "largest": Column("largest", note="micro-batch that fits, while its double does not"),
    "of H200": Column(
        "bound",
        ".2f",
        note=f"rate / {H200_BANDWIDTH / 1e12} TB/s over the bytes that an eager or a compiled step in bf16 moves",
    ),
}


@dataclass(frozen=True)
class LadderResult:
    lines: list[dict[str, Any]]
    """See LINE."""
    provenance: dict[str, Any]
    what: dict[str, str]
    """The rungs by name."""
    left_out: dict[str, str] = field(default_factory=dict)
    """What there was no time for, and what to do."""

    def tables(self) -> list[Table]:
        """Rates and memory of every rung; what the rungs are; time by kind of kernel where it was measured."""
        failed = [f"{line['rung']}, {line['scale']} px: {line['failed']}" for line in self.lines if line["failed"]]
        notes = "\n".join(failed + left_out_notes(self.left_out))
        lines = [{**line, "rate": rate(line)} for line in self.lines]
        found = [
            table(f"Ladder of training {ARCH} ({where(self.provenance)})", COLUMNS, lines, notes),
            Table("The rungs", ["rung", "what it does"], list(self.what.items()), text=["what it does"]),
        ]
        if profiled := {line["rung"]: line["kinds"] for line in self.lines if line["kinds"]}:
            title = f"Time by kind of kernel, µs per image, at {self.lines[-1]['scale']} px"
            kinds = [*KINDS, "other"]
            rows = [[rung, *(f"{times[kind]:,.0f}" for kind in kinds)] for rung, times in profiled.items()]
            note = "Summed over kernels, which may overlap; Triton's: see KINDS."
            found.append(Table(title, ["rung", *kinds], rows, note))
        return found

    def plot(self) -> Figure:
        """Rates as ratios to the first rung's, one line per scale."""
        figure = Figure(figsize=(9, 4), layout="constrained")
        axes = figure.subplots()
        rungs = list(dict.fromkeys(line["rung"] for line in self.lines))
        for scale in dict.fromkeys(line["scale"] for line in self.lines):
            ratios = [line["ratio"] for line in self.lines if line["scale"] == scale]
            axes.plot(range(len(rungs)), [float("nan") if r is None else r for r in ratios], "o-", label=f"{scale} px")
        axes.set_xticks(range(len(rungs)), rungs, fontsize=8)
        highest = max((line["ratio"] for line in self.lines if line["ratio"]), default=1.0)
        axes.set(ylabel="training, images/s,\n× the first rung's", ylim=(0, 1.1 * highest))
        axes.legend(frameon=False)
        return figure
