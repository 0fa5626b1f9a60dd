"""`cxrfast demo`: the whole study on phantoms, in minutes on two cores and without a network."""

import shutil
from pathlib import Path
from typing import Any

from cxrfast.phantoms.dataset import synth
from cxrfast.shards.build import build
from cxrfast.study.study import Study, study

SCALES, FOLDS = [32, 64, 96], [0, 1]
OPTIONS: dict[str, Any] = {
    "weights": "none",
    "epochs": 3,
    "global_batch": 8,
    "micro_batch": 8,
    "learning_rate": 3e-4,  # at 1e-3 the statistics of BatchNorm lag behind the weights in so few steps
}
"""From scratch, since ImageNet weights need a network; short, since it runs on two cores."""


def demo(out: Path) -> Study:
    """Phantoms of 384 px, shards at three small scales, two folds, every table and figure; minutes on two cores."""
    source, shards = out / "mimic-cxr-jpg", out / "shards"
    if not source.exists():
        drawing = out / "drawing"
        shutil.rmtree(drawing, ignore_errors=True)  # of a demo that was stopped
        synth(drawing, images=360, size=384)
        drawing.rename(source)
    build(source, shards, SCALES)
    return study(shards, out / "runs", SCALES, FOLDS, device="cpu", options=OPTIONS)
