"""What a training starts from: configuration, rows of its parts, staged shards, distributed model.

Options come in; the configuration and the objects it describes go out, or an error that names the wrong option.
"""

import fcntl
import hashlib
import os
import stat
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from cxrfast import config as presets
from cxrfast.config import Runtime, TrainConfig
from cxrfast.distributed import World, parallel, pick_device
from cxrfast.errors import RunError
from cxrfast.files import open_own, read_file
from cxrfast.labels import targets
from cxrfast.models.classifier import Classifier
from cxrfast.models.precision import compiled, resolve_precision
from cxrfast.pipelines.order import TrainOrder
from cxrfast.pipelines.reader import Reader
from cxrfast.runs.run import part_rows
from cxrfast.shards.format.info import SetInfo
from cxrfast.shards.parts import Selection, check_unlabelled, masks_of_parts, named, resolve_split
from cxrfast.shards.shard_set import ShardSet
from cxrfast.shards.upkeep.stage import stage
from cxrfast.splits import PARTS, check_official, check_parts, official_masks


def make_config(
    shards: Path, scale: int, *, device: str = "auto", subset: Path | None = None, **given: Any
) -> TrainConfig:
    """Configuration for a scale of a set: what is `given` and not None, else the preset of that scale.

    `subset`: file of row numbers, one per line, to which the parts are restricted. `precision` and `micro_batch` may stay
    auto: the training resolves them when the run starts. Raises RunError for impossible values.
    """
    info = ShardSet(shards).info
    check_labelled(shards, info)
    preset = presets.preset(scale)
    given = {name: value for name, value in given.items() if value is not None}
    global_batch = given.pop("global_batch", preset.global_batch)
    given.setdefault("micro_batch", min(preset.micro_batch, global_batch))
    if given["micro_batch"] == "auto":
        given["micro_batch"] = presets.AUTO
    given.setdefault("learning_rate", presets.learning_rate(global_batch))
    if subset is not None:
        given["subset"] = hashlib.sha256(read_subset(subset).astype("<i8").tobytes()).hexdigest()[:16]
    given["split"] = resolve_split(info, given.get("split", "auto"), given.get("fold", 0))
    resolve_precision(given.get("precision", "auto"), pick_device(device))  # refuses what the device does not have
    given.setdefault("weighted_validation", given.get("positive_weights", False))
    config = TrainConfig(set_id=info.id, scale=scale, labels=tuple(info.labels), global_batch=global_batch, **given)
    config = replace(config, weight_decay=config.decay or None if config.optimizer == "adam" else config.decay)
    check_unlabelled(config.unlabelled, config.blanks)
    return config


def check_labelled(shards: Path, info: SetInfo) -> None:
    """Raises RunError for a set without labels."""
    if not info.labels:
        raise RunError(f"{shards} has no labels to train on: add them with `cxrfast relabel {shards} TABLE`")


def is_partial(reader: Reader, allowed: bool, task: str = "train on") -> bool:
    """Whether shards of the set are still to be built at the reader's scale; quarantined rows are not missing.

    Raises RunError for such a set unless it is `allowed`; `task`: what the command does with its rows.
    """
    shard_set, scale = reader.shard_set, reader.scale
    info, shards = shard_set.info, shard_set.shards(scale)
    if len(shards) == info.shards:
        return False
    found = (
        f"{shard_set.folder} holds {sum(len(info.rows_of(s)) for s in shards):,} of {info.images:,} rows at {scale} px"
    )
    if not allowed:
        raise RunError(
            f"{found}, since its build is not finished: finish it with the command that began it (`cxrfast shard --out "
            f"{shard_set.folder} --scale {scale} …`), or {task} the rows that are there with --allow-partial"
        )
    return True


def select_rows(
    table: pd.DataFrame, config: TrainConfig, held: np.ndarray, subset: np.ndarray | None = None
) -> pd.DataFrame:
    """Rows used by a run: row, image_id, patient_id, part, raw labels; sorted by row.

    Leaves out rows not in `held` (int64, rows that the set holds), rows outside `subset`, rows without any label (unless they
    are negative), and other views. Raises RunError if a part is empty, if no row has one of the views, if a patient is in two
    parts and `config` does not allow it, or if the set has been relabelled since `config` was made.
    """
    if config.split == "auto":
        raise RunError("split auto is not resolved: make the configuration with make_config, or give folds or official")
    if absent := [name for name in config.labels if name not in table]:
        raise RunError(f"the set has no label {absent[0]} any more, it was relabelled: start a new training")
    if config.split == "official":
        check_official(official_masks(table["split"].to_numpy()))
    selection = Selection(
        labels=config.labels,
        split=config.split,
        fold=config.fold,
        unlabelled=config.unlabelled,
        views=config.views,
        subset=subset,
        limit=config.limit,
        allow_shared_patients=config.allow_shared_patients,
    )
    masks = masks_of_parts(table, held, selection)
    check_parts(masks, str(selection))
    part = named(masks)
    chosen = table.assign(part=part)[part != ""]
    return chosen[["row", "image_id", "patient_id", "part", *config.labels]].reset_index(drop=True)


def split_in_words(config: TrainConfig, info: SetInfo, rows: pd.DataFrame) -> str:
    """`split official (column part): 90 train, 30 val, 30 test images`, for a training's first lines."""
    count = rows["part"].value_counts()
    column = info.source_options.get("split_column")
    own = f" (column {column})" if column and (config.split == "official" or info.own_folds) else ""
    which = "official" if config.split == "official" else f"folds, fold {config.fold}"
    return f"split {which}{own}: {', '.join(f'{count[part]:,} {part}' for part in PARTS)} images"


def label_warnings(config: TrainConfig, rows: pd.DataFrame) -> list[str]:
    """What to know about labels that no training row names, in sentences; `rows`: the run's table."""
    raw = rows.loc[rows["part"] == "train", list(config.labels)].to_numpy(np.float32)
    _, mask = targets(raw, config.policies, config.blanks, config.unlabelled)
    unused, blank = ~mask.any(axis=0), np.isnan(raw).all(axis=0)
    found = []
    if names := np.array(config.labels)[blank & ~unused].tolist():
        found.append(
            f"blank in every training row, so negative in all of them: {', '.join(names)}; --blank LABEL=ignore leaves a label "
            "out of the loss"
        )
    if names := np.array(config.labels)[unused].tolist():
        found.append(f"no training row counts for {', '.join(names)}: nothing is learned about it")
    return found


def read_subset(path: Path) -> np.ndarray:
    """Row numbers from a file with one per line, int64, ascending. Raises RunError if it holds anything else, or nothing."""
    try:
        rows = np.unique(np.array([int(line) for line in read_file(path).decode().split()], np.int64))
    except (OSError, ValueError, OverflowError) as error:
        raise RunError(f"--rows {path}: give a text file with one row number per line ({error})") from error
    if not len(rows):
        raise RunError(f"--rows {path} is empty: give a text file with one row number per line")
    return rows


def staged(shards: Path, folder: Path, scale: int) -> Path:
    """Copy one scale of the set into `folder` on a local disk, once for all ranks and jobs of this machine. Returns the copy.

    Raises ShardError if that fails, RunError if another user has put something in the way.
    """
    copy = folder / ShardSet(shards).info.id
    folder.mkdir(parents=True, exist_ok=True)
    _check_own(copy)
    launch = os.environ.get("TORCHELASTIC_RUN_ID", "none") + "/" + os.environ.get("SLURM_RESTART_COUNT", "0")
    with open(_own_lock(folder / f"{copy.name}-{scale}.lock"), "a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # later ranks wait
        lock.seek(0)
        if launch.startswith("none") or lock.read() != launch:  # otherwise another rank of this launch has checked it
            stage(shards, copy, [scale])
            lock.truncate(0)
            lock.write(launch)
    return copy


def _own_lock(path: Path) -> int:
    try:
        return open_own(path, os.O_APPEND)
    except OSError as error:
        raise RunError(f"--stage: {path} {error.strerror}: choose a folder of your own") from error


def _check_own(folder: Path) -> None:
    """Raises RunError if `folder` is a link or another user's: everybody can guess its name."""
    with suppress(FileNotFoundError):
        found = folder.lstat()
        if stat.S_ISLNK(found.st_mode) or found.st_uid != os.geteuid():
            what = "is a link" if stat.S_ISLNK(found.st_mode) else f"belongs to user {found.st_uid}"
            raise RunError(f"--stage: {folder} {what}: choose a folder of your own")


def train_order(config: TrainConfig, rows: pd.DataFrame, ranks: World, shard_rows: int) -> TrainOrder:
    """Order in which this rank sees the training rows. Raises LoadError for batch sizes or ranks that do not fit."""
    return TrainOrder(
        rows=part_rows(rows, "train"),
        global_batch=config.global_batch,
        micro_batch=config.micro_batch,
        seed=config.seed,
        rank=ranks.rank,
        world=ranks.size,
        shard_rows=shard_rows if config.order == "block" else None,
    )


def distribute(
    model: Classifier, config: TrainConfig, runtime: Runtime, ranks: World
) -> tuple[torch.nn.Module, Callable[[], AbstractContextManager[None]]]:
    """`model` as the ranks train it, and a context in which its gradients are not averaged."""
    if config.sync_bn and ranks.device.type != "cuda":
        raise RunError("--sync-bn works only on GPUs: leave it out, or use --device cuda")
    forward: torch.nn.Module = model
    unsynced: Callable[[], AbstractContextManager[None]] = nullcontext
    if ranks.size > 1:
        if config.sync_bn:
            torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
        forward = averaging = parallel(model)
        unsynced = averaging.no_sync
    if runtime.compile:
        forward = compiled(forward, runtime.compile)
    return forward, unsynced
