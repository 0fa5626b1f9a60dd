"""The group `cxrfast bench`: speed and memory."""

import logging
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cxrfast.cli import options as option
from cxrfast.cli.terminal import fail, say, show

if TYPE_CHECKING:
    from cxrfast.bench.report import Result

log = logging.getLogger(__name__)

BENCH_MINUTES = 2.0
"""How long `cxrfast bench` takes without a command."""


@click.group(invoke_without_command=True)
@option.flag("--full", "Without a command: run `step` without a time limit.")
@click.pass_context
def bench(ctx: click.Context, full: bool) -> None:
    """Measure speed and memory. Without a command: `step`, in two minutes."""
    # leave through the stack, which ends processes and removes temporary folders
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    ctx.call_on_close(lambda: signal.signal(signal.SIGTERM, before))
    if ctx.invoked_subcommand is None:
        limit = "no time limit" if full else f"about {BENCH_MINUTES:g} minutes (all of it: cxrfast bench --full)"
        log.info(f"cxrfast bench: memory and images/s of training by resolution, {limit}")
        ctx.invoke(step, minutes=None if full else BENCH_MINUTES)
    elif full:
        fail("--full works only without a command, as `cxrfast bench --full`: leave out --minutes instead")


def report(result: "Result", out: Path) -> None:
    show(*result.tables())
    say(f"tables, JSON and plot: {out}")


RESULTS = click.option(
    "--out", type=option.FOLDER, default=Path("bench-results"), help="Folder for table, JSON and plot."
)
SHARDS = click.option("--shards", type=option.FOLDER, help="Shard set of JPEGs. [default: freshly drawn phantoms]")
ROUNDS = click.option("--rounds", type=option.COUNT, default=5, help="Rounds; results are their medians.")
MINUTES = click.option(
    "--minutes",
    type=option.Finite(min=0, min_open=True),
    help="Stop after about this long: fewer rounds, and what does not fit is left out. [default: no limit]",
)
MICRO_BATCH = click.option("--micro-batch", type=option.COUNT, help="Images per step. [default: by scale]")


def seconds_option(default: float, least: float = 0.01, what: str = "figure and round") -> option.Decorator:
    time = option.Finite(min=least, max=3600)
    return click.option("--seconds", type=time, default=default, help=f"Measured time per {what}.")


def only_option(what: str) -> option.Decorator:
    return click.option("--only", metavar="NAME", multiple=True, help=f"Only this {what}; repeatable.")


@bench.command()
@SHARDS
@option.scales("Once per scale. [default: all of the set]")
@RESULTS
@click.option("--arch", default="densenet121", help="A torchvision classifier.")
@seconds_option(10.0, 0.1, "figure")
@ROUNDS
@MINUTES
@MICRO_BATCH
@option.runtime_options
@option.flag("--each-engine", "Measure training with host and with dali, one after the other.")
def step(shards: Path | None, scales: tuple[int, ...], out: Path, **options: Any) -> None:
    """Memory and images/s of loading, training and validation, by scale."""
    from cxrfast.bench.training.step import bench as measure

    result = measure(shards, list(scales), out, **options)
    report(result, out)
    if not result.lines:
        fail("no scale could be measured, for the reasons above")


@bench.command()
@option.scales("Once per scale. [default: by device]")
@seconds_option(2.0)
@MICRO_BATCH
@option.DEVICE
@option.flag("--compile", "Also measure torch.compile: takes minutes longer per scale.", "with_compile")
@option.flag("--profile", "Also measure time by kind of kernel, at the largest scale.", "with_profile")
@only_option("rung")
@MINUTES
@RESULTS
def ladder(scales: tuple[int, ...], out: Path, only: tuple[str, ...], **options: Any) -> None:
    """Effect of each way to speed up training on images/s and memory, by scale, on a synthetic batch."""
    from cxrfast.bench.training.ladder import bench as measure

    report(measure(list(scales), out, only=list(only), **options), out)


@bench.command(name="shard")
@click.option("--data", help="MIMIC-CXR-JPG tree to take images from. [default: freshly drawn phantoms]")
@click.option("--images", type=click.IntRange(1, 1024), default=24, help="Images to measure on.")
@option.scales("Once per scale. [default: 256, 512, 1024 and 2048]")
@seconds_option(20.0)
@ROUNDS
@option.workers("Workers of the build that is compared with one worker's. [default: usable cores]")
@option.flag("--memory", "Also measure the memory of whole builds: takes minutes longer.", "with_memory")
@RESULTS
def bench_shard(data: str | None, scales: tuple[int, ...], out: Path, **options: Any) -> None:
    """Images/s per core of sharding compared with Pillow and libvips, by stage, by number of workers."""
    from cxrfast.bench.sharding.shard import bench as measure

    report(measure(data, list(scales), out, **options), out)


@bench.command(name="load")
@SHARDS
@option.scales("Once per scale. [default: all of the set]")
@seconds_option(2.0)
@ROUNDS
@option.workers("Threads or processes of each. [default: usable cores]")
@option.DEVICE
@click.option("--peers/--no-peers", "with_peers", default=True, help="Also measure other loaders.")
@option.flag("--engines", "Also compare host with dali on the device, in detail.", "with_engines")
@option.flag("--cold", "Also measure passes with an empty page cache.", "with_cold")
@option.flag("--large", "Also measure a set of 377,110 rows: takes a minute longer.", "with_large")
@only_option("way of loading")
@MINUTES
@RESULTS
def bench_load(shards: Path | None, scales: tuple[int, ...], out: Path, only: tuple[str, ...], **options: Any) -> None:
    """Images/s of loading compared with other loaders and the bare kernels, by scale."""
    from cxrfast.bench.loading.load import bench as measure

    report(measure(shards, list(scales), out, only=list(only), **options), out)


@bench.command()
@click.option("--shards", type=option.FOLDER, required=True, help="Shard set with both scales.")
@click.option("--scale", type=int, required=True, help="Side, px.")
@click.option("--from-scale", type=int, required=True, help="Smaller side, px.")
@click.option("--fold", type=click.IntRange(0, 4), default=0, help="Test fold.")
@click.option("--epochs", type=option.COUNT, default=6, help="Epochs of every run.")
@click.option("--target", type=click.FloatRange(0, 1), help="AUROC. [default: the best from scratch]")
@click.option("--weights", default="none", help="First weights, except from the smaller scale.")
@click.option("--global-batch", type=option.COUNT, help="Images per optimiser step. [default: by scale]")
@MICRO_BATCH
@click.option("--learning-rate", type=float, help="[default: 1e-4 · global batch / 32]")
@option.DEVICE
@RESULTS
def curriculum(shards: Path, scale: int, from_scale: int, out: Path, **options: Any) -> None:
    """Seconds to the same validation AUROC: from scratch, from a smaller scale, with progressive resizing."""
    from cxrfast.bench.training.curriculum import bench as measure

    report(measure(shards, scale, from_scale, out, **options), out)
