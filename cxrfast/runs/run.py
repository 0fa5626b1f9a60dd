"""A run's folder: RUNS/<arch>-<scale>/fold-<k>/. Every file in it is whole or absent; only this module knows their names.

config.json      the configuration, its hash, where the shards lay, versions
state.json       running | preempted | done | failed, epoch, rate, heartbeat
metrics.jsonl    a line an epoch
rows.parquet     its own copy of rows, parts and raw labels
last.pt          the checkpoint to resume from
best.safetensors weights of the epoch with the lowest validation loss
predictions.zarr, maps.zarr   see `store`
"""

import io
import json
import os
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from cxrfast import __version__
from cxrfast.config import TrainConfig
from cxrfast.errors import RunError
from cxrfast.files import replacing, write_bytes, write_json


@dataclass(frozen=True)
class Run:
    """A run on disk."""

    folder: Path
    config: TrainConfig
    shards: Path
    """Where its shard set lay when it was started."""

    @property
    def name(self) -> str:
        """`densenet121-2048/fold-0`, as people call it."""
        return f"{self.folder.parent.name}/{self.folder.name}"

    # rows

    def rows(self) -> pd.DataFrame:
        """row, image_id, patient_id, part (train, val or test), then the raw labels in the order of the logits."""
        path = self.folder / "rows.parquet"
        try:
            return pd.read_parquet(path, columns=["row", "image_id", "patient_id", "part", *self.config.labels])
        except (OSError, ValueError) as error:  # pyarrow's errors are either
            raise RunError(
                f"{path} is missing or damaged: restore it, or train the run again in a new folder"
            ) from error

    # state

    def state(self) -> dict[str, Any]:
        """{} if the run never started."""
        path = self.folder / "state.json"
        try:
            return json.loads(path.read_bytes()) if path.exists() else {}
        except ValueError as error:
            raise RunError(f"{path} is damaged: delete it, then run the training command again") from error

    def set_state(self, state: str, **more: Any) -> None:
        write_json(self.folder / "state.json", {"state": state, "time": round(time.time()), "pid": os.getpid(), **more})

    @property
    def is_done(self) -> bool:
        return self.state().get("state") == "done"

    @property
    def has_nothing_to_lose(self) -> bool:
        """True if it failed before anything was trained: its folder may take another configuration."""
        results = ("last.pt", "best.safetensors", "metrics.jsonl")
        return self.state().get("state") == "failed" and not any((self.folder / name).exists() for name in results)

    # metrics

    def metrics(self) -> list[dict[str, Any]]:
        """One dict an epoch, oldest first. A line that a killed process left unfinished is not one."""
        path = self.folder / "metrics.jsonl"
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        try:
            return [json.loads(line) for line in lines]
        except ValueError as error:
            raise RunError(f"{path} is damaged: restore it, or train the run again in a new folder") from error

    def add_metrics(self, line: dict[str, Any]) -> None:
        """Append an epoch's line; those of this epoch and later ones, left by a killed process, go."""
        kept = [m for m in self.metrics() if m["epoch"] < line["epoch"]]
        self._write_metrics([*kept, line])

    def cut_metrics(self, epochs: int) -> None:
        """Keep the lines of the first `epochs` epochs: what the checkpoint knows of."""
        self._write_metrics([m for m in self.metrics() if m["epoch"] < epochs])

    def _write_metrics(self, lines: list[dict[str, Any]]) -> None:
        write_bytes(self.folder / "metrics.jsonl", "".join(json.dumps(m) + "\n" for m in lines).encode())

    # checkpoints

    def save_last(self, checkpoint: dict[str, Any]) -> None:
        data = io.BytesIO()  # torch's own writing to a full disk is a RuntimeError about a position
        torch.save({**checkpoint, "config_hash": self.config.hash}, data)
        with replacing(self.folder / "last.pt") as file:
            file.write(data.getbuffer())

    def load_last(self) -> dict[str, Any] | None:
        """The checkpoint, on the CPU; None if there is none. Raises RunError if it is damaged or another run's."""
        path = self.folder / "last.pt"
        if not path.exists():
            return None
        try:
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
            owner = checkpoint["config_hash"]
        except Exception as error:  # torch raises half a dozen unrelated classes here
            raise RunError(
                f"{path} is damaged ({type(error).__name__}): delete it to start the run anew, or restore it"
            ) from error
        if owner != self.config.hash:
            raise RunError(
                f"{path} belongs to another configuration: delete it to start the run anew, or choose another --runs"
            )
        return checkpoint

    def save_best(self, weights: dict[str, torch.Tensor]) -> None:
        for derived in ("predictions.zarr", "maps.zarr"):  # of the weights that go now
            shutil.rmtree(self.folder / derived, ignore_errors=True)
        for picture in self.folder.glob("gradcam-*.png"):
            picture.unlink()
        tensors = {name: value.detach().cpu().contiguous() for name, value in weights.items()}
        write_bytes(self.folder / "best.safetensors", save(tensors, metadata={"config_hash": self.config.hash}))

    def load_best(self) -> dict[str, torch.Tensor]:
        """The model's state dict. Raises RunError if the run has none yet, or a damaged one."""
        path = self.folder / "best.safetensors"
        try:
            return load_file(path)
        except (FileNotFoundError, SafetensorError) as error:
            if not path.exists():
                raise RunError(f"{self.folder} has no best.safetensors yet: train it first") from None
            raise RunError(f"{path} is damaged ({error}): train the run again") from error


def part_rows(rows: pd.DataFrame, part: str) -> np.ndarray:
    """int64, ascending: the rows of a part of a run's table."""
    return rows.loc[rows["part"] == part, "row"].to_numpy(np.int64, copy=True)


def run_folder(runs: Path, config: TrainConfig, name: str | None = None) -> Path:
    return runs / (name or f"{config.arch}-{config.scale}") / f"fold-{config.fold}"


def start_run(folder: Path, config: TrainConfig, shards: Path, rows: pd.DataFrame) -> Run:
    """Create the run, or take up the one that is there if its configuration is the same.

    Raises RunError naming the differences if it is not; but a run that failed with nothing to lose takes the new one.
    """
    if (folder / "config.json").exists():
        run = read_run(folder)
        differences = config.differences(run.config)
        if differences and not run.has_nothing_to_lose:
            raise RunError(
                f"{folder} holds a run of another configuration ({'; '.join(differences)}): "
                "choose another --runs or --name, or give the same options to resume it"
            )
        if not differences:
            return Run(folder, config, shards)
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / "rows.parquet") as file:
        rows.to_parquet(file, index=False)
    write_json(
        folder / "config.json",
        {
            "config": asdict(config),
            "hash": config.hash,
            "shards": str(shards.absolute()),
            "versions": {"cxrfast": __version__, "torch": torch.__version__},
        },
    )
    return Run(folder, config, shards)


def read_run(folder: Path) -> Run:
    """Raises RunError if `folder` is no run or its config.json is damaged."""
    path = folder / "config.json"
    if not path.is_file():
        raise RunError(f"{folder} is not a run (no config.json): give a folder like runs/densenet121-256/fold-0")
    try:
        value = json.loads(path.read_bytes())
        return Run(folder, TrainConfig.from_json(value["config"]), Path(value["shards"]))
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path} is damaged ({error})") from error


def find_runs(runs: Path) -> list[Run]:
    """Every run below `runs`, by name, scale and fold. Raises RunError if there is none."""
    found = [read_run(path.parent) for path in runs.glob("*/fold-*/config.json")]
    if not found:
        raise RunError(
            f"no runs in {runs}: train one with `cxrfast train --runs {runs}`, or give the folder that holds them"
        )
    return sorted(found, key=lambda run: (run.config.arch, run.config.scale, run.folder.parent.name, run.config.fold))
