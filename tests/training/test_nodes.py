"""Several machines: two torchruns that find each other over the loopback device train as two ranks of one would."""

import os
import signal
import socket
import subprocess
from pathlib import Path

import psutil
import pytest
from trainings import assert_same, command, kill_group, run_to_the_end, start, wait_for

from cxrfast.runs.run import Run

RUN = Path("densenet121-32") / "fold-0"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start_nodes(shards: Path, runs: Path, logs: Path) -> list["subprocess.Popen[bytes]"]:
    """One torchrun of one rank for each of two nodes, as docs/runs.md has it, with half of the cores each.

    The two ranks of one node have as many, and so compute the same sums.
    """
    cores = sorted(os.sched_getaffinity(0))
    arguments, port = command(shards, runs, 2), free_port()
    meeting = ["--nnodes=2", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=pair"]
    own = [a.replace("--nproc_per_node=2", "--nproc_per_node=1") for a in arguments if a != "--standalone"]
    at = own.index("torch.distributed.run") + 1
    logs.mkdir(exist_ok=True)
    nodes = [start([*own[:at], *meeting, *own[at:]], logs / f"{node}") for node in range(2)]
    for node, process in enumerate(nodes):
        os.sched_setaffinity(process.pid, cores[node::2] or cores)
    return nodes


@pytest.fixture(scope="module")
def one_node(tiny_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of two ranks on one node."""
    runs = tmp_path_factory.mktemp("one-node")
    run_to_the_end(command(tiny_set, runs, 2))
    return runs / RUN


def test_a_signal_to_one_of_two_nodes_saves_and_ends_both_and_they_go_on_together(
    one_node: Path, tiny_set: Path, tmp_path: Path
) -> None:
    run = tmp_path / RUN
    nodes = start_nodes(tiny_set, tmp_path, tmp_path / "first")
    try:
        wait_for(lambda: (run / "metrics.jsonl").exists(), nodes[0])
        family = [child.pid for node in nodes for child in psutil.Process(node.pid).children(recursive=True)]
        os.kill(nodes[1].pid, signal.SIGUSR1)
        codes = [node.wait(timeout=60) for node in nodes]
    finally:
        for node in nodes:
            kill_group(node)
    assert all(codes)
    assert not [pid for pid in family if psutil.pid_exists(pid)], "nobody is left"
    state = Run.open(run).state()
    assert (state["state"], state["signal"]) == ("preempted", "SIGUSR1")
    nodes = start_nodes(tiny_set, tmp_path, tmp_path / "second")
    try:
        codes = [node.wait(timeout=150) for node in nodes]
    finally:
        for node in nodes:
            kill_group(node)
    logs = "".join((tmp_path / "second" / str(node)).read_text() for node in range(2))
    assert codes == [0, 0], logs
    assert "going on in epoch 2" in logs
    assert_same(one_node, run)
