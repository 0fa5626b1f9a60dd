"""Runs with predictions that several tests put films through."""

from pathlib import Path

import numpy as np
import pytest
import torch
from runs import make_untrained

from cxrfast.distributed import World
from cxrfast.pipelines.loader import Loader
from cxrfast.pipelines.order import EvalOrder
from cxrfast.runs.run import Run
from cxrfast.training.predict import predict

CPU = World(torch.device("cpu"))


def tell_films_apart(run: Run) -> None:
    """Give the run's network BatchNorm statistics of real images: as initialised, it gives all films the same logits."""
    model = run.load().train()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    with run.reader() as reader, torch.no_grad():
        (batch,) = Loader(reader, EvalOrder(rows=np.arange(30), micro_batch=30))
        model(batch.image)
    run.write_weights(model.state_dict())


def predicted_study(
    runs: Path, shards: Path, scales: tuple[int, ...] = (32, 64), folds: tuple[int, ...] = (0, 1)
) -> Path:
    """Small networks of random weights for every scale and fold, with logits of the set's first rows."""
    for fold in folds:
        for scale in scales:
            parts = [("test", "val", "train", "val", "train")[(i + fold) % 5] for i in range(60)]
            run = make_untrained(runs, shards, parts, scale, fold)
            tell_films_apart(run)
            predict(run, CPU)
    return runs


@pytest.fixture(scope="session")
def study(tiny_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two scales × two folds of the tiny set. Not to be written to."""
    return predicted_study(tmp_path_factory.mktemp("study") / "runs", tiny_set)
