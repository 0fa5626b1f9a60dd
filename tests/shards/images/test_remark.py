"""Remarks on images that are used all the same; those on DICOM elements are in `test_voi`."""

import struct
import tarfile
import zlib

import cv2
import numpy as np
import pytest
from pictures import saved
from PIL import Image
from sets import REAL

from cxrfast.shards.images.decode import decode, decode_with_remarks
from cxrfast.shards.images.remark import Remark


def ramp(low: int, high: int, kind: type = np.uint16) -> np.ndarray:
    """(64, 64) from the lowest to the highest value."""
    return np.linspace(low, high, 64 * 64).astype(kind).reshape(64, 64)


def png(image: np.ndarray) -> bytes:
    return cv2.imencode(".png", image)[1].tobytes()


@pytest.mark.parametrize(
    ("image", "grey", "expected"),
    [
        (ramp(0, 4095), "none", [Remark.NARROW_PNG]),
        (ramp(0, 4095), "window", []),
        (ramp(0, 4095), "mimic", []),
        (ramp(60_000, 65_535), "none", [Remark.NARROW_PNG]),
        (ramp(0, 16_383 + 257), "none", []),
        (ramp(700, 700), "none", [Remark.UNIFORM]),
        (ramp(700, 700), "window", [Remark.UNIFORM]),
        (ramp(700, 701), "none", [Remark.UNIFORM]),
        (ramp(100, 163, np.uint8), "none", [Remark.NARROW]),
        (ramp(100, 164, np.uint8), "none", []),
        (ramp(9, 9, np.uint8), "window", [Remark.UNIFORM]),
    ],
)
def test_an_image_that_uses_little_of_its_range_is_remarked_on(image, grey, expected):
    pixels, remarks = decode_with_remarks(png(image), grey)
    assert remarks == expected
    np.testing.assert_array_equal(pixels, decode(png(image), grey))


def test_a_narrow_jpeg_is_remarked_on():
    data = saved(Image.fromarray(ramp(100, 150, np.uint8)), quality=100)
    assert decode_with_remarks(data, "none")[1] == [Remark.NARROW]


@pytest.mark.parametrize("grey", ["none", "mimic", "window"])
def test_significant_bits_do_not_change_a_png(grey):
    data = png(ramp(0, 65_535) & 0xFFF0)
    chunk = b"sBIT\x0c"
    marked = data[:33] + struct.pack(">I", 1) + chunk + struct.pack(">I", zlib.crc32(chunk)) + data[33:]
    np.testing.assert_array_equal(decode(marked, grey), decode(data, grey))


def test_no_real_radiograph_is_remarked_on():
    files = [path.read_bytes() for folder in ("single", "dicom") for path in sorted((REAL / folder).glob("*"))]
    if not files:
        pytest.skip("the real radiographs are not here")
    with tarfile.open(REAL / "odd.tar") as tar:
        files += [tar.extractfile(member).read() for member in tar if member.isfile()]
    assert [decode_with_remarks(data, "window")[1] for data in files] == [[]] * len(files)
