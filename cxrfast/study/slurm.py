"""SLURM jobs of a study: `train.sh`, an array with one task per run, `report.sh`, and `submit.sh`, which queues both.

A training that is asked to stop saves, and its task is requeued until it is done. Every value from outside goes through
`quoted`; the lines of `setup` alone are shell. Files that do not carry `MARK` belong to somebody else.
"""

import logging
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec
from jinja2 import Environment, PackageLoader, StrictUndefined
from msgspec import Meta

from cxrfast.config import AUTO
from cxrfast.errors import RunError
from cxrfast.files import open_file, read_file, write_bytes
from cxrfast.runs.folder import RunFolder
from cxrfast.study.forecast import NOTICE_SECONDS, Outlook, parse_walltime
from cxrfast.study.plan import Plan
from cxrfast.text import path_fault, shown
from cxrfast.training.signals import TORCHRUN_SIGNALS

log = logging.getLogger(__name__)

MARK = "# Written by `cxrfast study --sbatch`, which replaces this file: keep your own lines elsewhere."
"""Second line of each script. A file without it is never replaced or deleted."""

SCRIPTS = ("train.sh", "report.sh", "submit.sh")

PLAIN = re.compile(r"[A-Za-z0-9_@%+=:,./-]+")
"""Text that neither a shell nor sbatch takes for anything but itself."""

OPTION = re.compile(r"-[A-Za-z]\S*|--[A-Za-z][A-Za-z0-9-]*(=.*)?")
"""One option of sbatch with its value."""

MOST = 2**20
"""Nodes, or GPUs or cores of one node, above any cluster's."""

PORT = 29400
"""Port on the first node where a training's nodes meet; plus the job's number mod 1000, so jobs can share a node."""


class Slurm(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Table [slurm] of the file."""

    account: str = ""
    partition: str = ""
    time: str = "24:00:00"
    """Wall time of one job, [DAYS-]HH:MM:SS; a training that takes longer continues in the next."""
    nodes: Annotated[int, Meta(ge=1, le=MOST)] = 1
    """Nodes per training."""
    gpus: Annotated[int, Meta(ge=0, le=MOST)] | None = None
    """GPUs per node; default: one per process, none with --device cpu."""
    cpus: Annotated[int, Meta(ge=1, le=MOST)] | None = None
    """Cores per node; default: 8 per process."""
    memory: str = ""
    """Memory per node, as sbatch takes it: 200G; 0 is all of it."""
    extra: tuple[str, ...] = ()
    """Further options of sbatch, such as --qos=long."""
    setup: tuple[str, ...] = ()
    """Lines of shell to run first, such as `module load cuda` or `source venv/bin/activate`."""

    def __post_init__(self) -> None:
        """Raises RunError naming the key of a text that would break a line, or is not one option."""
        texts = {key: getattr(self, key) for key in ("account", "partition", "time", "memory")}
        texts |= {f"extra[{n}]": option for n, option in enumerate(self.extra)}
        texts |= {f"setup[{n}]": re.sub(r"[\n\t]", " ", lines) for n, lines in enumerate(self.setup)}
        for key, text in texts.items():
            if fault := path_fault(text):
                raise RunError(f"{key} is {shown(text)}, which {fault}")
        for n, option in enumerate(self.extra):
            if not OPTION.fullmatch(option):
                raise RunError(f"extra[{n}] is {shown(option)}, not one option of sbatch, such as --qos=long")


class SlurmFile(msgspec.Struct, forbid_unknown_fields=True):
    slurm: Slurm = Slurm()


def read_slurm(path: Path) -> Slurm:
    """Table [slurm] of a TOML file. Raises RunError naming what is unknown or wrong in it."""
    try:
        slurm = msgspec.toml.decode(read_file(path, 2**20), type=SlurmFile).slurm
        parse_walltime(slurm.time)
    except FileNotFoundError:
        raise RunError(f"--slurm {path} does not exist") from None
    except OSError as error:
        raise RunError(f"--slurm {path} cannot be read: {error.strerror}") from error
    except (msgspec.DecodeError, ValueError, RecursionError, RunError) as error:
        known = ", ".join(Slurm.__struct_fields__)
        raise RunError(f"--slurm {path}: {error}; give TOML with one table, [slurm], with {known}") from error
    return slurm


def write_scripts(plan: Plan, outlooks: Sequence[Outlook], slurm: Slurm, folder: Path) -> list[Path]:
    """Write train.sh for the runs that are not done, report.sh and submit.sh into `folder`. Returns their paths.

    Jobs work in the folder in which this was called. Raises RunError, with nothing written, if a file of these names was not
    written by this function, or if a value cannot stand on one line of a script.
    """
    folder = folder.absolute()
    _check_replaceable(folder)
    waiting = [o for o in outlooks if not o.is_done]
    gpus = 0 if plan.runtime.device == "cpu" else plan.nproc
    gpus = gpus if slurm.gpus is None else slurm.gpus
    array = {"array": f"0-{len(waiting) - 1}", "signal": f"B:USR1@{NOTICE_SECONDS}"}
    values = {
        "plan": plan,
        "slurm": slurm,
        "outlooks": waiting,
        "mark": MARK,
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
    environment.filters |= {"quoted": quoted, "joined": joined}
    names = SCRIPTS if waiting else SCRIPTS[1:]
    texts = {name: environment.get_template(f"{name}.j2").render(values).encode() for name in names}
    if waiting and plan.options.get("micro_batch") in ("auto", AUTO):
        log.warning(
            "--micro-batch auto: each run measures what fits when it starts, so runs on different GPUs may train with different "
            "micro-batches; give a number to train all alike"
        )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train.sh").unlink(missing_ok=True)  # of an earlier call, with runs that are done now
    for name, text in texts.items():
        write_bytes(folder / name, text)
        (folder / name).chmod((folder / name).stat().st_mode | 0o111)
    return [folder / name for name in names]


def _check_replaceable(folder: Path) -> None:
    """Raises RunError naming the files in the way that this module did not write."""
    others = [name for name in SCRIPTS if os.path.lexists(folder / name) and not _is_ours(folder / name)]
    if others:
        raise RunError(
            f"{folder} holds {', '.join(others)}, which this version of cxrfast did not write: give another folder to --sbatch, "
            "or move them; nothing was written"
        )


def _is_ours(path: Path) -> bool:
    """True for a regular file whose second line is `MARK`."""
    try:
        with open(open_file(path, os.O_NOFOLLOW), "rb") as file:
            return file.read(1000).split(b"\n")[1:2] == [MARK.encode()]
    except OSError:
        return False


def quoted(value: object) -> str:
    """One word for a shell, and for a line of #SBATCH, whose quotation marks and backslashes work like those of a shell.

    Raises RunError for a text with control characters, which no line can hold.
    """
    text = str(value)
    if fault := path_fault(text):
        raise RunError(f"{shown(text)} cannot stand in a job script: it {fault}")
    return text if PLAIN.fullmatch(text) else '"' + re.sub(r'([\\"$`])', r"\\\1", text) + '"'


def joined(words: Iterable[object]) -> str:
    return " ".join(map(quoted, words))


def head(slurm: Slurm, name: str, folder: Path, nodes: int, gpus: int, cpus: int, more: dict[str, Any]) -> str:
    """First lines of a script: what it is and what it asks sbatch for."""
    if "\\" in str(folder):
        raise RunError(
            f"{folder}: sbatch takes the backslash in the name of a log for something else; give another folder"
        )
    pattern = "%A_%a" if "array" in more else "%j"
    asked = {
        "job-name": f"cxrfast-{name}",
        "output": f"{str(folder).replace('%', '%%')}/{name}-{pattern}.out",
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
    lines = [f"--{option}={quoted(value)}" for option, value in asked.items() if value != ""]
    lines += ["--requeue", *map(quoted, slurm.extra)]
    return "\n".join(["#!/usr/bin/env bash", MARK, *(f"#SBATCH {line}" for line in lines)])
