"""Commands that carry out the whole study."""

from pathlib import Path
from typing import Any

import click

from cxrfast import config
from cxrfast.cli.options import (
    FOLDER,
    forecast_options,
    given,
    run_options,
    runtime_options,
    taken_out,
    training_options,
)
from cxrfast.cli.terminal import fail, show


@click.command()
@click.argument("shards", type=FOLDER, metavar="SET")
@click.argument("runs", type=FOLDER)
@click.option("--scale", "scales", type=int, multiple=True, help="Once for each scale. [default: all of the set]")
@click.option("--fold", "folds", type=int, multiple=True, help="Once for each fold. [default: all five]")
@click.option(
    "--nproc",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Processes a training, as torchrun --nproc_per_node.",
)
@forecast_options
@training_options
@runtime_options
@run_options
def study(
    shards: Path,
    runs: Path,
    scales: tuple[int, ...],
    folds: tuple[int, ...],
    nproc: int,
    keep_going: bool,
    dry_run: bool,
    rates: tuple[tuple[int, float], ...],
    walltime: str | None,
    sbatch: Path | None,
    slurm: Path | None,
    **training: Any,
) -> None:
    """Every scale × fold of SET: train, predict, evaluate, ensemble, ERF, Grad-CAM, report. Goes on where it stopped."""
    runtime = taken_out(config.Runtime, training)
    options: dict[str, Any] = {"nproc": nproc, "options": given(training), **runtime}
    if dry_run or sbatch:
        ahead(
            shards, runs, list(scales), list(folds), dict(rates), walltime, None if dry_run else sbatch, slurm, options
        )
        return
    if slurm or walltime or rates:
        fail("--slurm, --walltime and --rate belong to --dry-run or --sbatch")
    from cxrfast.study.study import failed
    from cxrfast.study.study import study as carry_out
    from cxrfast.training.signals import Stopped

    try:
        result = carry_out(shards, runs, list(scales), list(folds), keep_going=keep_going, **options)
    except Stopped as stopped:
        click.echo(f"cxrfast: {stopped}", err=True)
        raise
    show(*result.tables)
    click.echo(f"report: {result.report}")
    if result.failures:
        fail(failed(result.failures))


def ahead(
    shards: Path,
    runs: Path,
    scales: list[int],
    folds: list[int],
    rates: dict[int, float],
    walltime: str | None,
    sbatch: Path | None,
    slurm: Path | None,
    options: dict[str, Any],
) -> None:
    """Show what a study would do; write its job scripts into the folder `sbatch`, if there is one."""
    from dataclasses import replace

    from cxrfast.study.forecast import forecast, forecast_table
    from cxrfast.study.pace import parse_walltime
    from cxrfast.study.plan import make_plan
    from cxrfast.study.slurm import Slurm, read_slurm, write_scripts

    asked = read_slurm(slurm) if slurm else Slurm()
    asked = replace(asked, time=walltime or asked.time)
    plan = make_plan(shards, runs, scales, folds, nodes=asked.nodes, **options)
    result = forecast(plan, rates)
    show(forecast_table(result, parse_walltime(asked.time) if walltime or slurm or sbatch else None))
    result.check()
    if sbatch:
        *scripts, submit = write_scripts(plan, result.outlooks, asked, sbatch)
        click.echo(f"{len(scripts)} job scripts in {sbatch}; read one, then queue them all: {submit}")


@click.command()
@click.option("--out", type=FOLDER, default=Path("demo"), show_default=True, help="Where everything goes.")
def demo(out: Path) -> None:
    """The whole study on phantoms: synth, shard, train, evaluate, report. CPU, minutes."""
    from cxrfast.study.demo import demo as run_demo
    from cxrfast.training.signals import Stopped

    try:
        result = run_demo(out)
    except Stopped as stopped:
        click.echo(f"cxrfast: {stopped}", err=True)
        raise
    show(*result.tables)
    click.echo(f"report: {result.report}")
