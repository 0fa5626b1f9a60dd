"""Seconds until a validation AUROC is reached at one scale: from scratch, from the run at a smaller one, and resized.

    python -m cxrfast.bench.curriculum --shards SET --scale 128 --from-scale 64 --epochs 6 --target 0.97 --out DIR

In: a shard set with both scales. Out: curriculum.json, .md and .png in DIR, and the runs, with which a measurement that
was stopped goes on. Every way trains all its epochs; when the target was reached is read from metrics.jsonl.
"""

from dataclasses import asdict, dataclass, fields
from itertools import accumulate
from pathlib import Path
from typing import Any

import click
from matplotlib.figure import Figure

from cxrfast.bench.harness import provenance, write_results
from cxrfast.config import Runtime, TrainConfig
from cxrfast.distributed import pick_device
from cxrfast.errors import CxrfastError
from cxrfast.pipelines.reader import Reader
from cxrfast.runs.run import Run
from cxrfast.tables import Table
from cxrfast.training.setup import make_config
from cxrfast.training.train import train

SCRATCH, SMALLER, RESIZED = "from scratch", "from the smaller scale", "progressive resizing"


@dataclass(frozen=True, kw_only=True)
class Way:
    """A way to train at the scale. Seconds are the runs' own: training and validation, without starting."""

    name: str
    before: float
    """Seconds of the run at the smaller scale; 0 for ways without one."""
    seconds: list[float]
    """Since the start of everything, at the end of each epoch at the scale, ascending."""
    auroc: list[float | None]
    """On the validation rows at the scale, by epoch; None where it is undefined."""
    reached: float | None
    """Seconds at the end of the first epoch with the target or more; None if none had it."""

    @property
    def best(self) -> float:
        return max((value for value in self.auroc if value is not None), default=float("nan"))


@dataclass(frozen=True, kw_only=True)
class CurriculumResult:
    scale: int
    from_scale: int
    fold: int
    target: float
    """The mean AUROC over findings that counts as reached."""
    ways: list[Way]
    provenance: dict[str, Any]


def bench(
    shards: Path,
    scale: int,
    from_scale: int,
    out: Path,
    *,
    fold: int = 0,
    epochs: int = 6,
    target: float | None = None,
    device: str = "auto",
    **options: Any,
) -> CurriculumResult:
    """Train every way for `epochs` epochs a run and write the results into `out`.

    `target`: AUROC; default: the best that training from scratch reaches. `options`: fields of TrainConfig, for all runs;
    their first weights are random unless `weights` says otherwise. Progressive resizing spends the first half of its
    epochs at the smaller scale, and is left out where TrainConfig has no `sizes`. Raises CxrfastError for a bad set.
    """
    chosen = pick_device(device)
    for side in (from_scale, scale):
        Reader(shards, side).close()  # says what is wrong before anything is trained
    options = {"weights": "none", **options, "fold": fold, "epochs": epochs}

    def run(name: str, side: int, **more: Any) -> Run:
        config = make_config(shards, side, device=device, **(options | more))
        return train(config, Runtime(shards=shards, runs=out / "runs", name=name, device=device))

    runs = {SCRATCH: run(f"scratch-{scale}", scale)}
    small = run(f"scratch-{from_scale}", from_scale)
    runs[SMALLER] = run(f"from-{from_scale}-{scale}", scale, weights=str(small.folder))
    if "sizes" in {field.name for field in fields(TrainConfig)} and epochs > 1:
        runs[RESIZED] = run(f"resized-{scale}", scale, sizes=((from_scale, epochs // 2),))
    target = target or way(SCRATCH, runs[SCRATCH], 0.0, 0.0).best
    before = sum(line["seconds"] for line in small.metrics())
    ways = [way(name, one, before if name == SMALLER else 0.0, target) for name, one in runs.items()]
    result = CurriculumResult(
        scale=scale, from_scale=from_scale, fold=fold, target=target, ways=ways, provenance=provenance(chosen)
    )
    write_results(out, "curriculum", asdict(result), [table(result)], plot(result))
    return result


def way(name: str, run: Run, before: float, target: float) -> Way:
    """What a run's metrics say of a way, to which `before` seconds belong."""
    lines = run.metrics()
    seconds = list(accumulate((line["seconds"] for line in lines), initial=before))[1:]
    auroc = [line["val_auroc"] for line in lines]
    reached = (s for s, value in zip(seconds, auroc, strict=True) if value is not None and value >= target)
    return Way(name=name, before=before, seconds=seconds, auroc=auroc, reached=next(reached, None))


def table(result: CurriculumResult) -> Table:
    first = result.ways[0].reached
    lines = [
        [
            one.name,
            str(len(one.seconds)),
            f"{one.before:,.1f}",
            f"{one.seconds[-1]:,.1f}",
            f"{one.best:.4f}",
            "never" if one.reached is None else f"{one.reached:,.1f}",
            "-" if one.reached is None or first is None else f"{first / one.reached:.2f}",
        ]
        for one in result.ways
    ]
    return Table(
        f"Seconds to a validation AUROC of {result.target:.4f} at {result.scale} px, fold {result.fold}",
        ["way", "epochs", "seconds before", "seconds in all", "best AUROC", "seconds to it", f"{SCRATCH} / it"],
        lines,
        f"Mean AUROC over findings. Seconds before: of the run at {result.from_scale} px, which count. One run a way: the "
        "spread between seeds is not measured. Looked at once an epoch.",
    )


def plot(result: CurriculumResult) -> Figure:
    """Validation AUROC against the seconds since the start of everything, one line per way."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for one in result.ways:
        values = [float("nan") if value is None else value for value in one.auroc]
        axes.plot(one.seconds, values, "o-", markersize=4, label=one.name)
    axes.axhline(result.target, color="0.5", linestyle=":")
    axes.set(xlabel="seconds since the start", ylabel=f"validation AUROC at {result.scale} px", xlim=(0, None))
    axes.legend(frameon=False)
    return figure


@click.command()
@click.option("--shards", type=click.Path(path_type=Path), required=True, help="Shard set with both scales.")
@click.option("--scale", type=int, required=True, help="px")
@click.option("--from-scale", type=int, required=True, help="px, smaller")
@click.option("--fold", default=0, show_default=True)
@click.option("--epochs", type=click.IntRange(min=1), default=6, show_default=True, help="Of every run.")
@click.option("--target", type=click.FloatRange(0, 1), help="AUROC. [default: the best from scratch]")
@click.option("--device", default="auto", show_default=True)
@click.option("--weights", default="none", show_default=True, help="First weights of the runs that start anew.")
@click.option("--global-batch", type=int)
@click.option("--micro-batch", type=int)
@click.option("--learning-rate", type=float)
@click.option("--out", type=click.Path(path_type=Path), default=Path("bench-results"), show_default=True)
def main(shards: Path, scale: int, from_scale: int, out: Path, **options: Any) -> None:
    """Seconds to the same validation AUROC: from scratch, from a smaller scale, and with progressive resizing."""
    from rich.console import Console

    try:
        result = bench(shards, scale, from_scale, out, **options)
    except CxrfastError as error:
        raise click.UsageError(str(error)) from error
    Console().print(table(result).rich())
    click.echo(f"table, JSON and plot: {out}")


if __name__ == "__main__":
    main()
