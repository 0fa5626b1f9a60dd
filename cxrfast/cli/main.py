"""The command line. Each command parses, calls one function of the module it names, and prints what that returns.

Modules are imported inside the commands, so that `cxrfast --help` answers at once.
"""

import math
import os
import sys
import tomllib
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cxrfast import __version__, config
from cxrfast.errors import CxrfastError, is_disk_full, is_out_of_memory

if TYPE_CHECKING:
    from rich.table import Table


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


class Cli(click.Group):
    """Turns the project's errors, and the file system's, into one message and exit code 2."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)  # in the order in which a study needs them

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except CxrfastError as error:
            fail(str(error))
        except KeyboardInterrupt:
            click.echo("cxrfast: interrupted; what was finished is kept, the same command goes on", err=True)
            sys.exit(130)
        except (RuntimeError, MemoryError, ImportError) as error:
            if not (is_out_of_memory(error) or "failed to map segment" in str(error)):  # of a library, while loading it
                raise
            words = (str(error).splitlines() or [type(error).__name__])[0]
            fail(f"memory ran out ({words}): use a smaller scale, or a machine or GPU with more memory that is free")
        except OSError as error:
            if is_disk_full(error):
                fail(
                    f"no space or quota left ({error.filename or 'while writing'}): what was finished is kept; make room and "
                    "run the same command again"
                )
            if error.filename is None:
                raise
            fail(f"{error.filename}: {error.strerror}")


def fail(message: str) -> None:
    rank = os.environ.get("RANK")
    click.echo(f"cxrfast: {f'rank {rank}: ' if rank else ''}{message}", err=True)
    sys.exit(2)


@click.group(cls=Cli, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="cxrfast")
def cli() -> None:
    """Train chest X-ray classifiers at full resolution without waiting for I/O."""


def show(*tables: "Table") -> None:
    """Print tables on stdout, as wide as the terminal; 120 columns where it is none."""
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 120)
    for table in tables:
        console.print(table)


# Data


@cli.command()
@click.argument("out", type=FOLDER)
@click.option("--images", default=600, show_default=True, help="How many.")
@click.option("--size", default=1024, show_default=True, help="Longer side, px.")
@click.option("--seed", default=0, show_default=True)
@click.option("--corrupt", default=0, show_default=True, help="Images to damage: truncated, empty, not a JPEG.")
@click.option("--workers", type=click.IntRange(min=1), help="Processes. [default: usable cores]")
def synth(out: Path, **options: Any) -> None:
    """A phantom MIMIC-CXR-JPG tree in OUT, findings planted at known sizes."""
    from cxrfast.phantoms.dataset import synth as make

    counts = make(out, **options)
    click.echo(f"{out}: " + ", ".join(f"{n:,} {what}" for what, n in counts.items()))


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


OF_ONE_SOURCE = (
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
    values = {name: options.pop(name) for name in OF_ONE_SOURCE}
    return {name: list(v) if isinstance(v, tuple) else v for name, v in values.items() if v not in (None, ())}


@cli.command()
@source_options
@click.option("--out", type=FOLDER, default=config.SHARDS, show_default=True, help="Shard set; or set CXRFAST_SHARDS.")
@click.option("--scale", "scales", type=int, multiple=True, required=True, help="Side, px; once for each scale wanted.")
@click.option("--workers", type=click.IntRange(min=1), help="Processes. [default: usable cores]")
@click.option(
    "--part", type=PartOfN(), metavar="I/N", help="Build every N-th shard only, as task I of a job array does."
)
@click.option("--dask", metavar="ADDRESS", help="Build on the workers of this dask scheduler instead.")
@click.option(
    "--limit", type=click.IntRange(min=1), help="Build only the shards of the first N rows; a later run adds the rest."
)
@click.option("--dry-run", is_flag=True, help="Say what it would take, write nothing.")
@click.option(
    "--codec",
    type=click.Choice(["jpeg", "raw"]),
    default="jpeg",
    show_default=True,
    help="raw: uncompressed, for scales that shall be read without decoding.",
)
@click.option("--quality", type=int, help="Of --codec jpeg, 1 to 100. [default: 95]")
@click.option(
    "--resize",
    type=click.Choice(["squash", "pad"]),
    default="squash",
    show_default=True,
    help="squash: to a square, as the study; pad: keeps the aspect on black.",
)
@click.option(
    "--grey",
    type=click.Choice(["none", "mimic", "window"]),
    default="none",
    show_default=True,
    help="How DICOM and 16-bit PNG become 8 bit; mimic: as MIMIC-CXR-JPG was made; window: VOI LUT.",
)
@click.option("--seed", default=0, show_default=True, help="Of the row permutation and the folds.")
@click.option("--allow-missing", is_flag=True, help="Go on although more than 0.1 % of the images are missing.")
@click.option("--retry-quarantined", is_flag=True, help="Try images again that could not be used before.")
def shard(
    data: str,
    out: Path,
    scales: tuple[int, ...],
    codec: str,
    quality: int | None,
    resize: str,
    grey: str,
    seed: int,
    **options: Any,
) -> None:
    """Cut the source tree into tar shards at every --scale. Run again after any accident: it goes on."""
    from cxrfast.shards.build import build
    from cxrfast.shards.format.recipe import ImageRecipe

    recipe = ImageRecipe(seed=seed, codec=codec, quality=quality, resize=resize, grey=grey)
    report = build(data, out, list(scales), recipe=recipe, source_options=chosen_source(options), **options)
    click.echo("\n".join(report.lines(out)))


@cli.command()
@click.argument("shards", type=FOLDER, metavar="SET")
@click.argument("table", metavar="TABLE")
@click.option(
    "--label",
    "labels",
    multiple=True,
    help="Column to take; once for each. [default: labels of SET or MIMIC, else all]",
)
@click.option("--key", help="Column of ids. [default: image_id, dicom_id, Image Index or study_id, else Path]")
@click.option(
    "--unmatched", type=FILE, metavar="FILE", help="CSV file for the ids that only the set or only TABLE knows."
)
def relabel(shards: Path, table: str, labels: tuple[str, ...], key: str | None, unmatched: Path | None) -> None:
    """Replace the labels of SET by those of TABLE (.csv, .tsv or .parquet, path or URL). No tar is touched."""
    from cxrfast.shards.upkeep.relabel import describe
    from cxrfast.shards.upkeep.relabel import relabel as replace_labels

    result = replace_labels(shards, table, labels=list(labels) or None, key=key, unmatched=unmatched)
    click.echo(describe(result, shards))


@cli.command()
@click.argument("shards", type=FOLDER, metavar="SET")
@click.option(
    "--out", type=FOLDER, default=Path("set-description"), show_default=True, help="Folder for describe.md, sizes.png."
)
def describe(shards: Path, out: Path) -> None:
    """Who and what is in SET: splits, labels, exclusions, image sizes, bytes. Needs no tar."""
    from cxrfast.shards.upkeep.describe import describe as look
    from cxrfast.shards.upkeep.describe import heading, to_tables, write

    description = look(shards)
    written = write(description, shards, out)
    click.echo(heading(description))
    show(*to_tables(description))
    click.echo(f"written: {', '.join(map(str, written))}")


@cli.command()
@click.argument("shards", type=FOLDER, metavar="SET")
@click.option("--deep", is_flag=True, help="Decode every image too, and compare it with its grid.")
@click.option("--source", is_flag=True, help="Compare the source tree with its SHA256SUMS.txt too.")
@click.option(
    "--repair",
    is_flag=True,
    help="Give what is broken back the bytes it had, shards without grids theirs, and say how.",
)
@click.option("--data", help="Source tree, a folder or URL, for --source and --repair; or set CXRFAST_DATA.")
@click.option("--accept-new-bytes", is_flag=True, help="With --repair: keep other bytes where the old cannot be had.")
@click.option("--workers", type=click.IntRange(min=1), help="Processes that repair. [default: usable cores]")
def verify(
    shards: Path,
    deep: bool,
    source: bool,
    repair: bool,
    data: str | None,
    accept_new_bytes: bool,
    workers: int | None,
) -> None:
    """Compare a shard set with its hashes, indexes and plan. Exit code 2 if anything differs."""
    from cxrfast.shards.storage import Tree
    from cxrfast.shards.upkeep.verify import describe, verify_source
    from cxrfast.shards.upkeep.verify import verify as check

    default = str(config.DATA)
    location = data or (default if source or "://" in default or os.path.isdir(default) else None)
    tree = Tree(location) if location else None
    if repair:
        from cxrfast.shards.repair.repair import repair as mend

        for line in mend(shards, tree, accept_new_bytes=accept_new_bytes, workers=workers).lines():
            click.echo(line)
    elif accept_new_bytes:
        fail("--accept-new-bytes belongs to --repair")
    verdict = check(shards, deep=deep)
    problems = list(verdict.problems)
    if source and tree:
        of_source = verify_source(shards, tree)
        problems += of_source.problems
        click.echo(of_source.describe(tree))
    for problem in problems:
        click.echo(f"{problem.path}: {problem.what}", err=True)
    if problems:
        advice = "" if repair else "; `cxrfast verify --repair` mends what it can"
        if all(problem.is_signed for problem in problems):
            advice = (
                "; SHA256SUMS says the same, so nothing in the set tells what was right: restore these shards from a copy, or "
                "delete their files and run the same `cxrfast shard` command again"
            )
        fail(f"{shards}: {len(problems):,} problems, named above{advice if verdict.problems else ''}")
    click.echo(describe(verdict, shards, deep))


@cli.command()
@click.argument("source", metavar="FROM")
@click.argument("to", metavar="TO")
@click.option(
    "--scale", "scales", type=int, multiple=True, help="Side, px; once for each scale wanted. [default: all of the set]"
)
@click.option(
    "--workers", type=click.IntRange(min=1), help="Files copied at once. [default: usable cores; from or to a URL, 8]"
)
def stage(source: str, to: str, scales: tuple[int, ...], workers: int | None) -> None:
    """Copy a shard set from FROM to TO, folders or URLs such as s3://bucket/set. Run again after any accident: it goes on."""
    from cxrfast.shards.upkeep.stage import stage as copy
    from cxrfast.units import size

    done = copy(source, to, list(scales) or None, workers=workers)
    click.echo(
        f"to {to}: {len(done.scales)} scales, {done.files:,} files, {size(done.bytes)} copied, {done.kept:,} kept, "
        f"{done.bytes / 1e6 / max(done.seconds, 1e-9):,.0f} MB/s"
    )


# Training


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


cache_option = click.option(
    "--cache", type=FOLDER, metavar="DIR", help="Keep decoded pixels here, on a local disk; may be deleted at any time."
)


def given(options: dict[str, Any]) -> dict[str, Any]:
    """Recipe options as TrainConfig fields; what was not given is None."""
    return {name: value or None if isinstance(value, tuple | bool) else value for name, value in options.items()}


def taken_out(kind: type, options: dict[str, Any]) -> dict[str, Any]:
    """Takes those of `options` out that are fields of the dataclass `kind`."""
    return {field.name: options.pop(field.name) for field in fields(kind) if field.name in options}


def run_options(command: Callable[..., None]) -> Callable[..., None]:
    """Options of `train` and `study` that say how a run goes about it; none changes the recipe."""
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


@cli.command()
@click.option("--shards", type=FOLDER, default=config.SHARDS, show_default=True, help="Shard set.")
@click.option("--scale", type=int, required=True, help="Side of the images, px.")
@click.option("--fold", default=0, show_default=True)
@click.option("--runs", type=FOLDER, default=config.RUNS, show_default=True, help="Folder of all runs.")
@click.option("--name", help="Folder of this run's folds. [default: ARCH-SCALE]")
@click.option(
    "--config",
    type=FILE,
    metavar="FILE",
    is_eager=True,
    expose_value=False,
    callback=read_toml,
    help="Options from a TOML file, named as here; those given here win.",
)
@training_options
@runtime_options
@run_options
def train(
    shards: Path,
    scale: int,
    fold: int,
    runs: Path,
    name: str | None,
    **options: Any,
) -> None:
    """Train one scale and fold, or go on with it. On several GPUs: torchrun --nproc_per_node=6 -m cxrfast.train …"""
    from cxrfast.training.train import configure
    from cxrfast.training.train import train as run_training

    runtime = config.Runtime(shards=shards, runs=runs, name=name, **taken_out(config.Runtime, options))
    chosen = configure(runtime, scale, fold, given(options))
    run = run_training(chosen, runtime)
    if os.environ.get("RANK", "0") == "0":
        click.echo(f"done: {run.folder}; next: cxrfast predict {run.folder}")


@cli.command(name="fetch-weights")
@click.option("--arch", default="densenet121", show_default=True, help="A torchvision classifier.")
@click.option("--to", type=FOLDER, help="Folder for the file. [default: torch's own]")
def fetch_weights(arch: str, to: Path | None) -> None:
    """ImageNet weights for machines without a network."""
    from cxrfast.models.weights import fetch_weights as fetch

    click.echo(fetch(arch, to))


# After training


@cli.command()
@click.argument("runs", type=FOLDER, nargs=-1, required=True, metavar="RUN...")
@click.option("--shards", type=FOLDER, help="Where the shard set lies now. [default: where it lay in training]")
@runtime_options
def predict(runs: tuple[Path, ...], shards: Path | None, device: str, **options: Any) -> None:
    """Logits of each RUN for its validation and test rows."""
    from cxrfast.distributed import world
    from cxrfast.runs.run import read_run
    from cxrfast.training.predict import predict as score

    with world(device) as ranks:
        for folder in runs:
            score(read_run(folder), ranks, shards=shards, **options)
            click.echo(folder / "predictions.zarr")


@cli.command()
@click.argument("runs", type=FOLDER, default=config.RUNS)
@click.option("--part", type=click.Choice(["val", "test"]), default="test", show_default=True)
def evaluate(runs: Path, part: str) -> None:
    """AUROC per finding and scale, mean ± sd over folds, of all predictions in RUNS."""
    from cxrfast.analysis.evaluate import evaluate as score
    from cxrfast.analysis.evaluate import to_table

    show(to_table(score(runs, part)))
    click.echo(f"tables: {runs / 'evaluation'}")


@cli.command()
@click.argument("runs", type=FOLDER, default=config.RUNS)
def ensemble(runs: Path) -> None:
    """Stack the scales in RUNS: weights fitted on validation logits, beside plain voting."""
    from cxrfast.analysis.ensemble import ensemble as stack
    from cxrfast.analysis.ensemble import to_table

    show(to_table(stack(runs)))
    click.echo(f"tables and figure: {runs / 'ensemble'}")


@cli.command()
@click.argument("runs", type=FOLDER, nargs=-1, required=True, metavar="RUN...")
@click.option("--images", default=64, show_default=True, help="Validation images to average over.")
@click.option("--shards", type=FOLDER, help="Where the shard set lies now.")
@click.option("--device", default="auto", show_default=True)
def erf(runs: tuple[Path, ...], images: int, shards: Path | None, device: str) -> None:
    """Effective receptive field of each RUN, beside the theoretical one."""
    from cxrfast.analysis.receptive_field import erf as measure
    from cxrfast.distributed import pick_device
    from cxrfast.runs.run import read_run

    for folder in runs:
        click.echo(measure(read_run(folder), images=images, shards=shards, device=pick_device(device)).describe())


@cli.command()
@click.argument("runs", type=FOLDER, nargs=-1, required=True, metavar="RUN...")
@click.option("--label", required=True, help="A finding, for instance Cardiomegaly.")
@click.option("--images", default=8, show_default=True, help="Positives with the highest logits.")
@click.option("--shards", type=FOLDER, help="Where the shard set lies now.")
@click.option("--device", default="auto", show_default=True)
def gradcam(runs: tuple[Path, ...], label: str, images: int, shards: Path | None, device: str) -> None:
    """Grad-CAM maps of each RUN for a finding, with a figure beside them."""
    from cxrfast.analysis.gradcam import gradcam_run, save_figure
    from cxrfast.distributed import pick_device
    from cxrfast.runs.run import read_run

    for folder in runs:
        run = read_run(folder)
        gradcam_run(run, label, images=images, shards=shards, device=pick_device(device))
        click.echo(save_figure(run, label, shards=shards))


@cli.command()
@click.argument("runs", type=FOLDER, default=config.RUNS)
def report(runs: Path) -> None:
    """report.html: tables and figures of RUNS in one file that opens anywhere."""
    from cxrfast.analysis.report import report as write

    click.echo(write(runs))


@cli.command()
@click.argument("runs", type=FOLDER, default=config.RUNS)
@click.option("--json", "as_json", is_flag=True, help="A JSON list instead of the table.")
def status(runs: Path, as_json: bool) -> None:
    """A line for each run in RUNS: state, epoch, best AUROC, images/s, time left, age of its heartbeat, job."""
    from cxrfast.runs.status import status as look
    from cxrfast.runs.status import to_json, to_table

    lines = look(runs)
    if as_json:
        click.echo(to_json(lines))
    else:
        show(to_table(lines, runs))


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


@cli.command()
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
    **recipe: Any,
) -> None:
    """Every scale × fold of SET: train, predict, evaluate, ensemble, ERF, Grad-CAM, report. Goes on where it stopped."""
    runtime = taken_out(config.Runtime, recipe)
    options: dict[str, Any] = {"nproc": nproc, "recipe": given(recipe), **runtime}
    if dry_run or sbatch:
        ahead(
            shards, runs, list(scales), list(folds), dict(rates), walltime, None if dry_run else sbatch, slurm, options
        )
        return
    if slurm or walltime or rates:
        fail("--slurm, --walltime and --rate belong to --dry-run or --sbatch")
    from cxrfast.study.study import failed
    from cxrfast.study.study import study as carry_out
    from cxrfast.training.launch import Stopped

    try:
        result = carry_out(shards, runs, list(scales), list(folds), keep_going=keep_going, **options)
    except Stopped as stopped:
        click.echo(f"cxrfast: {stopped}", err=True)
        sys.exit(stopped.exit_code)
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

    from cxrfast.study.forecast import forecast, parse_walltime, to_table
    from cxrfast.study.plan import make_plan
    from cxrfast.study.slurm import Slurm, read_slurm, write_scripts

    asked = read_slurm(slurm) if slurm else Slurm()
    asked = replace(asked, time=walltime or asked.time)
    plan = make_plan(shards, runs, scales, folds, nodes=asked.nodes, **options)
    result = forecast(plan, rates)
    show(to_table(result, parse_walltime(asked.time) if walltime or slurm or sbatch else None))
    result.check()
    if sbatch:
        *scripts, submit = write_scripts(plan, result.outlooks, asked, sbatch)
        click.echo(f"{len(scripts)} job scripts in {sbatch}; read one, then queue them all: {submit}")


BENCH_MINUTES = 2.0
"""How long `cxrfast bench` takes without a command."""


@cli.group(invoke_without_command=True)
@click.option("--full", is_flag=True, help="Without a command: take all the time that `step` needs.")
@click.pass_context
def bench(ctx: click.Context, full: bool) -> None:
    """How fast, and with how much memory. Without a command: `step`, in two minutes."""
    if ctx.invoked_subcommand is None:
        limit = "as long as it takes" if full else f"about {BENCH_MINUTES:g} minutes (all of it: cxrfast bench --full)"
        click.echo(f"cxrfast bench: memory and images/s of training by resolution, {limit}", err=True)
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


def only_option(what: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    return click.option("--only", metavar="NAME", multiple=True, help=f"This {what} only; may be given again.")


@bench.command()
@click.option("--shards", type=FOLDER, help="Shard set. [default: phantoms made for the purpose]")
@click.option("--scale", "scales", type=int, multiple=True, help="Once for each scale. [default: all of the set]")
@RESULTS
@click.option("--arch", default="densenet121", show_default=True)
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
    from cxrfast.bench.training.step import bench as measure
    from cxrfast.bench.training.step import to_table

    result = measure(shards, list(scales), out, **options)
    show(to_table(result))
    if not result.lines:
        fail("no scale could be measured, for the reasons above")
    click.echo(f"table, JSON and plot: {out}")


@bench.command()
@click.option("--scale", "scales", type=int, multiple=True, help="Once for each scale. [default: by device]")
@click.option(
    "--seconds",
    type=Finite(min=0.01, max=3600),
    default=2.0,
    show_default=True,
    help="Measured time a figure and round.",
)
@click.option("--micro-batch", type=click.IntRange(min=1), help="Images a step. [default: by scale]")
@click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda.")
@click.option("--compile", "with_compile", is_flag=True, help="torch.compile, too: minutes more a scale.")
@click.option("--profile", "with_profile", is_flag=True, help="Time by kind of kernel at the largest scale, too.")
@only_option("rung")
@MINUTES
@RESULTS
def ladder(scales: tuple[int, ...], out: Path, only: tuple[str, ...], **options: Any) -> None:
    """What each means of training faster is worth, in images/s and memory, by scale; on a synthetic batch."""
    from cxrfast.bench.training.ladder import bench as measure
    from cxrfast.bench.training.ladder import sections
    from cxrfast.tables import to_tables

    show(*to_tables(sections(measure(list(scales), out, only=list(only), **options))))
    click.echo(f"tables, JSON and plot: {out}")


@bench.command(name="shard")
@click.option("--data", help="MIMIC-CXR-JPG tree to take images from. [default: phantoms drawn for the purpose]")
@click.option("--images", type=click.IntRange(1, 1024), default=24, show_default=True, help="Images to measure on.")
@click.option(
    "--scale", "scales", type=int, multiple=True, help="Once for each scale. [default: 256, 512, 1024 and 2048]"
)
@click.option(
    "--seconds",
    type=Finite(min=0.01, max=3600),
    default=20.0,
    show_default=True,
    help="Measured time a figure and round.",
)
@ROUNDS
@click.option("--workers", type=click.IntRange(min=1), help="Of the build beside one worker's. [default: usable cores]")
@click.option("--memory", "with_memory", is_flag=True, help="Memory of whole builds, too: minutes more.")
@RESULTS
def bench_shard(data: str | None, scales: tuple[int, ...], out: Path, **options: Any) -> None:
    """Images/s a core of sharding beside Pillow and libvips, by stage, by number of workers."""
    from cxrfast.bench.sharding.shard import bench as measure
    from cxrfast.bench.sharding.shard import sections
    from cxrfast.tables import to_tables

    show(*to_tables(sections(measure(data, list(scales), out, **options))))
    click.echo(f"tables, JSON and plot: {out}")


@bench.command(name="load")
@click.option("--shards", type=FOLDER, help="Shard set of JPEGs. [default: phantoms made for the purpose]")
@click.option("--scale", "scales", type=int, multiple=True, help="Once for each scale. [default: all of the set]")
@click.option(
    "--seconds",
    type=Finite(min=0.01, max=3600),
    default=2.0,
    show_default=True,
    help="Measured time a figure and round.",
)
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
    from cxrfast.bench.loading.load import bench as measure
    from cxrfast.bench.loading.load import sections
    from cxrfast.tables import to_tables

    show(*to_tables(sections(measure(shards, list(scales), out, only=list(only), **options))))
    click.echo(f"tables, JSON and plot: {out}")


@cli.command()
@click.option("--out", type=FOLDER, default=Path("demo"), show_default=True, help="Where everything goes.")
def demo(out: Path) -> None:
    """The whole study on phantoms: synth, shard, train, evaluate, report. CPU, minutes."""
    from cxrfast.study.study import demo as carry_out

    result = carry_out(out)
    show(*result.tables)
    click.echo(f"report: {result.report}")


@cli.command()
@click.option("--deep", is_flag=True, help="Prove pixels, gradients, streams and memory, too: about a minute.")
@click.option("--shards", type=FOLDER, help="With --deep: shard set. [default: phantoms made for the purpose]")
@click.option("--scale", type=click.IntRange(min=1), help="With --deep: side, px. [default: the smallest of --shards]")
def doctor(deep: bool, shards: Path | None, scale: int | None) -> None:
    """What this machine has, what it lacks, and what to do about it."""
    from cxrfast.doctor.inventory import examine, to_table

    if not deep and (shards or scale):
        fail("--shards and --scale belong to --deep")
    findings = examine()
    show(to_table(findings))
    problems = []
    if any(f.is_problem for f in findings):
        problems.append("this machine lacks something that cxrfast needs: see the advice above")
    if deep:
        from cxrfast.doctor.checkup import checkup, failed

        problems.append(failed(checkup(shards, scale)))
    if any(problems):
        fail("; ".join(filter(None, problems)))
