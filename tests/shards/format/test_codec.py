import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import noise
from PIL import Image

from cxrfast.pipelines.reader import Reader
from cxrfast.shards.build import build
from cxrfast.shards.format.codec import decode_member, encode_member, pgm_header
from cxrfast.shards.format.recipe import ImageRecipe
from cxrfast.shards.images.bad_image import BadImage, Reason
from cxrfast.shards.images.decode import encode
from cxrfast.shards.upkeep.verify import verify

SIDES = st.integers(1, 300)


def reason(data: bytes) -> Reason:
    with pytest.raises(BadImage) as caught:
        decode_member(data, "raw")
    return caught.value.reason


@settings(max_examples=50)
@given(SIDES, SIDES, st.booleans())
def test_raw_pixels_come_back_as_they_were_pillow_reads_the_same_and_a_jpeg_has_its_quality(height, width, transposed):
    image = noise(width, height).T if transposed else noise(height, width)
    data = encode_member(image, "raw", None, None)
    np.testing.assert_array_equal(decode_member(data, "raw"), image)
    with Image.open(io.BytesIO(data)) as picture:
        assert (picture.format, picture.mode) == ("PPM", "L")
        np.testing.assert_array_equal(picture, image)
    for dct in ("accurate", "fast"):
        assert encode_member(image, "jpeg", 80, dct) == encode(np.ascontiguousarray(image), 80, dct)
    assert decode_member(encode(image, 80), "jpeg").shape == image.shape
    header = pgm_header(height, width)
    assert data.startswith(header)
    assert data[len(header) :] == image.tobytes(), "rows from the top, each from the left"


@pytest.mark.parametrize("pixels", [np.zeros((20, 30), np.uint8), np.full((20, 30), ord("\n"), np.uint8)])
def test_a_raw_image_cut_short_anywhere_is_truncated(pixels):
    data = encode_member(pixels, "raw", None, None)
    for keep in range(2, len(data)):
        assert reason(data[:keep]) is Reason.TRUNCATED, f"{keep} of {len(data)} bytes"


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", Reason.EMPTY),
        (b"P", Reason.NOT_AN_IMAGE),
        (encode(noise(8, 8), 95), Reason.NOT_AN_IMAGE),
        (b"P6\n2 1\n255\n" + bytes(6), Reason.NOT_AN_IMAGE),
        (b"P5\n2 2\n255\n" + bytes(5), Reason.CORRUPT),
        (b"P5\n2 2\n254\n" + bytes(4), Reason.CORRUPT),
        (b"P5\n2 2\n65535\n" + bytes(8), Reason.CORRUPT),
        (b"P5\n02 2\n255\n" + bytes(4), Reason.CORRUPT),
        (b"P5\n0 2\n255\n", Reason.CORRUPT),
        (b"P5\n-2 -2\n255\n" + bytes(4), Reason.CORRUPT),
        (b"P5\n" + b"9" * 5000 + b" 1\n255\n", Reason.CORRUPT),
        (b"P5\n60000 60000\n255\n", Reason.TOO_LARGE),
    ],
)
def test_what_is_no_whole_image_of_ours_is_refused_with_its_reason(data, expected):
    assert reason(data) is expected


@pytest.mark.slow
def test_real_radiographs_are_held_to_the_pixel(real_tree, real_set, tmp_path):
    build(real_tree, tmp_path / "set", [64, 256], recipe=ImageRecipe(codec="raw"))
    verdict = verify(tmp_path / "set", deep=True)
    assert verdict.problems == []
    assert verdict.rows == {64: 237, 256: 237}
    for scale in (64, 256):
        with Reader(tmp_path / "set", scale) as raws, Reader(real_set, scale) as jpegs:
            for row in raws.rows.tolist():
                pixels = decode_member(bytes(raws.read(row)), "raw")
                assert bytes(raws.read(row)) == encode_member(pixels, "raw", None, None)
                assert bytes(jpegs.read(row)) == encode(pixels, 95), f"row {row}"
