"""`cxrfast bench ladder`: what each means of training faster is worth, one on top of the other, by scale.

A synthetic uint8 batch lies on the device; a step is forward pass, loss, backward pass and a fused Adam. Every rung of
the ladder is timed in turn with the others, and then has a process of its own that says how much memory its step takes,
how many images fit and where the time goes. A rung that fails costs its lines alone. Nothing is loaded here.
"""

import logging
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from cxrfast.bench.harness import (
    Budget,
    Measured,
    announce,
    answer,
    in_own_process,
    least_seconds,
    no_time,
    provenance,
    write_results,
)
from cxrfast.bench.training.ladder_measure import ARCH, ROUNDS, RUNGS, Rung, alone, pick_rungs, rates, rungs_of
from cxrfast.bench.training.ladder_result import LadderLine, LadderResult, bound, plot, tables
from cxrfast.config import preset
from cxrfast.distributed import pick_device
from cxrfast.errors import RunError
from cxrfast.progress import progress

log = logging.getLogger(__name__)

SCALES = {"cuda": [256, 512, 1024, 2048], "cpu": [64, 128]}

START_SECONDS = 10.0
"""A process that trains takes about so long to start; for the plan alone."""


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
) -> LadderResult:
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
    result = LadderResult(
        [replace(line, bound=bound(line, origin["gpu"])) for line in lines],
        origin,
        {rung.name: rung.what for rung in rungs},
        left_out | missing,
    )
    write_results(out, "ladder", asdict(result), tables(result), plot(result))
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
) -> tuple[list[LadderLine], dict[str, str]]:
    """The lines of every scale that there was time for, with rates alone; and the other scales."""
    lines: list[LadderLine] = []
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


def _least(lines: list[LadderLine], wall: float, seconds: float, given: dict[str, Any]) -> float:
    """Seconds that the rates of a scale take at least, judging by the lines of another one; 0 if nothing is known."""
    timed = [line for line in lines if line.rate]
    if not timed:
        return 0.0
    first = timed[0]
    growth = given["scale"] ** 2 * given["micro_batch"] / (first.scale**2 * first.micro_batch)
    steps = [line.micro_batch / line.rate for line in timed if line.rate]
    return least_seconds(wall, len(first.rounds or []), steps, seconds, growth)


def _rates(given: dict[str, Any], rungs: list[str], seconds: float, budget: Budget) -> list[LadderLine]:
    """The lines of one scale: from one process that holds all rungs, or from one per rung if that one crashes."""
    lines = {rung: LadderLine(scale=given["scale"], rung=rung, micro_batch=given["micro_batch"]) for rung in rungs}
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
            lines[rung] = replace(line, ratio=Measured(line.rounds).ratio(Measured(base)))
    return list(lines.values())


def _all_extras(
    given: list[dict[str, Any]], lines: list[LadderLine], with_profile: bool, budget: Budget
) -> tuple[list[LadderLine], dict[str, str]]:
    """The lines with memory, and with kernels at the last scale; and what there was no time for."""
    found: list[LadderLine] = []
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
        log.info(f"{line.scale} px: memory of {line.rung}")
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


if __name__ == "__main__":
    jobs: dict[str, Callable[..., Any]] = {"rates": rates, "alone": alone}
    answer(lambda what, **options: jobs[what](**options))
