"""A model of small random networks on phantoms, alone, behind a site, and served by `cxrfast app`."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
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


@contextmanager
def served(*words: object) -> Iterator[tuple[str, "subprocess.Popen[str]"]]:
    """`cxrfast app` with these words in a process of its own: its address, and the process. Ends by Ctrl-C."""
    command = [sys.executable, "-W", "ignore", "-m", "cxrfast", "app", *map(str, words), "--port", "0"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        assert process.stdout
        found = next((m for line in process.stdout if (m := re.search(r"http://\S+", line))), None)
        assert found, process.communicate(timeout=20)
        yield found[0], process
    finally:
        if process.poll() is None:
            os.kill(process.pid, signal.SIGINT)
        process.communicate(timeout=20)


@pytest.fixture(scope="module")
def address(runs: Path) -> Iterator[str]:
    """Of an app that serves `runs`."""
    with served(runs, "--device", "cpu") as (address, process):
        yield address
        assert process.poll() is None, "the app lives on"
