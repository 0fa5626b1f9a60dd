"""JPEG bytes → uint8 grey pixels, upright by EXIF orientation.

simplejpeg (libjpeg-turbo) decodes 10 % faster than OpenCV and, unlike OpenCV, refuses truncated files.
"""

import struct
from collections.abc import Callable
from typing import NamedTuple

import cv2
import numpy as np
import simplejpeg

from cxrfast.shards.images.bad_image import MAX_PIXELS, BadImage, Reason, check_size

EOI, SOS = b"\xff\xd9", b"\xff\xda"
BASELINE, EXTENDED, PROGRESSIVE, LOSSLESS, JPEG_LS = 0xC0, 0xC1, 0xC2, 0xC3, 0xF7
FRAMES = {*range(0xC0, 0xD0), JPEG_LS} - {0xC4, 0xC8, 0xCC}
"""Markers that start a frame: 0xC0–0xCF except DHT, JPG and DAC."""
SCAN_PIXELS = 2**30
"""Most pixels × scans in a progressive file. Real files use 6 or 10 scans; a bomb adds one for every hundred bytes."""

TURN: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: np.fliplr,
    3: lambda image: np.rot90(image, 2),
    4: np.flipud,
    5: np.transpose,
    6: lambda image: np.rot90(image, -1),
    7: lambda image: np.rot90(image, 2).T,
    8: np.rot90,
}
"""EXIF orientation (tag 0x0112) → the function that turns the image upright; 1 is upright, other values mean nothing."""


class Frame(NamedTuple):
    """The segments before a JPEG's first scan."""

    process: int
    """Second byte of the frame's marker, 0xC0 for baseline."""
    precision: int
    """Bits per sample."""
    height: int
    width: int
    components: int
    orientation: int
    adobe: bool
    """True if there is an Adobe segment: its writers store CMYK inverted."""


def decode_jpeg(data: bytes) -> np.ndarray:
    """JPEG bytes → uint8 (H, W), upright; colour and CMYK become luma (ITU-R 601). Raises BadImage.

    8-bit Huffman-coded files are accepted, sequential or progressive. Arithmetic coding is refused: its decoder silently
    reads zeros where a file is cut short.
    """
    frame = read_frame(data)
    if frame is None:
        raise BadImage(Reason.CORRUPT if EOI in data[-64:] else Reason.TRUNCATED)
    if frame.process not in (BASELINE, EXTENDED, PROGRESSIVE) or frame.precision != 8:
        raise BadImage(Reason.UNSUPPORTED, f"JPEG process SOF{frame.process - 0xC0}, {frame.precision} bits")
    if frame.components not in (1, 3, 4):
        raise BadImage(Reason.UNSUPPORTED, f"JPEG of {frame.components} components")
    if not frame.height:
        raise BadImage(Reason.UNSUPPORTED, "JPEG whose height follows its pixels (DNL)")
    check_size(frame.height, frame.width)
    if frame.process == PROGRESSIVE:
        scans = data.count(SOS)
        if scans * max(frame.height * frame.width, 2**20) > SCAN_PIXELS:
            raise BadImage(Reason.TOO_LARGE, f"{scans:,} scans")
    image = decode_cmyk(data, frame.adobe) if frame.components == 4 else decode_grey(data)
    return np.ascontiguousarray(TURN[frame.orientation](image)) if frame.orientation in TURN else image


def decode_grey(data: bytes) -> np.ndarray:
    """A JPEG of one or three components → uint8 (H, W) as stored; colour becomes luma (ITU-R 601). Raises BadImage."""
    if not data:
        raise BadImage(Reason.EMPTY)
    if data[:2] != b"\xff\xd8":
        raise BadImage(Reason.NOT_AN_IMAGE)
    return _decode(data, "GRAY")[:, :, 0]


def decode_cmyk(data: bytes, inverted: bool) -> np.ndarray:
    """A JPEG of four components (CMYK or YCCK) → uint8 (H, W), luma. libjpeg itself would return K alone as grey."""
    inks = _decode(data, "CMYK")
    light = inks if inverted else 255 - inks
    luma = cv2.cvtColor(np.ascontiguousarray(light[:, :, :3]), cv2.COLOR_RGB2GRAY)
    return cv2.multiply(luma, np.ascontiguousarray(light[:, :, 3]), scale=1 / 255)


def _decode(data: bytes, colorspace: str) -> np.ndarray:
    try:
        height, width, *_ = simplejpeg.decode_jpeg_header(data)
        if height * width > MAX_PIXELS:
            raise BadImage(Reason.TOO_LARGE)
        return simplejpeg.decode_jpeg(data, colorspace)
    except ValueError as error:
        # libjpeg's message for a file that ends early: "Premature end of JPEG file"
        early = "Premature end" in str(error) or EOI not in data[-64:]
        raise BadImage(Reason.TRUNCATED if early else Reason.CORRUPT) from error


def read_frame(data: bytes) -> Frame | None:
    """Read the segments up to the first scan; None if they hold no complete frame header."""
    at, orientation, adobe, frame = 2, 0, False, b""
    for _ in range(10_000):  # more segments than any file has
        if len(data) < at + 4 or data[at] != 0xFF:
            break
        marker = data[at + 1]
        if marker == 0xFF or marker == 0x01 or 0xD0 <= marker <= 0xD7:  # a fill byte; markers without a length
            at += 1 if marker == 0xFF else 2
            continue
        length = int.from_bytes(data[at + 2 : at + 4])
        if marker in (0xD8, 0xD9, 0xDA) or length < 2:
            break
        if marker in FRAMES and not frame:
            frame = data[at + 1 : at + 10]
        elif marker == 0xE1 and not orientation and data[at + 4 : at + 10] == b"Exif\0\0":
            orientation = exif_orientation(data[at + 10 : at + 2 + length])
        elif marker == 0xEE and data[at + 4 : at + 9] == b"Adobe":
            adobe = True
        at += 2 + length
    if len(frame) < 9:
        return None
    process, _, precision, height, width, components = struct.unpack(">BHBHHB", frame)
    return Frame(process, precision, height, width, components, orientation, adobe)


def exif_orientation(tiff: bytes) -> int:
    """Orientation in an EXIF segment's first directory (EXIF 2.32, section 4.6.4); 0 if there is none."""
    if tiff[:4] not in (b"II*\0", b"MM\0*"):
        return 0

    def number(at: int, size: int) -> int:
        return int.from_bytes(tiff[at : at + size], "little" if tiff[:1] == b"I" else "big")

    first = number(4, 4)
    for at in range(first + 2, min(first + 2 + 12 * number(first, 2), len(tiff) - 11), 12):
        if number(at, 2) == 0x0112 and number(at + 2, 2) == 3:  # a SHORT
            return number(at + 8, 2)
    return 0
