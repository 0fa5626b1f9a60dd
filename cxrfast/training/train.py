"""Train one classifier at one scale on one fold: `torchrun --nproc_per_node=6 -m cxrfast.train`, or `cxrfast train`.

A shard set and a configuration come in; a run folder with checkpoints, metrics and the best weights goes out. Started
again, it resumes from the last checkpoint, with the same rows in the same order.
"""

import logging
import os
from dataclasses import replace
from datetime import timedelta

import pandas as pd
import torch

from cxrfast.config import AUTO, Runtime, TrainConfig
from cxrfast.distributed import World, world
from cxrfast.models.classifier import Classifier
from cxrfast.models.networks.factories import trusted
from cxrfast.pipelines.reader import Reader
from cxrfast.runs.folder import RunFolder
from cxrfast.runs.lease import locked_by_first
from cxrfast.runs.remarks import relabelling_note
from cxrfast.runs.run import Run
from cxrfast.shards.format.lock import Lease
from cxrfast.shards.parts import division
from cxrfast.training import resume, setup
from cxrfast.training.first_weights import FirstWeights
from cxrfast.training.micro_batch import largest_micro_batch, memory_explained
from cxrfast.training.trainer import OnEpoch, Trainer

log = logging.getLogger(__name__)


def train(config: TrainConfig, runtime: Runtime, on_epoch: OnEpoch | None = None) -> Run:
    """Train the run of this configuration, or resume it. Returns it when it is done.

    `on_epoch` is called after each epoch, once it is saved, with the epoch's line of metrics.jsonl, by the first rank alone. What
    it raises ends the training, which the same call resumes.

    A network of one's own, `config.arch` as package.module:factory, is imported.

    Raises Stopped (a SystemExit), with everything saved, after a signal; RunError if another process writes into its folder.
    """
    if runtime.stage:
        runtime = replace(runtime, shards=setup.staged(runtime.shards, runtime.stage, config.scale))
    if runtime.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
        torch.use_deterministic_algorithms(True)
    with world(runtime.device, timeout=timedelta(minutes=runtime.dist_timeout)) as ranks, trusted(config.arch):
        torch.manual_seed(config.seed)
        model = Classifier.of(config, recompute=runtime.recompute)
        for side in config.sides:
            model.check_size(side)
        folder = RunFolder.of(runtime.runs, config.arch, config.scale, config.fold, runtime.name)
        reader = Reader(runtime.shards, config.scale)
        config = replace(config, allow_partial=setup.is_partial(reader, config.allow_partial))
        subset = None if runtime.subset is None else setup.read_subset(runtime.subset)
        rows = setup.select_rows(reader.shard_set.rows(), config, reader.rows, subset)
        log.info(f"{folder.name}: {setup.split_in_words(config, reader.info, rows)}")
        if ranks.is_first:
            missing = (
                ["the set's build is not finished: only the rows that are there take part"]
                if config.allow_partial
                else []
            )
            for warning in [*missing, *setup.label_warnings(config, rows)]:
                log.warning(f"{folder.name}: {warning}")
        with locked_by_first(folder, "training", ranks) as lease:
            return _train(config, runtime, ranks, model, reader, rows, folder, lease, on_epoch)


def _train(
    config: TrainConfig,
    runtime: Runtime,
    ranks: World,
    model: Classifier,
    reader: Reader,
    rows: pd.DataFrame,
    folder: RunFolder,
    lease: Lease | None,
    on_epoch: OnEpoch | None,
) -> Run:
    """As `train`, with what it has prepared; rank 0 has the lease of the folder."""
    config = ranks.on_first(lambda: resume.as_started(folder, config, ranks.device))
    if config.micro_batch == AUTO:
        other = ranks.on_first(lambda: resume.micro_batch_of_other_folds(folder, config))
        chosen = largest_micro_batch(config, runtime, ranks, most=other)
        if other and chosen < other and ranks.is_first:
            log.warning(
                f"{folder.name}: --micro-batch auto: {chosen} images fit here, and other folds were trained with {other}, which "
                f"their tables will say; to train them alike, give --micro-batch {chosen} to all"
            )
        config = replace(config, micro_batch=chosen)
    for side in config.sides:
        model.check_micro_batch(side, config.micro_batch)
    # refuse sizes that do not fit before anything is written
    setup.train_order(config, rows, ranks, reader.info.rows_per_shard)

    def start() -> Run:
        origin, own_division = None, division(reader.shard_set.rows(), config.split, config.fold)
        if not folder.has_checkpoint:  # a checkpoint has its own weights
            first = FirstWeights.find(config)
            first.refuse_seen_patients(config, own_division, rows)
            first.load_into(model, config)  # the other ranks get them from DistributedDataParallel
            origin = first.origin
        return Run.start(folder.folder, config, runtime.shards, rows, origin, own_division)

    run = replace(ranks.on_first(start), lease=lease)
    if ranks.is_first and (note := relabelling_note(run, reader.shard_set)):
        log.warning(note)
    if ranks.rank:  # else all ranks would drop the same units of different images
        torch.manual_seed(config.seed + ranks.rank)
    with memory_explained(config, ranks):
        trainer = Trainer(run, ranks, model, reader, runtime, on_epoch)
    if over := ranks.on_first(lambda: resume.why_over(Run.open(run.folder), config) if run.is_done else ""):
        log.info(f"{run.name} is done already: {over}; its weights are in {run.folder}")
    else:
        trainer.fit()
    ranks.barrier()
    return replace(run, lease=None)
