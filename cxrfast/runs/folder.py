"""Names of the files in a run's folder, RUNS/<arch>-<scale>/fold-<k>/. Each file is whole or absent; only this module knows its name.

Imports neither torch nor pandas, since `cxrfast status` has to answer at once.
"""

from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

WEIGHTS = "best.safetensors"
FIGURE = "gradcam-"


@dataclass(frozen=True)
class RunFolder:
    """Where the files of a run are, or will be once it is started."""

    folder: Path

    @staticmethod
    def of(runs: Path, arch: str, scale: int, fold: int, name: str | None = None) -> "RunFolder":
        """The folder of a run below `runs`; `name` replaces `<arch>-<scale>`."""
        return RunFolder(runs / (name or f"{arch}-{scale}") / f"fold-{fold}")

    @staticmethod
    def below(runs: Path) -> list["RunFolder"]:
        """Every folder below `runs` that holds a run, damaged or not; sorted by path."""
        # glob passes over folders that may not be read, as those of other people
        found = {path.parent for name in ("config.json", "state.json") for path in runs.glob(f"*/fold-*/{name}")}
        return [RunFolder(folder) for folder in sorted(found)]

    @property
    def name(self) -> str:
        """`densenet121-2048/fold-0`, as people call it."""
        return f"{self.folder.parent.name}/{self.folder.name}"

    @property
    def config_path(self) -> Path:
        """The configuration, its hash, where the shards were, versions."""
        return self.folder / "config.json"

    @property
    def state_path(self) -> Path:
        """running | preempted | done | failed, epoch, rate, heartbeat."""
        return self.folder / "state.json"

    @property
    def metrics_path(self) -> Path:
        """One line per epoch."""
        return self.folder / "metrics.jsonl"

    @property
    def rows_path(self) -> Path:
        """The run's own copy of rows, parts and raw labels."""
        return self.folder / "rows.parquet"

    @property
    def checkpoint_path(self) -> Path:
        """The checkpoint to resume from."""
        return self.folder / "last.pt"

    @property
    def weights_path(self) -> Path:
        """Weights of the epoch with the lowest validation loss."""
        return self.folder / WEIGHTS

    @property
    def predictions_path(self) -> Path:
        """Logits of the validation and test rows."""
        return self.folder / "predictions.zarr"

    @property
    def maps_path(self) -> Path:
        """Receptive field and Grad-CAM maps."""
        return self.folder / "maps.zarr"

    @property
    def profile_path(self) -> Path:
        """A trace of a few training steps."""
        return self.folder / "profile.json"

    @property
    def tensorboard_path(self) -> Path:
        """Folder of TensorBoard's events."""
        return self.folder / "tensorboard"

    def gradcam_path(self, label: str) -> Path:
        """Figure of a finding's Grad-CAM maps."""
        return self.folder / f"{FIGURE}{quote(label, safe=' ')}.png"

    def gradcam_paths(self) -> dict[str, Path]:
        """The Grad-CAM figures that are there, by finding as the file names spell it; sorted."""
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

    @property
    def checkpoint_bytes(self) -> int:
        """Bytes of the checkpoint and the best weights that are there."""
        return sum(path.stat().st_size for path in (self.checkpoint_path, self.weights_path) if path.exists())
