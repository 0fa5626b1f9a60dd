"""Who builds: a dask cluster."""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from damage import contents
from sets import build

from cxrfast.errors import ShardError
from cxrfast.shards.building import dask_workers


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
    out, hit = tmp_path / "set", []

    def kill() -> None:
        while not any(f"-{victim.pid}-" in path.name for path in out.glob("512/*.tmp")):
            time.sleep(0.002)
        victim.kill()
        hit.append(victim.pid)

    thread = threading.Thread(target=kill)
    thread.start()
    report = build(noisy, out, [256, 512], dask=address)
    thread.join()
    assert hit
    assert report.complete
    assert contents(out) == contents(noisy_set)


def test_a_dask_scheduler_that_does_not_answer_is_named(phantoms, tmp_path, monkeypatch):
    pytest.importorskip("distributed")
    monkeypatch.setattr(dask_workers, "TIMEOUT", 1.0)
    with pytest.raises(ShardError, match=r"no dask scheduler answers at tcp://127\.0\.0\.1:9"):
        build(phantoms, tmp_path / "set", [8], dask="tcp://127.0.0.1:9")
