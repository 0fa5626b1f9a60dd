"""Encode and decode images of a set: uint8 grey pixels ↔ bytes in a tar.

`jpeg` is a baseline grey JPEG. `raw` is a binary PGM (Netpbm's P5): an ASCII header, then the rows of pixels. All raw images
of a scale have the same size and header, so pixels can be read straight into a batch.
"""

import re

import numpy as np

from cxrfast.shards.images.bad_image import BadImage, Reason, check_size
from cxrfast.shards.images.decode import encode
from cxrfast.shards.images.jpeg import decode_grey

SUFFIX = {"jpeg": "jpg", "raw": "pgm"}
"""File suffix of images, by codec."""

PGM = re.compile(rb"P5\n([1-9][0-9]{0,4}) ([1-9][0-9]{0,4})\n255\n")
"""Width and height, px; 255 is white."""


def encode_member(image: np.ndarray, codec: str, quality: int | None, dct: str | None) -> bytes:
    """uint8 (H, W) → the bytes of an image in a tar; `quality` and `dct` are JPEG's, None for raw pixels."""
    if codec == "raw":
        return pgm_header(*image.shape) + image.tobytes()
    assert quality is not None, "guaranteed by ImageRecipe"
    assert dct is not None, "guaranteed by ImageRecipe"
    return encode(image, quality, dct)


def decode_member(data: bytes, codec: str) -> np.ndarray:
    """The bytes of an image in a tar → uint8 (H, W), read-only if raw. Raises BadImage."""
    return _decode_pgm(data) if codec == "raw" else decode_grey(data)


def pgm_header(height: int, width: int) -> bytes:
    """The bytes before the height · width pixels of a raw image."""
    return b"P5\n%d %d\n255\n" % (width, height)


def _decode_pgm(data: bytes) -> np.ndarray:
    if not data:
        raise BadImage(Reason.EMPTY)
    if data[:2] != b"P5":
        raise BadImage(Reason.NOT_AN_IMAGE)
    header = PGM.match(data)
    if not header:
        raise BadImage(Reason.CORRUPT if data.count(b"\n") > 2 else Reason.TRUNCATED)
    width, height = map(int, header.groups())
    check_size(height, width)
    surplus = len(data) - header.end() - height * width
    if surplus:
        raise BadImage(Reason.CORRUPT if surplus > 0 else Reason.TRUNCATED, f"{surplus:+,} bytes")
    return np.frombuffer(data, np.uint8, offset=header.end()).reshape(height, width)
