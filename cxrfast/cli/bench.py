"""The group `cxrfast bench`: how fast, and with how much memory."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from cxrfast.cli.options import FOLDER, Finite, runtime_options
from cxrfast.cli.terminal import fail, show

log = logging.getLogger(__name__)

BENCH_MINUTES = 2.0
"""How long `cxrfast bench` takes without a command."""


@click.group(invoke_without_command=True)
@click.option("--full", is_flag=True, help="Without a command: take all the time that `step` needs.")
@click.pass_context
def bench(ctx: click.Context, full: bool) -> None:
    """How fast, and with how much memory. Without a command: `step`, in two minutes."""
    if ctx.invoked_subcommand is None:
        limit = "as long as it takes" if full else f"about {BENCH_MINUTES:g} minutes (all of it: cxrfast bench --full)"
        log.info(f"cxrfast bench: memory and images/s of training by resolution, {limit}")
        ctx.invoke(step, minutes=None if full else BENCH_MINUTES)
    elif full:
        fail("--full belongs to `cxrfast bench` without a command: leave out --minutes instead")


RESULTS = click.option(
    "--out", type=FOLDER, default=Path("bench-results"), show_default=True, help="Folder for table, JSON and plot."
)

ROUNDS = click.option(
    "--rounds", type=click.IntRange(min=1), default=5, show_default=True, help="Medians are over them."
)

MINUTES = click.option(
    "--minutes",
    type=Finite(min=0, min_open=True),
    help="End after about so long: fewer rounds, and what does not fit is left out. [default: no limit]",
)


def seconds_option(default: float) -> Callable[[Callable[..., None]], Callable[..., None]]:
    return click.option(
        "--seconds",
        type=Finite(min=0.01, max=3600),
        default=default,
        show_default=True,
        help="Measured time a figure and round.",
    )


def only_option(what: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    return click.option("--only", metavar="NAME", multiple=True, help=f"This {what} only; may be given again.")


@bench.command()
@click.option("--shards", type=FOLDER, help="Shard set. [default: phantoms made for the purpose]")
@click.option("--scale", "scales", type=int, multiple=True, help="Once for each scale. [default: all of the set]")
@RESULTS
@click.option("--arch", default="densenet121", show_default=True, help="A torchvision classifier.")
@click.option(
    "--seconds",
    type=Finite(min=0.1, max=3600),
    default=10.0,
    show_default=True,
    help="Measured time a figure.",
)
@ROUNDS
@MINUTES
@click.option("--micro-batch", type=click.IntRange(min=1), help="Images a forward pass. [default: by scale]")
@runtime_options
@click.option("--each-engine", is_flag=True, help="Measure training with host and with dali, one after the other.")
def step(shards: Path | None, scales: tuple[int, ...], out: Path, **options: Any) -> None:
    """Memory and images/s of loading, training and validation, by scale."""
    from cxrfast.bench.training.step import bench as measure_steps

    result = measure_steps(shards, list(scales), out, **options)
    show(result.table())
    if not result.lines:
        fail("no scale could be measured, for the reasons above")
    click.echo(f"table, JSON and plot: {out}")


@bench.command()
@click.option("--scale", "scales", type=int, multiple=True, help="Once for each scale. [default: by device]")
@seconds_option(2.0)
@click.option("--micro-batch", type=click.IntRange(min=1), help="Images a step. [default: by scale]")
@click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda.")
@click.option("--compile", "with_compile", is_flag=True, help="torch.compile, too: minutes more a scale.")
@click.option("--profile", "with_profile", is_flag=True, help="Time by kind of kernel at the largest scale, too.")
@only_option("rung")
@MINUTES
@RESULTS
def ladder(scales: tuple[int, ...], out: Path, only: tuple[str, ...], **options: Any) -> None:
    """What each means of training faster is worth, in images/s and memory, by scale; on a synthetic batch."""
    from cxrfast.bench.training.ladder import bench as measure_rungs
    from cxrfast.bench.training.ladder_result import tables

    show(*tables(measure_rungs(list(scales), out, only=list(only), **options)))
    click.echo(f"tables, JSON and plot: {out}")


@bench.command(name="shard")
@click.option("--data", help="MIMIC-CXR-JPG tree to take images from. [default: phantoms drawn for the purpose]")
@click.option("--images", type=click.IntRange(1, 1024), default=24, show_default=True, help="Images to measure on.")
@click.option(
    "--scale", "scales", type=int, multiple=True, help="Once for each scale. [default: 256, 512, 1024 and 2048]"
)
@seconds_option(20.0)
@ROUNDS
@click.option("--workers", type=click.IntRange(min=1), help="Of the build beside one worker's. [default: usable cores]")
@click.option("--memory", "with_memory", is_flag=True, help="Memory of whole builds, too: minutes more.")
@RESULTS
def bench_shard(data: str | None, scales: tuple[int, ...], out: Path, **options: Any) -> None:
    """Images/s a core of sharding beside Pillow and libvips, by stage, by number of workers."""
    from cxrfast.bench.sharding.result import tables
    from cxrfast.bench.sharding.shard import bench as measure_sharding

    show(*tables(measure_sharding(data, list(scales), out, **options)))
    click.echo(f"tables, JSON and plot: {out}")


@bench.command(name="load")
@click.option("--shards", type=FOLDER, help="Shard set of JPEGs. [default: phantoms made for the purpose]")
@click.option("--scale", "scales", type=int, multiple=True, help="Once for each scale. [default: all of the set]")
@seconds_option(2.0)
@ROUNDS
@click.option("--workers", type=click.IntRange(min=1), help="Threads or processes of each. [default: usable cores]")
@click.option("--device", default="auto", show_default=True, help="Of our own engines: auto, cpu or cuda.")
@click.option("--peers/--no-peers", "with_peers", default=True, show_default=True, help="Other loaders, too.")
@click.option("--engines", "with_engines", is_flag=True, help="host against dali on the device, in detail, too.")
@click.option("--cold", "with_cold", is_flag=True, help="Passes with an empty page cache, too.")
@click.option("--large", "with_large", is_flag=True, help="A set of 377,110 rows, too: a minute more.")
@only_option("way of loading")
@MINUTES
@RESULTS
def bench_load(shards: Path | None, scales: tuple[int, ...], out: Path, only: tuple[str, ...], **options: Any) -> None:
    """Images/s of loading beside other loaders and the bare kernels, by scale."""
    from cxrfast.bench.loading.load import bench as measure_loading
    from cxrfast.bench.loading.result import tables

    show(*tables(measure_loading(shards, list(scales), out, only=list(only), **options)))
    click.echo(f"tables, JSON and plot: {out}")
