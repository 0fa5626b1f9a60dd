"""What a trainer handles besides the loss: memory, random numbers, decoded pixels."""

import os
import sys
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import pytest
import torch
from commands import invoke, run
from trainings import CPU, OPTIONS, assert_same, command, make_trainer, needs_gpu, run_to_the_end

import cxrfast.training.train
from cxrfast.config import Runtime
from cxrfast.distributed import World
from cxrfast.errors import LoadError, RunError
from cxrfast.files import write_json
from cxrfast.pipelines import dali
from cxrfast.pipelines.loader import Loader
from cxrfast.pipelines.order import EvalOrder
from cxrfast.pipelines.proof import Proof
from cxrfast.pipelines.reader import Reader
from cxrfast.runs.run import Run
from cxrfast.training.micro_batch import memory_explained
from cxrfast.training.setup import make_config
from cxrfast.training.train import train

# Memory


SHORT_OF_MEMORY = """
import resource, sys
import torch
from cxrfast.cli.main import cli
from cxrfast.models.classifier import Classifier
from cxrfast.training.trainer import Trainer

Classifier("densenet121", 14)(torch.zeros((2, 1, 32, 32), dtype=torch.uint8)).sum().backward()  # loads what it needs
now = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmData")) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (now + 400 * 2**20,) * 2)
cli(["train", *sys.argv[1:]])
"""


@pytest.mark.slow
def test_training_that_runs_out_of_memory_says_what_helps(tiny_set, tmp_path):
    given = [f"--shards={tiny_set}", f"--runs={tmp_path}", "--device=cpu", "--scale=64", "--weights=none"]
    more = ["--global-batch=80", "--precision=fp32", "--threads=1", "--epochs=1"]
    done = run(
        sys.executable, "-c", SHORT_OF_MEMORY, *given, *more, "--micro-batch=80", timeout=150, OMP_NUM_THREADS="1"
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "memory ran out with micro-batches of 80 images of 64 px in fp32 (the machine has" in done.stderr
    assert "use --micro-batch 40 or --micro-batch auto or --recompute" in done.stderr
    failed = Run.open(tmp_path / "densenet121-64" / "fold-0")
    assert failed.state()["state"] == "failed"
    # what it advises is accepted, though it is another configuration
    done = invoke("train", *given, *more, "--micro-batch=40", "--limit=80")
    assert done.exit_code == 0, done.output
    assert Run.open(failed.folder).config.micro_batch == 40


def test_running_out_of_memory_becomes_an_error_that_says_what_helps(tiny_set):
    config = make_config(tiny_set, 64, device="cpu", **{**OPTIONS, "global_batch": 80, "micro_batch": 80})
    advice = r"80 images of 64 px in fp32 .*: use --micro-batch 40 or .* auto or --recompute"
    with pytest.raises(RunError, match=advice), memory_explained(config, World(CPU)):
        raise MemoryError
    with pytest.raises(RuntimeError, match="shapes"), memory_explained(config, World(CPU)):
        raise RuntimeError("shapes differ")


def test_a_run_that_has_something_to_lose_keeps_its_configuration(tiny_set, tmp_path):
    trainer = make_trainer(tiny_set, tmp_path)
    run, rows = trainer.run, trainer.run.rows()
    other = replace(run.config, micro_batch=8)
    for state in ("running", "preempted", "done"):
        run.set_state(state)
        with pytest.raises(RunError, match="micro_batch: 8, not 4"):
            Run.start(run.folder, other, tiny_set, rows)
    run.set_state("failed")
    for name in ("last.pt", "best.safetensors", "metrics.jsonl"):
        (run.folder / name).touch()
        with pytest.raises(RunError, match="micro_batch: 8, not 4"):
            Run.start(run.folder, other, tiny_set, rows)
        (run.folder / name).unlink()
    assert Run.start(run.folder, other, tiny_set, rows).config == other
    assert Run.open(run.folder).config == other


# Random numbers


@needs_gpu
@pytest.mark.parametrize("arch", ["densenet121", "mobilenet_v3_small"])
def test_deterministic_runs_on_a_gpu_are_bitwise_the_same(tiny_set, tmp_path, arch):
    runs = [tmp_path / name for name in ("one", "other")]
    for folder in runs:
        arguments = command(tiny_set, folder, arch=arch, device="cuda", precision="bf16", engine="host")
        run_to_the_end([*arguments, "--deterministic"])
    assert_same(*(folder / f"{arch}-32" / "fold-0" for folder in runs))


def test_deterministic_is_settled_before_cuda_starts(tiny_set, tmp_path, monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    found = {}

    @contextmanager
    def first_use_of_the_device(*args, **kwargs):
        found.update(config=os.environ.get("CUBLAS_WORKSPACE_CONFIG"), on=torch.are_deterministic_algorithms_enabled())
        raise RunError("that is all")
        yield

    monkeypatch.setattr(cxrfast.training.train, "world", first_use_of_the_device)
    try:
        with pytest.raises(RunError, match="that is all"):
            train(make_config(tiny_set, 32, device="cpu"), Runtime(shards=tiny_set, runs=tmp_path, deterministic=True))
    finally:
        torch.use_deterministic_algorithms(False)
        os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
    assert found == {"config": ":4096:8", "on": True}


@pytest.mark.parametrize("deterministic", [False, True])
def test_kernels_are_chosen_by_trial_unless_results_shall_repeat(tiny_set, tmp_path, monkeypatch, deterministic):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", deterministic)
    make_trainer(tiny_set, tmp_path, runtime={"deterministic": deterministic})
    assert torch.backends.cudnn.benchmark is not deterministic


# Decoded pixels


@pytest.mark.skipif(not dali.available(), reason="NVIDIA DALI is not installed")
def test_a_decoder_that_corrupts_stops_the_training_before_anything_is_saved(tiny_set, tmp_path, monkeypatch):
    # as on a GPU
    monkeypatch.setattr("cxrfast.training.trainer.Loader", partial(Loader, prove=True))
    compare, seen = Proof.compare, []

    def corrupted(self: Proof, images: torch.Tensor, rows, means) -> None:
        seen.append(len(rows))
        compare(self, images.flip(0) if len(seen) == 5 else images, rows, means)

    monkeypatch.setattr(Proof, "compare", corrupted)
    trainer = make_trainer(tiny_set, tmp_path, runtime={"engine": "dali"})
    says = r"run/fold-0: \d of .* images that were decoded by DALI .* no checkpoint was written yet"
    with pytest.raises(LoadError, match=says):
        trainer.fit()
    state = trainer.run.state()
    assert state["state"] == "failed"
    assert "--engine host" in state["error"]
    assert not (trainer.run.folder / "last.pt").exists()


@pytest.mark.skipif(not dali.available(), reason="NVIDIA DALI is not installed")
def test_a_gpu_without_a_number_is_the_one_that_this_rank_uses(tiny_set, monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    with Reader(tiny_set, 32) as reader:
        order = EvalOrder(rows=reader.rows, micro_batch=8)
        loader = Loader(reader, order, device="cuda", engine="dali")
        assert loader.device == loader._engine.device == loader.proof.device == torch.device("cuda", 3)
        assert Loader(reader, order, device="cuda:1", engine="dali")._engine.device.index == 1


# Ranks


@pytest.mark.parametrize(("pid", "state"), [(1234, "failed"), (4321, "running")])
def test_a_rank_that_lost_the_first_one_records_it_unless_another_training_took_over(tiny_set, tmp_path, pid, state):
    trainer = make_trainer(tiny_set, tmp_path, limit=8)
    trainer.first_pid, trainer.ranks = 1234, World(CPU, rank=1, size=2)
    write_json(trainer.run.state_path, {"state": "running", "pid": pid})
    with pytest.raises(SystemExit):
        trainer._failed(RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer"))
    assert trainer.run.state()["state"] == state
