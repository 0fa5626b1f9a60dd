"""Commands that read finished runs: tables, figures, the report."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from cxrfast.cli import options as option
from cxrfast.cli.terminal import fail, say, show
from cxrfast.errors import NotDefined

if TYPE_CHECKING:
    from cxrfast.thresholds import Rule

FINISHED_ONLY = option.flag(
    "--finished-only", "Leave out runs whose training is not done; otherwise they are marked with ‡."
)


ON = click.option("--on", metavar="NAME", help="Another set that `cxrfast predict RUNS SET` has scored, by its name.")
WITHOUT_SHARED = option.flag(
    "--without-shared-patients",
    "With --on: leave out rows whose patient or image is among the runs' rows.",
    "without_shared_patients",
)
OF_OTHER_SET = ("policy", "label_policies", "blank", "unlabelled", "without_shared_patients")


def other_set_options(command: option.Command) -> option.Command:
    """--on and the options that say what the labels of another set mean."""
    rules: dict[str, dict[str, Any]] = {
        "policy": {"help": "With --on: uncertain labels: u_zeros, u_ones or u_ignore. [default: as the runs]"},
        "label-policy": {"type": option.LABEL_POLICY, "multiple": True, "help": "With --on: of one label; repeatable."},
        "blank": {"type": option.BLANK, "multiple": True, "help": "With --on: blank labels. [default: as the runs]"},
        "unlabelled": {
            "type": click.Choice(["drop", "negative"]),
            "help": "With --on: images without any label. [default: as the runs]",
        },
    }
    command = WITHOUT_SHARED(command)
    for name, settings in reversed(rules.items()):
        field = "label_policies" if name == "label-policy" else name
        command = click.option(f"--{name}", field, **settings)(command)
    return ON(command)


def other_set_rules(on: str | None, options: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `evaluate_on` and others for the options of `other_set_options`. Fails if they are given without --on."""
    from cxrfast.analysis.other_set import OtherRules

    given = {name: options.pop(name) for name in OF_OTHER_SET}
    if on is None and any(given.values()):
        fail(
            "--policy, --label-policy, --blank, --unlabelled and --without-shared-patients need --on: runs keep their own rules"
        )
    without = given.pop("without_shared_patients")
    return {"rules": OtherRules(**given), "without_shared_patients": without}


def own_part(on: str | None) -> None:
    """Fail if --part was given with --on."""
    source = click.get_current_context().get_parameter_source("part")
    if on is not None and source is not ParameterSource.DEFAULT:
        fail("--part is about the runs' own rows, and --on about another set, which has no parts: give one of them")


@click.command()
@option.RUNS
@click.option("--part", type=click.Choice(["val", "test"]), default="test", help="Rows to score.")
@FINISHED_ONLY
@other_set_options
def evaluate(runs: Path, part: str, finished_only: bool, on: str | None, **options: Any) -> None:
    """AUROC per finding and scale, mean ± sd over folds, for all predictions in RUNS; with --on: on another set."""
    from cxrfast.analysis import evaluate as scores
    from cxrfast.analysis.other_set import other_folder

    own_part(on)
    of_other = other_set_rules(on, options)
    if on is None:
        result = scores.evaluate(runs, part, finished_only=finished_only)
    else:
        result = scores.evaluate_on(runs, on, finished_only=finished_only, **of_other)
        scores.write(runs / scores.FOLDER, result)
    show(scores.auroc_table(result))
    say(f"tables: {runs / scores.FOLDER / (other_folder(on) if on else '')}")


@click.command()
@option.RUNS
@FINISHED_ONLY
@other_set_options
def ensemble(runs: Path, finished_only: bool, on: str | None, **options: Any) -> None:
    """Stack the scales in RUNS with weights fitted on validation logits; compare with plain voting."""
    from cxrfast.analysis import ensemble as stack
    from cxrfast.analysis.other_set import other_folder

    of_other = other_set_rules(on, options)
    of_set = {"on": on, **of_other} if on else {}
    show(stack.ensemble_table(stack.ensemble(runs, finished_only=finished_only, **of_set)))
    say(f"tables and figure: {runs / stack.FOLDER / (other_folder(on) if on else '')}")


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
@option.RUNS
@click.option("--part", type=click.Choice(["val", "test"]), default="test", help="Rows to list.")
@click.option(
    "--out", type=option.FILE, metavar="FILE", help=".csv or .parquet. [default: RUNS/evaluation/predictions.csv]"
)
@option.flag("--patient-ids", "Also list the ids of the patients.")
@FINISHED_ONLY
@other_set_options
def table(
    runs: Path, part: str, out: Path | None, patient_ids: bool, finished_only: bool, on: str | None, **options: Any
) -> None:
    """Every prediction in RUNS as one long table: image, fold, label, target, logits and probabilities by scale."""
    from cxrfast.analysis.table import write_table

    own_part(on)
    of_other = other_set_rules(on, options)
    where: dict[str, Any] = {"patient_ids": patient_ids, "finished_only": finished_only}
    written = write_table(runs, out, part, on=on, **where, **of_other)
    for note in written.notes:
        say(note, err=True)
    say(f"{written.lines:,} lines: {written.path}")


@click.command()
@option.EACH_RUN
@click.option("--images", default=64, help="Validation images to average over.")
@option.MOVED_SHARDS
@option.DEVICE
@option.TRUST_ARCH
def erf(runs: tuple[Path, ...], images: int, shards: Path | None, device: str) -> None:
    """Effective receptive field of each RUN, next to the theoretical one."""
    from cxrfast.analysis.receptive_field import erf as measure_erf
    from cxrfast.distributed import pick_device
    from cxrfast.runs.run import Run

    def measure(folder: Path) -> str:
        return measure_erf(Run.open(folder), images=images, shards=shards, device=pick_device(device)).in_words()

    _where_defined(runs, measure)


@click.command()
@option.EACH_RUN
@click.option("--label", required=True, help="A finding, for instance Cardiomegaly.")
@click.option("--images", default=8, help="Number of positives, those with the highest logits.")
@option.MOVED_SHARDS
@option.DEVICE
@option.TRUST_ARCH
def gradcam(runs: tuple[Path, ...], label: str, images: int, shards: Path | None, device: str) -> None:
    """Grad-CAM maps and a figure of each RUN for a finding."""
    from cxrfast.analysis.gradcam import gradcam_run, save_figure
    from cxrfast.distributed import pick_device
    from cxrfast.runs.run import Run

    def draw(folder: Path) -> Path:
        run = Run.open(folder)
        gradcam_run(run, label, images=images, shards=shards, device=pick_device(device))
        return save_figure(run, label, shards=shards)

    _where_defined(runs, draw)


def _where_defined(runs: tuple[Path, ...], make: Callable[[Path], object]) -> None:
    """Say what `make` gives for each run; networks for which it is not defined are named and left out, unless all are."""
    left_out: list[NotDefined] = []
    for folder in runs:
        try:
            say(make(folder))
        except NotDefined as error:
            left_out.append(error)
            if len(left_out) == len(runs):
                raise
            say(f"cxrfast: {folder}: {error}", err=True)


@click.command()
@option.RUNS
@FINISHED_ONLY
def report(runs: Path, finished_only: bool) -> None:
    """Write report.html: tables and figures of RUNS in one file that opens anywhere."""
    from cxrfast.analysis.report import report as write_report

    say(write_report(runs, finished_only=finished_only))
