"""How this process was started: the ranks that torchrun announces in environment variables, and the tasks of SLURM."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from cxrfast.errors import RunError

RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
"""Variables that torchrun sets to numbers in each process that it starts."""

MEETING = ("MASTER_ADDR", "MASTER_PORT")
"""Variables that say where the processes of a training meet."""

ADVICE = "start the processes with torchrun, or unset it to use one process"


@dataclass(frozen=True)
class Launch:
    """This process among those that torchrun started; without torchrun the only one."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    """Processes on this machine."""


def launched(environment: Mapping[str, str] = os.environ) -> Launch:
    """What torchrun's variables say. Raises RunError if they contradict each other, or if some are missing."""
    given = {name: environment[name] for name in (*RANKS, *MEETING) if environment.get(name)}
    for name in (*RANKS, "MASTER_PORT"):
        if name in given and not (given[name].isascii() and given[name].isdecimal() and len(given[name]) < 7):
            raise RunError(f"{name}={given[name]!r} is not a number: {ADVICE}")
    size = int(given.get("WORLD_SIZE", 1))
    needed = ("RANK", *MEETING) if size > 1 else ()
    if missing := [name for name in needed if name not in given]:
        raise RunError(f"WORLD_SIZE={size} is set, but {' and '.join(missing)} are not: {ADVICE}")
    if "RANK" in given and "WORLD_SIZE" not in given:
        raise RunError(f"RANK={given['RANK']} is set, but WORLD_SIZE is not: {ADVICE}")
    found = Launch(
        int(given.get("RANK", 0)), size, int(given.get("LOCAL_RANK", 0)), int(given.get("LOCAL_WORLD_SIZE", 1))
    )
    if not (found.rank < size and found.local_rank < found.local_size <= size):
        values = " ".join(f"{name}={given[name]}" for name in RANKS if name in given)
        raise RunError(
            f"{values} cannot be: ranks are 0 to size - 1, and a machine has no more processes than all: {ADVICE}"
        )
    return found


def refuse_slurm_tasks(command: str, torchrun: str, environment: Mapping[str, str] = os.environ) -> None:
    """Raises RunError if SLURM runs `command` in several tasks, each of which would do all of the work.

    `torchrun`: what to start instead, with `{n}` for the number of processes per machine. In a job script or in the shell of
    salloc there is one process, but the tasks that were asked for would be idle.
    """
    if environment.get("WORLD_SIZE"):
        return
    name = "SLURM_STEP_NUM_TASKS" if environment.get("SLURM_STEP_NUM_TASKS") else "SLURM_NTASKS"  # of srun, of the job
    tasks, nodes = (_number(environment.get(variable)) for variable in (name, "SLURM_NNODES"))
    if tasks > 1:
        raise RunError(
            f"SLURM gives this command {tasks} tasks ({name}={tasks}), and each would do all of the work: use "
            f"`{torchrun.format(n=-(-tasks // nodes))}`, or `srun --ntasks=1 {command} …` for one process"
        )


def _number(text: str | None) -> int:
    """At least 1, also for text that is not a number."""
    return max(1, int(text)) if text and text.isascii() and text.isdecimal() else 1
