"""The whole study: every scale × fold trained and predicted, then tables, ensemble, receptive fields, Grad-CAM, report.

Each step is skipped where its result is there already, so a study that was stopped goes on where it stopped.
"""

import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from cxrfast import ensemble, evaluate
from cxrfast.config import TrainConfig
from cxrfast.distributed import pick_device, world
from cxrfast.erf import erf, has_erf
from cxrfast.errors import RunError
from cxrfast.gradcam import figure_path, gradcam_run, save_figure
from cxrfast.pipelines.reader import Reader
from cxrfast.predict import predict
from cxrfast.report import report
from cxrfast.runs import Run, find_runs, run_folder
from cxrfast.shards.build import build
from cxrfast.shards.manifest import read_set, scales_in
from cxrfast.splits import FOLDS
from cxrfast.store import has_predictions
from cxrfast.synth import synth
from cxrfast.train import Place, make_config, train

ERF_IMAGES, CAM_IMAGES, CAM_FINDINGS = 64, 6, 2


@dataclass(frozen=True)
class Study:
    tables: list[Table]
    """AUROC by finding and scale and, from two scales on, the ensemble's."""
    report: Path


def study(
    shards: Path,
    runs: Path,
    scales: list[int] | None = None,
    folds: list[int] | None = None,
    *,
    nproc: int = 1,
    device: str = "auto",
    engine: str = "auto",
    threads: int | None = None,
    cache: Path | None = None,
    recipe: dict[str, Any] | None = None,
) -> Study:
    """Train and predict `scales` (default: all of the set) × `folds` (default: all five) of a shard set, then report.

    `recipe`: fields of TrainConfig, None for the preset's. `nproc`: processes a training. Raises RunError or ShardError
    before the first training if the set, a scale or an option is wrong.
    """
    info, recipe = read_set(shards), recipe or {}
    official = recipe.get("split") == "official"
    scales = sorted(set(scales or scales_in(shards)))
    folds = sorted(set(folds or ([0] if official else range(FOLDS))))
    for scale in scales:
        Reader(shards, scale).close()  # says what is wrong before anything is trained
    for run in find_runs(runs) if any(runs.glob("*/fold-*/config.json")) else []:
        if run.config.set_id != info.id:
            raise RunError(
                f"{run.folder} was trained on set {run.config.set_id}, {shards} is {info.id}: choose another RUNS"
            )
    configs = [make_config(shards, scale, device=device, fold=fold, **recipe) for scale in scales for fold in folds]
    place = Place(shards=shards, runs=runs, device=device, engine=engine, threads=threads, cache=cache)
    done = [_run(config, place, nproc) for config in configs]
    evaluation = evaluate.evaluate(runs)
    tables = [evaluate.to_table(evaluation)]
    if len(scales) > 1:
        tables.append(ensemble.to_table(ensemble.ensemble(runs)))
    _maps([run for run in done if run.config.fold == folds[0]], evaluation, shards, device)
    return Study(tables, report(runs))


def _run(config: TrainConfig, place: Place, nproc: int) -> Run:
    """Train one run, in this process or by torchrun, and predict with it."""
    if nproc > 1:
        _torchrun(config, place, nproc)
        run = Run(run_folder(place.runs, config), config, place.shards)
    else:
        run = train(config, place)
    if not has_predictions(run):
        with world(place.device) as ranks:
            predict(run, ranks, shards=place.shards, engine=place.engine, threads=place.threads)
    return run


def _torchrun(config: TrainConfig, place: Place, nproc: int) -> None:
    fixed = {"set_id", "labels", "views", "factor", "patience", "stop_after", "degrees", "flip"}
    options: dict[str, Any] = {
        **{name: getattr(place, name) for name in ("shards", "runs", "device", "engine", "threads", "cache")},
        **{name: value for name, value in asdict(config).items() if name not in fixed},
    }
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={nproc}",
        "-m",
        "cxrfast.train",
    ]
    for name, value in options.items():
        command += [] if value is None else [f"--{name.replace('_', '-')}", str(value)]
    command += [argument for view in config.views for argument in ("--view", view)]
    if subprocess.run(command).returncode:
        raise RunError(
            f"{run_folder(place.runs, config)} failed, its message stands above; mend it and run the study again: "
            "what is done is not done twice"
        )


def _maps(runs: list[Run], evaluation: evaluate.Evaluation, shards: Path, device: str) -> None:
    """Receptive field of each run, and Grad-CAM of the findings that the largest scale knows best."""
    chosen = pick_device(device)
    for run in runs:
        try:
            if not has_erf(run):
                print(erf(run, images=ERF_IMAGES, shards=shards, device=chosen).describe(), file=sys.stderr)
        except RunError as error:  # an architecture without a known feature map has tables all the same
            print(error, file=sys.stderr)
            return
    largest = max(runs, key=lambda run: run.config.scale)
    known = evaluation.table[
        (evaluation.table["name"] == largest.folder.parent.name)
        & (evaluation.table["fold"] == largest.config.fold)
        & evaluation.table["auroc"].notna()
        & (evaluation.table["label"] != "No Finding")
    ]
    for label in known.sort_values("auroc", ascending=False)["label"].head(CAM_FINDINGS):
        if not figure_path(largest, label).exists():
            gradcam_run(largest, label, images=CAM_IMAGES, shards=shards, device=chosen)
            save_figure(largest, label, shards=shards)


DEMO_SCALES, DEMO_FOLDS = [32, 64, 128], [0, 1]
DEMO_RECIPE: dict[str, Any] = {
    "weights": "none",
    "epochs": 4,
    "global_batch": 16,
    "micro_batch": 16,
    "learning_rate": 1e-3,
}
"""From scratch, since ImageNet weights need a network; short, since it runs on two cores."""


def demo(out: Path) -> Study:
    """Phantoms of 512 px, shards at four small scales, two folds, every table and figure; minutes on two cores."""
    source, shards = out / "mimic-cxr-jpg", out / "shards"
    if not source.exists():
        drawing = out / "drawing"
        shutil.rmtree(drawing, ignore_errors=True)  # of a demo that was stopped
        synth(drawing, images=600, size=512)
        drawing.rename(source)
    build(source, shards, DEMO_SCALES)
    return study(shards, out / "runs", DEMO_SCALES, DEMO_FOLDS, device="cpu", recipe=DEMO_RECIPE)
