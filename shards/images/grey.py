"""Pixels of more than 8 bits → uint8, through a table over all possible values."""

import cv2
import numpy as np


def full_range(pixels: np.ndarray) -> np.ndarray:
    """uint16 (H, W) → uint8: v / 257 rounded, whatever part of the range the image uses."""
    return ((np.arange(2**16) + 128) // 257).astype(np.uint8)[pixels]


def stretched(pixels: np.ndarray) -> np.ndarray:
    """uint8 or uint16 (H, W) → uint8: the lowest value becomes 0, the highest 255, linear between, rounded."""
    return (_share(pixels) * 255 + 0.5).astype(np.uint8)[pixels]


def as_mimic(pixels: np.ndarray, inverted: bool = False) -> np.ndarray:
    """uint8 or uint16 (H, W) → uint8, the way MIMIC-CXR-JPG was made from DICOM files (Johnson et al. 2019, arXiv:1901.07042).

    Subtract the minimum, divide by the maximum, scale to 255 and truncate; invert if `inverted` (MONOCHROME1); equalise the
    histogram.
    """
    table = (_share(pixels) * 255).astype(np.uint8)
    return cv2.equalizeHist((255 - table if inverted else table)[pixels])


def _share(pixels: np.ndarray) -> np.ndarray:
    """float64 (highest value + 1,): position of each value between the lowest (0) and the highest (1); all 0 if they are equal."""
    low, high = int(pixels.min()), int(pixels.max())
    return (np.arange(high + 1) - low).clip(0) / max(1, high - low)
