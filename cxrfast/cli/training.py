"""Commands that train, predict and show the progress of runs."""

import os
from pathlib import Path
from typing import Any

import click

from cxrfast import config
from cxrfast.cli.options import FILE, FOLDER, configuration_options, configured, read_toml, runtime_options
from cxrfast.cli.terminal import show


@click.command()
@click.option("--shards", type=FOLDER, default=config.SHARDS, show_default=True, help="Shard set.")
@click.option("--scale", type=int, required=True, help="Side of the images, px.")
@click.option("--fold", default=0, show_default=True, help="Test fold.")
@click.option("--runs", type=FOLDER, default=config.RUNS, show_default=True, help="Folder of all runs.")
@click.option(
    "--config",
    type=FILE,
    metavar="FILE",
    is_eager=True,
    expose_value=False,
    callback=read_toml,
    help="Read options from a TOML file, with the names used here; the command line wins.",
)
@configuration_options(config.TrainConfig)
@configuration_options(config.Runtime)
def train(shards: Path, scale: int, fold: int, runs: Path, **options: Any) -> None:
    """Train one scale and fold, or resume it. On several GPUs: torchrun --nproc_per_node=6 -m cxrfast.train …"""
    from cxrfast.training.setup import make_config
    from cxrfast.training.train import train as run_training

    training, where = configured(options)
    runtime = config.Runtime(shards=shards, runs=runs, **where)
    chosen = make_config(shards, scale, device=runtime.device, subset=runtime.subset, fold=fold, **training)
    run = run_training(chosen, runtime)
    if os.environ.get("RANK", "0") == "0":
        click.echo(f"done: {run.folder}; next: cxrfast predict {run.folder}")


@click.command(name="fetch-weights")
@click.option("--arch", default="densenet121", show_default=True, help="A torchvision classifier.")
@click.option("--to", type=FOLDER, help="Folder for the file. [default: torch's own]")
def fetch_weights(arch: str, to: Path | None) -> None:
    """Download ImageNet weights for machines without a network."""
    from cxrfast.models.weights import fetch_weights as fetch

    click.echo(fetch(arch, to))


@click.command()
@click.argument("runs", type=FOLDER, nargs=-1, required=True, metavar="RUN...")
@click.option("--shards", type=FOLDER, help="Where the shard set is now. [default: where it was in training]")
@runtime_options
def predict(runs: tuple[Path, ...], shards: Path | None, device: str, **options: Any) -> None:
    """Compute the logits of each RUN for its validation and test rows."""
    from cxrfast.distributed import world
    from cxrfast.runs.run import Run
    from cxrfast.training.predict import predict as predict_run

    with world(device) as ranks:
        for folder in runs:
            run = Run.open(folder)
            predict_run(run, ranks, shards=shards, **options)
            click.echo(run.predictions_path)


@click.command()
@click.argument("runs", type=FOLDER, default=config.RUNS)
@click.option("--json", "as_json", is_flag=True, help="A JSON list instead of the table.")
def status(runs: Path, as_json: bool) -> None:
    """One line per run in RUNS: state, epoch, best AUROC, images/s, time left, age of its heartbeat, job."""
    from cxrfast.runs.status import status as read_status
    from cxrfast.runs.status import status_table, to_json

    lines = read_status(runs)
    if as_json:
        click.echo(to_json(lines))
    else:
        show(status_table(lines, runs))
