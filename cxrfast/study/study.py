"""The whole study: every scale × fold trained and predicted, then tables, ensemble, receptive fields, Grad-CAM, report.

A step whose result exists is skipped, so a study that was stopped resumes where it stopped.
"""

import logging
import os
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cxrfast.analysis import ensemble, evaluate
from cxrfast.analysis.gradcam import gradcam_run, save_figure
from cxrfast.analysis.receptive_field import erf, has_erf
from cxrfast.analysis.report import report
from cxrfast.distributed import pick_device, world
from cxrfast.errors import CxrfastError, NotDefined, RunError
from cxrfast.models.networks.factories import trusted
from cxrfast.runs.folder import RunFolder
from cxrfast.runs.lease import InUse
from cxrfast.runs.run import Run
from cxrfast.study.forecast import Outlook, forecast, projection
from cxrfast.study.plan import Plan, make_plan
from cxrfast.tables import Table
from cxrfast.training.predict import predict
from cxrfast.training.signals import TORCHRUN_SIGNALS, Stopped, call
from cxrfast.training.train import train

log = logging.getLogger(__name__)

ERF_IMAGES, CAM_IMAGES, CAM_FINDINGS = 64, 6, 2


@dataclass(frozen=True)
class Study:
    tables: list[Table]
    """AUROC by finding and scale; with several scales, the ensemble's too."""
    report: Path
    failures: list[str] = field(default_factory=list)
    """Error messages of the runs that failed; empty unless the study keeps going."""


def study(
    shards: Path,
    runs: Path,
    scales: list[int] | None = None,
    folds: list[int] | None = None,
    *,
    nproc: int = 1,
    options: dict[str, Any] | None = None,
    keep_going: bool = False,
    **runtime: Any,
) -> Study:
    """Train and predict `scales` (default: all of the set) × `folds` (default: all five) of a shard set, then report.

    `options`: fields of TrainConfig, None for the preset's. `nproc`: processes per training. `keep_going`: continue with the
    other runs after one failed. `runtime`: further fields of Runtime.

    Raises RunError or ShardError before the first training if the set, a scale or an option is wrong, RunError naming the
    run if one fails, and Stopped if a signal ended one.
    """
    with trusted((options or {}).get("arch")):
        return _study(make_plan(shards, runs, scales, folds, nproc=nproc, options=options, **runtime), keep_going)


def _study(plan: Plan, keep_going: bool) -> Study:
    """As `study`, of a plan."""
    pick_device(plan.runtime.device)  # raises before anything is trained
    expected = forecast(plan)
    expected.check()
    done: list[Run] = []
    failures: list[str] = []
    for number, outlook in enumerate(expected.outlooks, 1):
        try:
            done.append(_run(plan, outlook))
        except (CxrfastError, RuntimeError) as error:  # torch raises RuntimeError, for example if memory runs out
            if not keep_going:
                raise
            failures.append(str(error))
            log.warning(f"{error}; continuing with the other runs")
            continue
        left = [o for o in expected.outlooks[number:] if not o.is_done]
        if left and not outlook.is_done:
            log.info(projection(plan, left))
    if not done:
        raise RunError(failed(failures))
    try:
        return _results(plan, done, failures)
    except CxrfastError as error:
        raise RunError(failed([*failures, str(error)])) if failures else error from error


def _results(plan: Plan, done: list[Run], failures: list[str]) -> Study:
    """Tables, ensemble, maps and report of the runs that are done."""
    runs = plan.runtime.runs
    evaluation = evaluate.evaluate(runs)
    stacked = ensemble.ensemble(runs) if len({run.config.scale for run in done}) > 1 else None
    tables = [evaluate.auroc_table(evaluation), *([ensemble.ensemble_table(stacked)] if stacked else [])]
    first = min(run.config.fold for run in done)
    _maps([run for run in done if run.config.fold == first], evaluation, plan.runtime.shards, plan.runtime.device)
    return Study(tables, report(runs, evaluation, stacked), failures)


def _run(plan: Plan, outlook: Outlook) -> Run:
    """Train one run, in this process or with torchrun, and predict with it; skip what is done."""
    runtime, folder = plan.runtime, plan.runtime.runs / outlook.name
    if outlook.is_done:
        log.info(f"{outlook.name} is done already; its weights are in {folder}")
    elif plan.nproc > 1:
        _torchrun(plan, outlook, folder)
    else:
        try:
            train(plan.config(outlook.scale, outlook.fold, runtime.device), runtime)
        except CxrfastError as error:
            raise error if outlook.name in str(error) else type(error)(f"{outlook.name}: {error}") from error
    run = Run.open(folder)
    if not run.is_done:
        raise RunError(f"{folder} exited without finishing and without an error: run the study again")
    if not run.has_predictions:
        with world(runtime.device) as ranks:
            predict(run, ranks, shards=runtime.shards, engine=runtime.engine, threads=runtime.threads)
    return run


def _torchrun(plan: Plan, outlook: Outlook, folder: Path) -> None:
    """Raises Stopped if a signal ended it, RunError if it failed."""
    options = ["--standalone", f"--nproc_per_node={plan.nproc}", f"--signals-to-handle={TORCHRUN_SIGNALS}"]
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "100")  # seconds to save in; older torchrun gives 30
    training = ["-m", "cxrfast.train", f"--scale={outlook.scale}", f"--fold={outlook.fold}", *plan.train_arguments]
    started = time.time()
    code, received = call([sys.executable, "-m", "torch.distributed.run", *options, *training])
    if received is not None:
        raise Stopped(outlook.name, received)
    state = Run.open(folder).state() if RunFolder(folder).is_started else {}
    if state.get("state") == "preempted" and state["time"] >= int(started):  # by a signal sent to torchrun itself
        raise Stopped(outlook.name, signal.Signals[state.get("signal", "SIGTERM")])
    if code:
        raise RunError(
            f"{folder} failed, see the error above; fix the cause and run the study again: nothing is done twice"
        )


def failed(failures: list[str]) -> str:
    """One message about all runs that failed, for the end of a study."""
    count = "1 run" if len(failures) == 1 else f"{len(failures)} runs"
    return f"{count} failed; fix the cause and run the study again:" + "".join(f"\n  {f}" for f in failures)


def _maps(runs: list[Run], evaluation: evaluate.Evaluation, shards: Path, device: str) -> None:
    """Receptive field of each run, and Grad-CAM of the findings that the largest scale ranks best."""
    chosen = pick_device(device)
    for run in runs:
        try:
            if not has_erf(run):
                log.info(erf(run, images=ERF_IMAGES, shards=shards, device=chosen).in_words())
        except InUse:
            raise
        except RunError as error:  # no known feature map: this architecture has tables, but no maps
            log.warning(f"{error}; the study goes on without maps")
            return
    largest = max(runs, key=lambda run: run.config.scale)
    known = evaluation.table[
        (evaluation.table["name"] == largest.folder.parent.name)
        & (evaluation.table["fold"] == largest.config.fold)
        & evaluation.table["auroc"].notna()
        & (evaluation.table["label"] != "No Finding")
    ]
    for label in known.sort_values("auroc", ascending=False)["label"].head(CAM_FINDINGS):
        if not largest.gradcam_path(label).exists():
            try:
                gradcam_run(largest, label, images=CAM_IMAGES, shards=shards, device=chosen)
            except NotDefined as error:
                log.warning(f"{error}; the study goes on without them")
                return
            save_figure(largest, label, shards=shards)
