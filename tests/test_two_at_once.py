"""Two commands at once on one folder, in processes of their own: one works, the other is refused or finds the work done.

Whatever they do, the folder holds bitwise what one command alone leaves. CXRFAST_AT_ONCE is how often each test is repeated.
"""

import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from trainings import FAST, assert_same

from cxrfast.files import sha256
from cxrfast.runs.run import Run

TIMES = range(int(os.environ.get("CXRFAST_AT_ONCE", "2")))
NAME = "shufflenet_v2_x0_5-32"
HOW = [f"--{name.replace('_', '-')}={value}" for name, value in {**FAST, "limit": 48, "device": "cpu"}.items()]


def cxrfast(*words: object) -> list[str]:
    return [sys.executable, "-m", "cxrfast", *map(str, words)]


def train(shards: Path, runs: Path) -> list[str]:
    return cxrfast("train", f"--shards={shards}", f"--runs={runs}", "--scale=32", "--checkpoint-steps=1", *HOW)


def study(shards: Path, runs: Path) -> list[str]:
    return cxrfast("study", shards, runs, "--scale=32", "--fold=0", "--fold=1", *HOW)


def alone(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def at_once(command: list[str], seed: int) -> list[tuple[int, str]]:
    """Exit codes and messages of two processes with the same command; the second starts up to 4 s later."""
    processes = []
    for pause in (0.0, random.Random(seed).choice([0.0, 4.0 * random.Random(seed).random()])):
        time.sleep(pause)
        processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    messages = [process.communicate(timeout=300)[1] for process in processes]
    return list(zip([process.returncode for process in processes], messages, strict=True))


def assert_one_worked(ends: list[tuple[int, str]], found_done: str | None) -> None:
    """One process succeeded; the other was refused with a message that names the first, or found the work done.

    `found_done`: what it then says; None: nothing, it does the work again.
    """
    assert 0 in [code for code, _ in ends], ends
    for code, message in ends:
        assert code in (0, 2), message
        assert "Traceback" not in message
        if code == 2:
            assert "wait for it or end it" in message
            assert " by process " in message
    if found_done and [code for code, _ in ends] == [0, 0]:
        assert any(found_done in message for _, message in ends), ends


def assert_same_predictions(a: Path, b: Path) -> None:
    for part in ("val", "test"):
        one, other = (Run.open(run).read_predictions(part) for run in (a, b))
        np.testing.assert_array_equal(one.row, other.row)
        np.testing.assert_array_equal(one.logits, other.logits)


@pytest.fixture(scope="module")
def expected(tiny_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of a study that nobody disturbed. Not to be written to."""
    runs = tmp_path_factory.mktemp("alone") / "runs"
    alone(study(tiny_set, runs))
    return runs


@pytest.mark.slow
@pytest.mark.parametrize("time", TIMES)
def test_of_two_trainings_of_one_run_one_trains(tiny_set: Path, tmp_path: Path, expected: Path, time: int) -> None:
    ends = at_once(train(tiny_set, tmp_path / "runs"), time)
    assert_one_worked(ends, "is done already")
    run = tmp_path / "runs" / NAME / "fold-0"
    assert_same(run, expected / NAME / "fold-0")
    assert Run.open(run).is_done
    assert sha256(run / "best.safetensors") == sha256(expected / NAME / "fold-0" / "best.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("time", TIMES)
def test_of_two_predictions_with_one_run_none_is_mixed(tmp_path: Path, expected: Path, time: int) -> None:
    run = Path(shutil.copytree(expected / NAME / "fold-0", tmp_path / NAME / "fold-0"))
    shutil.rmtree(run / "predictions.zarr")
    assert_one_worked(at_once(cxrfast("predict", run, "--device=cpu"), time), None)
    assert_same_predictions(run, expected / NAME / "fold-0")
    assert sorted(path.name for path in run.glob("predictions*")) == ["predictions.zarr"]


@pytest.mark.slow
@pytest.mark.parametrize("time", TIMES)
def test_of_two_studies_in_one_folder_one_finishes(tiny_set: Path, tmp_path: Path, expected: Path, time: int) -> None:
    runs = tmp_path / "runs"
    ends = at_once(study(tiny_set, runs), time)
    assert_one_worked(ends, "is done already")
    for fold in ("fold-0", "fold-1"):
        assert_same(runs / NAME / fold, expected / NAME / fold)
        assert_same_predictions(runs / NAME / fold, expected / NAME / fold)
    table = Path("evaluation") / "auroc.csv"
    assert (runs / table).read_bytes() == (expected / table).read_bytes()
