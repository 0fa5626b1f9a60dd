"""One radiograph at every scale, resized by OpenCV; on a GPU, `pipelines.dali` resizes."""

import cv2
import numpy as np


def root_size(height: int, width: int, scale: int) -> int:
    """Largest scale · 2^k that fits within the shorter side, or the scale itself if none does."""
    side = min(height, width)
    return scale << max(0, (side // scale).bit_length() - 1)


def resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 (H, W) → uint8 (height, width); area averaging on an axis that shrinks, bilinear on one that grows."""
    h, w = image.shape
    inner = (min(w, width), min(h, height))
    if inner != (w, h):
        image = cv2.resize(image, inner, interpolation=cv2.INTER_AREA)
    if inner != (width, height):
        image = cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
    return image


def at_scales(image: np.ndarray, scales: list[int], resize: str = "squash") -> dict[int, np.ndarray]:
    """uint8 (H, W) → {scale: uint8 (scale, scale)}; `resize` is squash (each axis alone) or pad (keep the aspect ratio).

    Each scale is one exact area step from its own root, so its pixels never depend on which other scales are requested.
    Equal roots (2048 for 256, 512, 1024 and 2048 of a 2500 px image) are computed once. A root fits within the shorter side
    of a squashed image and within the longer side of a padded one.
    """
    side = max(image.shape) if resize == "pad" else min(image.shape)
    roots: dict[int, np.ndarray] = {}
    result = {}
    for scale in scales:
        root = root_size(side, side, scale)
        if root not in roots:
            roots[root] = _at_root(image, root, resize == "pad")
        result[scale] = _step(roots[root], root, scale)
    return result


def _at_root(image: np.ndarray, root: int, keeps_aspect: bool) -> np.ndarray:
    """uint8 (root, root); with the aspect kept, only the longer side is root and nothing is padded yet."""
    longer = max(image.shape)
    height, width = (max(1, round(side * root / longer)) if keeps_aspect else root for side in image.shape)
    return resize(image, height, width)


def _step(image: np.ndarray, root: int, scale: int) -> np.ndarray:
    """Centre an image on a black root × root square and shrink it to the scale; root / scale is a power of two.

    Only the part that is not black is allocated: the whole square of a thin image would fill the memory.
    """
    if image.shape == (root, root):
        return resize(image, scale, scale)
    factor = root // scale
    starts = [(root - side) // 2 for side in image.shape]
    (top, bottom), (left, right) = (
        (start // factor, -(-(start + side) // factor)) for start, side in zip(starts, image.shape, strict=True)
    )
    part = np.zeros(((bottom - top) * factor, (right - left) * factor), np.uint8)
    y, x = starts[0] - top * factor, starts[1] - left * factor
    part[y : y + image.shape[0], x : x + image.shape[1]] = image
    square = np.zeros((scale, scale), np.uint8)
    square[top:bottom, left:right] = resize(part, bottom - top, right - left)
    return square
