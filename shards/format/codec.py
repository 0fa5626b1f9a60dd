"""The images of a set: uint8 grey pixels ↔ the bytes of a member of its tars, as the recipe's codec says. No files.

`jpeg` is a baseline grey JPEG. `raw` is a binary PGM (Netpbm's P5): a header in ASCII, then the rows of pixels. All raw
images of a scale are of one size and have the same header, so that pixels can be read straight to where they belong.
"""

import re

import numpy as np

from cxrfast.shards.images.bad_image import BadImage, Reason, check_size
from cxrfast.shards.images.decode import encode
from cxrfast.shards.images.jpeg import decode_grey

SUFFIX = {"jpeg": "jpg", "raw": "pgm"}
"""By codec: what the names of its images end in."""

PGM = re.compile(rb"P5\n([1-9][0-9]{0,4}) ([1-9][0-9]{0,4})\n255\n")
"""Width and height, px; 255 is white."""


def encode_member(image: np.ndarray, codec: str, quality: int | None) -> bytes:
    """uint8 (H, W) → the bytes of an image in a tar; `quality` is that of JPEG."""
    if codec == "raw":
        return pgm_header(*image.shape) + image.tobytes()
    assert quality is not None  # the recipe sees to it
    return encode(image, quality)


def decode_member(data: bytes, codec: str) -> np.ndarray:
    """The bytes of an image in a tar → uint8 (H, W), read-only where it is raw. Raises BadImage."""
    return _decode_pgm(data) if codec == "raw" else decode_grey(data)


def pgm_header(height: int, width: int) -> bytes:
    """What precedes the height · width bytes of pixels of a raw image."""
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
