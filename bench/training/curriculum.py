"""`cxrfast bench curriculum`: time until a validation AUROC is reached at a scale, from scratch or starting smaller.

Three ways are compared: from scratch, from the run at a smaller scale, and progressive resizing within one run. Every
way trains all its epochs; when it reached the target is read from metrics.jsonl. The runs stay in the results' folder,
so that the same command continues a measurement that was stopped.
"""

from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from cxrfast.bench.harness import provenance
from cxrfast.bench.report import ABSENT, write_results
from cxrfast.config import Runtime
from cxrfast.distributed import pick_device
from cxrfast.errors import RunError
from cxrfast.pipelines.reader import Reader
from cxrfast.runs.run import Run
from cxrfast.tables import Table
from cxrfast.training.setup import make_config
from cxrfast.training.train import train

SCRATCH, SMALLER, RESIZED = "from scratch", "from the smaller scale", "progressive resizing"


@dataclass(frozen=True, kw_only=True)
class CurriculumResult:
    scale: int
    from_scale: int
    fold: int
    target: float
    """The mean AUROC over findings that counts as reached."""
    ways: list[dict[str, Any]]
    """See `way`."""
    provenance: dict[str, Any]

    def tables(self) -> list[Table]:
        first = self.ways[0]["reached"]
        title = f"Seconds to a validation AUROC of {self.target:.4f} at {self.scale} px, fold {self.fold}"
        head = ["way", "epochs", "seconds before", "seconds in all", "best AUROC", "seconds to it", f"{SCRATCH} / it"]
        lines = []
        for way in self.ways:
            seconds = [f"{way['before']:,.1f}", f"{way['seconds'][-1]:,.1f}"]
            reached = "never" if way["reached"] is None else f"{way['reached']:,.1f}"
            ratio = ABSENT if way["reached"] is None or first is None else f"{first / way['reached']:.2f}"
            lines.append([way["name"], str(len(way["seconds"])), *seconds, f"{best(way):.4f}", reached, ratio])
        note = f"Seconds before: spent on the run at {self.from_scale} px; they count."
        note = f"Mean AUROC over findings, checked once per epoch. {note} One run per way: the spread between seeds is not measured."
        return [Table(title, head, lines, note)]

    def plot(self) -> Figure:
        """Validation AUROC against the seconds since the start of everything, one line per way."""
        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.subplots()
        for way in self.ways:
            values = [float("nan") if value is None else value for value in way["auroc"]]
            axes.plot(way["seconds"], values, "o-", markersize=4, label=way["name"])
        axes.axhline(self.target, color="0.5", linestyle=":")
        axes.set(xlabel="seconds since the start", ylabel=f"validation AUROC at {self.scale} px", xlim=(0, None))
        axes.legend(frameon=False)
        return figure


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
    """Train every way for `epochs` epochs per run, write curriculum.json, curriculum.md and curriculum.png into `out`.

    `target`: AUROC, by default the best that training from scratch reaches. `options`: fields of TrainConfig for all
    runs; the first weights are random unless `weights` says otherwise. Progressive resizing spends the first half of
    its epochs at the smaller scale, and needs at least 2 epochs. Raises CxrfastError for bad input.
    """
    chosen = pick_device(device)
    if from_scale >= scale:
        raise RunError(f"the scale to start from must be smaller than {scale} px, not {from_scale}")
    for side in (from_scale, scale):
        Reader(shards, side).close()  # a problem is reported before anything is trained
    options = {"weights": "none", **options, "fold": fold, "epochs": epochs}

    def run(name: str, side: int, **more: Any) -> Run:
        config = make_config(shards, side, device=device, **(options | more))
        return train(config, Runtime(shards=shards, runs=out / "runs", name=name, device=device))

    runs = {SCRATCH: run(f"scratch-{scale}", scale)}
    small = run(f"scratch-{from_scale}", from_scale)
    runs[SMALLER] = run(f"from-{from_scale}-{scale}", scale, weights=str(small.folder))
    if epochs > 1:
        runs[RESIZED] = run(f"resized-{scale}", scale, sizes=((from_scale, epochs // 2),))
    metrics = {name: one.metrics() for name, one in runs.items()}
    target = target or best(way(SCRATCH, metrics[SCRATCH], 0.0, 0.0))
    before = {SMALLER: sum(line["seconds"] for line in small.metrics())}
    result = CurriculumResult(
        scale=scale,
        from_scale=from_scale,
        fold=fold,
        target=target,
        ways=[way(name, lines, before.get(name, 0.0), target) for name, lines in metrics.items()],
        provenance=provenance(chosen),
    )
    write_results(out, "curriculum", result)
    return result


def way(name: str, metrics: list[dict[str, Any]], before: float, target: float) -> dict[str, Any]:
    """A way to train at the scale, from its run's metrics; `before`: seconds that were spent first, at the smaller scale.

    `seconds`: of training and validation, without start-up, since the start of everything, at the end of each epoch, where
    `auroc` is that on the validation rows, None where it is undefined. `reached`: seconds at the end of the first epoch
    that has the target or more; None if none does.
    """
    seconds = list(accumulate((line["seconds"] for line in metrics), initial=before))[1:]
    auroc = [line["val_auroc"] for line in metrics]
    reached = (s for s, value in zip(seconds, auroc, strict=True) if value is not None and value >= target)
    return {"name": name, "before": before, "seconds": seconds, "auroc": auroc, "reached": next(reached, None)}


def best(way: dict[str, Any]) -> float:
    """The best AUROC of a way; NaN if all are undefined."""
    return max((value for value in way["auroc"] if value is not None), default=float("nan"))
