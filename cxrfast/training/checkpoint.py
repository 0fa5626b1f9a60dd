"""Checkpoints of a training: everything the rest of the run depends on, saved to last.pt and restored.

That is Counters, whatever has a state_dict (model, optimiser, scaler, schedule), and each rank's share of the epoch's loss and
random generators. `Run.write_checkpoint` adds the configuration's hash, by which a checkpoint of another run is refused.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from cxrfast.distributed import World
from cxrfast.errors import RunError, is_out_of_memory
from cxrfast.runs.run import Run


@dataclass
class Counters:
    """Progress and best results of a training."""

    epoch: int = 0
    """Finished epochs."""
    consumed: int = 0
    """Images of the current epoch that were trained on."""
    stale: int = 0
    """Epochs since the one with the lowest validation loss."""
    best: float = float("inf")
    """Lowest validation loss."""
    best_auroc: float | None = None
    """Validation AUROC of the epoch with the lowest loss."""

    def add_validation(self, loss: float, auroc: float | None) -> bool:
        """Count an epoch's validation. Returns whether its loss is the lowest so far."""
        is_best = loss < self.best
        if is_best:
            self.best, self.best_auroc, self.stale = loss, auroc, 0
        else:
            self.stale += 1
        return is_best

    def next_epoch(self) -> None:
        self.epoch, self.consumed = self.epoch + 1, 0


def save(
    run: Run, ranks: World, counters: Counters, stateful: Mapping[str, Any], loss: torch.Tensor, spent: float
) -> None:
    """Write the run's checkpoint; all ranks call it.

    `stateful`: objects with a state_dict, by name. `loss`: this rank's share of the epoch's loss. `spent`: seconds in the epoch.
    """
    cuda = torch.cuda.get_rng_state(ranks.device) if ranks.device.type == "cuda" else None
    losses, rng = ranks.gather(loss.item()), ranks.gather({"cpu": torch.get_rng_state(), "cuda": cuda})

    def write() -> None:
        states = {name: part.state_dict() for name, part in stateful.items()}
        run.write_checkpoint({**states, **vars(counters), "losses": losses, "spent": spent, "rng": rng})

    ranks.on_first(write)


def restore(
    run: Run, ranks: World, counters: Counters, stateful: Mapping[str, Any], loss: torch.Tensor
) -> float | None:
    """Fill `counters`, `stateful` and `loss` from the run's checkpoint. Returns the seconds already spent in the epoch.

    Returns None and changes nothing without a checkpoint. Raises RunError if it is damaged or belongs to
    another configuration.
    """
    checkpoint = run.read_checkpoint()
    if checkpoint is None:
        return None
    try:
        return _restore(checkpoint, ranks, counters, stateful, loss)
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        raise RunError(
            f"{run.checkpoint_path} is damaged ({type(error).__name__}: {' '.join(str(error).split())[:200]}): delete it to "
            "restart the run, or restore it"
        ) from error


def _restore(
    checkpoint: Mapping[str, Any], ranks: World, counters: Counters, stateful: Mapping[str, Any], loss: torch.Tensor
) -> float:
    """As `restore`, from a checkpoint that was read; raises what torch raises for contents that it never wrote."""
    counted = {name: checkpoint[name] for name in vars(counters)}
    losses, rng, spent = checkpoint["losses"], checkpoint["rng"], float(checkpoint["spent"])
    counts = [counted[name] for name in ("epoch", "consumed", "stale")]
    if any(type(count) is not int or count < 0 for count in counts) or not 0 <= spent < math.inf:
        raise ValueError("its progress cannot be")
    if math.isnan(counted["best"]) or not isinstance(counted["best_auroc"], float | None):
        raise ValueError("its best epoch cannot be")
    for name, part in stateful.items():
        part.load_state_dict(checkpoint[name])
    for name, value in counted.items():
        setattr(counters, name, value)
    if len(losses) == ranks.size:
        loss.fill_(losses[ranks.rank])
    else:  # resuming is bitwise with the same number of ranks; with another one only the sum counts
        loss.fill_(sum(losses) if ranks.is_first else 0.0)
    states = rng[ranks.rank % len(rng)]
    torch.set_rng_state(states["cpu"])
    if ranks.device.type == "cuda" and states["cuda"] is not None:
        torch.cuda.set_rng_state(states["cuda"], ranks.device)
    return spent
