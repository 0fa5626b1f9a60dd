"""One image: bytes → grey pixels → bytes. The first bytes, not the file name, choose between `jpeg`, `png` and `dicom`."""

from typing import Literal

import cv2
import numpy as np
import simplejpeg

from cxrfast.shards.images.bad_image import BadImage, Reason
from cxrfast.shards.images.grey import as_mimic, full_range, stretched
from cxrfast.shards.images.jpeg import decode_jpeg
from cxrfast.shards.images.png import BIT_DEPTH, SIGNATURE, decode_png
from cxrfast.shards.images.remark import Remark, remarks_on

UNSUPPORTED = (
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
"""First bytes of image formats that are recognised but not decoded."""


EXPLICIT_VRS = frozenset(b"AE AS AT CS DA DS DT IS LO LT OB PN SH ST TM UI UL US".split())
"""Value representations of the elements in groups 0002 and 0008 that are not sequences."""


def decode(data: bytes, grey: str) -> np.ndarray:
    """The bytes of a JPEG, PNG or DICOM file → uint8 (H, W). Raises BadImage, or ShardError where the recipe is at fault.

    `grey` reduces more than 8 bits: `none` keeps the full range of a 16-bit PNG (v / 257) and refuses DICOM files; `mimic`
    stretches and equalises the way MIMIC-CXR-JPG was made; `window` stretches a PNG from its lowest to its highest value and
    shows a DICOM file as a viewer does. Other 8-bit files are not changed.
    """
    return _decode(data, grey)[0]


def decode_with_remarks(data: bytes, grey: str) -> tuple[np.ndarray, list[Remark]]:
    """`decode`, and what is noteworthy about the image."""
    image, remarks = _decode(data, grey)
    seen = remarks_on(image)
    if Remark.NARROW in seen and grey == "none" and data.startswith(SIGNATURE) and data[BIT_DEPTH] == 16:
        seen = [Remark.NARROW_PNG]
    return image, [*remarks, *seen]


def _decode(data: bytes, grey: str) -> tuple[np.ndarray, list[Remark]]:
    """Pixels, and remarks on how they were made."""
    if data.startswith(b"\xff\xd8"):
        return decode_jpeg(data), []
    if data.startswith(SIGNATURE):
        pixels = decode_png(data)
        wide = {"none": full_range, "mimic": as_mimic, "window": stretched}
        return wide[grey](pixels) if pixels.dtype == np.uint16 else pixels, []
    if dicom := with_preamble(data):
        from cxrfast.shards.images.dicom import decode_dicom

        return decode_dicom(dicom, grey)
    if not data:
        raise BadImage(Reason.EMPTY)
    for start, name in UNSUPPORTED:
        if data.startswith(start):
            raise BadImage(Reason.UNSUPPORTED, name)
    if data[:4] + data[8:12] == b"RIFFWEBP":
        raise BadImage(Reason.UNSUPPORTED, "WebP")
    raise BadImage(Reason.NOT_AN_IMAGE)


def with_preamble(data: bytes) -> bytes | None:
    """A DICOM file, its preamble and prefix put in front where a writer left them out; None if it is something else."""
    if data[128:132] == b"DICM":
        return data
    start = 4 if data[:4] == b"DICM" else 0 if any(data[:128]) else 128
    return bytes(128) + b"DICM" + data[start:] if starts_as_dicom(data, start) else None


def starts_as_dicom(data: bytes, start: int) -> bool:
    """Do two DICOM elements start here, in order, both of group 0002 or 0008 (PS3.5, section 7.1)?"""
    order: Literal["little", "big"] = "big" if data[start : start + 1] == b"\0" else "little"
    before = (0, -1)
    for _ in range(2):
        header = data[start : start + 12]
        if len(header) < 12:
            return False
        tag = int.from_bytes(header[:2], order), int.from_bytes(header[2:4], order)
        is_explicit = header[4:6] in EXPLICIT_VRS
        if tag[0] not in (2, 8) or tag <= before or not (is_explicit or order == "little"):
            return False
        at, end = (4, 8) if not is_explicit else (8, 12) if header[4:6] == b"OB" else (6, 8)
        start += end + int.from_bytes(header[at:end], order)
        before = tag
    return start <= len(data)


def encode(image: np.ndarray, quality: int, dct: str = "accurate") -> bytes:
    """uint8 (H, W) → baseline grey JPEG bytes, the same as Pillow's where `dct` is accurate.

    `fast` is TurboJPEG's choice at quality 95 and below: rougher, and only for images that must keep their earlier bytes.
    """
    if dct == "accurate":
        options = [cv2.IMWRITE_JPEG_QUALITY, quality]
        return cv2.imencode(".jpg", np.ascontiguousarray(image), options)[1].tobytes()
    return simplejpeg.encode_jpeg(np.ascontiguousarray(image)[:, :, None], quality=quality, colorspace="GRAY")
