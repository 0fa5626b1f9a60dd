"""One run in memory: its model, optimiser, schedule, counters and position, and the loop that moves them.

A run and a shard set's reader come in; checkpoints, metrics and the best weights go into the run's folder. Labels, losses
and what is counted stay on the device; the host looks at them every few seconds and before it saves.
"""

import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch.nn import functional as F

from cxrfast.config import Runtime, TrainConfig
from cxrfast.distributed import World, parallel
from cxrfast.errors import LoadError, RunError
from cxrfast.labels import positive_weights, targets
from cxrfast.machine import resident_bytes
from cxrfast.metrics import auroc, bce
from cxrfast.models.classifier import Classifier
from cxrfast.models.precision import autocast, compiled, use_tf32
from cxrfast.pipelines.loader import Batch, Loader
from cxrfast.pipelines.order import Augment, EvalOrder, TrainOrder
from cxrfast.pipelines.proof import EVERY
from cxrfast.pipelines.reader import Reader
from cxrfast.progress import progress
from cxrfast.runs.run import Run, part_rows
from cxrfast.training.micro_batch import memory_explained
from cxrfast.training.monitor import NEVER, RATE_STEPS, Timed, Watch, profiled
from cxrfast.training.predict import complete, score
from cxrfast.training.signals import Preempted, StopRequest, Votes, is_lost_rank
from cxrfast.training.tensorboard import Board
from cxrfast.units import duration

BEAT_SECONDS = 30.0
"""Between two heartbeats in state.json."""

EXPLODED = 100.0
"""Mean BCE of a step above which training ends; chance is 0.69."""


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


class Trainer:
    """Trains a run from wherever its last checkpoint is to its end, or to a signal."""

    def __init__(self, run: Run, ranks: World, model: Classifier, reader: Reader, runtime: Runtime) -> None:
        config = run.config
        self.run, self.config, self.ranks, self.runtime = run, config, ranks, runtime
        use_tf32(config.precision)
        torch.backends.cudnn.benchmark = not runtime.deterministic  # shapes are fixed
        rows = run.rows()
        self.val_rows = part_rows(rows, "val")
        self._put_labels(rows, reader.info.images)
        self.order = train_order(config, rows, ranks, reader.info.rows_per_shard)
        loading: dict[str, Any] = {
            "device": ranks.device,
            "engine": runtime.engine,
            "threads": runtime.threads,
            "local_ranks": ranks.local_size,
            "cache": runtime.cache,
        }
        self.train_loader = Loader(
            reader, self.order, augment=Augment(degrees=config.degrees, flip=config.flip), **loading
        )
        val_order = EvalOrder(rows=self.val_rows, micro_batch=config.micro_batch, rank=ranks.rank, world=ranks.size)
        self.val_loader = Loader(reader, val_order, **loading)
        self._put_model(model)
        # two moments of every weight in one kernel, on GPUs and CPUs
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=config.learning_rate, fused=True)
        self.scaler = torch.amp.GradScaler(ranks.device.type, enabled=config.precision == "fp16")
        self.schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(
            self.optimizer, factor=config.factor, patience=config.patience
        )
        self.epoch, self.consumed, self.stale, self.best = 0, 0, 0, float("inf")
        self.best_auroc: float | None = None
        """Validation AUROC of the epoch with the lowest loss."""
        self.begun, self.spent = time.monotonic(), 0.0
        """When this epoch was begun here, and the seconds spent on it before."""
        self.loss = torch.zeros((), dtype=torch.float64, device=ranks.device)
        """Sum of this rank's share of the epoch's losses."""
        self.bad_step = torch.full((), NEVER, device=ranks.device)
        """First step of the epoch whose loss was not finite, or above `EXPLODED`; NEVER if there is none."""
        self.board: Board | None = None
        self.stop = StopRequest()
        self.votes = Votes(ranks, questions=3)
        self._beat = 0.0
        self.is_rate_told = False

    def _put_labels(self, rows: pd.DataFrame, images: int) -> None:
        """Targets and mask by row, (images, L): on the device for the loss, on the host for the counts."""
        target, mask = targets(rows[list(self.config.labels)].to_numpy(), self.config.policies)
        self.host_target = np.zeros((images, target.shape[1]), np.float32)
        self.host_mask = np.zeros((images, target.shape[1]), bool)
        self.host_target[rows["row"]], self.host_mask[rows["row"]] = target, mask
        self.target = torch.from_numpy(self.host_target).to(self.ranks.device)
        self.mask = torch.from_numpy(self.host_mask).to(self.ranks.device)
        self.positive_weights: torch.Tensor | None = None
        if self.config.positive_weights:
            is_train = (rows["part"] == "train").to_numpy()
            self.positive_weights = torch.from_numpy(positive_weights(target[is_train], mask[is_train])).to(
                self.ranks.device
            )

    def _put_model(self, model: Classifier) -> None:
        ranks = self.ranks
        if self.config.sync_bn and ranks.device.type != "cuda":
            raise RunError("--sync-bn works on GPUs only: leave it out, or use --device cuda")
        if self.config.sync_bn and ranks.size > 1:
            torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
        self.model = model.to(ranks.device)
        self.forward: torch.nn.Module = self.model
        self.unsynced: Callable[[], AbstractContextManager[None]] = nullcontext
        if ranks.size > 1:
            self.forward = parallel(self.model)
            self.unsynced = self.forward.no_sync
        if self.runtime.compile:
            self.forward = compiled(self.forward, self.runtime.compile)

    # The loop

    def fit(self) -> None:
        """Train until the epochs or the patience are used up.

        Raises Preempted, with everything saved, when a signal asked for an end; RunError for a loss that is not finite
        and for another rank that ended. state.json says which it was.
        """
        self.restore()
        self._set_state("running")
        if self.ranks.is_first and not self.runtime.quiet:
            self._tell_engine()
        if self.runtime.tensorboard and self.ranks.is_first:
            self.board = Board(self.run.tensorboard_path, self.epoch)
        try:
            with self.stop:  # to the end of the last word: torchrun sends SIGTERM when another rank has ended
                try:
                    with memory_explained(self.config, self.ranks):
                        while self.epoch < self.config.epochs and self.stale < self.config.stop_after:
                            self.end_epoch(*self.train_epoch())
                except Preempted as end:
                    self._set_state("preempted", signal=end.signal)
                    raise
                except BaseException as error:
                    self._failed(error)
                    raise
        finally:
            if self.board:
                self.board.close()
        self._set_state("done")

    def _tell_engine(self) -> None:
        """Say who decodes where nobody asked for an engine, and what of it cannot be proven."""
        loader = self.train_loader
        if self.runtime.engine == "auto":
            print(f"{self.run.name}: engine {loader.engine}: {loader.why}", file=sys.stderr, flush=True)
        if loader.proof and (unknown := loader.proof.unknown):
            print(
                f"{self.run.name}: the set holds no means of {unknown:,} rows, so that 1 in {EVERY} of them is decoded by the "
                f"CPU, too, and compared: `cxrfast verify --repair {loader.reader.folder}` adds them",
                file=sys.stderr,
                flush=True,
            )

    def train_epoch(self) -> tuple[int, float]:
        """Take the optimiser steps left in this epoch. Returns their number and the seconds spent waiting for data."""
        self.begun = time.monotonic()
        self.model.train()
        self.forward.train()
        steps = self.order.global_batches(self.epoch, self.consumed)
        size = self.config.size_at(self.epoch)
        batches = Timed(self.train_loader.epoch(self.epoch, self.consumed, scale=size), self.ranks.device)
        watch = Watch(self, batches, len(steps))
        label = f"{self.run.name} epoch {self.epoch + 1}"
        quiet = (
            self.runtime.quiet or not self.ranks.is_first or not len(steps)
        )  # none are left after a stop in validation
        with (
            self._profiled() as profiled,
            progress(label, len(steps) * self.config.global_batch, quiet=quiet) as advance,
        ):
            for done, rows in enumerate(steps, 1):
                self.step(rows, batches)
                self.consumed += self.config.global_batch
                advance(self.config.global_batch, watch.note())
                profiled()
                watch.after(done)
        batches.close()
        return len(steps), batches.waited

    def step(self, rows: np.ndarray, batches: Iterator[Batch]) -> None:
        """One optimiser step over the global batch `rows`, of which this rank sees its micro-batches."""
        mine = self.order.accumulation // self.ranks.size
        # BCE summed over unmasked entries, over their number in the global batch; DDP averages over ranks, hence the size.
        weight = self.ranks.size / max(1, int(self.host_mask[rows].sum()))
        total = torch.zeros_like(self.loss)
        for i in range(mine):
            batch = next(batches)
            with nullcontext() if i == mine - 1 else self.unsynced():
                with self.autocast():
                    logits = self.forward(batch.image)
                loss = weight * masked_bce_sum(
                    logits.float(), self.target[batch.row], self.mask[batch.row], self.positive_weights
                )
                self.scaler.scale(loss).backward()
            total += loss.detach()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.loss += total / self.ranks.size
        is_bad = ~(total < EXPLODED)  # also NaN
        self.bad_step = torch.where(
            is_bad & (self.bad_step == NEVER), self.consumed // self.config.global_batch, self.bad_step
        )

    def autocast(self) -> torch.autocast:
        return autocast(self.ranks.device, self.config.precision)

    def end_epoch(self, steps: int, waited: float) -> None:
        """Validate, move the schedule, write metrics, best weights and the checkpoint of the next epoch's start."""
        losses = self.ranks.gather(float(self.loss))
        self.refuse_bad()
        trained = time.monotonic()
        result = self._validate(losses)
        seconds = trained - self.begun
        measured = {
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "seconds": self._seconds(),
            "images_per_s": steps * self.config.global_batch / seconds if steps else None,
            "waiting_share": waited / seconds,
            "resident_bytes": resident_bytes(),
            "gpu_peak_bytes": self.gpu_peak(),
            "batchnorm_batch": self.config.micro_batch * (self.ranks.size if self.config.sync_bn else 1),
        }
        self.schedule.step(result["val_loss"])
        better = result["val_loss"] < self.best
        self.best, self.stale = (result["val_loss"], 0) if better else (self.best, self.stale + 1)
        self.best_auroc = result["val_auroc"] if better else self.best_auroc
        if self.ranks.is_first:
            line = {"epoch": self.epoch, "size": self.config.size_at(self.epoch), **result, **measured}
            self.run.add_metrics(line)
            if self.board:
                self.board.add(line, self.epoch)
            if better:
                self.run.write_weights(self.model.state_dict())
            self._report(result, measured, better)
        area = self.config.area_at(self.epoch)
        self.epoch, self.consumed = self.epoch + 1, 0
        self.begun, self.spent = time.monotonic(), 0.0
        self.loss.zero_()
        self.save()
        if measured["images_per_s"]:
            self.beat(measured["images_per_s"], area, seldom=False)

    def _seconds(self) -> float:
        """Spent on this epoch so far, before a stop, too."""
        return self.spent + time.monotonic() - self.begun

    def _validate(self, losses: list[float] | None) -> dict[str, Any]:
        """Losses and AUROC on the validation rows, on every rank. Raises Preempted, with all saved, if a signal comes."""
        micro_batches = -(-len(self.val_rows) // self.config.micro_batch)
        votes = iter(range(micro_batches // self.ranks.size))  # as many as every rank has

        def watched(n: int = 1, note: str = "") -> None:
            if next(votes, None) is not None and (stop := self.votes.cast(self.stop.number, 0, 0)[0]):
                self.preempt(stop)

        scores = score(self.model, self.val_loader, self.ranks, self.config.precision, watched)
        self.votes.close()
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
        if not np.isfinite(result["val_loss"]):
            raise RunError(f"the validation loss of epoch {self.epoch + 1} is not finite; {self._last_good}")
        return result

    def _report(self, result: dict[str, Any], measured: dict[str, Any], better: bool) -> None:
        if not self.runtime.quiet:
            shown = "undefined" if result["val_auroc"] is None else f"{result['val_auroc']:.4f}"
            print(
                f"{self.run.name} epoch {self.epoch + 1}: train loss {result['train_loss']:.4f}, validation loss "
                f"{result['val_loss']:.4f}{' (best)' if better else ''}, AUROC {shown}, "
                f"{measured['images_per_s'] or 0:.0f} images/s",
                file=sys.stderr,
                flush=True,
            )

    def gpu_peak(self) -> int | None:
        return torch.cuda.max_memory_allocated() if self.ranks.device.type == "cuda" else None

    def _profiled(self) -> AbstractContextManager[Callable[[], None]]:
        """What to call after each step; a trace of a few of them goes into the run's folder where it was asked for."""
        path = self.run.profile_path
        if not (self.runtime.profile and self.ranks.is_first) or path.exists():
            return nullcontext(lambda: None)
        return profiled(path)

    # Ends

    @property
    def _held(self) -> str:
        if not self.run.has_checkpoint:
            return "no checkpoint was written yet"
        return f"{self.run.checkpoint_path} holds the last good state"

    @property
    def _last_good(self) -> str:
        return f"{self._held}: lower --learning-rate or use --precision fp32, under another --name"

    def is_bad(self) -> bool:
        """Has a step's loss exploded, or an image been decoded wrong, on this rank? Waits for the device."""
        return int(self.bad_step) != NEVER or self._wrong_pixels() is not None

    def _wrong_pixels(self) -> str | None:
        return self.train_loader.problem() or self.val_loader.problem()

    def refuse_bad(self) -> None:
        """To be called by all ranks. Raises on rank 0, and ends the others: RunError where a step's loss was not finite,
        LoadError where an image was decoded wrong."""
        found = self.ranks.gather((int(self.bad_step), self._wrong_pixels()))

        def check() -> None:
            steps, problems = zip(*found or [(NEVER, None)], strict=True)
            if wrong := next((problem for problem in problems if problem), None):
                raise LoadError(f"{self.run.name}: {wrong}; {self._held}, the same command goes on from there")
            if (step := min(steps)) != NEVER:
                rows = self.order.global_batches(self.epoch)[step]
                raise RunError(
                    f"{self.run.name}: the loss was not finite, or above {EXPLODED:g}, in step {step + 1} of epoch "
                    f"{self.epoch + 1}, on rows {' '.join(map(str, rows.tolist()))}; {self._last_good}"
                )

        self.ranks.on_first(check)

    def preempt(self, number: int) -> None:
        """Save and raise Preempted for the signal `number`; all ranks call it at the same step."""
        self.votes.close()
        self.save()
        end = Preempted(number)
        if self.ranks.is_first and not self.runtime.quiet:
            print(f"{self.run.name}: {end.signal}; saved, the same command goes on", file=sys.stderr, flush=True)
        raise end

    def _failed(self, error: BaseException) -> None:
        """Write down how the run ended. Raises SystemExit(2), after a message, if it was for another rank."""
        if isinstance(error, SystemExit):  # rank 0 has said why
            return
        if self.ranks.size == 1 or not is_lost_rank(error):
            self._set_state("failed", always=True, error=f"{type(error).__name__}: {error}"[:500])
            return
        lost = (
            "another rank ended, its message stands elsewhere in this log (none: it was killed, perhaps for want of "
            "memory); the same command goes on from the last checkpoint"
        )
        if self.run.state().get("state") != "failed":
            self._set_state("failed", always=True, error=lost)
        print(f"cxrfast: rank {self.ranks.rank}: {self.run.name}: {lost}", file=sys.stderr, flush=True)
        raise SystemExit(2) from error

    def _set_state(self, state: str, always: bool = False, **more: Any) -> None:
        """`always`: also from other ranks than the first, which may be gone."""
        if self.ranks.is_first or always:
            self._beat = time.monotonic()
            self.run.set_state(
                state,
                host=socket.gethostname(),
                job=os.environ.get("SLURM_JOB_ID"),
                epoch=self.epoch,
                epochs=self.config.epochs,
                consumed=self.consumed,
                epoch_images=self.order.steps * self.config.global_batch,
                best_val_loss=None if self.best == float("inf") else self.best,
                best_val_auroc=self.best_auroc,
                **more,
            )

    def beat(self, images_per_s: float, area: float | None = None, seldom: bool = True) -> float:
        """Say in state.json that the run lives; if `seldom`, now and then. Returns the seconds left, at most.

        `area`: of the images that the rate is of, see `TrainConfig.area_at`; default: those of this epoch.
        """
        this = self.config.area_at(self.epoch)
        at_scale = images_per_s * (area or this)
        images = self.order.steps * self.config.global_batch
        seconds = (self.config.work(self.epoch, images, len(self.val_rows)) - self.consumed * this) / at_scale
        if self.ranks.is_first and not (seldom and time.monotonic() - self._beat < BEAT_SECONDS):
            self._set_state("running", images_per_s=images_per_s, images_per_s_at_scale=at_scale, eta_seconds=seconds)
        return seconds

    def tell_rate(self, images_per_s: float) -> None:
        """What the first steps let expect of the rest, once."""
        self.is_rate_told = True
        seconds = self.beat(images_per_s, seldom=False)
        if not self.runtime.quiet:
            epochs = f"{self.config.epochs - self.epoch} epochs are left"
            print(
                f"{self.run.name}: {images_per_s:,.3g} images/s after {RATE_STEPS[1]} steps; {epochs}, {duration(seconds)} "
                "at most",
                file=sys.stderr,
                flush=True,
            )

    # Checkpoints

    def save(self) -> None:
        """Write last.pt: all that the rest of the run depends on. Raises RunError, and writes nothing, for a bad loss."""
        self.refuse_bad()
        losses, rng = self.ranks.gather(self.loss.item()), self.ranks.gather(self._rng())

        def write() -> None:
            if not all(torch.isfinite(tensor).all() for tensor in self.model.parameters()):
                raise RunError(
                    f"{self.run.name}: weights are not finite after {self.consumed:,} images of epoch {self.epoch + 1}; "
                    f"{self._last_good}"
                )
            self.run.write_checkpoint(
                {
                    "model": self.model.state_dict(),
                    "optimizer": self.optimizer.state_dict(),
                    "scaler": self.scaler.state_dict(),
                    "schedule": self.schedule.state_dict(),
                    "epoch": self.epoch,
                    "consumed": self.consumed,
                    "stale": self.stale,
                    "best": self.best,
                    "best_auroc": self.best_auroc,
                    "losses": losses,
                    "spent": self._seconds(),
                    "rng": rng,
                }
            )

        self.ranks.on_first(write)

    def _rng(self) -> dict[str, torch.Tensor | None]:
        """States of this rank's generators, which dropout and stochastic depth draw from."""
        device = self.ranks.device
        return {
            "cpu": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        }

    def restore(self) -> None:
        """Take up the last checkpoint, if there is one."""
        checkpoint = self.run.read_checkpoint()
        if checkpoint is None:
            return
        self.model.load_state_dict(checkpoint["model"])
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        self.scaler.load_state_dict(checkpoint["scaler"])
        self.schedule.load_state_dict(checkpoint["schedule"])
        self.epoch, self.consumed = checkpoint["epoch"], checkpoint["consumed"]
        self.stale, self.best, self.best_auroc = checkpoint["stale"], checkpoint["best"], checkpoint["best_auroc"]
        self.spent = checkpoint["spent"]
        losses = checkpoint["losses"]
        same = len(losses) == self.ranks.size
        self.loss.fill_(losses[self.ranks.rank] if same else sum(losses) if self.ranks.is_first else 0.0)
        # another number of ranks cannot go on bitwise: each takes one that is there
        rng = checkpoint["rng"][self.ranks.rank % len(checkpoint["rng"])]
        torch.set_rng_state(rng["cpu"])
        if self.ranks.device.type == "cuda" and rng["cuda"] is not None:
            torch.cuda.set_rng_state(rng["cuda"], self.ranks.device)
        if self.ranks.is_first:
            self.run.cut_metrics(self.epoch)
            if not self.runtime.quiet:
                print(
                    f"{self.run.name}: going on in epoch {self.epoch + 1}, after {self.consumed:,} images",
                    file=sys.stderr,
                )


def masked_bce_sum(
    logits: torch.Tensor, target: torch.Tensor, mask: torch.Tensor, positive_weights: torch.Tensor | None = None
) -> torch.Tensor:
    """Binary cross-entropy with logits, (N, L) each, summed over the entries that count; `positive_weights`: (L,)."""
    losses = F.binary_cross_entropy_with_logits(logits, target, reduction="none", pos_weight=positive_weights)
    return (losses * mask).sum()
