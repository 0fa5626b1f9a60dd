"""Train one classifier at one scale on one fold: `torchrun --nproc_per_node=6 -m cxrfast.train`, or `cxrfast train`.

A shard set and a configuration come in; a run folder with checkpoints, metrics and the best weights goes out. Started
again, it goes on where the last checkpoint left off, with the same rows in the same order.
"""

import sys
import time
from collections.abc import Generator, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from cxrfast import config as presets
from cxrfast.config import TrainConfig
from cxrfast.distributed import World, pick_device, world
from cxrfast.errors import RunError
from cxrfast.labels import targets
from cxrfast.machine import resident_bytes
from cxrfast.metrics import auroc, bce
from cxrfast.model import Classifier, autocast, load_weights, resolve_precision
from cxrfast.pipelines.loader import Batch, Loader
from cxrfast.pipelines.order import Augment, EvalOrder, TrainOrder
from cxrfast.pipelines.reader import Reader
from cxrfast.predict import complete, score
from cxrfast.progress import Advance, progress
from cxrfast.runs import Run, part_rows, read_run, run_folder, start_run
from cxrfast.shards.manifest import read_set
from cxrfast.shards.rows import read_rows
from cxrfast.splits import check_parts, official_masks, part_masks

CLOCK_STEPS = 20
"""Optimiser steps between two looks at the clock, where several ranks have to agree on the time."""

SYNC_BUFFERS = (
    "forward_sync_buffers"
    if "forward_sync_buffers" in signature(DistributedDataParallel).parameters
    else "broadcast_buffers"
)  # its name before torch 2.14


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where and how a training runs; none of it changes the rows, their order or the recipe."""

    shards: Path
    runs: Path
    name: str | None = None
    """Of the folder that holds the folds; default `<arch>-<scale>`."""
    device: str = "auto"
    engine: str = "auto"
    threads: int | None = None
    """Decoding threads a rank; default: the usable cores divided by the ranks of this machine."""
    cache: Path | None = None
    """Folder on a local disk in which decoded pixels are kept; see `pipelines.cache`."""
    checkpoint_minutes: float = 10.0
    checkpoint_steps: int | None = None
    """Write last.pt after so many optimiser steps, beside the end of every epoch and every `checkpoint_minutes`."""
    deterministic: bool = False
    """Bitwise the same on a GPU, at some cost; a CPU is so anyway."""
    quiet: bool = False


def make_config(shards: Path, scale: int, *, device: str = "auto", **given: Any) -> TrainConfig:
    """The configuration for a scale of a set: what is `given` and not None, else the preset of that scale."""
    info = read_set(shards)
    preset = presets.preset(scale)
    given = {name: value for name, value in given.items() if value is not None}
    global_batch = given.pop("global_batch", preset.global_batch)
    given.setdefault("micro_batch", min(preset.micro_batch, global_batch))
    given.setdefault("learning_rate", presets.learning_rate(global_batch))
    given["precision"] = resolve_precision(given.get("precision", "auto"), pick_device(device))
    return TrainConfig(set_id=info.id, scale=scale, labels=tuple(info.labels), global_batch=global_batch, **given)


def select_rows(table: pd.DataFrame, config: TrainConfig, held: np.ndarray) -> pd.DataFrame:
    """The rows a run uses: row, image_id, patient_id, part, raw labels; sorted by row.

    Left out: rows that the set does not hold (`held`, int64, lists those it does), rows without any label, other views.
    Raises RunError if a part is empty, or if the set has been relabelled since `config` was made.
    """
    if absent := [name for name in config.labels if name not in table]:
        raise RunError(f"the set has no label {absent[0]} any more, it was relabelled: start the training again")
    parts = (
        official_masks(table["split"].to_numpy())
        if config.split == "official"
        else part_masks(table["fold"].to_numpy(), table["block"].to_numpy(), config.fold)
    )
    usable = table["row"].isin(held).to_numpy() & table[list(config.labels)].notna().any(axis=1).to_numpy()
    if config.views:
        usable &= table["view"].isin(config.views).to_numpy()
    masks = {part: mask & usable for part, mask in parts.items()}
    if config.limit is not None:
        masks = {part: mask & (np.cumsum(mask) <= config.limit) for part, mask in masks.items()}
    check_parts(masks, f"split {config.split}, fold {config.fold}")
    part = np.select(list(masks.values()), list(masks), default="")
    chosen = table.assign(part=part)[part != ""]
    return chosen[["row", "image_id", "patient_id", "part", *config.labels]].reset_index(drop=True)


def train_order(config: TrainConfig, rows: pd.DataFrame, ranks: World, shard_rows: int) -> TrainOrder:
    """The order in which this rank sees the training rows. Raises LoadError for batch sizes or ranks that do not fit."""
    return TrainOrder(
        rows=part_rows(rows, "train"),
        global_batch=config.global_batch,
        micro_batch=config.micro_batch,
        seed=config.seed,
        rank=ranks.rank,
        world=ranks.size,
        shard_rows=shard_rows if config.order == "block" else None,
    )


def train(config: TrainConfig, place: Place) -> Run:
    """Train, or go on with, the run of this configuration. Returns it when it is done."""
    with world(place.device) as ranks:
        if place.deterministic:
            torch.use_deterministic_algorithms(True)
        torch.manual_seed(config.seed)
        model = Classifier(config.arch, len(config.labels))
        model.check_size(config.scale)
        reader = Reader(place.shards, config.scale)
        rows = select_rows(read_rows(place.shards / "rows.parquet"), config, reader.rows)
        train_order(
            config, rows, ranks, reader.info.rows_per_shard
        )  # refuses sizes that do not fit before anything is written
        folder = run_folder(place.runs, config, place.name)

        def start() -> Run:
            if not (folder / "last.pt").exists():  # else the checkpoint brings its own weights
                refuse_other_fold(config)
                load_weights(model, config.weights)  # the other ranks get them from DistributedDataParallel
            return start_run(folder, config, place.shards, rows)

        run = ranks.on_first(start)
        trainer = Trainer(run, ranks, model, reader, place)
        if not run.is_done:
            trainer.fit()
        elif ranks.is_first and not place.quiet:
            print(f"{run.name} is done already; its weights are in {run.folder}", file=sys.stderr)
        ranks.barrier()
        return run


def refuse_other_fold(config: TrainConfig) -> None:
    """Raises RunError if the run that gives the first weights has seen rows that this one validates or tests on."""
    if not (Path(config.weights) / "config.json").exists():
        return
    parent = read_run(Path(config.weights)).config
    if parent.set_id == config.set_id and (parent.fold, parent.split) != (config.fold, config.split):
        raise RunError(
            f"--weights {config.weights} was trained on {parent.split} fold {parent.fold}, whose training rows hold patients "
            f"of this run's validation and test parts ({config.split} fold {config.fold}): start from a run of the same fold"
        )


class Trainer:
    """One run in memory: model, optimiser, schedule, counters and the position in the data."""

    def __init__(self, run: Run, ranks: World, model: Classifier, reader: Reader, place: Place) -> None:
        config = run.config
        self.run, self.config, self.ranks, self.place = run, config, ranks, place
        rows = run.rows()
        self.val_rows = part_rows(rows, "val")
        self._put_labels(rows, reader.info.images)
        self.order = train_order(config, rows, ranks, reader.info.rows_per_shard)
        loading: dict[str, Any] = {
            "device": ranks.device,
            "engine": place.engine,
            "threads": place.threads,
            "local_ranks": ranks.local_size,
            "cache": place.cache,
        }
        self.train_loader = Loader(
            reader, self.order, augment=Augment(degrees=config.degrees, flip=config.flip), **loading
        )
        val_order = EvalOrder(rows=self.val_rows, micro_batch=config.micro_batch, rank=ranks.rank, world=ranks.size)
        self.val_loader = Loader(reader, val_order, **loading)

        self.model = model.to(ranks.device)
        self.forward: torch.nn.Module = self.model
        if ranks.size > 1:
            # Statistics are broadcast before they are used (see `score`), not before every forward pass.
            unsynced = {SYNC_BUFFERS: False}
            self.forward = DistributedDataParallel(self.model, gradient_as_bucket_view=True, **unsynced)  # type: ignore[arg-type]
        self.optimizer = torch.optim.Adam(
            model.parameters(), lr=config.learning_rate, fused=ranks.device.type == "cuda"
        )
        self.scaler = torch.amp.GradScaler(ranks.device.type, enabled=config.precision == "fp16")
        self.schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(
            self.optimizer, factor=config.factor, patience=config.patience
        )
        self.epoch, self.consumed, self.stale, self.best = 0, 0, 0, float("inf")
        self.loss = torch.zeros((), dtype=torch.float64, device=ranks.device)
        """Sum of this rank's share of the epoch's losses."""

    def _put_labels(self, rows: pd.DataFrame, images: int) -> None:
        """Targets and mask by row, (images, L): on the device for the loss, on the host for the counts."""
        target, mask = targets(rows[list(self.config.labels)].to_numpy(), self.config.policy)
        self.host_target = np.zeros((images, target.shape[1]), np.float32)
        self.host_mask = np.zeros((images, target.shape[1]), bool)
        self.host_target[rows["row"]], self.host_mask[rows["row"]] = target, mask
        self.target = torch.from_numpy(self.host_target).to(self.ranks.device)
        self.mask = torch.from_numpy(self.host_mask).to(self.ranks.device)

    # The loop

    def fit(self) -> None:
        """Train until the epochs or the patience are used up."""
        self.restore()
        self._set_state("running")
        try:
            while self.epoch < self.config.epochs and self.stale < self.config.stop_after:
                started = time.monotonic()
                steps, waited = self.train_epoch()
                self.end_epoch(started, steps, waited)
        except BaseException as error:
            self._set_state("failed", error=f"{type(error).__name__}: {error}"[:500])
            raise
        self._set_state("done")

    def train_epoch(self) -> tuple[int, float]:
        """The optimiser steps left in this epoch. Returns their number and the seconds spent waiting for data."""
        self.model.train()
        self.forward.train()
        steps = self.order.global_batches(self.epoch, self.consumed)
        batches = _Timed(self.train_loader.epoch(self.epoch, self.consumed))
        saved, label = time.monotonic(), f"{self.run.name} epoch {self.epoch + 1}"
        with progress(
            label, len(steps) * self.config.global_batch, quiet=self.place.quiet or not self.ranks.is_first
        ) as advance:
            for done, rows in enumerate(steps, 1):
                self.step(rows, batches)
                self.consumed += self.config.global_batch
                self._show(advance, done)
                if done < len(steps) and self._is_due(done, time.monotonic() - saved):
                    self.save()
                    saved = time.monotonic()
        batches.close()
        return len(steps), batches.waited

    def _is_due(self, done: int, seconds: float) -> bool:
        """Is a checkpoint due? Rank 0's clock decides, asked for now and then only, since asking synchronises the ranks."""
        if self.place.checkpoint_steps and done % self.place.checkpoint_steps == 0:
            return True
        if self.ranks.size > 1 and done % CLOCK_STEPS:
            return False
        return self.ranks.broadcast(seconds > 60 * self.place.checkpoint_minutes)

    def step(self, rows: np.ndarray, batches: Iterator[Batch]) -> None:
        """One optimiser step over the global batch `rows`, of which this rank sees its micro-batches."""
        mine = self.order.accumulation // self.ranks.size
        # BCE summed over unmasked entries, over their number in the global batch; DDP averages over ranks, hence the size.
        weight = self.ranks.size / max(1, int(self.host_mask[rows].sum()))
        for i in range(mine):
            batch = next(batches)
            last = i == mine - 1
            with nullcontext() if last or self.ranks.size == 1 else self.forward.no_sync():  # type: ignore[operator]
                with self.autocast():
                    logits = self.forward(batch.image)
                loss = weight * masked_bce_sum(logits.float(), self.target[batch.row], self.mask[batch.row])
                self.scaler.scale(loss).backward()
            self.loss += loss.detach() / self.ranks.size
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    def autocast(self) -> torch.autocast:
        return autocast(self.ranks.device, self.config.precision)

    def _show(self, advance: Advance, done: int) -> None:
        note = ""
        if done % 50 == 0 and self.ranks.is_first:  # rank 0's share, of all steps since the epoch began
            note = f"loss {float(self.loss) * self.ranks.size * self.config.global_batch / self.consumed:.4f}"
        advance(self.config.global_batch, note)

    def end_epoch(self, started: float, steps: int, waited: float) -> None:
        """Validate, move the schedule, write metrics, best weights and the checkpoint of the next epoch's start."""
        losses = self.ranks.gather(float(self.loss))
        trained = time.monotonic()
        with progress(f"{self.run.name} validation", len(self.val_rows), quiet=True) as advance:
            scores = score(self.model, self.val_loader, self.ranks, self.config.precision, advance)
        result: dict[str, Any] = {}
        if scores is not None and losses is not None:
            complete(scores, self.val_rows, self.run.name)
            target, mask = self.host_target[scores.row], self.host_mask[scores.row]
            per_label = auroc(scores.logits, target, mask)
            defined = per_label[~np.isnan(per_label)]
            result = {
                "train_loss": sum(losses) / self.order.steps,
                "val_loss": bce(scores.logits, target, mask),
                "val_auroc": float(defined.mean()) if len(defined) else None,
                "val_auroc_by_label": {
                    name: None if np.isnan(v) else float(v)
                    for name, v in zip(self.config.labels, per_label, strict=True)
                },
            }
        result = self.ranks.broadcast(result)
        if not np.isfinite([result["train_loss"], result["val_loss"]]).all():
            raise RunError(
                f"{self.run.name}: the loss is not finite in epoch {self.epoch + 1}; {self.run.folder / 'last.pt'} "
                "holds the last good state: lower --learning-rate, or use --precision fp32"
            )
        seconds = trained - started
        measured = {
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "seconds": time.monotonic() - started,
            "images_per_s": steps * self.config.global_batch / seconds,
            "waiting_share": waited / seconds,
            "resident_bytes": resident_bytes(),
            "gpu_peak_bytes": self._gpu_peak(),
        }
        self.schedule.step(result["val_loss"])
        better = result["val_loss"] < self.best
        self.best, self.stale = (result["val_loss"], 0) if better else (self.best, self.stale + 1)
        if self.ranks.is_first:
            self.run.add_metrics({"epoch": self.epoch, **result, **measured})
            if better:
                self.run.save_best(self.model.state_dict())
            self._report(result, measured, better)
        self.epoch, self.consumed = self.epoch + 1, 0
        self.loss.zero_()
        self.save()
        self._set_state("running")

    def _report(self, result: dict[str, Any], measured: dict[str, Any], better: bool) -> None:
        if not self.place.quiet:
            shown = "undefined" if result["val_auroc"] is None else f"{result['val_auroc']:.4f}"
            print(
                f"{self.run.name} epoch {self.epoch + 1}: train loss {result['train_loss']:.4f}, validation loss "
                f"{result['val_loss']:.4f}{' (best)' if better else ''}, AUROC {shown}, {measured['images_per_s']:.0f} images/s",
                file=sys.stderr,
                flush=True,
            )

    def _gpu_peak(self) -> int | None:
        return torch.cuda.max_memory_allocated() if self.ranks.device.type == "cuda" else None

    def _set_state(self, state: str, **more: Any) -> None:
        if self.ranks.is_first:
            self.run.set_state(
                state, epoch=self.epoch, best_val_loss=None if self.best == float("inf") else self.best, **more
            )

    # Checkpoints

    def save(self) -> None:
        """Write last.pt: all that the rest of the run depends on."""
        losses = self.ranks.gather(self.loss.item())
        if self.ranks.is_first:
            self.run.save_last(
                {
                    "model": self.model.state_dict(),
                    "optimizer": self.optimizer.state_dict(),
                    "scaler": self.scaler.state_dict(),
                    "schedule": self.schedule.state_dict(),
                    "epoch": self.epoch,
                    "consumed": self.consumed,
                    "stale": self.stale,
                    "best": self.best,
                    "losses": losses,
                    "rng": torch.get_rng_state(),
                }
            )
        self.ranks.barrier()

    def restore(self) -> None:
        """Take up the last checkpoint, if there is one."""
        checkpoint = self.run.load_last()
        if checkpoint is None:
            return
        self.model.load_state_dict(checkpoint["model"])
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        self.scaler.load_state_dict(checkpoint["scaler"])
        self.schedule.load_state_dict(checkpoint["schedule"])
        self.epoch, self.consumed = checkpoint["epoch"], checkpoint["consumed"]
        self.stale, self.best = checkpoint["stale"], checkpoint["best"]
        losses = checkpoint["losses"]
        same = len(losses) == self.ranks.size
        self.loss.fill_(losses[self.ranks.rank] if same else sum(losses) if self.ranks.is_first else 0.0)
        torch.set_rng_state(checkpoint["rng"])
        if self.ranks.is_first:
            self.run.cut_metrics(self.epoch)
            if not self.place.quiet:
                print(
                    f"{self.run.name}: going on in epoch {self.epoch + 1}, after {self.consumed:,} images",
                    file=sys.stderr,
                )


def masked_bce_sum(logits: torch.Tensor, target: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropy with logits, (N, L) each, summed over the entries that count."""
    return (F.binary_cross_entropy_with_logits(logits, target, reduction="none") * mask).sum()


class _Timed(Iterator[Batch]):
    """Batches, and the seconds that their consumer waited for them."""

    def __init__(self, batches: Generator[Batch]) -> None:
        self.batches, self.waited = batches, 0.0

    def __next__(self) -> Batch:
        start = time.monotonic()
        try:
            return next(self.batches)
        finally:
            self.waited += time.monotonic() - start

    def close(self) -> None:
        self.batches.close()


if __name__ == "__main__":
    from cxrfast.cli import cli

    cli(["train", *sys.argv[1:]], prog_name="cxrfast")
