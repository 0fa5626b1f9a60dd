"""`cxrfast bench ladder`: the effect of each way to speed up training, added one by one, by scale.

A synthetic uint8 batch is on the device; a step is forward pass, loss, backward pass and a fused Adam. The rungs of
the ladder are timed in turns. Then each gets its own process, which measures how much memory its step takes, how
many images fit and where the time goes. A rung that fails costs its own lines only. Nothing is loaded here.
"""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from cxrfast.bench.harness import (
    Budget,
    Measured,
    Pace,
    announce,
    in_time,
    measure_elsewhere,
    no_time,
    provenance,
)
from cxrfast.bench.report import write_results
from cxrfast.bench.training.ladder_measure import ARCH, ROUNDS, RUNGS, Rung, alone, pick_rungs, rates, rungs_of
from cxrfast.bench.training.ladder_result import LadderLine, LadderResult, bound
from cxrfast.config import preset
from cxrfast.distributed import pick_device
from cxrfast.errors import RunError

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
) -> LadderResult:
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
    lines, left_out = _all_rates(given, [rung.name for rung in rungs], seconds, budget)
    lines, missing = _all_extras(given, lines, with_profile, budget)
    if all(line.rounds is None for line in lines):
        reasons = [*(line.failed for line in lines), *left_out.values()]
        raise RunError(f"no rung could be measured; first: {reasons[0]}")
    origin = provenance(chosen)
    lines = [replace(line, bound=bound(line, origin["gpu"])) for line in lines]
    result = LadderResult(lines, origin, {rung.name: rung.what for rung in rungs}, left_out | missing)
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


def _all_rates(
    given: list[dict[str, Any]], rungs: list[str], seconds: float, budget: Budget
) -> tuple[list[LadderLine], dict[str, str]]:
    """The lines of every scale that there was time for, with rates alone; and the other scales."""
    lines: list[LadderLine] = []
    left_out: dict[str, str] = {}

    def work(one: dict[str, Any], share: Budget) -> Pace | None:
        start = budget.clock()
        found = _rates(one, rungs, seconds, share)
        lines.extend(found)
        steps = [line.micro_batch / line.rate for line in found if line.rate]
        rounds = max(len(line.rounds or []) for line in found)
        return Pace(budget.clock() - start, rounds, steps, seconds, _pixels(one)) if steps else None

    in_time({f"{one['scale']} px": (_pixels(one), one) for one in given}, work, budget, left_out)
    return lines, left_out


def _pixels(one: dict[str, Any]) -> int:
    return one["scale"] ** 2 * one["micro_batch"]


def _rates(given: dict[str, Any], rungs: list[str], seconds: float, budget: Budget) -> list[LadderLine]:
    """The lines of one scale: from one process that holds all rungs, or from one per rung if that one crashes."""
    lines = {rung: LadderLine(scale=given["scale"], rung=rung, micro_batch=given["micro_batch"]) for rung in rungs}
    for together in (rungs, *([rung] for rung in rungs)):
        if any(lines[rung].rounds or lines[rung].failed for rung in together):
            continue
        try:
            options = {**given, "rungs": together, "seconds": seconds}
            figures = len(together) * (ROUNDS + 2)
            found = measure_elsewhere(rates, options, budget, f"{given['scale']} px", figures)
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
            "rung": line.rung,
            "start": largest[line.scale],
            "with_profile": with_profile and line.scale == given[-1]["scale"],
        }
        start = budget.clock()
        try:
            more = measure_elsewhere(alone, options, budget)
        except (RunError, MemoryError) as error:
            more = {"failed": str(error)}
        took = budget.clock() - start
        largest[line.scale] = more.get("largest") or largest[line.scale]  # the next rung's is near it
        found.append(replace(line, **more))
    return found, {what: f"{', '.join(rungs)}: {no_time(took, budget.left)}" for what, rungs in missing.items()}
