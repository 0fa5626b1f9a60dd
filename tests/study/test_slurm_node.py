"""The generated scripts on a real SLURM: this machine as its only node. Needs root, slurmctld, slurmd and munged.

On Debian: apt-get install --no-install-recommends slurm-wlm munge
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import invoke

from cxrfast.runs.folder import RunFolder
from cxrfast.runs.status import Status, read_metrics, read_status

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not all(map(shutil.which, ("slurmctld", "slurmd", "munged"))), reason="SLURM's daemons are not installed"
    ),
    pytest.mark.skipif(os.geteuid() != 0, reason="SLURM's daemons need root"),
]

CONFIGURATION = """
ClusterName=one
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort=17817
SlurmdPort=17818
AuthType=auth/munge
AuthInfo=cred_expire=5
SlurmUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
ReturnToService=2
MpiDefault=none
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=p Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def until(seconds: float, question: str, answer: str) -> str:
    """Ask a shell until it says `answer`, for `seconds` at most. Returns what it said last."""
    end = time.monotonic() + seconds
    while True:
        said = subprocess.run(question, shell=True, capture_output=True, text=True).stdout
        if answer in said or time.monotonic() > end:
            return said
        time.sleep(0.3)


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """Folder of a SLURM with one node, this machine, that runs during the test."""
    folder = tmp_path / "slurm"
    for name in ("state", "spool"):
        (folder / name).mkdir(parents=True)
    host = socket.gethostname().split(".")[0]
    configuration = CONFIGURATION.format(host=host, folder=folder, cpus=os.cpu_count())
    (folder / "slurm.conf").write_text(configuration)
    monkeypatch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
    pid_files = [folder / "slurmctld.pid", folder / "slurmd.pid"]
    if subprocess.run(["munge", "-n"], capture_output=True).returncode:
        Path("/run/munge").mkdir(exist_ok=True)
        shutil.chown("/run/munge", "munge", "munge")
        subprocess.run(["su", "munge", "-s", "/bin/sh", "-c", "munged"], check=True)
        pid_files.append(Path("/run/munge/munged.pid"))
    try:
        for daemon in ("slurmctld", "slurmd"):
            subprocess.run([daemon], check=True)
        if "idle" not in until(20, "sinfo -h -o %t", "idle"):
            pytest.skip(f"this machine does not become a node: {(folder / 'slurmd.log').read_text()[-500:]}")
        yield folder
    finally:
        subprocess.run(["scancel", "--user", "root"], capture_output=True)
        until(40, "squeue -h | wc -l", "0")
        for path in pid_files:
            if path.exists():
                os.kill(int(path.read_text()), signal.SIGTERM)


def wait_for(run: Path, state: str, seconds: float = 240) -> Status:
    """Wait until the run in this folder has that state."""
    end = time.monotonic() + seconds
    while (found := read_status(RunFolder(run), time.time())).state != state:
        assert time.monotonic() < end, found
        time.sleep(0.2)
    return found


def test_a_preempted_task_is_queued_again_until_it_is_done_and_then_the_tables_follow(cluster, tiny_set, tmp_path):
    tools = tmp_path / "tools"
    tools.mkdir()
    core = min(os.sched_getaffinity(0))  # one: several threads are slow while other tests run
    (tools / "cxrfast").write_text(f'#!/bin/sh\nexec taskset -c {core} {sys.executable} -m cxrfast "$@"\n')
    (tools / "cxrfast").chmod(0o755)
    setup = [f"export PATH={tools}:$PATH PYTHONPATH={Path(__file__).parents[2]}"]
    (tmp_path / "slurm.toml").write_text(f"[slurm]\npartition = 'p'\ncpus = 1\ntime = '00:10:00'\nsetup = {setup}\n")
    runs, jobs = tmp_path / "runs", tmp_path / "jobs"
    options = (
        "--weights none --arch shufflenet_v2_x0_5 --epochs 30 --limit 40 --global-batch 8 --micro-batch 8 --device cpu"
    )
    where = f"--scale 32 --fold 0 --fold 1 --sbatch {jobs} --slurm {tmp_path / 'slurm.toml'}"
    done = invoke("study", tiny_set, runs, *where.split(), *options.split())
    assert done.exit_code == 0, done.output
    said = subprocess.run([jobs / "submit.sh"], capture_output=True, text=True, check=True).stdout
    job, report = (line.split(": job ")[1].split(",")[0] for line in said.splitlines()[:2])
    name = "shufflenet_v2_x0_5-32"
    for task in (0, 1):
        assert wait_for(runs / name / f"fold-{task}", "running").job == f"{job}_{task}"
    subprocess.run(["scancel", "--signal=USR1", "--batch", f"{job}_1"], check=True)
    queue = f"squeue -h -r -j {job} -o '%K %T'"
    assert "1 PENDING" in until(60, queue, "1 PENDING"), "this task is in the queue again"
    assert "0 PENDING" not in until(0, queue, ""), "the other one is not"
    assert "PENDING" in until(0, f"squeue -h -j {report} -o %T", "PENDING"), "the report waits for both"
    for task in (0, 1):
        wait_for(runs / name / f"fold-{task}", "done")
    show = f"scontrol show job {report}"
    assert "JobState=COMPLETED" in until(240, show, "JobState=COMPLETED"), (jobs / f"report-{report}.out").read_text()
    assert (runs / "report.html").exists()
    log = (jobs / f"train-{job}_1.out").read_text()
    assert "SIGUSR1; saved" in log
    assert "start 1: stopped before it was done: queued again" in log
    assert "start 2: done" in log
    assert "start 1: done" in (jobs / f"train-{job}_0.out").read_text()
    for task in (0, 1):
        epochs = [line["epoch"] for line in read_metrics(RunFolder(runs / name / f"fold-{task}"))]
        assert epochs == list(range(len(epochs))), "no epoch lost, none twice"
