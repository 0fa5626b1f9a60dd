"""One image: bytes → grey pixels → bytes. The first bytes, not the file name, choose between `jpeg`, `png` and `dicom`."""

import cv2
import numpy as np
import simplejpeg

from cxrfast.shards.images.bad_image import BadImage, Reason
from cxrfast.shards.images.grey import as_mimic, full_range, stretched
from cxrfast.shards.images.jpeg import decode_jpeg
from cxrfast.shards.images.png import SIGNATURE, decode_png
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


def decode(data: bytes, grey: str) -> np.ndarray:
    """The bytes of a JPEG, PNG or DICOM file → uint8 (H, W). Raises BadImage, or ShardError where the recipe is at fault.

    `grey` reduces more than 8 bits: `none` keeps the full range of a 16-bit PNG (v / 257) and refuses DICOM files; `mimic`
    stretches and equalises the way MIMIC-CXR-JPG was made; `window` stretches a PNG from its lowest to its highest value and
    shows a DICOM file as a viewer does. Other 8-bit files are not changed.
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
    for start, name in UNSUPPORTED:
        if data.startswith(start):
            raise BadImage(Reason.UNSUPPORTED, name)
    if data[:4] + data[8:12] == b"RIFFWEBP":
        raise BadImage(Reason.UNSUPPORTED, "WebP")
    raise BadImage(Reason.NOT_AN_IMAGE)


def decode_with_remarks(data: bytes, grey: str) -> tuple[np.ndarray, list[Remark]]:
    """`decode`, and what is noteworthy about the image."""
    image = decode(data, grey)
    return image, remarks_on(image)


def encode(image: np.ndarray, quality: int, dct: str = "accurate") -> bytes:
    """uint8 (H, W) → baseline grey JPEG bytes, the same as Pillow's where `dct` is accurate.

    `fast` is TurboJPEG's choice at quality 95 and below: rougher, and only for images that must keep their earlier bytes.
    """
    if dct == "accurate":
        options = [cv2.IMWRITE_JPEG_QUALITY, quality]
        return cv2.imencode(".jpg", np.ascontiguousarray(image), options)[1].tobytes()
    return simplejpeg.encode_jpeg(np.ascontiguousarray(image)[:, :, None], quality=quality, colorspace="GRAY")
