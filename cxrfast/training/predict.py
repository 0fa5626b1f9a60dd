"""Logits of a trained run for its validation and test rows, into predictions.zarr. One process, or several by torchrun."""

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from cxrfast.distributed import World
from cxrfast.errors import RunError
from cxrfast.models.precision import autocast, use_tf32
from cxrfast.pipelines.loader import Loader
from cxrfast.pipelines.order import EvalOrder
from cxrfast.pipelines.reader import Reader
from cxrfast.progress import Advance, progress
from cxrfast.runs.lease import locked_by_first
from cxrfast.runs.remarks import relabelling_note
from cxrfast.runs.run import Predictions, Run, part_rows

log = logging.getLogger(__name__)

PARTS = ("val", "test")


def predict(
    run: Run,
    world: World,
    *,
    shards: Path | None = None,
    engine: str = "auto",
    threads: int | None = None,
) -> None:
    """Score the run's validation and test rows with its best weights.

    `shards`: current location of the set; default: where it was in training. Raises RunError if it is another set, or if
    another process writes into the run.
    """
    with locked_by_first(run, "predicting", world) as lease:
        _predict(replace(run, lease=lease), world, run.reader(shards), engine, threads)


def _predict(run: Run, world: World, reader: Reader, engine: str, threads: int | None) -> None:
    if world.is_first and (note := relabelling_note(run, reader.shard_set)):
        log.warning(note)
    model = run.load(world.device)
    table = run.rows()
    rows = {part: part_rows(table, part) for part in PARTS}
    parts: dict[str, Predictions] = {}
    total = sum(map(len, rows.values()))
    with progress(f"predict {run.name}", total) as advance:
        for part in PARTS:
            order = EvalOrder(rows=rows[part], micro_batch=run.config.micro_batch, rank=world.rank, world=world.size)
            loader = Loader(
                reader, order, device=world.device, engine=engine, threads=threads, local_ranks=world.local_size
            )
            scores = score(model, loader, world, run.config.precision, advance)
            if scores is not None:
                parts[part] = scores
    world.on_first(lambda: run.write_predictions({part: complete(parts[part], rows[part], run.name) for part in PARTS}))


def score(model: torch.nn.Module, loader: Loader, world: World, precision: str, advance: Advance) -> Predictions | None:
    """Logits float32 (n, L) of every row in the loader's order, gathered to rank 0; None on the other ranks.

    Puts the model into eval mode, with rank 0's BatchNorm statistics on every rank.
    """
    model.eval()
    use_tf32(precision)
    world.broadcast_buffers(model)
    rows, logits = [], []
    with torch.inference_mode(), autocast(world.device, precision):
        for batch in loader:
            logits.append(model(batch.image).float())  # stays on the device: no synchronisation in the loop
            rows.append(batch.row)
            advance(len(batch.row) * world.size)
    mine = (torch.cat(rows).cpu().numpy(), torch.cat(logits).cpu().numpy()) if rows else None
    gathered = world.gather(mine)
    if gathered is None:
        return None
    pieces = [piece for piece in gathered if piece is not None]
    row, logit = (np.concatenate(arrays) for arrays in zip(*pieces, strict=True))
    order = np.argsort(row)
    return Predictions(row[order], logit[order])


def complete(scores: Predictions, rows: np.ndarray, name: str) -> Predictions:
    """Return `scores` if they cover exactly `rows`. Raises RunError if not."""
    if not np.array_equal(scores.row, np.sort(rows)):
        raise RunError(
            f"{name}: {len(scores.row):,} rows were scored instead of {len(rows):,}; this is a bug, "
            "no predictions are written"
        )
    return scores
