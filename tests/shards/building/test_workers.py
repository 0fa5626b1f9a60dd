"""Who builds: processes that die of outside causes or of an image, parts of a job array, a dask cluster."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import psutil
import pytest
from commands import run
from damage import contents
from sets import build as build_set

from cxrfast.errors import ShardError
from cxrfast.shards.building import dask_workers
from cxrfast.shards.format.info import read_set
from cxrfast.shards.format.rows import read_rows

MARK = b"this image leads the decoder astray"
ASTRAY = [0, 40, 100]

build = partial(build_set, workers=2)


# Workers that die


@contextmanager
def once_written(pattern: str, out: Path, kill: Callable[[], object]) -> Iterator[None]:
    """Meanwhile, `kill` as soon as there is a file of that pattern in `out`."""

    def wait() -> None:
        while not list(out.glob(pattern)):
            time.sleep(0.002)
        kill()

    with ThreadPoolExecutor(1) as pool:
        killed = pool.submit(wait)
        yield
        killed.result()


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSEGV])
def test_a_worker_that_dies_costs_its_open_shards_only(noisy, noisy_set, tmp_path, how):
    def kill() -> None:
        there = [p for p in psutil.Process().children() if "spawn_main" in " ".join(p.cmdline())]
        there[-1].send_signal(how)

    with once_written("512/*.tmp", tmp_path / "set", kill):
        assert build(noisy, tmp_path / "set", [256, 512]).complete
    assert contents(tmp_path / "set") == contents(noisy_set)


CRASHING = """
import ctypes, sys
from pathlib import Path
from cxrfast.errors import ShardError
from cxrfast.shards.building import dask_workers
from cxrfast.shards import build
from cxrfast.shards.format import film as step
real = step.decode_with_remarks
def decode(data, grey):
    if sys.argv[3].encode() in data:
        HOW
    return real(data, grey)
step.decode_with_remarks = decode
if __name__ == "__main__":
    try:
        build.build(Path(sys.argv[1]), Path(sys.argv[2]), [32], workers=2)
    except ShardError as error:
        sys.exit(str(error))
"""
"""Workers import this script, so that the decoder that crashes at some images is theirs too."""


def crash(tree: Path, out: Path, script: Path, how: str) -> subprocess.CompletedProcess[str]:
    script.write_text(CRASHING.replace("HOW", how))
    return run(sys.executable, script, tree, out, MARK.decode())


@pytest.fixture
def astray(tiny_set, tree):
    """A tree with images that crash the decoder above: two of one shard, one of another."""
    for path in read_rows(tiny_set / "rows.parquet")["path"][ASTRAY]:
        with open(tree / path, "ab") as file:
            file.write(MARK)
    return tree


def test_images_that_crash_the_decoder_are_left_out_and_no_others(astray, tmp_path):
    done = crash(astray, tmp_path / "set", tmp_path / "script.py", "ctypes.string_at(0)")
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "set" / "quarantine.csv").read_text().splitlines()[1:]
    assert [int(line.split(",")[0]) for line in lines] == ASTRAY
    assert all(line.endswith(",crashes the decoder") for line in lines)


@pytest.mark.slow
def test_a_worker_that_is_killed_again_and_again_fails_its_shard_and_costs_no_row(astray, tmp_path):
    done = crash(astray, tmp_path / "set", tmp_path / "script.py", "import os; os.kill(os.getpid(), 9)")
    assert "2 shards could not be built" in done.stderr
    assert "died twice (SIGKILL)" in done.stderr
    assert sorted(p.name for p in (tmp_path / "set" / "32").iterdir()) == ["000002.idx", "000002.json", "000002.tar"]
    assert build(astray, tmp_path / "set", [32]).rows == {32: 150}


@pytest.mark.slow
def test_a_crash_at_an_image_that_was_fine_at_another_scale_fails_its_shard(astray, tmp_path):
    build(astray, tmp_path / "set", [8])
    done = crash(astray, tmp_path / "set", tmp_path / "script.py", "ctypes.string_at(0)")
    assert "crashes the decoder now" in done.stderr


# Parts


def test_parts_build_the_same_set_in_any_order(phantoms, raw_set, tmp_path):
    out, recipe = tmp_path / "set", read_set(raw_set).recipe
    assert not build(phantoms, out, [32, 64], part=(2, 2), recipe=recipe).complete
    assert not (out / "SHA256SUMS").exists(), "a part of a set is not a set"
    assert build(phantoms, out, [32, 64], part=(1, 2), recipe=recipe).complete
    assert contents(out) == contents(raw_set)
    assert build(phantoms, tmp_path / "other", [8], part=(5, 5)).rows == {}, "a part beyond the shards"
    for options in ({"dask": "tcp://127.0.0.1:1"}, {"retry_quarantined": True}):
        with pytest.raises(ShardError, match="--part cannot be combined"):
            build(phantoms, tmp_path / "other", [8], part=(1, 2), **options)


@pytest.mark.slow
def test_parts_at_the_same_time_build_the_same_set(noisy, noisy_set, tmp_path):
    out = tmp_path / "set"
    options = ["--scale", "256", "--scale", "512", "--workers", "1", "--part"]
    command = [sys.executable, "-m", "cxrfast", "shard", "--data", noisy, "--out", out, *options]
    parts = [
        subprocess.Popen([*command, f"{i}/3"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        for i in (1, 2, 3)
    ]
    errors = [part.communicate()[1] for part in parts]
    assert [part.returncode for part in parts] == [0, 0, 0], errors
    assert contents(out) == contents(noisy_set)


# A dask cluster


@contextmanager
def dask(*words: str) -> Iterator[subprocess.Popen]:
    """A dask process of its own."""
    command = [sys.executable, "-m", "dask", *words]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[tuple[str, list[subprocess.Popen]]]:
    """Address of a scheduler, and its two workers of one thread each."""
    pytest.importorskip("distributed")
    file = tmp_path / "scheduler.json"
    at = ("--scheduler-file", str(file))
    worker = ("worker", *at, "--no-nanny", "--nthreads", "1", "--no-dashboard", "--local-directory", str(tmp_path))
    with dask("scheduler", *at, "--port", "0", "--no-dashboard", "--host", "127.0.0.1"):
        while not file.exists():
            time.sleep(0.02)
        address = json.loads(file.read_text())["address"]
        with dask(*worker) as first, dask(*worker) as second:
            from distributed import Client

            with Client(address, set_as_default=False) as client:
                client.wait_for_workers(2, timeout=60)
            yield address, [first, second]


@pytest.mark.slow
def test_a_dask_cluster_builds_the_same_bytes_and_a_killed_worker_costs_its_open_shard(
    noisy, noisy_set, tmp_path, cluster
):
    address, (victim, _) = cluster
    with once_written(f"512/*-{victim.pid}-*.tmp", tmp_path / "set", victim.kill):
        assert build(noisy, tmp_path / "set", [256, 512], dask=address).complete
    assert contents(tmp_path / "set") == contents(noisy_set)


def test_a_dask_scheduler_that_does_not_answer_is_named(phantoms, tmp_path, monkeypatch):
    pytest.importorskip("distributed")
    monkeypatch.setattr(dask_workers, "TIMEOUT", 1.0)
    with pytest.raises(ShardError, match=r"no dask scheduler answers at tcp://127\.0\.0\.1:9"):
        build(phantoms, tmp_path / "set", [8], dask="tcp://127.0.0.1:9")
