"""Micro-batches that fit: real steps in real processes, on the CPU, under small limits."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cxrfast.errors import RunError
from cxrfast.training import micro_batch
from cxrfast.training.micro_batch import Step, Trial, cache_file, largest_micro_batch, shareable

TINY = {"arch": "densenet121", "scale": 32, "outputs": 3, "precision": "fp32", "device": "cpu"}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "cxrfast" / "micro-batch.json"


@pytest.fixture
def trials(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes that were tried, where up to 12 images fit; nothing is measured."""
    tried: list[int] = []

    def try_in_own_process(step: Step, size: int) -> Trial:
        tried.append(size)
        return Trial(has_room=size <= 12)

    monkeypatch.setattr(micro_batch, "try_in_own_process", try_in_own_process)
    return tried


def step(memory: int, scale: int = 64) -> Step:
    return Step(
        arch="densenet121",
        scale=scale,
        outputs=3,
        precision="fp32",
        recompute=False,
        compile=None,
        device="cpu",
        memory=memory,
        threads=2,
    )


DATA = """
import threading, time
from pathlib import Path
from tests.training.test_micro_batch import step
from cxrfast.training import micro_batch

def sample():
    while True:
        lines = Path("/proc/self/status").read_text().splitlines()
        peaks.append(next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmData")))
        time.sleep(0.01)

peaks = []
threading.Thread(target=sample, daemon=True).start()
micro_batch._train(step(2**40), 1, micro_batch.torch.device("cpu"))
print(max(peaks))
"""


def memory_for_one_image() -> int:
    """Bytes in which a step over one image of 64 px fits on this machine, and one over 61, 0.7 GiB more, does not."""
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", DATA], capture_output=True, text=True, check=True, cwd=root)
    return int((int(done.stdout) + 2**28) / (1 - micro_batch.RESERVE))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="/proc tells what a process holds")
def test_less_memory_means_a_smaller_divisor_and_the_second_call_measures_nothing(
    cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {**TINY, "scale": 64, "global_batch": 61, "memory": memory_for_one_image()}
    assert largest_micro_batch(**options) == 1
    lines = capsys.readouterr().err.splitlines()
    assert "61 × 64 px does not fit" in lines[0]
    assert "1 × 64 px fits" in lines[1]
    assert lines[2].endswith(f"1, remembered in {cache}")
    monkeypatch.setattr(subprocess, "run", None)
    assert largest_micro_batch(**options) == 1
    assert list(json.loads(cache.read_text()).values()) == [1]


def test_a_cpu_takes_64_images_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(micro_batch, "try_in_own_process", lambda step, size: Trial(has_room=True))
    assert largest_micro_batch(**TINY, global_batch=256) == 64
    assert largest_micro_batch(**TINY, global_batch=96) == 48


def test_where_not_one_image_fits_one_error_says_what_to_do(cache: Path) -> None:
    with pytest.raises(RunError, match=r"tried 2, 1 images of 32 px on cpu, none fits into 0\.0 GiB .*--recompute"):
        largest_micro_batch(**TINY, global_batch=2, memory=2**20)
    assert not cache.exists(), "other processes may have held the memory: it is tried again"


def test_an_unknown_architecture_is_not_taken_for_a_lack_of_memory() -> None:
    with pytest.raises(RunError, match="'densenet' is unknown"):
        largest_micro_batch(**{**TINY, "arch": "densenet"}, global_batch=4)
    with pytest.raises(RunError, match="the trial of 4 images failed"):
        largest_micro_batch(**{**TINY, "scale": 1}, global_batch=4)


def test_two_processes_at_once_measure_once(cache: Path, tmp_path: Path) -> None:
    code = f"from cxrfast.training.micro_batch import largest_micro_batch\nprint(largest_micro_batch(**{TINY}, global_batch=4))"
    start = lambda rank: subprocess.Popen(  # noqa: E731
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "RANK": str(rank)},
    )
    done = [process.communicate(timeout=300) for process in (start(0), start(1))]
    assert [out.strip() for out, _ in done] == ["2", "2"], "four images are two each"
    assert "".join(err for _, err in done).count("2 × 32 px fits") == 1


def test_a_process_that_waits_goes_on_when_the_measuring_one_is_killed(cache: Path, trials: list[int]) -> None:
    cache.parent.mkdir()
    code = (
        f"import fcntl, time\nfile = open({str(cache.with_suffix('.lock'))!r}, 'ab')\n"
        "fcntl.flock(file, fcntl.LOCK_EX)\nprint('held', flush=True)\ntime.sleep(600)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert holder.stdout
    assert holder.stdout.readline() == "held\n"
    killer = subprocess.Popen(["sh", "-c", f"sleep 1; kill -9 {holder.pid}"])
    assert largest_micro_batch(**TINY, global_batch=8) == 8
    assert trials == [8]
    assert holder.wait() == -9
    holder.stdout.close()
    killer.wait()


def test_a_trial_ends_with_the_process_that_asked_for_it() -> None:
    argument = json.dumps({"step": vars(step(2**33, 32)), "size": 4, "parent": os.getpid() + 1})
    done = subprocess.run(
        [sys.executable, "-m", "cxrfast.training.micro_batch", argument], capture_output=True, text=True, timeout=300
    )
    assert (done.returncode, done.stdout) == (1, "")


def test_the_largest_divisor_is_found_by_halves(trials: list[int]) -> None:
    assert largest_micro_batch(**TINY, global_batch=48) == 12
    assert trials == [48, 6, 12, 16]
    assert largest_micro_batch(**TINY, global_batch=48) == 12
    assert len(trials) == 4
    assert largest_micro_batch(**TINY, global_batch=48, world=6) == 8
    assert largest_micro_batch(**TINY, global_batch=48, recompute=True) == 12
    assert len(trials) > 5, "another question is another measurement"


def test_what_other_processes_left_of_a_gpu_is_not_remembered(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(micro_batch, "try_in_own_process", lambda step, size: Trial(size < 4, shared=True))
    assert largest_micro_batch(**TINY, global_batch=8) == 2
    assert not cache.exists()


@pytest.mark.parametrize("damage", [b"", b"junk", b"[]", b'{"a": "8"}', b'{"a": 0}', b"\xff"])
def test_a_damaged_cache_is_one_warning_and_made_anew(
    cache: Path, trials: list[int], capsys: pytest.CaptureFixture[str], damage: bytes
) -> None:
    cache.parent.mkdir()
    cache.write_bytes(damage)
    assert [largest_micro_batch(**TINY, global_batch=8) for _ in range(2)] == [8, 8]
    assert capsys.readouterr().err.count("is damaged") == 1
    assert trials == [8]


def test_a_cache_that_cannot_be_written_is_one_warning(
    cache: Path, trials: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    cache.parent.write_text("a file in the folder's place")
    assert largest_micro_batch(**TINY, global_batch=8) == 8
    assert capsys.readouterr().err.count("cannot be used") == 1


def test_shareable_sizes_give_every_rank_equally_many_micro_batches() -> None:
    assert shareable(48, 6, 48) == [1, 2, 4, 8]
    assert shareable(48, 1, 10) == [1, 2, 3, 4, 6, 8]
    for world in (1, 2, 3, 4, 6):
        assert all(48 % size == 0 and (48 // size) % world == 0 for size in shareable(48, world, 48))
    with pytest.raises(RunError, match="5 ranks cannot share a global batch of 48"):
        shareable(48, 5, 48)


def test_without_a_variable_the_cache_lies_in_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/somebody")
    assert cache_file() == Path("/somebody/.cache/cxrfast/micro-batch.json")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_a_gpu_takes_what_it_holds() -> None:
    small = largest_micro_batch(**{**TINY, "device": "cuda", "scale": 256}, global_batch=4096, memory=8 * 2**30)
    assert 1 < small < 4096
