from pathlib import Path

import numpy as np
import pytest
import torch

from cxrfast.config import Runtime
from cxrfast.distributed import World
from cxrfast.errors import RunError
from cxrfast.pipelines.reader import Reader
from cxrfast.runs.run import Run, part_rows
from cxrfast.shards.build import build
from cxrfast.shards.format.recipe import ImageRecipe
from cxrfast.shards.images.jpeg import decode_grey
from cxrfast.training.predict import PARTS, predict
from cxrfast.training.setup import make_config
from cxrfast.training.train import train


@pytest.fixture(scope="module")
def run(tiny_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    config = make_config(tiny_set, 32, device="cpu", weights="none", epochs=1, global_batch=8, precision="fp32")
    return train(config, Runtime(shards=tiny_set, runs=tmp_path_factory.mktemp("runs"), device="cpu"))


def test_every_row_of_a_part_is_predicted_once_with_the_logits_of_its_own_image(run: Run, tiny_set: Path) -> None:
    predict(run, World(torch.device("cpu")))
    model, reader = run.load(torch.device("cpu")), Reader(tiny_set, 32)
    for part in PARTS:
        predictions = run.read_predictions(part)
        np.testing.assert_array_equal(predictions.row, part_rows(run.rows(), part))
        images = np.stack([decode_grey(bytes(reader.read(int(row)))) for row in predictions.row])
        with torch.inference_mode():
            alone = torch.cat([model(torch.from_numpy(image)[None, None]) for image in images]).numpy()
        np.testing.assert_allclose(predictions.logits, alone, rtol=1e-3, atol=1e-4)
        assert predictions.logits.std(axis=0).max() > 1e-4, "logits that do not differ would pass whatever the order"


def test_a_set_that_was_moved_is_found_and_another_set_refused(
    run: Run, phantoms: Path, tiny_set: Path, tmp_path: Path
) -> None:
    moved = tmp_path / "moved"
    moved.symlink_to(tiny_set)
    predict(run, World(torch.device("cpu")), shards=moved)
    build(phantoms, tmp_path / "other", [32], recipe=ImageRecipe(seed=1), workers=1)
    with pytest.raises(RunError, match=r"was trained on set .* give the right folder with --shards"):
        predict(run, World(torch.device("cpu")), shards=tmp_path / "other")


def test_a_run_without_weights_is_refused(run: Run, tmp_path: Path) -> None:
    untrained = Run.start(tmp_path / "run", run.config, run.shards, run.rows())
    with pytest.raises(RunError, match="train it first"):
        predict(untrained, World(torch.device("cpu")))


def test_damaged_weights_are_refused(run: Run, tmp_path: Path) -> None:
    damaged = Run.start(tmp_path / "run", run.config, run.shards, run.rows())
    weights = (run.folder / "best.safetensors").read_bytes()
    (damaged.folder / "best.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(RunError, match="is damaged"):
        predict(damaged, World(torch.device("cpu")))
