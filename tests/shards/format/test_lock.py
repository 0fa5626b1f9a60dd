import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from cxrfast.errors import ShardError
from cxrfast.shards.format import lock as module
from cxrfast.shards.format.lock import Lock

HOLD = """
import os, sys, time
from pathlib import Path
from cxrfast.errors import ShardError
from cxrfast.shards.format import lock
if sys.argv[2]:
    lock._machine = lambda: sys.argv[2]
lock.BEAT = 0.1
try:
    with lock.Lock(Path(sys.argv[1])):
        print("held", flush=True)
        time.sleep(float(sys.argv[3]))
except ShardError:
    print("refused", flush=True)
"""


def hold(folder: Path, machine: str = "", seconds: float = 60) -> subprocess.Popen:
    """A process that holds the lock of `folder`, or is refused; `machine`: what it takes itself to run on."""
    return subprocess.Popen(
        [sys.executable, "-c", HOLD, folder, machine, str(seconds)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])},
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Signs of life every tenth of a second."""
    monkeypatch.setattr(module, "BEAT", 0.1)
    monkeypatch.setattr(module, "WATCH", 2.0)


def test_a_second_build_is_refused_and_told_who_is_at_work(tmp_path):
    with Lock(tmp_path), pytest.raises(ShardError, match=f"process {os.getpid()} on "), Lock(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_the_lock_of_a_killed_process_is_taken_over_reaped_or_not(tmp_path):
    with hold(tmp_path) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(ShardError, match=f"process {other.pid} "), Lock(tmp_path):
            pass
        other.kill()
        while other.poll() is None and Path(f"/proc/{other.pid}/stat").read_text().split()[2] != "Z":
            time.sleep(0.01)
        with Lock(tmp_path):  # its parent, this process, has not asked for its exit code yet
            assert json.loads((tmp_path / "lease.json").read_text())["pid"] == os.getpid()
    assert not list(tmp_path.iterdir())


def test_of_many_that_take_over_a_dead_lock_one_gets_it(tmp_path):
    with hold(tmp_path) as dead:
        assert dead.stdout.readline() == "held\n"
        dead.kill()
    others = [hold(tmp_path, seconds=8) for _ in range(6)]
    answers = [other.communicate()[0] for other in others]
    assert sorted(answers) == ["held\n"] + ["refused\n"] * 5
    assert not list(tmp_path.iterdir())


def test_a_build_that_beats_on_another_machine_is_left_alone(tmp_path, quick):
    with hold(tmp_path, "another") as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(ShardError, match=f"process {other.pid} "), Lock(tmp_path):
            pass
        other.kill()


def test_a_build_that_is_silent_on_another_machine_is_taken_over(tmp_path, quick):
    with hold(tmp_path, "another") as other:
        assert other.stdout.readline() == "held\n"
        other.kill()
    with Lock(tmp_path):
        assert json.loads((tmp_path / "lease.json").read_text())["pid"] == os.getpid()


@pytest.mark.parametrize("content", ["", "{", "[]"])
def test_a_lock_that_was_never_written_is_in_the_way_for_a_moment_only(tmp_path, quick, content):
    (tmp_path / "lease.json").write_text(content)
    with Lock(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_parts_of_one_division_work_side_by_side_and_nobody_else(tmp_path):
    with Lock(tmp_path, (1, 3)) as first, Lock(tmp_path, (3, 3)):
        assert not first.alone()
        for part in ((1, 3), (2, 2), None):
            with pytest.raises(ShardError, match="is being built"), Lock(tmp_path, part):
                pass
    with Lock(tmp_path, (2, 3)) as alone:
        assert alone.alone()
    with Lock(tmp_path), pytest.raises(ShardError, match="is being built"), Lock(tmp_path, (1, 3)):
        pass
    assert not list(tmp_path.iterdir())


def test_who_lost_the_lock_hears_of_it(tmp_path):
    with Lock(tmp_path) as lock:
        lock.check()
        (tmp_path / "lease.json").unlink()
        with pytest.raises(ShardError, match="another build took over"):
            lock.check()
        (tmp_path / "lease.json").write_text("of the other")
    assert (tmp_path / "lease.json").read_text() == "of the other"


def test_a_lock_is_given_back_after_an_error_and_its_thread_ends(tmp_path):
    threads = threading.active_count()
    with pytest.raises(KeyError), Lock(tmp_path):
        raise KeyError
    assert not list(tmp_path.iterdir())
    assert threading.active_count() == threads


def test_the_lock_tells_the_job_of_a_cluster(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    with Lock(tmp_path), pytest.raises(ShardError, match="job 4711"), Lock(tmp_path):
        pass
