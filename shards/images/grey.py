"""Pixels of more than 8 bits → uint8, by a table over all values they can have; neither files nor formats."""

import cv2
import numpy as np


def full_range(pixels: np.ndarray) -> np.ndarray:
    """uint16 (H, W) → uint8: 0 … 65,535 becomes 0 … 255, v / 257 rounded, whatever part of it the image uses."""
    return ((np.arange(2**16) + 128) // 257).astype(np.uint8)[pixels]


def stretched(pixels: np.ndarray) -> np.ndarray:
    """uint8 or uint16 (H, W) → uint8: the lowest value becomes 0, the highest 255, linear between, rounded."""
    return (_share(pixels) * 255 + 0.5).astype(np.uint8)[pixels]


def as_mimic(pixels: np.ndarray, inverted: bool = False) -> np.ndarray:
    """uint8 or uint16 (H, W) → uint8, as MIMIC-CXR-JPG was made of DICOM files (Johnson et al. 2019, arXiv:1901.07042).

    The minimum is subtracted, the result divided by its maximum, stretched to 255 and truncated; `inverted` (MONOCHROME1)
    is undone; then the histogram is equalised.
    """
    table = (_share(pixels) * 255).astype(np.uint8)
    return cv2.equalizeHist((255 - table if inverted else table)[pixels])


def _share(pixels: np.ndarray) -> np.ndarray:
    """float64 (highest value + 1,): how far each value lies from the lowest to the highest, 0–1; all 0 if there is but one."""
    low, high = int(pixels.min()), int(pixels.max())
    return (np.arange(high + 1) - low).clip(0) / max(1, high - low)
