"""The same radiograph at every scale: grey pixels in, grey pixels out. OpenCV resizes. On a GPU, `pipelines.dali` does."""

import cv2
import numpy as np


def root_size(height: int, width: int, scale: int) -> int:
    """The largest scale · 2^k within the shorter side; the scale itself where the side is smaller."""
    side = min(height, width)
    return scale << max(0, (side // scale).bit_length() - 1)


def resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 (H, W) → uint8 (height, width); per axis, area averaging where it shrinks and bilinear where it enlarges."""
    h, w = image.shape
    inner = (min(w, width), min(h, height))
    if inner != (w, h):
        image = cv2.resize(image, inner, interpolation=cv2.INTER_AREA)
    if inner != (width, height):
        image = cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
    return image


def at_scales(image: np.ndarray, scales: list[int], resize: str = "squash") -> dict[int, np.ndarray]:
    """uint8 (H, W) → {scale: uint8 (scale, scale)}; `resize` is squash (each axis by itself) or pad (the aspect is kept).

    Each scale is one exact area step from its own root, so its pixels never depend on which other scales are asked for;
    roots that coincide (2048 for 256, 512, 1024 and 2048 of a 2500-px image) are computed once. A root fits within the
    shorter side where the image is squashed, within the longer where it is padded.
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
    """uint8 (root, root), or with the longer side root and the shorter in proportion, not padded yet."""
    longer = max(image.shape)
    height, width = (max(1, round(side * root / longer)) if keeps_aspect else root for side in image.shape)
    return resize(image, height, width)


def _step(image: np.ndarray, root: int, scale: int) -> np.ndarray:
    """An image centred on a black root × root square → that square at the scale, root / scale a power of two.

    The square itself is never made, only the part that is not black: that of a thin image would fill the memory.
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
