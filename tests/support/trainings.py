"""Trainings in processes of their own or in this one, and how to inspect them."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import run

from cxrfast.config import Runtime
from cxrfast.distributed import World
from cxrfast.models.classifier import Classifier
from cxrfast.pipelines.reader import Reader
from cxrfast.runs.run import Run
from cxrfast.shards.format.rows import read_rows
from cxrfast.training.setup import make_config, select_rows
from cxrfast.training.trainer import Trainer

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)

OPTIONS = {"weights": "none", "epochs": 2, "global_batch": 8, "micro_batch": 4, "precision": "fp32"}
FAST = {**OPTIONS, "arch": "shufflenet_v2_x0_5"}
"""The fastest network."""
SHORT = {**OPTIONS, "epochs": 1, "limit": 16}
"""One epoch of two steps."""

TIMING = {"seconds", "images_per_s", "waiting_share", "resident_bytes", "gpu_peak_bytes"}
SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2"


def command(shards: Path, runs: Path, nproc: int = 1, **options: Any) -> list[str]:
    """Train at 32 px with a checkpoint every second step. `options`: of `cxrfast train`."""
    torchrun = ["-m", "torch.distributed.run", f"--nproc_per_node={nproc}", "--standalone"]
    start = [*torchrun, f"--signals-to-handle={SIGNALS}"] if nproc > 1 else []
    places = {"shards": shards, "runs": runs, "scale": 32, "checkpoint_steps": 2, "device": "cpu"}
    given = [f"--{name.replace('_', '-')}={value}" for name, value in {**places, **OPTIONS, **options}.items()]
    return [sys.executable, *start, "-m", "cxrfast.train", *given]


def run_to_the_end(arguments: list[str]) -> str:
    """Run a command that must succeed. Returns its stderr."""
    done = run(*arguments, timeout=150)
    assert done.returncode == 0, done.stderr
    return done.stderr


def run_ranks(code: str, nproc: int, *arguments: Path) -> str:
    """Run Python code, which may import from tests/support, in `nproc` processes. Returns its stdout."""
    script = arguments[-1] / "ranks.py"
    script.write_text(code)
    torchrun = ["-m", "torch.distributed.run", f"--nproc_per_node={nproc}", "--standalone"] if nproc > 1 else []
    done = run(sys.executable, *torchrun, script, *arguments, timeout=150)
    assert done.returncode == 0, done.stderr
    return done.stdout


@contextlib.contextmanager
def started(arguments: list[str], log: Path) -> "Iterator[subprocess.Popen[bytes]]":
    """A process in a session of its own, none of which is left afterwards."""
    with open(log, "wb") as file:
        process = subprocess.Popen(arguments, stdout=file, stderr=file, start_new_session=True)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def is_in_second_epoch(run: Path) -> bool:
    last = run / "last.pt"
    if not last.exists():
        return False
    checkpoint = torch.load(last, weights_only=True)
    return checkpoint["epoch"] == 1 and checkpoint["consumed"] > 0


def wait_for(is_so: Callable[[], bool], process: "subprocess.Popen[bytes]", seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        assert process.poll() is None, "the training ended early"
        assert time.monotonic() < deadline
        time.sleep(0.02)


def assert_same(a: Path, b: Path) -> None:
    """Two run folders hold bitwise the same last weights, and the same metrics except for time and memory."""
    one, other = (torch.load(run / "last.pt", weights_only=True)["model"] for run in (a, b))
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
    untimed = [
        [{k: v for k, v in line.items() if k not in TIMING} for line in Run.open(run).metrics()] for run in (a, b)
    ]
    assert untimed[0] == untimed[1]


def make_trainer(
    shards: Path,
    runs: Path,
    scale: int = 32,
    runtime: dict[str, Any] | None = None,
    ranks: World | None = None,
    **options: Any,
) -> Trainer:
    """A trainer of `runs`/run/fold-0 in this process, on the CPU; default: of one rank."""
    config = make_config(shards, scale, device="cpu", **{**OPTIONS, **options})
    torch.manual_seed(0)
    reader = Reader(shards, scale)
    rows = select_rows(read_rows(shards / "rows.parquet"), config, reader.rows)
    run = Run.start(runs / "run" / "fold-0", config, shards, rows)
    where = Runtime(shards=shards, runs=runs, **(runtime or {}))
    return Trainer(run, ranks or World(CPU), Classifier(config.arch, len(config.labels)), reader, where)
