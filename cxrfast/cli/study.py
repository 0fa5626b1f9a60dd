"""Commands that run a whole study."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cxrfast import config
from cxrfast.cli import options as option
from cxrfast.cli.terminal import fail, say, show
from cxrfast.launch import refuse_slurm_tasks

if TYPE_CHECKING:
    from cxrfast.study.study import Study


@click.command()
@option.SET
@click.argument("runs", type=option.FOLDER)
@option.scales("Repeatable. [default: all scales of the set]")
@click.option("--fold", "folds", type=int, multiple=True, help="Repeatable. [default: all five]")
@click.option("--nproc", type=option.COUNT, default=1, help="Processes per training, as torchrun --nproc_per_node.")
@option.flag("--keep-going", "Continue with the other runs after one fails.")
@option.flag("--dry-run", "Check every run, estimate its time and space, write nothing.")
@click.option(
    "--rate",
    "rates",
    type=option.RATE,
    multiple=True,
    help="Images/s at a scale, for --dry-run; repeatable. [default: from earlier runs]",
)
@click.option("--walltime", metavar="[D-]HH:MM:SS", help="Wall time of one job, for --dry-run and --sbatch.")
@click.option("--sbatch", type=option.FOLDER, metavar="DIR", help="Write SLURM job scripts into DIR instead.")
@click.option("--slurm", type=option.FILE, metavar="FILE", help="TOML with account, partition, set-up lines, …")
@option.configuration_options(config.TrainConfig)
@option.configuration_options(config.Runtime, option.options_of(config.Runtime).keys() - {"name"})
def study(shards: Path, runs: Path, keep_going: bool, dry_run: bool, **options: Any) -> None:
    """Train, predict and evaluate every scale × fold of SET, then ensemble, ERF, Grad-CAM, report. Run again, it resumes."""
    training, runtime = option.configured(options)
    scales, folds = list(options["scales"]), list(options["folds"])
    where = {"shards": shards, "runs": runs, "scales": scales, "folds": folds, "nproc": options["nproc"], **runtime}
    chosen = {**where, "options": training}
    rates, walltime, sbatch, slurm = (options[name] for name in ("rates", "walltime", "sbatch", "slurm"))
    if dry_run or sbatch:
        _look_ahead(chosen, dict(rates), walltime, slurm, None if dry_run else sbatch)
        return
    if slurm or walltime or rates:
        fail("--slurm, --walltime and --rate need --dry-run or --sbatch")
    if options["nproc"] == 1 or os.environ.get("SLURM_STEP_NUM_TASKS"):  # a job script may ask for one task per process
        refuse_slurm_tasks("cxrfast study", "srun --ntasks=1 cxrfast study … --nproc={n}")
    from cxrfast.study.study import failed
    from cxrfast.study.study import study as carry_out

    result = _carried_out(carry_out, keep_going=keep_going, **chosen)
    if result.failures:
        fail(failed(result.failures))


def _carried_out(study: Callable[..., "Study"], *arguments: Any, **options: Any) -> "Study":
    """Run a study, show its tables and print where its report is."""
    from cxrfast.training.signals import Stopped

    try:
        result = study(*arguments, **options)
    except Stopped as stopped:
        say(f"cxrfast: {stopped}", err=True)
        raise
    show(*result.tables)
    say(f"report: {result.report}")
    return result


def _look_ahead(
    chosen: dict[str, Any], rates: dict[int, float], walltime: str | None, slurm: Path | None, sbatch: Path | None
) -> None:
    """Show what a study would do; write its job scripts into the folder `sbatch`, if one is given."""
    from msgspec.structs import replace

    from cxrfast.study.forecast import forecast, forecast_table, parse_walltime
    from cxrfast.study.plan import make_plan
    from cxrfast.study.slurm import Slurm, read_slurm, write_scripts

    asked = read_slurm(slurm) if slurm else Slurm()
    asked = replace(asked, time=walltime or asked.time)
    plan = make_plan(nodes=asked.nodes, **chosen)
    result = forecast(plan, rates)
    show(forecast_table(result, parse_walltime(asked.time) if walltime or slurm or sbatch else None))
    result.check()
    if sbatch:
        submit = write_scripts(plan, result.outlooks, asked, sbatch)[-1]
        say(f"job scripts in {sbatch}; read train.sh, then queue everything: {submit}")


@click.command()
@click.option("--out", type=option.FOLDER, default=Path("demo"), show_default=True, help="Folder for everything.")
def demo(out: Path) -> None:
    """The whole study on phantoms: synth, shard, train, evaluate, report. On a CPU, in minutes."""
    from cxrfast.study.demo import demo as run_demo
    from cxrfast.units import duration

    started = time.monotonic()
    result = _carried_out(run_demo, out)
    say(
        f"\nThat was a whole study, in {duration(time.monotonic() - started)}. Open {result.report} in a browser; for your own "
        "radiographs, start with `cxrfast shard --help`."
    )
