"""Cores and memory that this process may use, as granted by scheduler and container."""

import math
import os
import platform
from importlib import import_module
from pathlib import Path


def usable_cores() -> int:
    """CPU affinity ∩ cgroup quota, at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            cores = min(cores, math.ceil(int(quota) / int(period)))
    except (OSError, ValueError):
        pass  # no cgroup v2 here
    return max(1, cores)


def slurm_job() -> str | None:
    """This process's SLURM job as squeue shows it: `17`, or `17_3` for task 3 of an array; None outside SLURM."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{os.environ.get('SLURM_ARRAY_TASK_ID')}" if array else os.environ.get("SLURM_JOB_ID")


def let_threads_sleep() -> None:
    """Have OpenMP's waiting threads sleep after a short spin, unless the environment says otherwise.

    Threads that spin as long as libgomp's 300,000 rounds make CPU training several times slower where other processes use
    the cores; threads that never spin (OMP_WAIT_POLICY=PASSIVE) halve it on an idle machine. OpenMP reads the environment
    once: call this before torch is imported. Child processes inherit the setting.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = "3000"


def user_sets_threads() -> bool:
    """Whether the user has set OMP_NUM_THREADS. torchrun, too, sets it for several workers: to 1."""
    if "OMP_NUM_THREADS" not in os.environ or "TORCHELASTIC_RUN_ID" not in os.environ:
        return "OMP_NUM_THREADS" in os.environ
    import psutil  # not at the top: the command line loads this module

    try:
        return "OMP_NUM_THREADS" in psutil.Process(os.getppid()).environ()  # as torchrun was started
    except psutil.Error:
        return True


def memory_bytes() -> int:
    """Main memory, bytes, limited by the cgroup."""
    import psutil

    total = psutil.virtual_memory().total
    try:
        return min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):
        return total


def resident_bytes() -> int:
    """Current resident memory of this process and its children."""
    import psutil

    process = psutil.Process()
    total = 0
    for p in (process, *process.children(recursive=True)):
        try:
            total += p.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return total


def installed(package: str, module: str) -> str | None:
    """Version of a package as pip reports it, else as its module does (copied, or part of another package); None if absent."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        try:
            return str(import_module(module).__version__)
        except ImportError:
            return None


def processor() -> str:
    """Name of the processor as the system reports it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
