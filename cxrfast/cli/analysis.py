"""Commands that read finished runs: tables, figures, the report."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from cxrfast.cli import options as option
from cxrfast.cli.terminal import say, show

if TYPE_CHECKING:
    from cxrfast.thresholds import Rule

FINISHED_ONLY = option.flag(
    "--finished-only", "Leave out runs whose training is not done; otherwise they are marked with ‡."
)


@click.command()
@option.RUNS
@click.option("--part", type=click.Choice(["val", "test"]), default="test", help="Rows to score.")
@FINISHED_ONLY
def evaluate(runs: Path, part: str, finished_only: bool) -> None:
    """AUROC per finding and scale, mean ± sd over folds, for all predictions in RUNS."""
    from cxrfast.analysis.evaluate import auroc_table
    from cxrfast.analysis.evaluate import evaluate as evaluate_runs

    show(auroc_table(evaluate_runs(runs, part, finished_only=finished_only)))
    say(f"tables: {runs / 'evaluation'}")


@click.command()
@option.RUNS
@FINISHED_ONLY
def ensemble(runs: Path, finished_only: bool) -> None:
    """Stack the scales in RUNS with weights fitted on validation logits; compare with plain voting."""
    from cxrfast.analysis.ensemble import ensemble as stack_scales
    from cxrfast.analysis.ensemble import ensemble_table

    show(ensemble_table(stack_scales(runs, finished_only=finished_only)))
    say(f"tables and figure: {runs / 'ensemble'}")


@click.command()
@option.RUNS
@click.option(
    "--rule",
    type=option.RULE,
    help="youden, sensitivity=VALUE or specificity=VALUE, on validation rows. [default: the runs' own; at first youden]",
)
@FINISHED_ONLY
def thresholds(runs: Path, rule: "Rule | None", finished_only: bool) -> None:
    """Choose the thresholds of all runs in RUNS on validation rows; show what they do on test rows."""
    from cxrfast.analysis.thresholds import choose_thresholds, evaluate_thresholds, thresholds_table

    choose_thresholds(runs, rule, finished_only=finished_only)
    show(thresholds_table(evaluate_thresholds(runs, finished_only=finished_only)))
    say(f"tables: {runs / 'evaluation'}")


@click.command()
@option.EACH_RUN
@click.option("--images", default=64, help="Validation images to average over.")
@option.MOVED_SHARDS
@option.DEVICE
def erf(runs: tuple[Path, ...], images: int, shards: Path | None, device: str) -> None:
    """Effective receptive field of each RUN, next to the theoretical one."""
    from cxrfast.analysis.receptive_field import erf as measure_erf
    from cxrfast.distributed import pick_device
    from cxrfast.runs.run import Run

    for folder in runs:
        say(measure_erf(Run.open(folder), images=images, shards=shards, device=pick_device(device)).in_words())


@click.command()
@option.EACH_RUN
@click.option("--label", required=True, help="A finding, for instance Cardiomegaly.")
@click.option("--images", default=8, help="Number of positives, those with the highest logits.")
@option.MOVED_SHARDS
@option.DEVICE
def gradcam(runs: tuple[Path, ...], label: str, images: int, shards: Path | None, device: str) -> None:
    """Grad-CAM maps and a figure of each RUN for a finding."""
    from cxrfast.analysis.gradcam import gradcam_run, save_figure
    from cxrfast.distributed import pick_device
    from cxrfast.runs.run import Run

    for folder in runs:
        run = Run.open(folder)
        gradcam_run(run, label, images=images, shards=shards, device=pick_device(device))
        say(save_figure(run, label, shards=shards))


@click.command()
@option.RUNS
@FINISHED_ONLY
def report(runs: Path, finished_only: bool) -> None:
    """Write report.html: tables and figures of RUNS in one file that opens anywhere."""
    from cxrfast.analysis.report import report as write_report

    say(write_report(runs, finished_only=finished_only))
