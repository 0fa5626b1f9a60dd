"""A model of small random networks on phantoms, alone, behind a site, and served by `cxrfast app`."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from apps import Served, served
from runs import make_untrained
from trainings import CPU

from cxrfast.distributed import World
from cxrfast.inference.ensemble import ScaleEnsemble
from cxrfast.runs.run import Run
from cxrfast.shards.build import build
from cxrfast.shards.format.recipe import ImageRecipe
from cxrfast.training.predict import predict

SCALES, FOLDS = (32, 64), (0, 1)


@pytest.fixture(scope="session")
def runs(phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two scales, two folds, predictions and thresholds; of a set that takes DICOM files. Not to be written to."""
    folder = tmp_path_factory.mktemp("app")
    build(phantoms, folder / "set", list(SCALES), recipe=ImageRecipe(grey="mimic"), workers=1)
    for scale in SCALES:
        for fold in FOLDS:
            run = make_untrained(folder / "runs", folder / "set", ["val"] * 20 + ["test"] * 20, scale, fold)
            predict(run, World(CPU), engine="host")
            run.set_state("done", epoch=1)
    return folder / "runs"


@pytest.fixture(scope="session")
def model(runs: Path) -> ScaleEnsemble:
    return ScaleEnsemble.from_runs(Run.find(runs))


@pytest.fixture(scope="session")
def film(phantoms: Path) -> bytes:
    """A phantom, JPEG."""
    return next(iter(sorted(phantoms.rglob("*.jpg")))).read_bytes()


@pytest.fixture(scope="module")
def app(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """An app that serves `runs`, and writes nothing."""
    folder = tmp_path_factory.mktemp("empty")
    with served(runs, "--device", "cpu", folder=folder) as found:
        yield found
    assert not list(folder.iterdir())
