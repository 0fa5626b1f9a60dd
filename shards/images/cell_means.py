"""Mean grey of each cell of a 4 × 4 grid over an image, taken before encoding and compared with what is decoded later.

Some hardware JPEG decoders have silently overwritten memory in use. A manifest holds the grid of each of its rows, as
43 bytes of text per row.
"""

import base64
from itertools import pairwise

import numpy as np

SIDE = 4
"""Cells along each axis."""

STEPS = 128
"""Steps per grey level: white, 255, is stored as 32,640, which fits in 16 bits."""


def edges(side: int) -> list[int]:
    """Borders of the cells along an axis of `side` px: cell i covers edges[i] up to, not including, edges[i + 1]."""
    return [i * side // SIDE for i in range(SIDE + 1)]


def grid(image: np.ndarray) -> np.ndarray:
    """uint8 (H, W), at least 4 px per side → int16 (4, 4): mean grey of each cell in steps of 1 / STEPS."""
    import cv2  # here, since tables read manifests and need no OpenCV

    rows, columns = edges(image.shape[0]), edges(image.shape[1])
    cells = [image[top:bottom, left:right] for top, bottom in pairwise(rows) for left, right in pairwise(columns)]
    means = [cv2.sumElems(cell)[0] * STEPS / cell.size for cell in cells]
    return np.rint(means).astype(np.int16).reshape(SIDE, SIDE)


def pack(grids: list[np.ndarray] | np.ndarray) -> str:
    """int16 grids (n, 4, 4) → base64 text of their little-endian bytes."""
    return base64.b64encode(np.asarray(grids, "<i2").tobytes()).decode()


def unpack(text: str, rows: int) -> np.ndarray:
    """The text `pack` made of `rows` grids → int16 (rows, 4, 4), read-only. Raises ValueError for any other text."""
    grids = np.frombuffer(base64.b64decode(text, validate=True), "<i2").astype(np.int16, copy=False)
    if len(grids) and not 0 <= grids.min() <= grids.max() <= 255 * STEPS:
        raise ValueError("means outside the grey levels 0 to 255")
    return grids.reshape(rows, SIDE, SIDE)


def tolerance(codec: str, quality: int | None, scale: int) -> float:
    """Largest difference in grey levels between a cell of a decoded image of `scale` px and its grid.

    A block of 8 × 8 px keeps its mean to half a step of its DC coefficient, Q / 16 grey levels. Cells whose borders cut
    blocks, and blocks clamped at black or white, add errors that shrink as cells grow. At quality 95, 5,253 real
    radiographs reach 0.05 of the 0.17 allowed for both together at 1024 px, 0.08 of 0.30 at 256, 0.48 of 0.81 at 64, and
    5.3 of 5.6 at 8. The remaining 0.75 covers decoders with another inverse DCT: libjpeg's fast one darkens by 0.5. Below
    quality 95, dithered images (single white pixels on black, or black on white) can exceed the tolerance.
    """
    if codec == "raw":
        return 1 / STEPS
    assert quality is not None  # guaranteed by the recipe
    dc = dc_quantiser(quality)
    return 0.75 + dc / 16 + (1.5 * dc + 8) / (scale / SIDE)


def dc_quantiser(quality: int) -> int:
    """DC step in a JPEG's luminance table (ISO 10918-1, K.1), scaled to a quality as libjpeg does."""
    percent = 5000 // quality if quality < 50 else 200 - 2 * quality
    return min(max((16 * percent + 50) // 100, 1), 255)
