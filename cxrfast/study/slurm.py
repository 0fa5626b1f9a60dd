"""SLURM jobs of a study: `train.sh`, an array with one task per run, `report.sh`, and `submit.sh`, which queues both.

A training that is asked to stop saves, and its task is requeued until it is done.
"""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec
from jinja2 import Environment, PackageLoader, StrictUndefined
from msgspec import Meta

from cxrfast.errors import RunError
from cxrfast.files import write_bytes
from cxrfast.runs.folder import RunFolder
from cxrfast.study.forecast import NOTICE_SECONDS, Outlook, parse_walltime
from cxrfast.study.plan import Plan
from cxrfast.training.signals import TORCHRUN_SIGNALS

PORT = 29400
"""Port on the first node where a training's nodes meet; plus the job's number mod 1000, so jobs can share a node."""


class Slurm(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Table [slurm] of the file."""

    account: str = ""
    partition: str = ""
    time: str = "24:00:00"
    """Wall time of one job, [DAYS-]HH:MM:SS; a training that takes longer continues in the next."""
    nodes: Annotated[int, Meta(ge=1)] = 1
    """Nodes per training."""
    gpus: Annotated[int, Meta(ge=0)] | None = None
    """GPUs per node; default: one per process, none with --device cpu."""
    cpus: Annotated[int, Meta(ge=1)] | None = None
    """Cores per node; default: 8 per process."""
    memory: str = ""
    """Memory per node, as sbatch takes it: 200G; 0 is all of it."""
    extra: tuple[str, ...] = ()
    """Further options of sbatch, such as --qos=long."""
    setup: tuple[str, ...] = ()
    """Lines of shell to run first, such as `module load cuda` or `source venv/bin/activate`."""


class SlurmFile(msgspec.Struct, forbid_unknown_fields=True):
    slurm: Slurm = Slurm()


def read_slurm(path: Path) -> Slurm:
    """Table [slurm] of a TOML file. Raises RunError naming what is unknown or wrong in it."""
    try:
        slurm = msgspec.toml.decode(path.read_bytes(), type=SlurmFile).slurm
        parse_walltime(slurm.time)
    except FileNotFoundError:
        raise RunError(f"--slurm {path} does not exist") from None
    except (msgspec.DecodeError, ValueError, RunError) as error:
        known = ", ".join(Slurm.__struct_fields__)
        raise RunError(f"--slurm {path}: {error}; give TOML with one table, [slurm], with {known}") from error
    return slurm


def write_scripts(plan: Plan, outlooks: Sequence[Outlook], slurm: Slurm, folder: Path) -> list[Path]:
    """Write train.sh for the runs that are not done, report.sh and submit.sh into `folder`. Returns their paths.

    Jobs work in the folder in which this was called.
    """
    folder = folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    waiting = [o for o in outlooks if not o.is_done]
    gpus = 0 if plan.runtime.device == "cpu" else plan.nproc
    gpus = gpus if slurm.gpus is None else slurm.gpus
    array = {"array": f"0-{len(waiting) - 1}", "signal": f"B:USR1@{NOTICE_SECONDS}"}
    values = {
        "plan": plan,
        "slurm": slurm,
        "outlooks": waiting,
        "script": folder / "train.sh",
        "runs": plan.runtime.runs,
        "state_name": RunFolder(plan.runtime.runs).state_path.name,
        "notice": NOTICE_SECONDS,
        "train_head": head(slurm, "train", folder, slurm.nodes, gpus, slurm.cpus or 8 * plan.nproc, array),
        "report_head": head(slurm, "report", folder, 1, min(1, gpus), slurm.cpus or 8, {}),
        "torchrun": f"--nproc_per_node={plan.nproc} --signals-to-handle={TORCHRUN_SIGNALS}",
        "port": PORT,
    }
    loader = PackageLoader("cxrfast.study", "templates")
    environment = Environment(loader=loader, keep_trailing_newline=True, trim_blocks=True, undefined=StrictUndefined)
    environment.filters |= {"quoted": lambda value: shlex.quote(str(value)), "joined": shlex.join}
    (folder / "train.sh").unlink(missing_ok=True)  # of an earlier call, with runs that are done now
    names = ["train.sh", "report.sh", "submit.sh"] if waiting else ["report.sh", "submit.sh"]
    for name in names:
        write_bytes(folder / name, environment.get_template(f"{name}.j2").render(values).encode())
        (folder / name).chmod((folder / name).stat().st_mode | 0o111)
    return [folder / name for name in names]


def head(slurm: Slurm, name: str, folder: Path, nodes: int, gpus: int, cpus: int, more: dict[str, Any]) -> str:
    """First lines of a script: what it asks sbatch for."""
    asked = {
        "job-name": f"cxrfast-{name}",
        "output": folder / f"{name}-{'%A_%a' if 'array' in more else '%j'}.out",
        "open-mode": "append",
        "chdir": Path.cwd(),
        "account": slurm.account,
        "partition": slurm.partition,
        "time": slurm.time,
        "nodes": nodes,
        "ntasks-per-node": 1,
        "cpus-per-task": cpus,
        "gpus-per-node": gpus or "",
        "mem": slurm.memory,
        **more,
    }
    given = {option: str(value) for option, value in asked.items() if value != ""}
    lines = [f'--{option}="{value}"' if " " in value else f"--{option}={value}" for option, value in given.items()]
    return "\n".join(["#!/usr/bin/env bash", *(f"#SBATCH {line}" for line in [*lines, "--requeue", *slurm.extra])])
