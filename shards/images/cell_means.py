"""The mean grey of a 4 × 4 grid of an image's cells, taken before it is encoded: what somebody decoded is compared with it.

Some hardware JPEG decoders have overwritten memory that was in use, without an error. A manifest holds the grid of each
of its rows, 43 bytes of text a row.
"""

import base64
from itertools import pairwise

import cv2
import numpy as np

SIDE = 4
"""Cells along each axis."""

STEPS = 128
"""Steps a grey level: white, 255, is stored as 32,640, which fits 16 bits."""


def edges(side: int) -> list[int]:
    """The borders of the cells along an axis of `side` px: cell i goes from edges[i] to before edges[i + 1]."""
    return [i * side // SIDE for i in range(SIDE + 1)]


def grid(image: np.ndarray) -> np.ndarray:
    """uint8 (H, W), 4 px or more a side → int16 (4, 4): the mean grey of each cell in steps of 1 / STEPS."""
    rows, columns = edges(image.shape[0]), edges(image.shape[1])
    cells = [image[top:bottom, left:right] for top, bottom in pairwise(rows) for left, right in pairwise(columns)]
    means = [cv2.sumElems(cell)[0] * STEPS / cell.size for cell in cells]
    return np.rint(means).astype(np.int16).reshape(SIDE, SIDE)


def pack(grids: list[np.ndarray] | np.ndarray) -> str:
    """int16 grids (n, 4, 4) → text: base64 of their little-endian bytes."""
    return base64.b64encode(np.asarray(grids, "<i2").tobytes()).decode()


def unpack(text: str, rows: int) -> np.ndarray:
    """What `pack` wrote of so many rows → int16 (rows, 4, 4), read-only. Raises ValueError if it is not that."""
    grids = np.frombuffer(base64.b64decode(text, validate=True), "<i2").astype(np.int16, copy=False)
    if len(grids) and not 0 <= grids.min() <= grids.max() <= 255 * STEPS:
        raise ValueError("means that are no grey levels")
    return grids.reshape(rows, SIDE, SIDE)


def tolerance(codec: str, quality: int | None, scale: int) -> float:
    """Grey levels by which the mean of a cell of a decoded image of `scale` px may differ from its grid.

    A block of 8 × 8 px keeps its mean to half a step of its DC coefficient, Q / 16 grey levels. Cells whose borders cut
    blocks, and blocks that are clamped at black and white, add errors that shrink with a cell's side. Of these two together
    5,253 real radiographs use, at quality 95, 0.05 of 0.17 at 1024 px, 0.08 of 0.30 at 256, 0.48 of 0.81 at 64, 5.3 of 5.6
    at 8. The remaining 0.75 are for decoders with another inverse DCT: libjpeg's fast one darkens by 0.5. Below quality 95,
    dithered images, of single white pixels on black or black ones on white, can go beyond it.
    """
    if codec == "raw":
        return 1 / STEPS
    assert quality is not None  # the recipe sees to it
    dc = dc_quantiser(quality)
    return 0.75 + dc / 16 + (1.5 * dc + 8) / (scale / SIDE)


def dc_quantiser(quality: int) -> int:
    """Step of the DC coefficient in a JPEG's luminance table (ISO 10918-1, K.1), as libjpeg scales it to a quality."""
    percent = 5000 // quality if quality < 50 else 200 - 2 * quality
    return min(max((16 * percent + 50) // 100, 1), 255)
