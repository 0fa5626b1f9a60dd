"""Types of parameters, and the options that several commands share."""

import math
import tomllib
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import click

from cxrfast import config


class LocalPath(click.Path):
    """A path of this machine; a URL is refused as it was typed, before `Path` eats one of its slashes."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if "://" in str(value):
            self.fail(
                f"{value} is a URL, and only local paths are read and written: `cxrfast stage` copies a set from it to a "
                "folder, or back",
                param,
                ctx,
            )
        return super().convert(value, param, ctx)


FOLDER = LocalPath(path_type=Path, file_okay=False)
FILE = LocalPath(path_type=Path)


class PartOfN(click.ParamType):
    """`2/8` → (2, 8)."""

    name = "I/N"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        if isinstance(value, tuple):
            return value
        i, slash, n = value.partition("/")
        if not (slash and i.isdecimal() and n.isdecimal() and 1 <= int(i) <= int(n)):
            self.fail(f"{value!r} is not I/N with I from 1 to N, such as 2/8", param, ctx)
        return int(i), int(n)


class MicroBatch(click.IntRange):
    """A number of images, or `auto`."""

    name = "INTEGER|auto"

    def __init__(self) -> None:
        super().__init__(min=1)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return value if value == "auto" else super().convert(value, param, ctx)


class Finite(click.FloatRange):
    """A number in a range, which `nan` is in none of."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number", param, ctx)
        return number


class Sizes(click.ParamType):
    """`64x2,96x2` → ((64, 2), (96, 2)): side in px and epochs."""

    name = "SIDExEPOCHS,…"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[tuple[int, int], ...]:
        if isinstance(value, tuple):
            return value
        parts = [part.partition("x") for part in str(value).split(",")]
        if not all(side.isdecimal() and epochs.isdecimal() for side, _, epochs in parts):
            self.fail(f"{value!r} is not SIDExEPOCHS, or several with commas between, such as 64x2,96x2", param, ctx)
        return tuple((int(side), int(epochs)) for side, _, epochs in parts)


class LabelPolicy(click.ParamType):
    """`Edema=u_ones` → ("Edema", "u_ones")."""

    name = "LABEL=POLICY"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str]:
        if isinstance(value, tuple):
            return value
        label, equals, policy = str(value).rpartition("=")
        if not equals:
            self.fail(f"{value!r} is not LABEL=POLICY, such as Edema=u_ones", param, ctx)
        return label, policy


def read_toml(ctx: click.Context, param: click.Parameter, path: Path | None) -> Path | None:
    """Takes the options of this command from a TOML file; those on the command line win."""
    if path is None:
        return None
    try:
        values = tomllib.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise click.BadParameter(f"{path} is no TOML file ({error})", ctx, param) from error
    known = {option: option_ for option_ in ctx.command.params for option in option_.opts}
    found = {}
    for name, value in values.items():
        option = known.get(f"--{name.replace('_', '-')}")
        if option is None or option is param:
            names = ", ".join(sorted(o.removeprefix("--").replace("-", "_") for o in known if o.startswith("--")))
            raise click.BadParameter(f"{path} holds {name}, which is no option; there are {names}", ctx, param)
        found[option.name] = value if isinstance(value, list) or not option.multiple else [value]
    ctx.default_map = {**(ctx.default_map or {}), **found}
    return path


class ScaleRate(click.ParamType):
    """`2048=75` → (2048, 75.0)."""

    name = "SCALE=IMAGES_PER_S"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, float]:
        if isinstance(value, tuple):
            return value
        scale, _, rate = value.partition("=")
        try:
            if scale.isdecimal() and 0 < float(rate) < float("inf"):
                return int(scale), float(rate)
        except ValueError:
            pass
        self.fail(f"{value!r} is not SCALE=IMAGES_PER_S, such as 2048=75", param, ctx)


def source_options(command: Callable[..., None]) -> Callable[..., None]:
    """Options of `shard` that say what the source tree is and how its tables are read."""
    for option in reversed(
        (
            click.option("--data", default=config.DATA, show_default=True, help="Source tree; or set CXRFAST_DATA."),
            click.option(
                "--source",
                default="mimic",
                show_default=True,
                help="mimic, chexpert, nih, table or package.module:name.",
            ),
            click.option("--labels", type=click.Choice(["chexpert", "negbio"]), help="mimic: who labelled. [chexpert]"),
            click.option("--table", metavar="FILE", help="table: .csv, .tsv, .parquet; in --data, absolute or a URL."),
            click.option("--path-column", metavar="NAME", help="table: paths. [path, file or filename]"),
            click.option(
                "--patient-column", metavar="NAME", help="table: patients. [patient_id, subject_id or patient]"
            ),
            click.option("--label", metavar="NAME", multiple=True, help="table: column of a label; once for each."),
            click.option("--image-column", metavar="NAME", help="table: ids of images. [paths without suffix]"),
            click.option("--study-column", metavar="NAME", help="table: studies. [each image is one]"),
            click.option("--view-column", metavar="NAME", help="table: view positions. [unknown]"),
            click.option("--split-column", metavar="NAME", help="table: official train, validate, test. [none]"),
        )
    ):
        command = option(command)
    return command


SOURCE_ARGUMENTS = (
    "labels",
    "table",
    "path_column",
    "patient_column",
    "label",
    "image_column",
    "study_column",
    "view_column",
    "split_column",
)
"""Arguments of the sources' functions by these names; `read_source` refuses those that the chosen one does not have."""


def chosen_source(options: dict[str, Any]) -> dict[str, Any]:
    """Take the options of one source that were given out of `options`."""
    values = {name: options.pop(name) for name in SOURCE_ARGUMENTS}
    return {name: list(v) if isinstance(v, tuple) else v for name, v in values.items() if v not in (None, ())}


def training_options(command: Callable[..., None]) -> Callable[..., None]:
    """Options of `train` and `study` that decide what is trained; None means the preset's value."""
    for option in reversed(
        (
            click.option("--arch", help="A torchvision classifier. [default: densenet121]"),
            click.option(
                "--weights", help="imagenet, none, a .pth or .safetensors file, or a run. [default: imagenet]"
            ),
            click.option("--policy", help="Uncertain labels: u_zeros, u_ones or u_ignore. [default: u_zeros]"),
            click.option(
                "--label-policy",
                "label_policies",
                type=LabelPolicy(),
                multiple=True,
                help="Another policy for this label; may be given again.",
            ),
            click.option(
                "--positive-weights", is_flag=True, help="Weigh positives of a label by negatives / positives."
            ),
            click.option("--split", help="folds or official. [default: folds]"),
            click.option("--view", "views", multiple=True, help="Keep this view position only; may be given again."),
            click.option(
                "--rows",
                "subset",
                type=FILE,
                metavar="FILE",
                help="Use these rows only: a file with one number a line.",
            ),
            click.option("--limit", type=click.IntRange(min=1), help="Use the first N rows of each part only."),
            click.option(
                "--global-batch", type=click.IntRange(min=1), help="Images an optimiser step. [default: by scale]"
            ),
            click.option(
                "--micro-batch", type=MicroBatch(), help="Images a forward pass; auto: what fits. [default: by scale]"
            ),
            click.option("--learning-rate", type=float, help="[default: 1e-4 · global batch / 32]"),
            click.option("--epochs", type=int, help="At most. [default: 100]"),
            click.option(
                "--sizes", type=Sizes(), help="Train on smaller images first: side x epochs, such as 64x2,96x2."
            ),
            click.option("--precision", help="auto, bf16, fp16, tf32 or fp32. [default: auto]"),
            click.option("--sync-bn", is_flag=True, help="BatchNorm over all ranks' micro-batches; GPUs only."),
            click.option(
                "--order",
                type=click.Choice(["global", "block"]),
                help="block: a few shards at a time, for storage that is slow to seek. [default: global]",
            ),
            click.option("--seed", type=int, help="[default: 0]"),
        )
    ):
        command = option(command)
    return command


def runtime_options(command: Callable[..., None]) -> Callable[..., None]:
    """Options that say where and how something runs."""
    for option in reversed(
        (
            click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda."),
            click.option(
                "--engine",
                type=click.Choice(["auto", "dali", "host"]),
                default="auto",
                show_default=True,
                help="Who decodes.",
            ),
            click.option(
                "--threads", type=click.IntRange(min=1), help="Decoding threads a process. [default: usable cores]"
            ),
        )
    ):
        command = option(command)
    return command


def run_options(command: Callable[..., None]) -> Callable[..., None]:
    """Options of `train` and `study` that say how a run goes about it; none changes what is learned."""
    for option in reversed(
        (
            cache_option,
            click.option(
                "--stage", type=FOLDER, metavar="DIR", help="Copy the scale to this local disk first, once a machine."
            ),
            click.option(
                "--checkpoint-minutes", default=10.0, show_default=True, help="Write last.pt at least so often."
            ),
            click.option(
                "--checkpoint-steps",
                type=click.IntRange(min=1),
                help="Write last.pt after so many optimiser steps, too.",
            ),
            click.option(
                "--recompute", is_flag=True, help="Keep less for the backward pass, compute it again: less memory."
            ),
            click.option(
                "--compile",
                metavar="MODE",
                help=f"torch.compile: {' or '.join(config.COMPILE_MODES)}.",
            ),
            click.option("--tensorboard", is_flag=True, help="Write events for TensorBoard into the run, too."),
            click.option("--profile", is_flag=True, help="Write a trace of a few steps: profile.json in the run."),
            click.option(
                "--dist-timeout", default=10.0, show_default=True, help="Minutes that a rank waits for the others."
            ),
            click.option("--deterministic", is_flag=True, help="Bitwise repeatable on a GPU, slower."),
        )
    ):
        command = option(command)
    return command


cache_option = click.option(
    "--cache", type=FOLDER, metavar="DIR", help="Keep decoded pixels here, on a local disk; may be deleted at any time."
)


def forecast_options(command: Callable[..., None]) -> Callable[..., None]:
    """Options of `study` that look ahead, or leave the work to SLURM."""
    for option in reversed(
        (
            click.option("--keep-going", is_flag=True, help="After a run that failed, go on with the others."),
            click.option("--dry-run", is_flag=True, help="Check every run, say what it would take, write nothing."),
            click.option(
                "--rate", "rates", type=ScaleRate(), multiple=True, help="For --dry-run. [default: of earlier runs]"
            ),
            click.option("--walltime", metavar="[D-]HH:MM:SS", help="Of one job, for --dry-run and --sbatch."),
            click.option("--sbatch", type=FOLDER, metavar="DIR", help="Write SLURM job scripts into DIR instead."),
            click.option("--slurm", type=FILE, metavar="FILE", help="TOML with account, partition, set-up lines, …"),
        )
    ):
        command = option(command)
    return command


def given(options: dict[str, Any]) -> dict[str, Any]:
    """Training options as TrainConfig fields; what was not given is None."""
    return {name: value or None if isinstance(value, tuple | bool) else value for name, value in options.items()}


def taken_out(kind: type, options: dict[str, Any]) -> dict[str, Any]:
    """Takes those of `options` out that are fields of the dataclass `kind`."""
    return {field.name: options.pop(field.name) for field in fields(kind) if field.name in options}
