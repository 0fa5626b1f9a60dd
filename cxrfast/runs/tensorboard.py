"""Writes the metrics of a run as TensorBoard scalars, into a folder in the run. Needs `cxrfast[tensorboard]`."""

from pathlib import Path
from typing import Any

from cxrfast.errors import RunError

TAGS = {
    "train_loss": "loss/training",
    "val_loss": "loss/validation",
    "val_auroc": "AUROC/mean",
    "learning_rate": "training/learning rate",
    "images_per_s": "training/images per second",
    "waiting_share": "training/share of time waiting for data",
    "resident_bytes": "memory/process, GiB",
    "gpu_peak_bytes": "memory/torch on the GPU, GiB",
}
"""Metric → tag; other metrics are not shown."""


class Board:
    """Writes the epochs of a run as events."""

    def __init__(self, folder: Path, epoch: int = 0) -> None:
        """`folder`: for the events. `epoch`: the first that will be added, from 0; older events of it and later epochs, left
        by a run that resumed earlier, are hidden. Raises RunError if TensorBoard is not installed."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise RunError(f"TensorBoard cannot be used ({error}): pip install 'cxrfast[tensorboard]'") from error
        self.writer = SummaryWriter(folder, purge_step=epoch)

    def add(self, line: dict[str, Any], step: int) -> None:
        """Write a line of the metrics at `step`, the epoch from 0, without undefined values."""
        scalars = {tag: line.get(name) for name, tag in TAGS.items()}
        scalars |= {f"AUROC/{label}": value for label, value in line.get("val_auroc_by_label", {}).items()}
        for tag, value in scalars.items():
            if value is not None:
                self.writer.add_scalar(tag, value / 2**30 if tag.endswith("GiB") else value, step)
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()
