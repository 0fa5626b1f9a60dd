"""Micro-batches that fit: on a CPU measured and extrapolated, on a GPU tried."""

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from trainings import OPTIONS, assert_same, command, needs_gpu, run_to_the_end

from cxrfast.config import AUTO, Runtime, TrainConfig
from cxrfast.distributed import World
from cxrfast.errors import RunError
from cxrfast.machine import memory_bytes, resident_bytes
from cxrfast.runs.run import Run
from cxrfast.training import micro_batch
from cxrfast.training.micro_batch import cpu_room, cpu_step_bytes, gpu_step_memory, largest_micro_batch, shareable
from cxrfast.training.setup import make_config
from cxrfast.training.train import train

ONE = World(torch.device("cpu"))
RUNTIME = Runtime(shards=Path(), runs=Path())


def config(global_batch: int, scale: int = 32, **more) -> TrainConfig:
    given = {"precision": "fp32", "micro_batch": AUTO, "learning_rate": 1e-4}
    return TrainConfig(set_id="0", scale=scale, labels=("a", "b"), global_batch=global_batch, **(given | more))


@pytest.fixture(scope="module")
def needed():
    """Bytes of a step by its number of images of 32 px."""
    return cpu_step_bytes(config(1), RUNTIME)


def test_memory_on_a_cpu_is_extrapolated_from_small_steps(needed) -> None:
    state = torch.get_rng_state()
    assert needed(10) == pytest.approx(micro_batch._allocated(config(1), RUNTIME, 10, 32), rel=0.05)
    large = cpu_step_bytes(config(1, scale=32, sizes=((96, 1),)), RUNTIME)
    # the largest side counts
    assert large(3) == pytest.approx(micro_batch._allocated(config(1), RUNTIME, 3, 96), rel=0.05)
    thrifty = cpu_step_bytes(config(1, scale=96), replace(RUNTIME, recompute=True))
    assert thrifty(20) < 0.6 * large(20)
    assert torch.equal(torch.get_rng_state(), state), "other random numbers stay what they were"


def test_the_largest_micro_batch_that_fits_is_chosen_and_said(needed, monkeypatch, caplog) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(micro_batch, "cpu_step_bytes", lambda config, runtime: needed)
    monkeypatch.setattr(micro_batch, "cpu_room", lambda local_ranks: (needed(12) + needed(13)) // 2)
    assert largest_micro_batch(config(48), RUNTIME, ONE) == 12
    assert [line.split()[2] for line in caplog.messages] == ["48", "6", "12", "16"], "found by halves"
    assert "48 × 32 px does not fit into 0." in caplog.messages[0]
    assert "12 × 32 px fits into 0." in caplog.messages[2]
    assert largest_micro_batch(config(48), RUNTIME, ONE, most=8) == 8
    assert largest_micro_batch(config(22), RUNTIME, ONE) == 11
    monkeypatch.setattr(micro_batch, "cpu_room", lambda local_ranks: needed(1000))
    assert largest_micro_batch(config(256), RUNTIME, ONE) == 64, "at most, on a CPU"
    assert largest_micro_batch(config(96), RUNTIME, ONE) == 48
    monkeypatch.setattr(micro_batch, "cpu_room", lambda local_ranks: 0)
    says = r"tried 2, 1 images of 32 px on cpu, none fits into .* GiB: give --recompute, or"
    with pytest.raises(RunError, match=says):
        largest_micro_batch(config(2), RUNTIME, ONE)


def test_local_ranks_share_the_memory_that_is_left() -> None:
    used = resident_bytes()
    assert cpu_room(1) + used == pytest.approx(0.9 * 0.85 * memory_bytes(), rel=0.05)
    assert cpu_room(4) + used == pytest.approx(0.9 * 0.85 * memory_bytes() / 4, rel=0.05)


def test_shareable_sizes_give_every_rank_equally_many_micro_batches() -> None:
    assert shareable(48, 6, 48) == [1, 2, 4, 8]
    assert shareable(48, 1, 10) == [1, 2, 3, 4, 6, 8]
    for world in (1, 2, 3, 4, 6):
        assert all(48 % size == 0 and (48 // size) % world == 0 for size in shareable(48, world, 48))
    with pytest.raises(RunError, match="5 ranks cannot share a global batch of 48"):
        shareable(48, 5, 48)


@pytest.mark.slow
def test_auto_trains_what_the_number_trains_and_other_folds_and_later_runs_keep_it(
    tiny_set: Path, tmp_path: Path, monkeypatch, caplog
) -> None:
    caplog.set_level(logging.INFO)
    given = {**OPTIONS, "epochs": 1, "limit": 16}
    auto = make_config(tiny_set, 32, device="cpu", **{**given, "micro_batch": "auto"})
    runtime = Runtime(shards=tiny_set, runs=tmp_path, device="cpu")
    run = train(auto, runtime)
    assert run.config == replace(auto, micro_batch=8), "all of the global batch fits"
    number = make_config(tiny_set, 32, device="cpu", **{**given, "micro_batch": 8})
    assert_same(train(number, replace(runtime, name="number")).folder, run.folder)

    caplog.clear()
    assert train(auto, runtime).config.micro_batch == 8
    assert "--micro-batch auto" not in caplog.text, "a run keeps its size"
    run.set_state("failed")
    for path in (run.checkpoint_path, run.weights_path, run.metrics_path):
        path.unlink()
    train(auto, runtime)
    assert "--micro-batch auto: 8 × 32 px fits" in caplog.text, (
        "a run that failed with nothing to lose is measured again"
    )

    train(replace(number, micro_batch=4, fold=1), runtime)
    assert train(replace(auto, fold=2), runtime).config.micro_batch == 4, "no larger than that of another fold"


@pytest.mark.slow
def test_ranks_agree_on_a_size_that_they_can_share(tiny_set: Path, tmp_path: Path) -> None:
    said = run_to_the_end(command(tiny_set, tmp_path, 2, epochs=1, limit=16, micro_batch="auto"))
    assert said.count("--micro-batch auto: 4 × 32 px fits") == 1, "eight images are four each"
    assert Run.open(tmp_path / "densenet121-32" / "fold-0").config.micro_batch == 4


@needs_gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_gpu_takes_what_it_holds_and_is_left_as_it_was(precision: str) -> None:
    device = torch.device("cuda", 0)
    asked = config(2**16, scale=512, precision=precision)
    before, state = torch.cuda.memory_reserved(device), torch.cuda.get_rng_state(device)
    found = largest_micro_batch(asked, RUNTIME, World(device))
    assert 1 < found < 2**16
    assert gpu_step_memory(asked, RUNTIME, device, found)
    assert gpu_step_memory(asked, RUNTIME, device, 2 * found) is None
    assert torch.cuda.memory_reserved(device) < before + 2**27, "workspaces of cuBLAS stay"
    assert torch.equal(torch.cuda.get_rng_state(device), state)
    torch.empty(int(0.95 * torch.cuda.mem_get_info(device)[0]), dtype=torch.uint8, device=device)
