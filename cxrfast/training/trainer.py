"""The training loop of one run, with its model, optimiser, schedule and counters.

A run and a shard set's reader come in; checkpoints, metrics and the best weights go into the run's folder. Labels and losses
stay on the device; the host reads the losses every few seconds and before it saves.
"""

import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, nullcontext
from typing import Any

import numpy as np
import torch

from cxrfast.config import Runtime
from cxrfast.distributed import World
from cxrfast.errors import LoadError, RunError
from cxrfast.machine import resident_bytes
from cxrfast.models.classifier import Classifier
from cxrfast.models.precision import autocast, use_tf32
from cxrfast.pipelines.loader import Batch, Loader
from cxrfast.pipelines.order import Augment, EvalOrder
from cxrfast.pipelines.proof import EVERY
from cxrfast.pipelines.reader import Reader
from cxrfast.progress import progress
from cxrfast.runs.run import Run, part_rows
from cxrfast.runs.tensorboard import Board
from cxrfast.training import checkpoint
from cxrfast.training.checkpoint import Counters
from cxrfast.training.loss import EXPLODED, NEVER, EpochLoss, Targets
from cxrfast.training.micro_batch import memory_explained
from cxrfast.training.monitor import RATE_STEPS, Action, Heartbeat, Monitor, Timed, is_over, profiled
from cxrfast.training.optimizer import make_optimizer
from cxrfast.training.predict import complete, score
from cxrfast.training.schedule import Schedule
from cxrfast.training.setup import distribute, train_order
from cxrfast.training.signals import LOST_RANK, Stopped, StopRequest, is_lost_rank
from cxrfast.units import duration

log = logging.getLogger(__name__)

OnEpoch = Callable[[dict[str, Any]], object]
"""Takes an epoch's line of metrics.jsonl."""


class Trainer:
    """Trains a run from its last checkpoint to its end, or until a signal."""

    def __init__(
        self,
        run: Run,
        ranks: World,
        model: Classifier,
        reader: Reader,
        runtime: Runtime,
        on_epoch: OnEpoch | None = None,
    ) -> None:
        config = run.config
        self.run, self.config, self.ranks, self.runtime, self.on_epoch = run, config, ranks, runtime, on_epoch
        use_tf32(config.precision)
        torch.backends.cudnn.benchmark = not runtime.deterministic  # shapes are fixed
        rows = run.rows()
        self.val_rows = part_rows(rows, "val")
        self.targets = Targets(rows, config, reader.info.images, ranks.device)
        self.order = train_order(config, rows, ranks, reader.info.rows_per_shard)
        loading: dict[str, Any] = {
            "device": ranks.device,
            "engine": runtime.engine,
            "threads": runtime.threads,
            "local_ranks": ranks.local_size,
            "cache": runtime.cache,
        }
        augment = Augment(degrees=config.degrees, flip=config.flip)
        self.train_loader = Loader(reader, self.order, augment=augment, **loading)
        val_order = EvalOrder(rows=self.val_rows, micro_batch=config.micro_batch, rank=ranks.rank, world=ranks.size)
        self.val_loader = Loader(reader, val_order, **loading)
        self.model = model.to(ranks.device)
        self.forward, self.unsynced = distribute(self.model, config, runtime, ranks)
        self.optimizer = make_optimizer(config, self.model)
        self.scaler = torch.amp.GradScaler(ranks.device.type, enabled=config.precision == "fp16")
        self.schedule = Schedule(config, self.optimizer, self.order.steps)
        names = ("model", "optimizer", "scaler", "schedule")
        self.stateful = {name: getattr(self, name) for name in names}
        self.counters = Counters()
        self.begun, self.spent = time.monotonic(), 0.0
        """When this process began the epoch, and seconds spent on it by earlier ones."""
        self.loss = EpochLoss(ranks.device)
        self.board: Board | None = None
        self.stop = StopRequest(run.name, answers=ranks.is_first)
        self.monitor = Monitor(ranks, runtime.checkpoint_minutes, runtime.checkpoint_steps)
        self.is_bad = False
        """Whether this rank has seen a bad loss or image."""
        self.first_pid = 0
        """Process number of the first rank, once the training has begun."""
        self.heartbeat = Heartbeat(run, self.counters, self.order.steps * config.global_batch, len(self.val_rows))

    # The loop

    def fit(self) -> None:
        """Train until all epochs are done, or early stopping ends the run.

        Raises Stopped, with everything saved, after a signal; RunError for a loss that is not finite; SystemExit(2) if
        another rank has ended. The run's state records which it was.
        """
        self.restore()
        self.first_pid = self.ranks.on_first(self._write_start)
        self._log_engine()
        with ExitStack() as stack:
            if self.runtime.tensorboard and self.ranks.is_first:
                self.board = stack.enter_context(closing(Board(self.run.tensorboard_path, self.counters.epoch)))
            # until the final state is written: torchrun sends SIGTERM when another rank has ended
            stack.enter_context(self.stop)
            try:
                with memory_explained(self.config, self.ranks):
                    while not is_over(self.config, self.counters):
                        self.end_epoch(*self.train_epoch())
            except Stopped as end:
                if self.ranks.is_first:
                    self.heartbeat.write("preempted", signal=end.signal)
                raise
            except BaseException as error:
                self._failed(error)
                raise
        if self.ranks.is_first:
            self.heartbeat.write("done")

    def _write_start(self) -> int:
        """Returns the process number of the first rank, which the run's state names while it is ours."""
        self.heartbeat.write("running")
        self.run.keep_epochs()
        return os.getpid()

    def train_epoch(self) -> tuple[int, float]:
        """Take the remaining optimiser steps of this epoch. Returns their number and the seconds spent waiting for data."""
        self.begun = time.monotonic()
        self.model.train()
        self.forward.train()
        counters, global_batch = self.counters, self.config.global_batch
        steps = self.order.global_batches(counters.epoch, counters.consumed)
        size = self.config.size_at(counters.epoch)
        batches = Timed(self.train_loader.epoch(counters.epoch, counters.consumed, scale=size), self.ranks.device)
        self.monitor.start_epoch(len(steps), counters.consumed)
        label = f"{self.run.name} epoch {counters.epoch + 1}"
        with (
            profiled(self.run.profile_path, self.runtime.profile and self.ranks.is_first) as profiled_step,
            progress(label, len(steps) * global_batch) as advance,
        ):
            for done, rows in enumerate(steps, 1):
                self.step(rows, batches)
                counters.consumed += global_batch
                advance(global_batch, self.look(batches))
                profiled_step()
                self.after_step(done)
        batches.close()
        return len(steps), batches.waited

    def step(self, rows: np.ndarray, batches: Iterator[Batch]) -> None:
        """One optimiser step over the global batch `rows`, using this rank's micro-batches."""
        self.schedule.start_step(self.counters.epoch, self.counters.consumed // self.config.global_batch)
        mine = self.order.accumulation // self.ranks.size
        # BCE summed over unmasked entries / their number in the global batch; DDP averages over ranks, hence the size
        weight = self.ranks.size / self.targets.entries(rows)
        total = torch.zeros_like(self.loss.total)
        for i in range(mine):
            batch = next(batches)
            with nullcontext() if i == mine - 1 else self.unsynced():
                with self.autocast():
                    logits = self.forward(batch.image)
                loss = weight * self.targets.loss_sum(logits.float(), batch.row)
                self.scaler.scale(loss).backward()
            total += loss.detach()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.loss.add(total, self.counters.consumed // self.config.global_batch, self.ranks.size)

    def autocast(self) -> torch.autocast:
        return autocast(self.ranks.device, self.config.precision)

    def look(self, batches: Timed) -> str:
        """Every few seconds, wait for the device and return loss, waiting and memory for the progress bar; else ""."""
        if not self.monitor.is_look_due():
            return ""
        self.is_bad = int(self.loss.bad_step) != NEVER or self._wrong_pixels() is not None
        images, seconds = self.counters.consumed, time.monotonic() - self.monitor.begun
        memory = (self.gpu_peak() or resident_bytes()) / 2**30
        # rank 0's share of all steps since the epoch began
        loss = float(self.loss.total) * self.ranks.size * self.config.global_batch / images
        if self.ranks.is_first and self.heartbeat.is_due():
            self.heartbeat.beat((images - self.monitor.first_images) / seconds)
        return f"loss {loss:.4f}, waiting {batches.waited / seconds:.0%}, {memory:.1f} GiB"

    def after_step(self, done: int) -> None:
        """Save, stop or continue after step `done` of this epoch. Raises Stopped, or RunError for a bad loss."""
        rate = self.monitor.steady_rate(done, self.counters.consumed)
        if rate and self.ranks.is_first:
            left = self.heartbeat.beat(rate)
            epochs = f"{self.config.epochs - self.counters.epoch} epochs are left"
            log.info(
                f"{self.run.name}: {rate:,.3g} images/s after {RATE_STEPS[1]} steps; {epochs}, {duration(left)} at most"
            )
        match self.monitor.after_step(done, self.stop.number, self.is_bad):
            case Action.CHECK:
                self.refuse_bad()
            case Action.STOP:
                self._save_and_stop()
            case Action.SAVE:
                self.save()

    def end_epoch(self, steps: int, waited: float) -> None:
        """Validate, update the schedule, write metrics, best weights and a checkpoint at the start of the next epoch.

        `steps`, `waited`: as returned by `train_epoch`.
        """
        losses = self.ranks.gather(float(self.loss.total))
        self.refuse_bad()
        seconds = time.monotonic() - self.begun
        rate, area = steps * self.config.global_batch / seconds, self.config.area_at(self.counters.epoch)
        result = self._validate(losses)
        measured = {
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "seconds": self._seconds(),
            "images_per_s": rate or None,
            "waiting_share": waited / seconds,
            "resident_bytes": resident_bytes(),
            "gpu_peak_bytes": self.gpu_peak(),
            "batchnorm_batch": self.config.micro_batch * (self.ranks.size if self.config.sync_bn else 1),
        }
        self.schedule.end_epoch(self.counters.epoch, result["val_loss"])
        is_best = self.counters.add_validation(result["val_loss"], result["val_auroc"])
        line = {"epoch": self.counters.epoch, "size": self.config.size_at(self.counters.epoch), **result, **measured}
        self.ranks.on_first(lambda: self._write_epoch(line, is_best))
        self.counters.next_epoch()
        self.begun, self.spent = time.monotonic(), 0.0
        self.loss.total.zero_()
        self.save()
        if rate and self.ranks.is_first:
            self.heartbeat.beat(rate, area)
        if self.on_epoch:  # last: if it raises, nothing is lost
            told = self.on_epoch
            self.ranks.on_first(lambda: told(line))

    def _validate(self, losses: list[float] | None) -> dict[str, Any]:
        """Losses and AUROC on the validation rows, on every rank. Raises Stopped, with everything saved, after a signal."""
        micro_batches = -(-len(self.val_rows) // self.config.micro_batch)
        votes = iter(range(micro_batches // self.ranks.size))  # as many as every rank has

        def watched(n: int = 1, note: str = "") -> None:
            if next(votes, None) is None:
                return
            if self.monitor.after_validation_batch(self.stop.number) is Action.STOP:
                self._save_and_stop()

        scores = score(self.model, self.val_loader, self.ranks, self.config.precision, watched)
        self.monitor.votes.close()

        def measure() -> dict[str, Any]:
            assert scores is not None  # gathered to the first rank
            assert losses is not None
            found = complete(scores, self.val_rows, self.run.name)
            return {"train_loss": sum(losses) / self.order.steps, **self.targets.validate(found.logits, found.row)}

        result: dict[str, Any] = self.ranks.on_first(measure)
        if not np.isfinite(result["val_loss"]):
            epoch = self.counters.epoch + 1
            raise RunError(f"the validation loss of epoch {epoch} is not finite; {self._last_good}")
        return result

    def _write_epoch(self, line: dict[str, Any], is_best: bool) -> None:
        """Write metrics, events and, if the epoch was the best, weights into the run; log one line."""
        epoch = line["epoch"]
        self.run.add_metrics(line)
        if self.board:
            self.board.add(line, epoch)
        if is_best:
            self.run.write_weights(self.model.state_dict())
        shown = "undefined" if line["val_auroc"] is None else f"{line['val_auroc']:.4f}"
        log.info(
            f"{self.run.name} epoch {epoch + 1}: train loss {line['train_loss']:.4f}, validation loss "
            f"{line['val_loss']:.4f}{' (best)' if is_best else ''}, AUROC {shown}, {line['images_per_s'] or 0:.0f} images/s"
        )

    def _seconds(self) -> float:
        """Seconds spent on this epoch so far, including before a stop."""
        return self.spent + time.monotonic() - self.begun

    def gpu_peak(self) -> int | None:
        return torch.cuda.max_memory_allocated() if self.ranks.device.type == "cuda" else None

    # Checkpoints

    def save(self) -> None:
        """Write a checkpoint; all ranks call it. For a bad loss or bad weights, raises RunError and writes nothing."""
        self.refuse_bad()
        self.ranks.on_first(self._refuse_bad_weights)
        checkpoint.save(self.run, self.ranks, self.counters, self.stateful, self.loss.total, self._seconds())

    def restore(self) -> None:
        """Resume from the last checkpoint, if there is one."""
        spent = checkpoint.restore(self.run, self.ranks, self.counters, self.stateful, self.loss.total)
        if spent is None:
            return
        self.spent = spent
        self.ranks.on_first(lambda: self.run.cut_metrics(self.counters.epoch))
        log.info(
            f"{self.run.name}: resuming in epoch {self.counters.epoch + 1} after {self.counters.consumed:,} images"
        )

    # Ends

    def _wrong_pixels(self) -> str | None:
        return self.train_loader.problem() or self.val_loader.problem()

    def refuse_bad(self) -> None:
        """Raise RunError if a step's loss was not finite, LoadError if an image was decoded wrongly; all ranks call it.

        Rank 0 raises, the other ranks exit.
        """
        found = self.ranks.gather((int(self.loss.bad_step), self._wrong_pixels()))

        def check() -> None:
            steps, problems = zip(*found or [(NEVER, None)], strict=True)
            if wrong := next((problem for problem in problems if problem), None):
                raise LoadError(f"{self.run.name}: {wrong}; {self._held}, the same command resumes from there")
            if (step := min(steps)) != NEVER:
                epoch = self.counters.epoch
                rows = self.order.global_batches(epoch)[step]
                raise RunError(
                    f"{self.run.name}: the loss was not finite, or above {EXPLODED:g}, in step {step + 1} of epoch "
                    f"{epoch + 1}, on rows {' '.join(map(str, rows.tolist()))}; {self._last_good}"
                )

        self.ranks.on_first(check)

    def _refuse_bad_weights(self) -> None:
        if not all(torch.isfinite(tensor).all() for tensor in self.model.parameters()):
            raise RunError(
                f"{self.run.name}: weights are not finite after {self.counters.consumed:,} images of epoch "
                f"{self.counters.epoch + 1}; {self._last_good}"
            )

    @property
    def _held(self) -> str:
        if not self.run.has_checkpoint:
            return "no checkpoint was written yet"
        return f"{self.run.checkpoint_path} holds the last good state"

    @property
    def _last_good(self) -> str:
        return f"{self._held}: lower --learning-rate or use --precision fp32, under another --name"

    def _save_and_stop(self) -> None:
        """Save, then raise Stopped for the signal that the ranks agreed on; all ranks call it at the same step."""
        self.save()
        end = Stopped(self.run.name, self.monitor.signal)
        log.info(f"{self.run.name}: {end.signal}; saved, the same command resumes")
        raise end

    def _failed(self, error: BaseException) -> None:
        """Record how the run ended. If another rank was the cause, log that and raise SystemExit(2)."""
        if isinstance(error, SystemExit):  # rank 0 has said why
            return
        if self.ranks.size == 1 or not is_lost_rank(error):
            self.heartbeat.write("failed", error=f"{type(error).__name__}: {error}"[:500])
            return
        # rank 0 may be gone: any rank writes, unless another training took over
        state = self.run.state()
        if state.get("pid") == self.first_pid and state.get("state") != "failed":
            self.heartbeat.write("failed", error=LOST_RANK)
        log.error(f"{self.run.name}: {LOST_RANK}")
        raise SystemExit(2) from error

    # Messages

    def _log_engine(self) -> None:
        """Log which engine `auto` chose, and how many rows lack the means that prove its pixels."""
        loader = self.train_loader
        if self.runtime.engine == "auto":
            log.info(f"{self.run.name}: engine {loader.engine}: {loader.why}")
        if loader.proof and (unknown := loader.proof.unknown):
            log.info(
                f"{self.run.name}: the set holds no means of {unknown:,} rows, so 1 in {EVERY} of them is also decoded by "
                f"the CPU and compared: `cxrfast verify --repair {loader.reader.folder}` adds the means"
            )
