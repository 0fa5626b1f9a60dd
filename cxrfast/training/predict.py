"""Logits of a trained run for its validation and test rows, into predictions.zarr, and thresholds chosen on validation rows.

One process, or several by torchrun.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from cxrfast.distributed import World
from cxrfast.errors import RunError
from cxrfast.labels import targets
from cxrfast.models.precision import autocast, use_tf32
from cxrfast.pipelines.loader import Loader
from cxrfast.pipelines.order import EvalOrder
from cxrfast.pipelines.reader import Reader
from cxrfast.progress import Advance, progress
from cxrfast.runs.lease import locked_by_first
from cxrfast.runs.reference import MOST_FILMS, reference_of, sampled, write_reference
from cxrfast.runs.remarks import relabelling_note
from cxrfast.runs.run import Predictions, Run, part_rows
from cxrfast.thresholds import YOUDEN, choose

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
    """Score the run's validation and test rows with its best weights, then choose its thresholds on the validation rows.

    Thresholds that it has already are chosen again by their rule, otherwise by Youden's.

    `shards`: current location of the set; default: where it was in training. Raises RunError if it is another set, or if
    another process writes into the run.
    """
    with locked_by_first(run, "predicting", world) as lease:
        _predict(replace(run, lease=lease), world, run.reader(shards), engine, threads)


def _predict(run: Run, world: World, reader: Reader, engine: str, threads: int | None) -> None:
    if world.is_first and (note := relabelling_note(run, reader.shard_set)):
        log.warning(note)
    world.on_first(run.read_thresholds)  # raises, before anything is done, if those that are there are damaged
    model = run.load(world.device)
    table = run.rows()
    rows = {part: part_rows(table, part) for part in PARTS}
    parts: dict[str, Predictions] = {}
    looks = Looks()
    total = sum(map(len, rows.values()))
    with progress(f"predict {run.name}", total) as advance:
        for part in PARTS:
            look = looks if part == "val" else None
            scores = score_rows(run, model, reader, rows[part], world, engine, threads, advance, look)
            if scores is not None:
                parts[part] = scores
    world.on_first(lambda: write_reference(run, reference_of(looks.pixels(), source_sizes(reader)), reader.info.recipe))
    world.on_first(lambda: _write(run, {part: complete(parts[part], rows[part], run.name) for part in PARTS}, table))


def _write(run: Run, parts: Mapping[str, Predictions], rows: pd.DataFrame) -> None:
    """Write predictions, and the thresholds that the validation rows give. rows: `Run.rows`."""
    run.write_predictions(parts)
    if not np.isfinite(parts["val"].logits).all():
        log.warning(f"{run.name} has no thresholds: some validation logits are not finite, its weights diverged")
        run.thresholds_path.unlink(missing_ok=True)
        return
    earlier, config = run.read_thresholds(), run.config
    raw = rows[rows["part"] == "val"].sort_values("row")[list(config.labels)].to_numpy(np.float32)
    known = targets(raw, config.policies, config.blanks, config.unlabelled)
    chosen = choose(parts["val"].logits, *known, earlier.rule if earlier else YOUDEN)
    run.write_thresholds(chosen, len(raw))


class Looks:
    """A few pixels of the first images that are loaded, for the run's reference."""

    def __init__(self) -> None:
        self._parts: list[torch.Tensor] = []
        self._room = MOST_FILMS

    def __call__(self, images: torch.Tensor) -> None:
        """images: uint8 (N, 1, H, W). Does not wait for the device."""
        if self._room > 0:
            self._parts.append(sampled(images[: self._room, 0]).clone())  # a view would keep the batch in memory
            self._room -= len(images)

    def pixels(self) -> np.ndarray:
        """uint8 (n, h, w)."""
        return torch.cat(self._parts).cpu().numpy() if self._parts else np.zeros((0, 1, 1), np.uint8)


MOST_SIZES = 20_000
"""Source images whose sizes the reference is made from."""


def source_sizes(reader: Reader) -> np.ndarray:
    """int64 (M, 2): height and width of the set's first source images, px; rows are in random order."""
    shard_set, found = reader.shard_set, []
    for shard in shard_set.shards(reader.scale):
        if manifest := shard_set.manifest(reader.scale, shard):
            found += manifest.sizes
        if len(found) >= MOST_SIZES:
            break
    return np.array(found[:MOST_SIZES], np.int64).reshape(-1, 2)


def score_rows(
    run: Run,
    model: torch.nn.Module,
    reader: Reader,
    rows: np.ndarray,
    world: World,
    engine: str,
    threads: int | None,
    advance: Advance,
    look: Callable[[torch.Tensor], None] | None = None,
) -> Predictions | None:
    """`score` of the rows (int64) of a set, with the micro-batch and the precision of the run."""
    order = EvalOrder(rows=rows, micro_batch=run.config.micro_batch, rank=world.rank, world=world.size)
    loader = Loader(reader, order, device=world.device, engine=engine, threads=threads, local_ranks=world.local_size)
    return score(model, loader, world, run.config.precision, advance, look)


def score(
    model: torch.nn.Module,
    loader: Loader,
    world: World,
    precision: str,
    advance: Advance,
    look: Callable[[torch.Tensor], None] | None = None,
) -> Predictions | None:
    """Logits float32 (n, L) of every row in the loader's order, gathered to rank 0; None on the other ranks.

    `look`: called with the images of each batch.

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
            if look:
                look(batch.image)
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
