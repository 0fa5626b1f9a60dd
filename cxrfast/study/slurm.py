"""Job scripts for SLURM: one per run, one for the tables once all are done, and `submit.sh`, which queues them.

A training that is told to stop saves and is queued again, until it is done. Text in, text out, but for `write_scripts`.
"""

import os
import shlex
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from cxrfast.errors import RunError
from cxrfast.files import write_bytes
from cxrfast.runs.folder import RunFolder
from cxrfast.study.pace import NOTICE_SECONDS, parse_walltime
from cxrfast.study.plan import Plan
from cxrfast.study.run_forecast import Outlook
from cxrfast.training.signals import TORCHRUN_SIGNALS

PORT = 29400
"""Port at which the nodes of one training meet, on the first of them: plus the job's number mod 1000, so that jobs may share a node."""


@dataclass(frozen=True, kw_only=True)
class Slurm:
    """Table [slurm] of the file. Raises RunError for values that make no sense."""

    account: str = ""
    partition: str = ""
    time: str = "24:00:00"
    """Wall time of one job, [DAYS-]HH:MM:SS; a training that takes longer continues in the next."""
    nodes: int = 1
    """Nodes per training."""
    gpus: int | None = None
    """GPUs per node; default: one per process, none with --device cpu."""
    cpus: int | None = None
    """Cores per node; default: 8 per process."""
    memory: str = ""
    """Memory per node, as sbatch takes it: 200G; 0 is all of it."""
    extra: tuple[str, ...] = ()
    """Further options of sbatch, such as --qos=long."""
    setup: tuple[str, ...] = ()
    """Lines of shell before anything is run, such as `module load cuda` or `source venv/bin/activate`."""

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            wanted = f.type if f.type is str else tuple if f.type == tuple[str, ...] else int
            if value is None:
                continue
            if not isinstance(value, wanted) or isinstance(value, bool):
                kind = {tuple: "a list of texts", str: "a text", int: "a whole number"}[wanted]
                raise RunError(f"[slurm] {f.name} = {value!r} is not {kind}")
            if isinstance(value, tuple) and not all(isinstance(text, str) for text in value):
                raise RunError(f"[slurm] {f.name} = {list(value)!r} is not a list of texts")
            if isinstance(value, int) and value < (0 if f.name == "gpus" else 1):
                raise RunError(f"[slurm] {f.name} = {value} is too small")
        parse_walltime(self.time)


def read_slurm(path: Path) -> Slurm:
    """Table [slurm] of a TOML file. Raises RunError naming what is unknown or wrong in it."""
    try:
        value = tomllib.loads(path.read_text())
    except FileNotFoundError:
        raise RunError(f"--slurm {path} does not exist") from None
    except ValueError as error:  # of the encoding, too
        raise RunError(f"--slurm {path} is no TOML ({error})") from error
    known = [f.name for f in fields(Slurm)]
    table = value.get("slurm", {})
    unknown = [name for name in value if name != "slurm"]
    unknown += [f"slurm.{name}" for name in table if name not in known] if isinstance(table, dict) else ["slurm"]
    if unknown:
        raise RunError(
            f"--slurm {path}: {', '.join(unknown)} is unknown: it has one table, [slurm], with {', '.join(known)}"
        )
    try:
        values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in table.items()}
        return Slurm(**values)
    except RunError as error:
        raise RunError(f"--slurm {path}: {error}") from error


def write_scripts(plan: Plan, outlooks: Sequence[Outlook], slurm: Slurm, folder: Path) -> list[Path]:
    """Write the scripts of all runs that are not done, `report.sh` and `submit.sh` into `folder`; their paths.

    Scripts of an earlier call that are not needed any more are removed. Jobs work where this was called.
    """
    folder = folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    waiting = [o for o in outlooks if not o.is_done]
    scripts = {script_name(o): train_script(plan, o, slurm, folder) for o in waiting}
    scripts["report.sh"] = report_script(plan, slurm, folder)
    for old in folder.glob("*-fold-*.sh"):
        if old.name not in scripts:
            old.unlink()
    scripts["submit.sh"] = submit_script([script_name(o) for o in waiting], plan)
    for name, text in scripts.items():
        write_bytes(folder / name, text.encode())
        os.chmod(folder / name, 0o777 & (os.stat(folder / name).st_mode | 0o111))
    return [folder / name for name in scripts]


def script_name(outlook: Outlook) -> str:
    return outlook.name.replace("/", "-") + ".sh"


def head(slurm: Slurm, name: str, folder: Path, *, nodes: int, gpus: int, cpus: int, options: Sequence[str]) -> str:
    """The first lines of a script: what sbatch is asked for, then the lines that set up the software."""
    asked = {
        "job-name": name,
        "output": folder / f"{name}-%j.out",
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
    }
    lines = [f"--{option}={_quoted(value)}" for option, value in asked.items() if value != ""]
    lines += ["--requeue", *options, *slurm.extra]
    return "".join(["#!/usr/bin/env bash\n", *(f"#SBATCH {line}\n" for line in lines)])


def _quoted(value: Any) -> str:
    """As sbatch reads it in a script."""
    return f'"{value}"' if " " in str(value) else str(value)


def train_script(plan: Plan, outlook: Outlook, slurm: Slurm, folder: Path) -> str:
    """The job of one run."""
    cpus, warning = slurm.cpus or 8 * plan.nproc, f"--signal=B:USR1@{NOTICE_SECONDS}"
    top = head(
        slurm,
        script_name(outlook).removesuffix(".sh"),
        folder,
        nodes=slurm.nodes,
        gpus=_gpus(plan, slurm),
        cpus=cpus,
        options=[warning],
    )
    return _template("train.sh.j2").render(
        head=top,
        name=outlook.name,
        notice=NOTICE_SECONDS,
        state_file=shlex.quote(str(RunFolder(plan.runtime.runs / outlook.name).state_path)),
        setup="\n".join(slurm.setup),
        command=_training(plan, slurm, plan.train_options(outlook.scale, outlook.fold)),
    )


def _template(name: str) -> Template:
    loader = PackageLoader("cxrfast.study", "templates")
    return Environment(loader=loader, keep_trailing_newline=True, undefined=StrictUndefined).get_template(name)


def _training(plan: Plan, slurm: Slurm, options: list[str]) -> str:
    """The command that trains one run, in lines."""
    text = " ".join(map(shlex.quote, options))
    if slurm.nodes == 1 and plan.nproc == 1:
        return f"cxrfast train \\\n    {text}"
    common = f"--nproc_per_node={plan.nproc} --signals-to-handle={TORCHRUN_SIGNALS}"
    if slurm.nodes == 1:
        return f"torchrun --standalone {common} \\\n    -m cxrfast.train {text}"
    return (
        'head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)\n'
        'srun --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=1 \\\n'
        '    torchrun --nnodes="$SLURM_NNODES" --rdzv_backend=c10d --rdzv_id="$SLURM_JOB_ID" \\\n'
        f'    --rdzv_endpoint="$head:$(({PORT} + SLURM_JOB_ID % 1000))" \\\n'
        f"    {common} \\\n    -m cxrfast.train {text}"
    )


def report_script(plan: Plan, slurm: Slurm, folder: Path) -> str:
    """The job that predicts, and makes tables, ensemble, maps and report, in one process."""
    text, setup = " ".join(map(shlex.quote, plan.study_arguments())), "\n".join(slurm.setup)
    top = head(
        slurm,
        "cxrfast-report",
        folder,
        nodes=1,
        gpus=min(1, _gpus(plan, slurm)),
        cpus=slurm.cpus or 8,
        options=[],
    )
    return f"""{top}
# Predicts with every run, then evaluates, stacks the scales and writes report.html; what is done is not done twice.

{setup}
exec cxrfast study \\
    {text}
"""


def submit_script(names: Sequence[str], plan: Plan) -> str:
    """Queues the trainings, and the report behind all of them."""
    runs = shlex.quote(str(plan.runtime.runs))
    return _template("submit.sh.j2").render(names=[shlex.quote(name) for name in names], runs=runs)


def _gpus(plan: Plan, slurm: Slurm) -> int:
    if slurm.gpus is not None:
        return slurm.gpus
    return 0 if plan.runtime.device == "cpu" else plan.nproc
