"""Training rates of earlier runs, and wall times of jobs."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from statistics import median

from cxrfast.config import TrainConfig
from cxrfast.errors import CxrfastError, RunError
from cxrfast.runs.folder import RunFolder
from cxrfast.runs.run import Run
from cxrfast.runs.status import read_metrics

NOTICE_SECONDS = 120
"""Seconds before its end at which a job is asked to save; forecasts leave them out."""


class Pace:
    """Images/s of a run: as given for its scale, else its own so far, else of another run of its architecture and scale."""

    def __init__(self, runs: Path, given: Mapping[int, float] | None = None) -> None:
        self.given = given or {}
        self.by_folder: dict[Path, float] = {}
        self.by_scale: dict[tuple[str, int], float] = {}
        for folder in RunFolder.below(runs):
            try:
                config = Run.open(folder.folder).config
            except CxrfastError:
                continue
            lines = [line for line in read_metrics(folder) if line.get("images_per_s")]
            if rates := [line["images_per_s"] * config.area_at(line["epoch"]) for line in lines]:
                self.by_folder[folder.folder] = self.by_scale[config.arch, config.scale] = median(rates)

    def of(self, folder: Path, config: TrainConfig) -> float | None:
        known = self.by_folder.get(folder) or self.by_scale.get((config.arch, config.scale))
        return self.given.get(config.scale) or known


def parse_walltime(text: str) -> int:
    """`36:00:00` or `1-12:00:00` → seconds. Raises RunError for anything else, or if too short to save."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+):([0-5]\d):([0-5]\d)", text)
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups()) if match else (0, 0, 0, 0)
    total = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    if total <= NOTICE_SECONDS:
        raise RunError(f"wall time {text!r} is not [DAYS-]HH:MM:SS of more than {NOTICE_SECONDS} s, such as 24:00:00")
    return total


def jobs(seconds: float, walltime: int) -> int:
    """Number of jobs of `walltime` seconds that a training of `seconds` takes; each saves before it ends."""
    return math.ceil(seconds / (walltime - NOTICE_SECONDS))
