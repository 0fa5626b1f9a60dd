import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cxrfast.errors import RunError, ShardError
from cxrfast.shards.format import lock as module
from cxrfast.shards.format.lock import Lease, Lock

HOLD = """
import socket, sys, time
from pathlib import Path
from cxrfast.errors import ShardError
from cxrfast.shards.format import lock
if sys.argv[2]:
    socket.gethostname = lambda: sys.argv[2]
    lock.BEAT, lock.WATCH = 0.1, 2.0
try:
    with lock.Lock(Path(sys.argv[1])):
        print("held", flush=True)
        time.sleep(float(sys.argv[3]))
except ShardError:
    print("refused", flush=True)
"""


def hold(folder: Path, host: str = "", seconds: float = 60) -> subprocess.Popen:
    """A process that holds the lock of `folder`, or is refused; `host`: the machine it takes itself to run on."""
    command = [sys.executable, "-c", HOLD, folder, host, str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


@contextmanager
def held(folder: Path, host: str = "") -> Iterator[subprocess.Popen]:
    with hold(folder, host) as other:
        assert other.stdout.readline() == "held\n"
        try:
            yield other
        finally:
            other.kill()


def holder(folder: Path) -> int | None:
    """The process named in the lock of `folder`."""
    return int((folder / "lease.lock").read_text().partition("pid=")[2].split()[0])


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Signs of life every tenth of a second."""
    monkeypatch.setattr(module, "BEAT", 0.1)
    monkeypatch.setattr(module, "WATCH", 2.0)


@pytest.fixture
def no_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that cannot exchange two names, as NFS."""
    from filelock._soft._exclusive import _recovery

    monkeypatch.setattr(_recovery, "exchange_names", lambda *_: False)


def test_a_second_process_is_refused_and_its_message_names_the_first_and_its_job(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    message = rf"{tmp_path} is being built by process {os.getpid()} on .*, job 4711: wait for it or end it"
    with Lock(tmp_path), pytest.raises(ShardError, match=message), Lock(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_a_lease_is_for_any_folder_and_is_given_back_after_an_error(tmp_path):
    def lease() -> Lease:
        return Lease(tmp_path / "lease.lock", "the run is being trained", RunError)

    threads = threading.active_count()
    with pytest.raises(RunError, match=f"the run is being trained by process {os.getpid()} on "), lease(), lease():
        pass
    with pytest.raises(KeyError), Lock(tmp_path):
        raise KeyError
    assert not list(tmp_path.iterdir())
    assert threading.active_count() == threads, "its thread ends"


def test_the_lock_of_a_killed_process_is_taken_over_at_once(tmp_path):
    with held(tmp_path) as other, pytest.raises(ShardError, match=f"process {other.pid} "), Lock(tmp_path):
        pass
    with Lock(tmp_path):
        assert holder(tmp_path) == os.getpid()
    assert not list(tmp_path.iterdir())


def test_the_lock_of_a_process_that_is_stopped_here_is_left_alone(tmp_path, quick):
    with held(tmp_path) as other:
        other.send_signal(signal.SIGSTOP)
        time.sleep(0.3)
        with pytest.raises(ShardError, match=f"process {other.pid} "), Lock(tmp_path):
            pass


@pytest.mark.slow
def test_of_many_that_take_over_a_dead_lock_one_gets_it(tmp_path):
    with held(tmp_path):
        pass
    others = [hold(tmp_path, seconds=8) for _ in range(4)]
    answers = [other.communicate()[0] for other in others]
    assert sorted(answers) == ["held\n"] + ["refused\n"] * 3
    assert not list(tmp_path.iterdir())


def test_a_holder_on_another_machine_is_left_alone_while_it_beats_and_taken_over_when_it_is_silent(
    tmp_path, quick, caplog
):
    with (
        held(tmp_path, "another") as other,
        pytest.raises(ShardError, match=f"process {other.pid} on another"),
        Lock(tmp_path),
    ):
        pass
    caplog.clear()
    with Lock(tmp_path):
        assert holder(tmp_path) == os.getpid()
    assert "waiting 2 s for a sign of life" in caplog.text


@pytest.mark.usefixtures("quick", "no_exchange")
@pytest.mark.parametrize("host", ["another", "killed and not reaped"])
def test_a_dead_holder_is_taken_over_where_names_cannot_be_exchanged(tmp_path, host):
    """The second one is a zombie here until this process asks for its exit code."""
    with held(tmp_path, "" if " " in host else host) as other:
        other.kill()
        while other.poll() is None and Path(f"/proc/{other.pid}/stat").read_text().split()[2] != "Z":
            time.sleep(0.01)
        with Lock(tmp_path):
            assert holder(tmp_path) == os.getpid()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", ["", "{"])
def test_a_lock_that_was_never_written_is_in_the_way_for_a_moment_only(tmp_path, quick, content):
    (tmp_path / "lease.lock").write_text(content)
    with Lock(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_locks_of_an_earlier_version_and_of_killed_takeovers_are_removed(tmp_path):
    for name in ("lease.json", "lease-1-of-3.json", f"lease.lock.break.17.{'0' * 32}"):
        (tmp_path / name).write_text("{}")
        os.utime(tmp_path / name, (1, 1))
    (tmp_path / f"lease.lock.break.18.{'0' * 32}").write_text("{}")  # of a takeover that runs
    with Lock(tmp_path):
        assert sorted(path.name[:19] for path in tmp_path.iterdir()) == ["lease.lock", "lease.lock.break.18"]


def test_parts_of_one_division_work_side_by_side_and_exclude_everything_else(tmp_path):
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


def test_a_lost_lock_is_noticed_and_that_of_the_new_holder_stays(tmp_path):
    with Lock(tmp_path) as lock:
        lock.check()
        (tmp_path / "lease.lock").unlink()
        with pytest.raises(ShardError, match="another process took over"):
            lock.check()
        (tmp_path / "lease.lock").write_text("of the other")
    assert (tmp_path / "lease.lock").read_text() == "of the other"
