"""What is noteworthy about an image that is used all the same."""

from enum import StrEnum

import cv2
import numpy as np

NARROW_RANGE = 64
"""Grey levels; an image that spans fewer uses less than a quarter of the range."""


class Remark(StrEnum):
    """Noted in a shard's manifest, counted by `shard` and `describe`."""

    UNIFORM = "one grey value"
    NARROW = "less than a quarter of the grey range"
    NARROW_PNG = "16-bit PNG that uses less than a quarter of its range"
    WINDOW = "invalid window ignored"
    FUNCTION = "unknown VOI LUT function taken for LINEAR"
    LUT = "invalid VOI LUT ignored"
    RESCALE = "invalid modality LUT or rescale slope ignored"
    PADDING = "pixel padding stretched like anatomy: see --grey window"
    SHAPE = "presentation LUT shape that contradicts MONOCHROME1 or 2 ignored"


def remarks_on(image: np.ndarray) -> list[Remark]:
    """Remarks on decoded pixels, uint8 (H, W)."""
    low, high, *_ = cv2.minMaxLoc(image)
    if low == high:
        return [Remark.UNIFORM]
    return [Remark.NARROW] if high - low < NARROW_RANGE else []
