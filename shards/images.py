"""One image: bytes → grey pixels → the same radiograph at every scale → bytes. No files.

simplejpeg (libjpeg-turbo) decodes 10 % faster than OpenCV here and, unlike it, refuses a truncated file; OpenCV resizes.
"""

from enum import StrEnum

import cv2
import numpy as np
import simplejpeg

from cxrfast.errors import ShardError

MAX_PIXELS = 256 * 2**20
"""Larger than any radiograph; a header that promises more is a decompression bomb."""


class Reason(StrEnum):
    """Why an image is quarantined."""

    MISSING = "missing"
    EMPTY = "empty"
    NOT_AN_IMAGE = "not an image"
    TRUNCATED = "truncated"
    CORRUPT = "corrupt"
    TOO_LARGE = "too large"


class BadImage(ShardError):
    """An image that cannot be used, with its `reason`."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(str(reason))
        self.reason = reason


def decode_grey(data: bytes) -> np.ndarray:
    """JPEG bytes → uint8 (H, W); colour becomes luma (ITU-R 601). Raises BadImage."""
    if not data:
        raise BadImage(Reason.EMPTY)
    if data[:2] != b"\xff\xd8":
        raise BadImage(Reason.NOT_AN_IMAGE)
    try:
        height, width, *_ = simplejpeg.decode_jpeg_header(data)
        if height * width > MAX_PIXELS:
            raise BadImage(Reason.TOO_LARGE)
        return simplejpeg.decode_jpeg(data, "GRAY")[:, :, 0]
    except ValueError as error:
        # libjpeg's message for a file that ends early: "Premature end of JPEG file"
        early = "Premature end" in str(error) or b"\xff\xd9" not in data[-64:]
        raise BadImage(Reason.TRUNCATED if early else Reason.CORRUPT) from error


def encode(image: np.ndarray, quality: int) -> bytes:
    """uint8 (H, W) → baseline grey JPEG bytes."""
    return simplejpeg.encode_jpeg(np.ascontiguousarray(image)[:, :, None], quality=quality, colorspace="GRAY")


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


def at_scales(image: np.ndarray, scales: list[int]) -> dict[int, np.ndarray]:
    """uint8 (H, W) → {scale: uint8 (scale, scale)}.

    Each scale is one exact area step from its own root, so its pixels never depend on which other scales are asked for;
    roots that coincide (2048 for 256, 512, 1024 and 2048 of a 2500-px image) are computed once.
    """
    roots: dict[int, np.ndarray] = {}
    result = {}
    for scale in scales:
        root = root_size(image.shape[0], image.shape[1], scale)
        if root not in roots:
            roots[root] = resize(image, root, root)
        result[scale] = resize(roots[root], scale, scale)
    return result
