"""Runs without a training: rows, logits of a chosen quality, and weights as they were initialised."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from rich.console import Console

from cxrfast.config import TrainConfig
from cxrfast.labels import MIMIC
from cxrfast.models.classifier import Classifier
from cxrfast.runs.run import Predictions, Run
from cxrfast.tables import Table

LABELS = ("Edema", "Fracture", "Lung Lesion", "Pneumonia")
N = 300
SMALL = "mobilenet_v3_small"


def study_rows(fold: int, n: int = N) -> pd.DataFrame:
    """The same images and labels in every fold: no Fracture at all, no Lung Lesion in the validation rows of folds 0 and 1."""
    rng, i = np.random.default_rng(0), np.arange(n)
    raw = rng.choice([1.0, 0.0, -1.0, np.nan], size=(n, len(LABELS)), p=[0.3, 0.3, 0.1, 0.3]).astype(np.float32)
    raw[raw[:, 1] == 1, 1] = 0
    raw[np.isin(i % 5, (1, 2)) & (raw[:, 2] == 1), 2] = 0
    part = np.array(["test", "train", "val", "train", "train"])[(i + fold) % 5]
    ids = {"row": i, "image_id": [f"i{j}" for j in i], "patient_id": [f"p{j // 2}" for j in i], "part": part}
    return pd.DataFrame({**ids, **dict(zip(LABELS, raw.T, strict=True))})


def make_run(
    runs: Path,
    scale: int,
    fold: int = 0,
    rows: pd.DataFrame | None = None,
    *,
    quality: float | None = 1.0,
    name: str | None = None,
    shards: Path = Path("shards"),
    state: str | None = "done",
    **options: Any,
) -> Run:
    """A run of `study_rows` that predicted with `quality`; None: not at all. `state`: None: unknown. `options`: of TrainConfig."""
    batches = {"global_batch": 8, "micro_batch": 8, "learning_rate": 1e-4}
    config = TrainConfig(**{"set_id": "a1", "scale": scale, "fold": fold, "labels": LABELS, **batches, **options})
    folder = runs / (name or f"{config.arch}-{scale}") / f"fold-{fold}"
    run = Run.start(folder, config, shards, study_rows(fold) if rows is None else rows)
    if quality is not None:
        predict(run, quality)
        if state is not None:
            run.set_state(state, epoch=1)
    return run


def rewrite_config(run: Run, **fields: Any) -> Run:
    """Opens the run again, as if it had been started with other values of these fields of TrainConfig."""
    stored = json.loads(run.config_path.read_text())
    stored["config"].update(fields)
    stored["hash"] = TrainConfig.from_json(stored["config"]).hash
    run.config_path.write_text(json.dumps(stored))
    return Run.open(run.folder)


def predict(run: Run, quality: float, drop: int = 0) -> None:
    """Store logits that know each finding by `quality`, rows in a random order; the first `drop` are left out."""
    rng, parts = np.random.default_rng(run.config.scale + run.config.fold), {}
    for part in ("val", "test"):
        rows = run.rows().query("part == @part").sample(frac=1, random_state=1).iloc[drop:]
        positive = (rows[list(run.config.labels)] == 1).to_numpy()
        logits = quality * (2 * positive - 1) + rng.normal(size=positive.shape)
        parts[part] = Predictions(rows["row"].to_numpy(), logits)
    run.write_predictions(parts)


def metrics_line(epoch: int, **values: Any) -> dict[str, Any]:
    """A line of metrics.jsonl as a training writes it; `values` replace those made up here."""
    losses = {"train_loss": 0.5 - 0.1 * epoch, "val_loss": 0.6 - 0.1 * epoch}
    scores = {"val_auroc": None, "val_auroc_by_label": {}}
    speed = {"seconds": 600.0, "images_per_s": 100.0, "waiting_share": 0.01}
    memory = {"resident_bytes": 2**30, "gpu_peak_bytes": None}
    return {"epoch": epoch, "learning_rate": 1e-4, **losses, **scores, **speed, **memory, **values}


def noise(n: int, side: int, seed: int = 0) -> torch.Tensor:
    """uint8 (n, 1, side, side)."""
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (n, 1, side, side), dtype=np.uint8))


def make_untrained(
    runs: Path, shards: Path, parts: list[str], scale: int = 64, fold: int = 0, **labels: list[float]
) -> Run:
    """A small network of random weights; its rows are the first of the set, in `parts`. `labels`: raw values to set."""
    set_id = json.loads((shards / "set.json").read_bytes())["id"]
    columns = {label.replace("_", " "): np.array(values, np.float32) for label, values in labels.items()}
    rows = pd.read_parquet(shards / "rows.parquet").iloc[: len(parts)].assign(part=parts, **columns)
    rows = rows[["row", "image_id", "patient_id", "part", *MIMIC]]
    known = {"set_id": set_id, "labels": MIMIC, "arch": SMALL, "global_batch": 4, "micro_batch": 4}
    run = make_run(runs, scale, fold, rows, quality=None, shards=shards, **known)
    torch.manual_seed(fold)
    run.write_weights(Classifier(SMALL, len(MIMIC)).state_dict())
    return run


def shown(table: Table, width: int = 160, color: bool = False) -> str:
    """A table as a terminal shows it."""
    console = Console(file=io.StringIO(), width=width, force_terminal=color, color_system="standard" if color else None)
    console.print(table.rich())
    return console.file.getvalue()  # type: ignore[attr-defined]


def read_csv(path: Path) -> pd.DataFrame:
    """A table of scores; the column remark is text, not NaN where it is empty."""
    table = pd.read_csv(path, dtype={"remark": "str"})
    return table.fillna({"remark": ""})
