"""Functions called in a process of their own."""

import signal
import subprocess
import sys

import bench_jobs
import psutil
import pytest
from bench_jobs import within_20_seconds

from cxrfast.bench.process import in_own_process
from cxrfast.errors import LoadError, RunError


def test_a_process_answers_reports_figures_and_loads_only_what_its_function_needs():
    figures: list[str] = []
    assert in_own_process(bench_jobs.report_three, {"a": 1}, on_figure=figures.append) == [1, False]
    assert figures == ["figure 0", "figure 1", "figure 2"]


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        (RuntimeError("[enforce fail at alloc_cpu.cpp:117] not enough memory: you"), MemoryError, "not enough"),
        (MemoryError("std::bad_alloc"), MemoryError, "^out of memory: std::bad_alloc$"),
        (RuntimeError("the shared memory of sets"), RunError, "^RuntimeError: the shared memory of sets$"),
        (LoadError("no shards at 64 px"), RunError, "^no shards at 64 px$"),
        (signal.SIGKILL, MemoryError, "^exit code -9$"),
        (signal.SIGABRT, RunError, "^exit code -6$"),
    ],
)
def test_a_process_that_fails_says_why(how, error, message):
    with pytest.raises(error, match=message):
        in_own_process(bench_jobs.fail, {"how": how})


def has_ended(pid: str) -> bool:
    try:
        return psutil.Process(int(pid)).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_a_process_over_its_limit_is_killed_with_everything_it_started(tmp_path):
    seen: list[int] = []
    with pytest.raises(RunError, match="did not end within 3s and was killed"):
        in_own_process(bench_jobs.hang, {"folder": tmp_path}, limit=3, watch=lambda process: seen.append(process.pid))
    own, started = (tmp_path / "pids").read_text().split()
    assert set(seen) == {int(own)}
    assert has_ended(own)
    assert within_20_seconds(lambda: has_ended(started))


def test_a_benchmark_that_is_terminated_leaves_no_process_and_no_folder(tmp_path):
    """SIGTERM to `cxrfast bench` while a process of its own is at work."""
    code = (
        "import sys, tempfile; from pathlib import Path; import bench_jobs; import click\n"
        "from cxrfast.bench.process import in_own_process; from cxrfast.cli.bench import bench\n"
        "@bench.command()\n"
        "def forever():\n"
        "    with tempfile.TemporaryDirectory() as folder:\n"
        "        in_own_process(bench_jobs.hang, {'folder': Path(sys.argv[2])})\n"
        "bench(['forever'])\n"
    )
    (tmp_path / "temporary").mkdir()
    command = [sys.executable, "-c", code, "forever", tmp_path]
    environment = {"PYTHONPATH": ":".join(sys.path), "TMPDIR": str(tmp_path / "temporary"), "PATH": "/usr/bin"}
    with subprocess.Popen(command, env=environment) as process:
        assert within_20_seconds((tmp_path / "pids").exists)
        assert any((tmp_path / "temporary").iterdir())
        process.terminate()
        assert process.wait(30) == 128 + signal.SIGTERM
    assert not any((tmp_path / "temporary").iterdir())
    for pid in (tmp_path / "pids").read_text().split():
        assert within_20_seconds(lambda pid=pid: has_ended(pid))  # type: ignore[misc]
