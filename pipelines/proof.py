"""Proof of decoded pixels: compares batches with the grids of means in the set's manifests and counts differences, on the
batch's device. Only reading the result waits for the device.

Hardware JPEG decoders have been reported to overwrite memory that was still in use, without an error (pytorch/vision#9606,
meta-pytorch/torchcodec#1634), so images decoded on a GPU are not trusted blindly.
"""

import numpy as np
import torch

from cxrfast.pipelines.decoder import Pixels
from cxrfast.pipelines.reader import Reader
from cxrfast.shards.images.cell_means import SIDE, STEPS, edges, grid, tolerance

EVERY = 16
"""In a set without grids, rows whose number this divides are also decoded on the CPU and compared."""

NONE = 2**62
"""Row number that does not exist."""

UNKNOWN = -1
"""Placeholder for an unknown mean."""


class Proof:
    """Compares images at the stored scale of `reader` with its grids.

    `compare` moves 0.1 % of the bytes of a training step and does not wait for the device; `problem` does.
    """

    def __init__(self, reader: Reader, device: torch.device) -> None:
        self.reader, self.device = reader, device
        self.tolerance = tolerance(reader.info.codec, reader.info.quality, reader.scale)
        """Largest allowed difference of a cell's mean, grey levels."""
        self._pixels = Pixels(reader, reader.scale)
        self.compared = 0
        """Number of images whose means were known."""
        self._found = torch.tensor([0, NONE], dtype=torch.int64)
        """Number of rows that differ and the smallest of them; moves to the device with the first batch."""
        self._largest = torch.zeros(())

    def expected(self, rows: np.ndarray) -> np.ndarray:
        """int16 (N, 16): the means that the images of `rows` should have, in steps of 1/128, or UNKNOWN.

        Without grids in the set, some rows are decoded here. Raises LoadError if one does not decode.
        """
        means = self.reader.grids[rows].reshape(len(rows), -1)
        for i in np.flatnonzero((means[:, 0] == UNKNOWN) & (rows % EVERY == 0)).tolist():
            means[i] = grid(self._pixels.get(int(rows[i]))).ravel()
        return means

    def compare(self, images: torch.Tensor, rows: np.ndarray, expected: np.ndarray) -> None:
        """Compare unrotated images, uint8 (N, 1, scale, scale), with the result of `expected` for the same rows."""
        if self._found.device != self.device:
            self._found, self._largest = self._found.to(self.device), self._largest.to(self.device)
        table = torch.from_numpy(np.column_stack([rows, expected]))  # int64: one small copy to the device
        if self.device.type == "cuda":
            table = table.pin_memory().to(self.device, non_blocking=True)
        row, means = table[:, 0], table[:, 1:]
        apart = torch.where(means != UNKNOWN, (cell_means(images) - means / STEPS).abs(), 0)
        self._largest = torch.maximum(self._largest, apart.max())
        bad = (apart > self.tolerance).any(1)
        first = torch.where(bad, row, NONE).min()
        self._found = torch.stack([self._found[0] + bad.sum(), torch.minimum(self._found[1], first)])
        self.compared += int((expected[:, 0] != UNKNOWN).sum())

    @property
    def unknown(self) -> int:
        """Number of rows without a grid in the set."""
        return int((self.reader.grids[self.reader.rows, 0, 0] == UNKNOWN).sum())

    @property
    def largest(self) -> float:
        """Largest difference of a cell's mean so far, grey levels. Waits for the device."""
        return self._largest.item()

    def problem(self) -> str | None:
        """Description of what is wrong with the images compared so far, or None. Waits for the device."""
        count, first = self._found.tolist()
        if not count:
            return None
        reader, known = self.reader, self.reader.grids[first]
        off = np.abs(grid(self._pixels.get(first)).astype(np.int32) - known).max()
        if known[0, 0] != UNKNOWN and off > self.tolerance * STEPS:
            return (
                f"the means in the manifests of {reader.folder} do not match its images, first row {first} at "
                f"{reader.scale} px: `cxrfast verify --deep {reader.folder}` names the shards and says what to do"
            )
        return (
            f"{count:,} of the {self.compared:,} images that were decoded by DALI and compared differ from the set, "
            f"first row {first} of {reader.folder} at {reader.scale} px: the JPEG decoder of {self.device} cannot be "
            "trusted: use --engine host"
        )


def cell_means(images: torch.Tensor) -> torch.Tensor:
    """uint8 (N, 1, H, W) → float32 (N, 16): mean grey of each cell of the 4 × 4 grid, row by row, on the images' device."""
    if images.device.type != "cpu":
        return means_by_torch(images)
    # OpenCV takes a fraction of torch's time
    return torch.from_numpy(np.stack([grid(image).ravel() for image in images[:, 0].numpy()])).float() / STEPS


def means_by_torch(images: torch.Tensor) -> torch.Tensor:
    """`cell_means` on any device. torch sums an int32 copy, which briefly takes four times the batch's memory."""
    n, _, height, width = images.shape
    if height % SIDE == 0 and width % SIDE == 0:
        cells = images.reshape(n, SIDE, height // SIDE, SIDE, width // SIDE)
        return cells.sum((2, 4), dtype=torch.int32).reshape(n, -1) / (height * width // SIDE**2)
    y, x = edges(height), edges(width)
    means = [
        images[:, 0, y[i] : y[i + 1], x[j] : x[j + 1]].float().mean((1, 2)) for i in range(SIDE) for j in range(SIDE)
    ]
    return torch.stack(means, 1)
