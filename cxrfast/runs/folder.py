"""Names of the files in a run's folder, RUNS/<arch>-<scale>/fold-<k>/, which only this module knows. Each is whole or absent.

Imports neither torch nor pandas, since `cxrfast status` must answer at once.
"""

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

WEIGHTS = "best.safetensors"
FIGURE = "gradcam-"
LONGEST = 120
"""Characters of a finding's name in the name of a file; file systems allow 255, and temporary names are longer."""


def file_name(label: str) -> str:
    """Name of a finding in names of files and arrays: it opens no other level and is not too long."""
    name = quote(label, safe=" ")
    if not name.strip("."):
        name = name.replace(".", "%2E")
    if len(name) > LONGEST:
        name = f"{name[:LONGEST]}-{hashlib.sha256(label.encode()).hexdigest()[:12]}"
    return name


LARGEST_TEXT = 2**26
"""Bytes of a run's JSON files; those of long trainings have a hundredth of it."""


class _File:
    """Path of a file in a run's folder."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, run: "RunFolder", owner: type) -> Path:
        return run.folder / self.name


@dataclass(frozen=True)
class RunFolder:
    """Where the files of a run are, or will be once it is started."""

    folder: Path

    config_path = _File("config.json")
    """The configuration, its hash, where the shards were, versions."""
    state_path = _File("state.json")
    """running | preempted | done | failed, epoch, rate, heartbeat."""
    metrics_path = _File("metrics.jsonl")
    """One line per epoch."""
    rows_path = _File("rows.parquet")
    """The run's own copy of rows, parts and raw labels."""
    checkpoint_path = _File("last.pt")
    """The checkpoint to resume from."""
    weights_path = _File(WEIGHTS)
    """Weights of the epoch with the lowest validation loss."""
    predictions_path = _File("predictions.zarr")
    """Logits of the validation and test rows."""
    thresholds_path = _File("thresholds.json")
    """Thresholds of its logits, chosen on the validation rows."""
    external_path = _File("external")
    """Folder of logits of other sets' rows, see `runs.external`."""
    reference_path = _File("reference.json")
    """What its validation films look like, and how the images of its set were made."""
    maps_path = _File("maps.zarr")
    """Receptive field and Grad-CAM maps."""
    profile_path = _File("profile.json")
    """Trace of a few training steps."""
    tensorboard_path = _File("tensorboard")
    """Folder of TensorBoard's events."""
    lease_path = _File("lease.lock")
    """Names the process that writes into the folder; exists only while it does."""

    @staticmethod
    def of(runs: Path, arch: str, scale: int, fold: int, name: str | None = None) -> "RunFolder":
        """The folder of a run below `runs`; `name` replaces `<arch>-<scale>`.

        `timm/test_vit` at 64 px is `timm-test_vit-64`, `mynets.small:make` is `mynets.small-make-64`.
        """
        return RunFolder(runs / (name or f"{re.sub('[/:]', '-', arch)}-{scale}") / f"fold-{fold}")

    @staticmethod
    def below(runs: Path) -> list["RunFolder"]:
        """Every folder below `runs` with a run, damaged or not; sorted by path."""
        # glob skips unreadable folders, such as those of other users
        found = {path.parent for name in ("config.json", "state.json") for path in runs.glob(f"*/fold-*/{name}")}
        return [RunFolder(folder) for folder in sorted(found)]

    @staticmethod
    def within(folder: Path) -> list["RunFolder"]:
        """The started runs of a folder: it is one itself, or holds one scale's folds, or all runs; sorted by path."""
        if folder.name in ("", "..") or (not folder.parent.name and RunFolder(folder).is_started):
            folder = Path(os.path.abspath(folder))  # the name of the folder above a run says what it is
        folds = {path.parent for path in folder.glob("fold-*/config.json")}
        found = [RunFolder(folder), *map(RunFolder, sorted(folds)), *RunFolder.below(folder)]
        return [run for run in found if run.is_started]

    @staticmethod
    def none_below(runs: Path) -> str:
        """Why there are no runs below `runs`, and what to do, for a message."""
        if RunFolder(runs).is_started or next(runs.glob("fold-*/config.json"), None):
            return f"{runs} is {'a run' if RunFolder(runs).is_started else 'one scale of a study'}: give the folder of all runs"
        return f"no runs in {runs}: train one with `cxrfast train --runs {runs}`, or give the folder that holds them"

    @property
    def name(self) -> str:
        """`densenet121-2048/fold-0`, for people."""
        return f"{self.folder.parent.name}/{self.folder.name}"

    def gradcam_path(self, label: str) -> Path:
        """Figure of a finding's Grad-CAM maps."""
        return self.folder / f"{FIGURE}{file_name(label)}.png"

    def gradcam_paths(self) -> dict[str, Path]:
        """The existing Grad-CAM figures by finding, as spelt in the file names; sorted."""
        paths = sorted(self.folder.glob(f"{FIGURE}*.png"))
        return {path.stem.removeprefix(FIGURE): path for path in paths}

    @property
    def is_started(self) -> bool:
        return self.config_path.exists()

    @property
    def has_checkpoint(self) -> bool:
        return self.checkpoint_path.exists()

    @property
    def has_predictions(self) -> bool:
        return self.predictions_path.is_dir()
