"""Commands that train, predict and show the progress of runs."""

import os
from pathlib import Path
from typing import Any

import click

from cxrfast import config
from cxrfast.cli import options as option
from cxrfast.cli.terminal import say, show
from cxrfast.launch import launched, refuse_slurm_tasks


@click.command()
@click.option("--shards", type=option.FOLDER, default=config.SHARDS, help="Shard set.")
@click.option("--scale", type=int, required=True, help="Side of the images, px.")
@click.option("--fold", default=0, help="Test fold.")
@click.option("--runs", type=option.FOLDER, default=config.RUNS, help="Folder of all runs.")
@option.config_file
@option.configuration_options(config.TrainConfig)
@option.configuration_options(config.Runtime)
def train(shards: Path, scale: int, fold: int, runs: Path, **options: Any) -> None:
    """Train one scale and fold, or resume it. On several GPUs: torchrun --nproc_per_node=6 -m cxrfast.train …"""
    refuse_slurm_tasks("cxrfast train", "torchrun --nproc_per_node={n} -m cxrfast.train …")
    launched()
    from cxrfast.training.setup import make_config
    from cxrfast.training.train import train as run_training

    training, where = option.configured(options)
    runtime = config.Runtime(shards=shards, runs=runs, **where)
    chosen = make_config(shards, scale, device=runtime.device, subset=runtime.subset, fold=fold, **training)
    run = run_training(chosen, runtime)
    if os.environ.get("RANK", "0") == "0":
        say(f"done: {run.folder}; next: cxrfast predict {run.folder}")


@click.command(name="fetch-weights")
@click.option("--arch", default="densenet121", help="A torchvision classifier, or timm/NAME.")
@click.option("--to", type=option.FOLDER, help="Folder for the file. [default: torch's own]")
def fetch_weights(arch: str, to: Path | None) -> None:
    """Download ImageNet weights for machines without a network."""
    from cxrfast.models.weights import fetch_weights as fetch

    say(fetch(arch, to))


@click.command()
@option.RUNS
@option.flag("--json", "A JSON list instead of the table.", "as_json")
def status(runs: Path, as_json: bool) -> None:
    """One line per run in RUNS: state, epoch, validation AUROC at the lowest loss, images/s, time left, age of its heartbeat, job."""
    from cxrfast.runs.status import status as read_status
    from cxrfast.runs.status import status_table, to_json

    lines = read_status(runs)
    if as_json:
        say(to_json(lines))
    else:
        show(status_table(lines, runs))
