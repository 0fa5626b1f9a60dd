"""The loss and its gradients, whatever is masked and however the batch is shared."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch
from trainings import OPTIONS

from cxrfast.config import Runtime
from cxrfast.training.setup import make_config
from cxrfast.training.train import train

GRADIENTS = """
import sys
from pathlib import Path
import numpy as np
import torch
from cxrfast.distributed import world
from cxrfast.models.classifier import Classifier
from cxrfast.pipelines.reader import Reader
from cxrfast.runs.run import Run
from cxrfast.shards.format.rows import read_rows
from cxrfast.config import Runtime
from cxrfast.training.setup import make_config, select_rows
from cxrfast.training.trainer import Trainer

shards, folder = map(Path, sys.argv[1:])
with world("cpu") as ranks:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = make_config(
        shards, 32, device="cpu", weights="none", global_batch=16, micro_batch=4, precision="fp32", policy="u_ignore"
    )
    reader = Reader(shards, 32)
    rows = select_rows(read_rows(shards / "rows.parquet"), config, reader.rows)
    run = Run.start(folder / f"of-{ranks.size}-{ranks.rank}", config, shards, rows)
    trainer = Trainer(run, ranks, Classifier("densenet121", 14), reader, Runtime(shards=shards, runs=folder))
    (batch, *_) = trainer.order.global_batches(0)
    rng = np.random.default_rng(0)
    for n, row in enumerate(batch.tolist()):
        # micro-batch j of 4 is rows j::4: of the first all is masked, of the others ever fewer entries
        trainer.targets.host_mask[row] = rng.random(14) < (n % 4) / 4
    trainer.targets.mask = torch.from_numpy(trainer.targets.host_mask)
    found = {}
    trainer.optimizer.step = lambda *a, **k: found.update((n, p.grad.clone()) for n, p in trainer.model.named_parameters())
    trainer.model.train()
    trainer.step(batch, trainer.train_loader.epoch(0))
    if ranks.is_first:
        torch.save(found, folder / f"gradients-{ranks.size}.pt")
    del trainer
"""


def test_two_ranks_have_the_gradients_of_one_that_accumulates_whatever_is_masked(
    tiny_set: Path, tmp_path: Path
) -> None:
    (tmp_path / "gradients.py").write_text(GRADIENTS)
    for start in ([], ["-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]):
        done = subprocess.run(
            [sys.executable, *start, tmp_path / "gradients.py", tiny_set, tmp_path],
            capture_output=True,
            text=True,
            timeout=150,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        )
        assert done.returncode == 0, done.stderr
    one, two = (torch.load(tmp_path / f"gradients-{n}.pt", weights_only=True) for n in (1, 2))
    assert one.keys() == two.keys()
    assert max(float(gradient.abs().max()) for gradient in one.values()) > 0.01
    for name, gradient in one.items():
        torch.testing.assert_close(two[name], gradient, atol=1e-6, rtol=0, msg=name)


def test_positives_of_rare_labels_may_weigh_more(tiny_set: Path, tmp_path: Path) -> None:
    runtime = Runtime(shards=tiny_set, runs=tmp_path, device="cpu")
    options = {**OPTIONS, "epochs": 1, "limit": 16}
    plain = train(make_config(tiny_set, 32, device="cpu", **options), runtime)
    weighed = train(
        make_config(tiny_set, 32, device="cpu", **options, positive_weights=True), replace(runtime, name="weighed")
    )
    assert weighed.metrics()[0]["train_loss"] > plain.metrics()[0]["train_loss"]
