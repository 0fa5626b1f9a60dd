"""Pictures to encode and decode."""

import io

import cv2
import numpy as np
import pytest
from PIL import Image

from cxrfast.shards.images.bad_image import BadImage, Reason
from cxrfast.shards.images.decode import decode

LUMA = np.array([0.299, 0.587, 0.114])
"""ITU-R BT.601."""


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width), np.uint8)


def smooth(*shape: int, seed: int = 0) -> np.ndarray:
    """Shapes that use the whole range of 8 bits and survive a JPEG."""
    image = cv2.GaussianBlur(noise(shape[0], int(np.prod(shape[1:])), seed).reshape(shape), (0, 0), 4)
    return cv2.normalize(image, None, 0, 255, cv2.NORM_MINMAX)


def saved(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def reason(data: bytes, how=lambda data: decode(data, "none")) -> Reason:
    with pytest.raises(BadImage) as caught:
        how(data)
    return caught.value.reason


def exif(orientation: int, order: str = "big", kind: int = 3) -> bytes:
    """An APP1 segment with this orientation in its first directory, after another tag."""

    def number(value: int, size: int) -> bytes:
        return value.to_bytes(size, order)

    def entry(tag: int, kind: int, value: int) -> bytes:
        return number(tag, 2) + number(kind, 2) + number(1, 4) + number(value, 2) + number(0, 2)

    directory = number(2, 2) + entry(0x0100, 3, 99) + entry(0x0112, kind, orientation) + number(0, 4)
    start = b"MM\0*" if order == "big" else b"II*\0"
    return segment(0xE1, b"Exif\0\0" + start + number(8, 4) + directory)


def segment(marker: int, content: bytes) -> bytes:
    return bytes((0xFF, marker)) + (len(content) + 2).to_bytes(2) + content
