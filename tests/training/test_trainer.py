"""What a trainer looks after beside the loss: precision, memory, random numbers, decoded pixels, waiting, warnings."""

import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch import nn
from trainings import (
    assert_same,
    command,
    is_in_second_epoch,
    kill_group,
    make_trainer,
    run_to_the_end,
    start,
    wait_for,
)

import cxrfast.training.train
from cxrfast.cli.main import cli
from cxrfast.config import COMPILE_MODES, Runtime
from cxrfast.errors import LoadError, RunError, is_out_of_memory
from cxrfast.models.densenet import DenseNet, Shape
from cxrfast.models.precision import compiled, resolve_precision, use_tf32, without_tf32
from cxrfast.pipelines import dali
from cxrfast.pipelines.loader import Loader
from cxrfast.pipelines.order import EvalOrder, TrainOrder
from cxrfast.pipelines.proof import Proof
from cxrfast.pipelines.reader import Reader
from cxrfast.runs.run import Run
from cxrfast.training.monitor import Timed
from cxrfast.training.setup import make_config
from cxrfast.training.train import train

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
CUDA = torch.device("cuda", 0)


# Compiling


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_modes_that_capture_cuda_graphs_are_refused_with_the_reason(tiny_set: Path, tmp_path: Path, mode: str) -> None:
    given = ["train", f"--shards={tiny_set}", f"--runs={tmp_path}", "--device=cpu", "--scale=32", f"--compile={mode}"]
    done = CliRunner().invoke(cli, given)
    assert done.exit_code == 2
    assert f"--compile {mode} captures CUDA graphs, which fail when gradients are accumulated" in done.output
    assert "use default or max-autotune-no-cudagraphs" in done.output
    assert not (tmp_path / "densenet121-32").exists()


def test_an_unknown_mode_names_those_that_there_are() -> None:
    with pytest.raises(RunError, match="--compile fast is unknown: use default or max-autotune-no-cudagraphs"):
        Runtime(shards=Path(), runs=Path(), compile="fast")


@needs_gpu
@pytest.mark.parametrize("mode", COMPILE_MODES)
def test_a_compiled_network_accumulates_the_gradients_of_an_eager_one(mode: str) -> None:
    """Two micro-batches before the gradients are looked at, as every preset has it."""
    torch.manual_seed(0)
    use_tf32("fp32")
    eager = DenseNet(Shape(8, (2, 2), 16), 5).to(CUDA, memory_format=torch.channels_last)
    other = DenseNet(Shape(8, (2, 2), 16), 5).to(CUDA, memory_format=torch.channels_last)
    other.load_state_dict(eager.state_dict())
    forward = compiled(other, mode)
    for images in torch.randn(2, 4, 3, 64, 64, device=CUDA):
        for net in (eager, forward):
            net(images.contiguous(memory_format=torch.channels_last)).square().sum().backward()
    for (name, p), q in zip(eager.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-3, atol=1e-4, msg=name)


# Precision


@pytest.fixture
def _tf32_as_before():
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def tf32() -> tuple[bool, bool]:
    """May convolutions, and matrix products, use it?"""
    return torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32


@pytest.mark.usefixtures("_tf32_as_before")
def test_only_the_precision_tf32_computes_in_tf32(tiny_set: Path, tmp_path: Path) -> None:
    for precision, expected in (("tf32", (True, True)), ("fp32", (False, False)), ("bf16", (False, False))):
        use_tf32(precision)
        assert tf32() == expected
    use_tf32("tf32")
    make_trainer(tiny_set, tmp_path, precision="fp32")
    assert tf32() == (False, False)


@pytest.mark.usefixtures("_tf32_as_before")
def test_float32_is_exact_for_a_while_and_then_all_is_as_it_was() -> None:
    use_tf32("tf32")
    with without_tf32():
        assert tf32() == (False, False)
    assert tf32() == (True, True)


def test_tf32_on_a_cpu_is_refused() -> None:
    with pytest.raises(RunError, match="--precision tf32 works on NVIDIA GPUs only"):
        resolve_precision("tf32", torch.device("cpu"))
    assert resolve_precision("tf32", CUDA) == "tf32"


@needs_gpu
@pytest.mark.usefixtures("_tf32_as_before")
def test_float32_convolutions_of_a_gpu_are_those_of_a_cpu_and_tf32_is_coarser() -> None:
    torch.manual_seed(0)
    convolution, images = nn.Conv2d(64, 64, 3), torch.randn(8, 64, 32, 32)
    expected = convolution(images)
    errors = {}
    for precision in ("fp32", "tf32"):
        use_tf32(precision)
        errors[precision] = (convolution.to(CUDA)(images.to(CUDA)).cpu() - expected).abs().max().item()
    assert errors["fp32"] < 1e-5 < errors["tf32"] < 1e-1


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


def test_training_that_runs_out_of_memory_says_what_helps(tiny_set: Path, tmp_path: Path) -> None:
    given = [f"--shards={tiny_set}", f"--runs={tmp_path}", "--device=cpu", "--scale=64", "--weights=none"]
    more = ["--global-batch=80", "--precision=fp32", "--threads=1", "--epochs=1"]
    done = subprocess.run(
        [sys.executable, "-c", SHORT_OF_MEMORY, *given, *more, "--micro-batch=80"],
        capture_output=True,
        text=True,
        timeout=150,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "memory ran out with micro-batches of 80 images of 64 px in fp32 (the machine has" in done.stderr
    assert "use --micro-batch 40 or --micro-batch auto or --recompute" in done.stderr
    run = Run.open(tmp_path / "densenet121-64" / "fold-0")
    assert run.state()["state"] == "failed"
    # what it advises is accepted, though it is another configuration
    done = CliRunner().invoke(cli, ["train", *given, *more, "--micro-batch=40", "--limit=80"])
    assert done.exit_code == 0, done.output
    assert Run.open(run.folder).config.micro_batch == 40


def test_what_another_error_made_of_running_out_of_memory_is_that_too() -> None:
    """torch.save raises a RuntimeError about a position where its buffer cannot grow."""
    position = RuntimeError("unexpected pos 64871232 vs 64871120")
    assert not is_out_of_memory(position)
    position.__context__ = MemoryError()
    assert is_out_of_memory(position)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"), True),
        (MemoryError(), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("could not create a primitive"), True),
        (RuntimeError("std::bad_alloc"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("CUDA runtime API error cudaErrorMemoryAllocation (2):\nout of memory"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied (4x1024 and 14x1024)"), False),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (RunError("memory ran out"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_running_out_of_memory_is_told_from_other_errors(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) == expected


def test_a_run_that_has_something_to_lose_keeps_its_configuration(tiny_set: Path, tmp_path: Path) -> None:
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


@pytest.mark.parametrize("nproc", [1, 2])
def test_a_network_with_dropout_that_was_killed_ends_as_if_nothing_had_been(
    tiny_set: Path, tmp_path: Path, nproc: int
) -> None:
    """The generators of all ranks are part of the checkpoint, and ranks draw different numbers."""
    options = {"arch": "mobilenet_v3_small"}
    whole, run = (tmp_path / name / "mobilenet_v3_small-32" / "fold-0" for name in ("whole", "killed"))
    run_to_the_end(command(tiny_set, tmp_path / "whole", nproc, **options))
    arguments = command(tiny_set, tmp_path / "killed", nproc, **options)
    process = start(arguments, tmp_path / "log")
    try:
        wait_for(lambda: is_in_second_epoch(run), process)
        os.kill(process.pid, signal.SIGTERM)
        process.wait(timeout=40)
    finally:
        kill_group(process)
    states = [state["cpu"] for state in torch.load(run / "last.pt", weights_only=True)["rng"]]
    assert len(states) == nproc
    assert nproc == 1 or not torch.equal(states[0], states[1])
    run_to_the_end(arguments)
    assert_same(whole, run)


@needs_gpu
@pytest.mark.parametrize("arch", ["densenet121", "mobilenet_v3_small"])
def test_deterministic_runs_on_a_gpu_are_bitwise_the_same(tiny_set: Path, tmp_path: Path, arch: str) -> None:
    runs = [tmp_path / name for name in ("one", "other")]
    for folder in runs:
        arguments = command(tiny_set, folder, arch=arch, device="cuda", precision="bf16", engine="host")
        run_to_the_end([*arguments, "--deterministic"])
    assert_same(*(folder / f"{arch}-32" / "fold-0" for folder in runs))


def test_deterministic_is_settled_before_cuda_starts(
    tiny_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
def test_kernels_are_chosen_by_trial_unless_results_shall_repeat(
    tiny_set: Path, tmp_path: Path, deterministic: bool
) -> None:
    before = torch.backends.cudnn.benchmark
    try:
        make_trainer(tiny_set, tmp_path, runtime={"deterministic": deterministic})
        assert torch.backends.cudnn.benchmark is not deterministic
    finally:
        torch.backends.cudnn.benchmark = before


# Decoded pixels


@pytest.mark.skipif(not dali.available(), reason="NVIDIA DALI is not installed")
def test_a_decoder_that_corrupts_stops_the_training_before_anything_is_saved(
    tiny_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        cxrfast.training.trainer, "Loader", lambda *args, **options: Loader(*args, **options, prove=True)
    )  # as on a GPU
    compare, seen = Proof.compare, []

    def corrupted(self: Proof, images: torch.Tensor, rows, means) -> None:
        seen.append(len(rows))
        compare(self, images.flip(0) if len(seen) == 5 else images, rows, means)

    monkeypatch.setattr(Proof, "compare", corrupted)
    trainer = make_trainer(tiny_set, tmp_path, runtime={"engine": "dali"})
    with pytest.raises(
        LoadError, match=r"run/fold-0: \d of .* images that DALI decoded .* no checkpoint was written yet"
    ):
        trainer.fit()
    state = trainer.run.state()
    assert state["state"] == "failed"
    assert "--engine host" in state["error"]
    assert not (trainer.run.folder / "last.pt").exists()


def test_the_engine_that_decodes_is_said_once_with_the_reason(tiny_set: Path, tmp_path: Path) -> None:
    said = run_to_the_end(command(tiny_set, tmp_path, 2, epochs=2, limit=16))
    assert said.count("engine host: on a CPU its threads are several times as fast as DALI's") == 1


@pytest.mark.skipif(not dali.available(), reason="NVIDIA DALI is not installed")
def test_a_gpu_without_a_number_is_the_one_that_this_rank_uses(tiny_set: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    with Reader(tiny_set, 32) as reader:
        order = EvalOrder(rows=reader.rows, micro_batch=8)
        loader = Loader(reader, order, device="cuda", engine="dali")
        assert loader.device == loader._engine.device == loader.proof.device == torch.device("cuda", 3)
        assert Loader(reader, order, device="cuda:1", engine="dali")._engine.device.index == 1


# Waiting


def slow(batches, seconds: float):
    for batch in batches:
        time.sleep(seconds)
        yield batch


def test_on_a_cpu_waiting_is_the_time_that_the_next_batch_takes(tiny_set: Path) -> None:
    with Reader(tiny_set, 32) as reader:
        batches = Timed(slow(Loader(reader, TrainOrder(rows=reader.rows, global_batch=8, micro_batch=8)), 0.02))
        for _ in range(5):
            next(batches)
        batches.close()
    assert batches.waited >= 0.1


@needs_gpu
@pytest.mark.parametrize("busy", [False, True])
def test_on_a_gpu_waiting_is_the_time_that_the_gpu_has_nothing_to_do(tiny_set: Path, busy: bool) -> None:
    """The host waits 0.1 s for its batches in both cases; a GPU that is busy meanwhile waits for none of it."""
    with Reader(tiny_set, 32) as reader:
        order = TrainOrder(rows=reader.rows, global_batch=8, micro_batch=8)
        loader = Loader(reader, order, device="cuda", engine="host")
        for _ in loader:  # pinned memory is got once, which may wait for the GPU
            pass
        batches = Timed(slow(loader, 0.02), CUDA)
        with torch.cuda.stream(torch.cuda.Stream()) if not busy else nullcontext():
            for n in range(6):
                next(batches)
                if n == 0:
                    torch.cuda.synchronize()
                    first = batches.waited
                if busy:
                    torch.cuda._sleep(10**9)  # half a second and more
        batches.close()
    assert (batches.waited - first < 0.05) if busy else (batches.waited - first > 0.09)


# Warnings


STRIDES = """
import sys
import warnings
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from cxrfast.distributed import parallel

class Restride(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight):
        return weight.clone()

    @staticmethod
    def backward(ctx, gradient):  # as channels last leaves that of a 1 x 1 convolution on a GPU
        n = gradient.shape[1]
        return gradient.contiguous().as_strided(gradient.shape, (n, 1, n, n))

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 4, 1, 1))

    def forward(self, images):
        return nn.functional.conv2d(images, Restride.apply(self.weight))

dist.init_process_group("gloo", init_method="tcp://127.0.0.1:0", rank=0, world_size=1)
with warnings.catch_warnings(record=True) as found:
    warnings.simplefilter("always")
    net = parallel(Net()) if sys.argv[1] == "ours" else DistributedDataParallel(Net(), gradient_as_bucket_view=True)
    net(torch.randn(2, 4, 5, 5)).sum().backward()
print(sum("Grad strides" in str(warning.message) for warning in found))
dist.destroy_process_group()
"""


@pytest.mark.parametrize(("whose", "warnings"), [("ours", 0), ("torch's", 1)])
def test_ranks_do_not_warn_of_the_strides_of_gradients_which_torch_alone_does(whose: str, warnings: int) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", STRIDES, whose], capture_output=True, text=True, env=environment, timeout=120
    )
    assert done.stdout.split() == [str(warnings)], done.stderr
