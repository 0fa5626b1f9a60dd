"""What a run keeps when it is trained again: choices of the machine and rules of the version that started it, its epochs.

The number of epochs is not part of what a run is: with more of them, a run that is done goes on from its last checkpoint,
unless early stopping ended it.
"""

import logging
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch

from cxrfast.config import AUTO, TrainConfig
from cxrfast.errors import RunError
from cxrfast.models.precision import resolve_precision
from cxrfast.runs.folder import RunFolder
from cxrfast.runs.run import Run
from cxrfast.runs.status import number
from cxrfast.units import counted

log = logging.getLogger(__name__)


def earlier_run(folder: RunFolder) -> Run | None:
    """The run in a folder that a training may go on with; None if there is none, or none with anything to lose.

    Raises RunError if it is damaged.
    """
    if not folder.is_started:
        return None
    run = Run.open(folder.folder)
    return None if run.has_nothing_to_lose else run


def kept(config: TrainConfig, earlier: TrainConfig) -> TrainConfig:
    """`config` with what a run that was started as `earlier` keeps: what was left to the machine, rules of its version."""
    same: dict[str, Any] = {"allow_partial": earlier.allow_partial}
    if config.precision == "auto":
        same["precision"] = earlier.precision
    if config.micro_batch == AUTO:
        same["micro_batch"] = earlier.micro_batch
    if config.positive_weights and earlier.positive_weights:
        same["weighted_validation"] = earlier.weighted_validation
    if config.allow_shared_patients:  # an earlier version did not ask
        same["allow_shared_patients"] = earlier.allow_shared_patients
    return replace(config, **same)


def as_started(folder: RunFolder, config: TrainConfig, device: torch.device) -> TrainConfig:
    """`config` with what the run in a folder keeps from its start; for a new run, with the precision of this device.

    Raises RunError if this device cannot go on in the run's precision.
    """
    if not (run := earlier_run(folder)):
        return replace(config, precision=resolve_precision(config.precision, device))
    found = kept(config, run.config)
    if config.precision == "auto":
        _check_precision(run, found.precision, device)
    return found


def _check_precision(run: Run, precision: str, device: torch.device) -> None:
    """Log that this device would have chosen another precision than the run's. Raises RunError if it does not have it."""
    try:
        resolve_precision(precision, device)
    except RunError:
        raise RunError(
            f"{run.folder} was started in {precision}, which this machine ({device}) does not have: resume it on a machine like "
            "the one that started it, or train it under another --name"
        ) from None
    if (own := resolve_precision("auto", device)) != precision:
        log.warning(
            f"{run.name}: goes on in {precision}, in which it was started; a new run would take {own} here, so it may be slower"
        )


def micro_batch_of_other_folds(folder: RunFolder, config: TrainConfig) -> int | None:
    """Smallest micro-batch of the other folds with this configuration; None if there are none.

    They may differ in what the machine chose and in their number of epochs.
    """
    found = []
    for path in folder.folder.parent.glob("fold-*"):
        with suppress(RunError):  # a damaged run is reported when it is opened to be trained
            run = Run.open(path)
            if path == folder.folder or run.has_nothing_to_lose:  # the size of the latter may be what failed
                continue
            if not kept(replace(config, fold=run.config.fold, micro_batch=AUTO), run.config).differences(run.config):
                found.append(run.config.micro_batch)
    return min(found, default=None)


def stale_epochs(lines: list[dict[str, Any]]) -> int:
    """Number of epochs since the one with the lowest validation loss, from a run's metrics; 0 without any."""
    losses = [float("inf") if (loss := number(line.get("val_loss"))) is None else loss for line in lines]
    return len(losses) - 1 - losses.index(min(losses)) if losses else 0


def why_over(run: Run, config: TrainConfig) -> str:
    """Why a run that is done has nothing left to train with this configuration, as a sentence; "" if it goes on.

    Raises RunError if there are epochs left, but no checkpoint to go on from.
    """
    lines, state = run.metrics(), run.state()
    done = state.get("epoch")
    done = done if isinstance(done, int) else len(lines)
    if config.epochs <= done:
        return f"{counted(done, 'epoch')} {'is' if done == 1 else 'are'} trained" + (
            f", more than --epochs {config.epochs}" if config.epochs < done else ""
        )
    stale = stale_epochs(lines)
    if (config.stops_early and stale >= config.stop_after) or (not lines and done < run.config.epochs):
        since = f", {stale} of them without a lower validation loss" if stale else ""
        return f"it stopped early after {done} epochs{since}, so --epochs {config.epochs} changes nothing"
    if not run.has_checkpoint:
        raise RunError(
            f"{run.folder} is done after {done} epochs, and {run.checkpoint_path.name}, from which --epochs {config.epochs} would "
            "go on, is missing: restore it, or train the run under another --name"
        )
    return ""
