"""`cxrfast export`: trained networks as one folder that can be handed on."""

from pathlib import Path

import click

from cxrfast.cli import options as option
from cxrfast.cli.analysis import FINISHED_ONLY
from cxrfast.cli.terminal import say

FORMATS = ("onnx", "torchscript", "torchvision")
"""As in `inference.formats`, which loads torch."""


@click.command()
@click.argument("runs", type=option.FOLDER)
@click.argument("out", type=option.FOLDER)
@option.scales("Only this scale, px; repeatable. [default: all]")
@click.option(
    "--fold", "folds", type=click.IntRange(min=0), multiple=True, help="Only this fold; repeatable. [default: all]"
)
@click.option(
    "--name",
    "names",
    multiple=True,
    help="Only this group of runs, such as densenet121-256; repeatable. [default: all]",
)
@click.option(
    "--format",
    "formats",
    type=click.Choice(FORMATS),
    multiple=True,
    help="Another format next to safetensors; repeatable. onnx needs cxrfast[export].",
)
@FINISHED_ONLY
@option.MOVED_SHARDS
@option.TRUST_ARCH
def export(
    runs: Path,
    out: Path,
    scales: tuple[int, ...],
    folds: tuple[int, ...],
    names: tuple[str, ...],
    formats: tuple[str, ...],
    finished_only: bool,
    shards: Path | None,
) -> None:
    """Write the networks of RUNS into the folder OUT, to hand on: weights, ensemble, thresholds, a model card.

    RUNS is the folder of all runs, of one scale's folds, or of one run. `cxrfast.load("OUT")` and `cxrfast predict OUT`
    read OUT.
    """
    from cxrfast.exports.export import export as write_export
    from cxrfast.exports.export import select
    from cxrfast.runs.folder import RunFolder
    from cxrfast.runs.run import Run

    found = [Run.open(one.folder) for one in RunFolder.within(runs)] or Run.find(runs)
    chosen = select(found, scales=scales, folds=folds, names=names, finished_only=finished_only)
    say(f"model: {write_export(chosen, out, formats=formats, shards=shards)}")
