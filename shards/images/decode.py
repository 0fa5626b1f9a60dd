"""One image: bytes → grey pixels → the same radiograph at every scale → bytes. No files.

What a file is, its first bytes say and not its name; `jpeg`, `png` and `dicom` decode, OpenCV resizes.
"""

import cv2
import numpy as np
import simplejpeg

from cxrfast.shards.images.bad_image import MAX_PIXELS, BadImage, Reason
from cxrfast.shards.images.grey import as_mimic, full_range, stretched
from cxrfast.shards.images.jpeg import decode_grey, decode_jpeg
from cxrfast.shards.images.png import SIGNATURE, decode_png

__all__ = [
    "MAX_PIXELS",
    "BadImage",
    "Reason",
    "at_scales",
    "decode",
    "decode_grey",
    "encode",
    "resize",
    "root_size",
]

NOT_TAKEN = (
    (b"GIF8", "GIF"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"II+\0", "BigTIFF"),
    (b"MM\0+", "BigTIFF"),
    (b"BM", "BMP"),
    (b"\xff\x4f\xff\x51", "JPEG 2000"),
    (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG 2000"),
    (b"\xff\x0a", "JPEG XL"),
    (b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL"),
)
"""First bytes of formats that are images, and that nothing here decodes."""


def decode(data: bytes, grey: str) -> np.ndarray:
    """The bytes of a JPEG, PNG or DICOM file → uint8 (H, W). Raises BadImage, or ShardError where the recipe is at fault.

    `grey` says what becomes of more than 8 bits: `none` keeps the full range of a 16-bit PNG (v / 257) and knows no answer to a
    DICOM file; `mimic` stretches and equalises as MIMIC-CXR-JPG was made; `window` shows a PNG from its lowest to its highest
    value and a DICOM file as a viewer does. Files of 8 bits other than DICOM are taken as they are.
    """
    if data.startswith(b"\xff\xd8"):
        return decode_jpeg(data)
    if data.startswith(SIGNATURE):
        pixels = decode_png(data)
        wide = {"none": full_range, "mimic": as_mimic, "window": stretched}
        return wide[grey](pixels) if pixels.dtype == np.uint16 else pixels
    if data[128:132] == b"DICM":
        from cxrfast.shards.images.dicom import decode_dicom

        return decode_dicom(data, grey)
    if not data:
        raise BadImage(Reason.EMPTY)
    for start, name in NOT_TAKEN:
        if data.startswith(start):
            raise BadImage(Reason.UNSUPPORTED, name)
    if data[:4] + data[8:12] == b"RIFFWEBP":
        raise BadImage(Reason.UNSUPPORTED, "WebP")
    raise BadImage(Reason.NOT_AN_IMAGE)


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
