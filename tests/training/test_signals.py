"""Trainings that receive a signal, fail or are killed: nothing is lost, and state.json says what happened."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil
import pytest
import torch
from damage import mounted
from trainings import (
    FAST,
    OPTIONS,
    SHORT,
    assert_same,
    command,
    is_in_second_epoch,
    make_trainer,
    run_to_the_end,
    started,
    wait_for,
)

from cxrfast.config import Runtime
from cxrfast.errors import RunError
from cxrfast.pipelines.order import TrainOrder
from cxrfast.runs.run import Run
from cxrfast.training.setup import make_config
from cxrfast.training.signals import Stopped, StopRequest, call
from cxrfast.training.train import train

RUN = Path("densenet121-32") / "fold-0"


@pytest.fixture(scope="module", params=[1, 2])
def undisturbed(request, tiny_set, tmp_path_factory):
    """Number of processes, and folder of an undisturbed run."""
    runs = tmp_path_factory.mktemp("undisturbed")
    run_to_the_end(command(tiny_set, runs, request.param))
    return request.param, runs / RUN


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_saves_and_ends_all_ranks_and_the_same_command_ends_as_if_nothing_had_happened(
    undisturbed, tiny_set, tmp_path, number
):
    nproc, whole = undisturbed
    arguments, run = command(tiny_set, tmp_path, nproc, checkpoint_steps=10**6), tmp_path / RUN
    with started(arguments, tmp_path / "log") as process:
        wait_for(lambda: (run / "metrics.jsonl").exists(), process)  # the first epoch's end
        family = [process.pid, *(child.pid for child in psutil.Process(process.pid).children(recursive=True))]
        os.kill(process.pid, number)
        code = process.wait(timeout=40)
    log = (tmp_path / "log").read_text()
    assert code == 128 + number if nproc == 1 else code != 0
    assert not [pid for pid in family if psutil.pid_exists(pid)], "no process is left"
    state = Run.open(run).state()
    assert (state["state"], state["signal"]) == ("preempted", number.name)
    assert f"{number.name}; saved, the same command resumes" in log
    assert 'Traceback (most recent call last):\n  File "' + str(Path(__file__).parents[2] / "cxrfast") not in log
    assert torch.load(run / "last.pt", weights_only=True)["epoch"] == 1
    run_to_the_end(arguments)
    assert_same(whole, run)
    assert Run.open(run).is_done


@pytest.mark.slow
def test_a_killed_training_ends_as_if_nothing_had_happened(undisturbed, tiny_set, tmp_path):
    nproc, whole = undisturbed
    arguments, run = command(tiny_set, tmp_path, nproc), tmp_path / RUN
    with started(arguments, tmp_path / "log") as process:
        wait_for(lambda: is_in_second_epoch(run), process)
    assert 0 < torch.load(run / "last.pt", weights_only=True)["consumed"] < 96
    assert Run.open(run).state()["state"] == "running"
    run_to_the_end(arguments)
    assert_same(whole, run)


@pytest.mark.slow
def test_going_on_with_another_number_of_ranks_keeps_rows_and_order(tiny_set, tmp_path):
    """Two ranks to the middle of an epoch, then one: the rows left are those that one rank alone would have had left."""
    run = tmp_path / RUN
    with started(command(tiny_set, tmp_path, 2), tmp_path / "log") as process:
        wait_for(lambda: is_in_second_epoch(run), process)
        os.kill(process.pid, signal.SIGTERM)
        process.wait(timeout=40)
    checkpoint = torch.load(run / "last.pt", weights_only=True)
    assert Run.open(run).state()["state"] == "preempted"
    assert checkpoint["consumed"] % OPTIONS["global_batch"] == 0
    run_to_the_end(command(tiny_set, tmp_path, 1))
    assert [line["epoch"] for line in Run.open(run).metrics()] == [0, 1]
    rows = Run.open(run).rows()
    order = TrainOrder(rows=rows.loc[rows["part"] == "train", "row"].to_numpy(), global_batch=8, micro_batch=4, seed=0)
    left = sum(map(len, order.micro_batches(1, checkpoint["consumed"])))
    assert left + checkpoint["consumed"] == order.steps * 8


def test_a_signal_saves_and_the_resumed_run_ends_as_if_nothing_had_happened(tiny_set, tmp_path):
    options = {**SHORT, "arch": FAST["arch"]}
    make_trainer(tiny_set, tmp_path / "whole", **options).fit()
    for when in ("training", "validation"):
        first = make_trainer(tiny_set, tmp_path / when, **options)
        trained = first.train_epoch() if when == "validation" else None
        first.stop.number = signal.SIGUSR1
        with pytest.raises(Stopped):
            first.end_epoch(*trained) if trained else first.fit()
        checkpoint = torch.load(first.run.checkpoint_path, weights_only=True)
        steps = first.order.steps if when == "validation" else 1
        assert (checkpoint["epoch"], checkpoint["consumed"]) == (0, steps * 8)
        assert first.run.metrics() == []
        if when == "training":
            assert (first.run.state()["state"], first.run.state()["signal"]) == ("preempted", "SIGUSR1")
        make_trainer(tiny_set, tmp_path / when, **options).fit()
        assert_same(tmp_path / "whole" / "run" / "fold-0", tmp_path / when / "run" / "fold-0")


def test_a_loss_that_explodes_names_the_step_its_rows_and_the_last_good_checkpoint(tiny_set, tmp_path):
    trainer = make_trainer(tiny_set, tmp_path, limit=32, learning_rate=1e9)
    trainer.counters.epoch = 1
    trainer.save()
    good = (trainer.run.folder / "last.pt").read_bytes()
    says = r"step \d+ of epoch 2, on rows [\d ]+; .*last.pt holds the last good state"
    with pytest.raises(RunError, match=says) as caught:
        trainer.fit()
    words = str(caught.value).split()
    step = int(words[words.index("step") + 1])
    rows = trainer.order.global_batches(1)[step - 1]
    assert f"on rows {' '.join(map(str, rows))};" in str(caught.value)
    assert step <= 3, "the first step's update is what breaks it"
    assert (trainer.run.folder / "last.pt").read_bytes() == good
    state = trainer.run.state()
    assert state["state"] == "failed"
    assert "the loss was not finite" in state["error"]


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_when_a_rank_dies_the_other_ends_with_a_message_and_does_not_hang(tiny_set, tmp_path, victim):
    run = tmp_path / RUN
    with started(command(tiny_set, tmp_path, 2, epochs=50), tmp_path / "log") as process:
        wait_for(lambda: (run / "metrics.jsonl").exists(), process)
        children = psutil.Process(process.pid).children()
        living = [child for child in children if child.status() != psutil.STATUS_ZOMBIE]
        (rank,) = (child for child in living if child.environ().get("RANK") == str(victim))
        family = [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
        rank.kill()
        assert process.wait(timeout=30) != 0
    assert not [pid for pid in family if psutil.pid_exists(pid)]
    assert "another rank ended" in (tmp_path / "log").read_text()
    state = Run.open(run).state()
    assert state["state"] == "failed"
    assert "another rank ended" in state["error"]


@pytest.mark.slow
def test_a_full_disk_keeps_the_checkpoint_before_and_the_same_command_goes_on(tiny_set, tmp_path):
    with mounted(tmp_path / "disk", "size=260m") as disk:
        config = make_config(tiny_set, 32, device="cpu", **{**OPTIONS, "limit": 16})
        trainer = make_trainer(tiny_set, disk, limit=16)
        trainer.save()
        before = (trainer.run.folder / "last.pt").read_bytes()
        filler = disk / "filler"
        filler.write_bytes(bytes(os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize - 4 * 2**20))
        with pytest.raises(OSError, match="No space left"):
            trainer.fit()
        assert (trainer.run.folder / "last.pt").read_bytes() == before
        assert not list(trainer.run.folder.glob("*.tmp"))
        filler.unlink()
        assert train(config, Runtime(shards=tiny_set, runs=disk, name="run", device="cpu")).is_done


def test_signals_are_noted_only_where_they_are_asked_for():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)]
    with StopRequest() as request:
        assert request.number == 0
        os.kill(os.getpid(), signal.SIGUSR1)
        assert request.number == signal.SIGUSR1
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGUSR2)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)] == before


def test_a_signal_is_answered_at_once_and_a_second_ctrl_c_interrupts(capfd):
    with StopRequest("densenet121-32/fold-0", answers=True) as request:
        os.kill(os.getpid(), signal.SIGINT)
        said = capfd.readouterr().err
        assert "densenet121-32/fold-0: SIGINT: saving once this step is over; Ctrl-C again ends it at once" in said
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        assert request.number == signal.SIGINT
    assert capfd.readouterr().err == ""
    with StopRequest("other", answers=False):  # a rank other than the first
        os.kill(os.getpid(), signal.SIGTERM)
    assert capfd.readouterr().err == ""


def test_a_terminal_that_is_closed_saves_unless_nohup_ignores_it(capfd):
    before = signal.getsignal(signal.SIGHUP)
    try:
        with StopRequest("x", answers=True) as request:
            os.kill(os.getpid(), signal.SIGHUP)
        assert request.number == signal.SIGHUP
        assert "x: SIGHUP: saving" in capfd.readouterr().err
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with StopRequest("x", answers=True) as request:
            os.kill(os.getpid(), signal.SIGHUP)
        assert request.number == 0
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


# A training in a process of its own


CHILD = """
import signal, sys, time
def end(number, frame):
    time.sleep(0.3)
    open(sys.argv[1], "a").write(f"{number} ")
    sys.exit(7)
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
    signal.signal(number, end)
open(sys.argv[1], "w").write("up ")
time.sleep(30)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_passed_on_once_and_the_child_is_waited_for(tmp_path, number):
    seen = tmp_path / "seen"

    def interrupt() -> None:
        while not (seen.exists() and seen.read_text()):
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    threading.Thread(target=interrupt).start()
    assert call([sys.executable, "-c", CHILD, str(seen)]) == (7, number)
    assert seen.read_text() == f"up {int(number)} ", "after its own clean-up, and told once"
    assert signal.getsignal(number) is before


def test_a_study_under_nohup_passes_no_hangup_on():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        parent = f"import os, signal; os.kill({os.getpid()}, signal.SIGHUP)"
        assert call([sys.executable, "-c", parent]) == (0, None)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_child_without_a_signal_has_only_its_exit_code_and_a_stop_that_of_a_shell():
    assert call(["sh", "-c", "exit 3"]) == (3, None)
    assert Stopped("x").code == 143
    assert Stopped("x", signal.SIGUSR1).code == 138
    assert "stopped by SIGUSR1 in densenet121-32/fold-0" in str(Stopped("densenet121-32/fold-0", signal.SIGUSR1))


# Several machines: two torchruns that find each other over the loopback device


@contextmanager
def two_nodes(shards: Path, runs: Path, logs: Path) -> Iterator[list["subprocess.Popen[bytes]"]]:
    """One torchrun of one rank for each of two nodes, as docs/runs.md has it, with half of the cores each.

    The two ranks of one node have as many, and so compute the same sums.
    """
    cores, arguments = sorted(os.sched_getaffinity(0)), command(shards, runs, 2)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    meeting = ["--nnodes=2", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=pair"]
    own = [a.replace("--nproc_per_node=2", "--nproc_per_node=1") for a in arguments if a != "--standalone"]
    at = own.index("torch.distributed.run") + 1
    logs.mkdir(exist_ok=True)
    with ExitStack() as stack:
        nodes = [stack.enter_context(started([*own[:at], *meeting, *own[at:]], logs / str(node))) for node in range(2)]
        for node, process in enumerate(nodes):
            os.sched_setaffinity(process.pid, cores[node::2] or cores)
        yield nodes


@pytest.mark.slow
def test_a_signal_to_one_of_two_nodes_saves_and_ends_both_and_they_go_on_together(tiny_set, tmp_path):
    run_to_the_end(command(tiny_set, tmp_path / "one-node", 2))
    run = tmp_path / RUN
    with two_nodes(tiny_set, tmp_path, tmp_path / "first") as nodes:
        wait_for(lambda: (run / "metrics.jsonl").exists(), nodes[0])
        family = [child.pid for node in nodes for child in psutil.Process(node.pid).children(recursive=True)]
        os.kill(nodes[1].pid, signal.SIGUSR1)
        assert all([node.wait(timeout=60) for node in nodes])
    assert not [pid for pid in family if psutil.pid_exists(pid)], "no process is left"
    state = Run.open(run).state()
    assert (state["state"], state["signal"]) == ("preempted", "SIGUSR1")
    with two_nodes(tiny_set, tmp_path, tmp_path / "second") as nodes:
        codes = [node.wait(timeout=150) for node in nodes]
    logs = "".join((tmp_path / "second" / str(node)).read_text() for node in range(2))
    assert codes == [0, 0], logs
    assert "resuming in epoch 2" in logs
    assert_same(tmp_path / "one-node" / RUN, run)
