"""Default folders, and what a training takes by its scale: batch sizes and learning rate."""

import os
from dataclasses import dataclass
from pathlib import Path

DATA = os.environ.get("CXRFAST_DATA") or "data/mimic-cxr-jpg"  # text: it may be a URL
SHARDS = Path(os.environ.get("CXRFAST_SHARDS") or "data/shards")
RUNS = Path("runs")


@dataclass(frozen=True)
class Preset:
    """Batch sizes; they do not depend on the number of GPUs. Ours: the study's own table was not available to us."""

    global_batch: int
    micro_batch: int


PRESETS = {128: Preset(32, 16), 256: Preset(384, 32), 512: Preset(192, 16), 1024: Preset(96, 8), 2048: Preset(48, 4)}
"""By largest scale. From 256 px on, 1, 2, 3, 4, 6 or 12 ranks can share a global batch."""

LEARNING_RATE, LEARNING_RATE_BATCH = 1e-4, 32
"""Adam's learning rate for a global batch of 32; it grows in proportion to the global batch, as in the study."""


def preset(scale: int) -> Preset:
    """Preset of the next scale in PRESETS at or above `scale`; above 2048 px, the preset of 2048 px."""
    return PRESETS[min((s for s in PRESETS if s >= scale), default=max(PRESETS))]


def learning_rate(global_batch: int) -> float:
    return LEARNING_RATE * global_batch / LEARNING_RATE_BATCH
