"""Commands that write, check and copy shard sets."""

import os
from pathlib import Path
from typing import Any

import click
from click import Choice

from cxrfast import config
from cxrfast.cli import options as option
from cxrfast.cli.terminal import fail, safe, say
from cxrfast.cli.terminal import show as show_tables


@click.command()
@click.argument("out", type=option.FOLDER)
@click.option("--images", default=600, help="Number of images.")
@click.option("--size", default=1024, help="Longer side, px.")
@click.option("--seed", default=0, help="Seed of everything that is drawn.")
@click.option("--corrupt", default=0, help="Images to damage: truncated, empty, not a JPEG.")
@option.workers("Processes. [default: usable cores]")
def synth(out: Path, **options: Any) -> None:
    """Draw a phantom MIMIC-CXR-JPG tree in OUT, with findings planted at known sizes."""
    from cxrfast.phantoms.dataset import synth as draw_tree

    counts = draw_tree(out, **options)
    say(f"{out}: " + ", ".join(f"{n:,} {what}" for what, n in counts.items()))


@click.command()
@option.of_source
@click.option("--out", type=option.FOLDER, help=f"Shard set; or set CXRFAST_SHARDS. [default: {config.SHARDS}]")
@option.config_file
@option.scales("Side, px, such as 512 or 512,1024; repeatable.")
@option.workers("Processes. [default: usable cores]")
@click.option(
    "--part", type=option.PART, metavar="I/N", help="Build only every N-th shard: the share of task I of a job array."
)
@click.option("--dask", metavar="ADDRESS", help="Build on the workers of this dask scheduler.")
@click.option(
    "--limit", type=option.COUNT, help="Build only the shards of the first N rows; run again without it for the rest."
)
@option.flag("--dry-run", "Estimate size and time, write nothing.")
@click.option(
    "--codec", type=Choice(["jpeg", "raw"]), default="jpeg", help="raw: uncompressed, to be read without decoding."
)
@click.option("--quality", type=int, help="JPEG quality, 1 to 100. [default: 95]")
@click.option(
    "--resize",
    type=Choice(["squash", "pad"]),
    default="squash",
    help="squash: stretch to a square, as in the study; pad: keep the aspect ratio, on black.",
)
@click.option(
    "--grey",
    type=Choice(["none", "mimic", "window"]),
    default="none",
    help="How DICOM and 16-bit PNG become 8-bit; mimic: as MIMIC-CXR-JPG was made; window: VOI LUT.",
)
@click.option("--seed", default=0, help="Seed of the row permutation and the folds.")
@option.flag("--allow-missing", "Continue even if more than 0.1 % of the images are missing or unreadable.")
@option.flag("--allow-shared-patients", "Continue even if a patient is in two parts of the split.")
@option.flag("--retry-quarantined", "Retry the images that could not be used before.")
def shard(data: str, out: Path | None, scales: tuple[int, ...], **options: Any) -> None:
    """Write the source tree as tar shards at every --scale. After an interruption, run it again: it resumes."""
    from cxrfast.shards.build import build, default_out
    from cxrfast.shards.format.info import is_laid_out
    from cxrfast.shards.format.recipe import ImageRecipe

    recipe = ImageRecipe(**{name: options.pop(name) for name in ("seed", "codec", "quality", "resize", "grey")})
    if out is None:
        out = config.SHARDS if os.environ.get("CXRFAST_SHARDS") else default_out(data, config.SHARDS)
        if out != config.SHARDS:
            say(
                f"--out is {out}, since {config.SHARDS} would lie inside --data {data}; give other commands this folder"
            )
        elif is_laid_out(out):
            say(f"no --out is given: continuing the set in {out}", err=True)
    source_options = option.chosen_source(options)
    report = build(data, out, list(scales), recipe=recipe, source_options=source_options, announce=say, **options)
    say("\n".join(report.outcome(out)))


@click.command()
@option.SET
@click.argument("table", metavar="TABLE")
@click.option(
    "--label", "labels", multiple=True, help="Column to use; repeatable. [default: labels of SET or MIMIC, else all]"
)
@click.option("--key", help="Column of ids. [default: image_id, dicom_id, Image Index or study_id, else Path]")
@click.option(
    "--unmatched", type=option.FILE, metavar="FILE", help="CSV file for ids that are only in SET or only in TABLE."
)
@option.flag(
    "--allow-unmatched",
    "Accept a table that lacks more than 1 % of the ids in SET, has more than 1 % others, or names other patients.",
)
def relabel(shards: Path, table: str, labels: tuple[str, ...], **options: Any) -> None:
    """Replace the labels of SET with the columns of TABLE (.csv, .tsv or .parquet, path or URL). Tars do not change."""
    from cxrfast.shards.upkeep.relabel import relabel as replace_labels

    result = replace_labels(shards, table, labels=list(labels) or None, **options)
    say(result.summary(shards))


@click.command()
@option.SET
@click.option(
    "--out", type=option.FOLDER, default=Path("set-description"), help="Folder for describe.md, sizes.png, remarks.csv."
)
@click.option(
    "--show",
    multiple=True,
    metavar="COLUMN",
    help="Tabulate a kept column even if it may identify patients; repeatable.",
)
def describe(shards: Path, out: Path, show: tuple[str, ...]) -> None:
    """Describe SET: patients, splits, labels, exclusions, image sizes, bytes. Needs no tar."""
    from cxrfast.shards.upkeep.describe import describe as describe_set

    description = describe_set(shards, out, show)
    say(description.heading)
    for caution in description.cautions:
        say(f"warning: {caution}")
    show_tables(*description.tables)
    say(f"written: {', '.join(map(str, description.written))}")


@click.command()
@option.SET
@option.flag("--deep", "Also decode every image, and compare it with its grid and with other scales.")
@option.flag("--source", "Also compare the source tree with its SHA256SUMS.txt.")
@option.flag("--repair", "Restore the original bytes of what is broken and add missing grids; report how.")
@click.option("--data", help="Source tree, a folder or URL, for --source and --repair; or set CXRFAST_DATA.")
@option.flag("--accept-new-bytes", "With --repair: accept other bytes where the original ones cannot be restored.")
@click.option(
    "--trust-source",
    metavar="MODULE:FUNCTION",
    help="With --repair: run this function, which SET names as its source. [default: only built-in sources]",
)
@click.option(
    "--table", metavar="FILE", help="With --repair: the table that SET was built from, if it is not in --data."
)
@option.workers("Processes for --repair. [default: usable cores]")
def verify(shards: Path, deep: bool, source: bool, repair: bool, data: str | None, **options: Any) -> None:
    """Compare a shard set with its hashes, indexes and plan. Exit code 2 if anything differs."""
    from cxrfast.shards.repair.repair import repair as restore
    from cxrfast.shards.upkeep.verify import find_source, inspect

    for name in ("accept_new_bytes", "trust_source", "table"):
        if options[name] and not repair:
            fail(f"--{name.replace('_', '-')} needs --repair")
    tree = find_source(data, config.DATA, source)
    if repair:
        for line in restore(shards, tree, **options).lines():
            say(safe(line))
    result = inspect(shards, tree if source else None, deep=deep, is_repaired=repair)
    for line in result.lines:
        say(safe(line))
    for problem in result.problems:
        say(safe(f"{problem.path}: {problem.what}"), err=True)
    if result.problems:
        fail(result.advice)


@click.command()
@click.argument("source", metavar="FROM")
@click.argument("to", metavar="TO")
@option.scales("Side, px; repeatable. [default: all scales of the set]")
@option.workers("Files copied in parallel. [default: usable cores; 8 from or to a URL]")
def stage(source: str, to: str, scales: tuple[int, ...], workers: int | None) -> None:
    """Copy a shard set from FROM to TO, folders or URLs such as s3://bucket/set. Run again, it resumes."""
    from cxrfast.shards.upkeep.stage import stage as copy_set
    from cxrfast.units import size

    done = copy_set(source, to, list(scales) or None, workers=workers)
    say(
        f"to {to}: {len(done.scales)} scales, {done.files:,} files, {size(done.bytes)} copied, {done.kept:,} kept, "
        f"{done.bytes / 1e6 / max(done.seconds, 1e-9):,.0f} MB/s"
    )
