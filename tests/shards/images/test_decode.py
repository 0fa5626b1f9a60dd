import io
import tarfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import noise, reason, saved
from PIL import Image, ImageOps
from sets import REAL

from cxrfast.shards.images.bad_image import BadImage, Reason
from cxrfast.shards.images.decode import decode
from cxrfast.shards.images.jpeg import decode_grey
from cxrfast.shards.images.resize import at_scales, resize, root_size

SCALES = st.lists(st.sampled_from([8, 12, 16, 24, 32, 64, 100]), min_size=1, max_size=4, unique=True)
SIDES = st.integers(1, 260)


def area_weights(n: int, m: int) -> np.ndarray:
    """(m, n): fraction of output pixel i that each of the n input pixels covers; m ≤ n."""
    edges = np.arange(m + 1) * n / m
    covered = np.minimum(edges[1:, None], np.arange(1, n + 1)) - np.maximum(edges[:-1, None], np.arange(n))
    return np.clip(covered, 0, None) * m / n


def linear_weights(n: int, m: int) -> np.ndarray:
    """(m, n): bilinear interpolation at pixel centres, edges repeated; m ≥ n."""
    at = np.clip((np.arange(m) + 0.5) * n / m - 0.5, 0, n - 1)
    return np.clip(1 - abs(at[:, None] - np.arange(n)), 0, None)


# Resizing


@settings(max_examples=60)
@given(SIDES, SIDES, SCALES, SCALES, st.sampled_from(["squash", "pad"]))
def test_the_pixels_of_a_scale_do_not_depend_on_the_other_scales_asked_for(height, width, scales, others, how):
    image = noise(height, width)
    together = at_scales(image, sorted({*scales, *others}), resize=how)
    for scale in scales:
        alone = at_scales(image, [scale], resize=how)[scale]
        assert alone.shape == (scale, scale)
        assert alone.dtype == np.uint8
        np.testing.assert_array_equal(together[scale], alone)


@given(st.integers(1, 60_000), st.integers(1, 60_000), st.integers(8, 4096))
def test_the_root_is_the_largest_doubling_of_the_scale_within_the_shorter_side(height, width, scale):
    root, side = root_size(height, width, scale), min(height, width)
    assert (root // scale).bit_count() == 1
    assert root % scale == 0
    assert root == scale if side < scale else root <= side < 2 * root


def test_a_whole_power_of_two_is_one_exact_block_mean_and_rounding_does_not_add_up_over_the_scales():
    for power in range(5):
        image = noise(32 << power, 32 << power, seed=power)
        mean = image.reshape(32, 1 << power, 32, 1 << power).mean(axis=(1, 3))
        assert abs(at_scales(image, [32])[32] - mean).max() <= 0.5 + 1e-6
    image = noise(512, 512)
    for scale, picture in at_scales(image, [32, 64, 128, 256]).items():
        # one halving rounds half up and adds 1/8 of a grey level; in steps, 64 px would have three of them
        assert abs(picture.mean() - image.mean()) < 0.16, f"{scale} px"


@settings(max_examples=60)
@given(SIDES, SIDES, SIDES, SIDES)
def test_resizing_averages_areas_where_an_axis_shrinks_and_interpolates_where_it_grows(
    height, width, to_height, to_width
):
    image = noise(height, width)
    inner = min(height, to_height), min(width, to_width)
    expected = area_weights(height, inner[0]) @ image @ area_weights(width, inner[1]).T
    expected = linear_weights(inner[0], to_height) @ expected @ linear_weights(inner[1], to_width).T
    result = resize(image, to_height, to_width)
    assert result.shape == (to_height, to_width)
    assert abs(result - expected).max() <= 1.25  # two steps round, and OpenCV's weights are fixed-point


def test_thin_and_tiny_images_become_squares():
    for shape in ((1, 1), (1, 5000), (3000, 2), (65_535, 1), (2, 65_535)):
        pictures = at_scales(np.full(shape, 77, np.uint8), [8, 64])
        assert all((picture == 77).all() for picture in pictures.values())
        pictures = at_scales(np.full(shape, 77, np.uint8), [8, 64], resize="pad")
        assert all(picture.shape == (scale, scale) for scale, picture in pictures.items())


@settings(max_examples=60)
@given(SIDES, SIDES, st.sampled_from([8, 12, 64, 100]))
def test_padding_keeps_the_aspect_on_a_black_square_whose_root_fits_the_longer_side(height, width, scale):
    image, longer = noise(height, width), max(height, width)
    root = root_size(longer, longer, scale)
    inner = max(1, round(height * root / longer)), max(1, round(width * root / longer))
    top, left = (root - inner[0]) // 2, (root - inner[1]) // 2
    square = np.zeros((root, root), np.uint8)
    square[top : top + inner[0], left : left + inner[1]] = resize(image, *inner)
    np.testing.assert_array_equal(at_scales(image, [scale], resize="pad")[scale], resize(square, scale, scale))
    assert root <= longer or root == scale
    assert abs(inner[0] / inner[1] - height / width) <= max(1, height / width) / min(inner)


def test_what_is_padded_is_black_and_the_rest_is_not_and_a_square_has_nothing_to_pad():
    image = noise(90, 90)
    np.testing.assert_array_equal(at_scales(image, [32], resize="pad")[32], at_scales(image, [32])[32])
    picture = at_scales(np.full((300, 600), 200, np.uint8), [64], resize="pad")[64]
    assert (picture[16:48] == 200).all()
    assert not picture[:16].any()
    assert not picture[48:].any()


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "GIF", "WebP", "JPEG2000"])
def test_another_format_is_named_and_our_own_images_are_jpegs_and_nothing_else(kind):
    data = saved(Image.fromarray(noise(9, 9)), kind)
    assert reason(data, decode_grey) is Reason.NOT_AN_IMAGE
    if kind != "PNG":
        with pytest.raises(BadImage, match=r"unsupported format: \w") as caught:
            decode(data, "none")
        assert caught.value.reason is Reason.UNSUPPORTED


@pytest.mark.parametrize("data", [b"<html></html>", b"\0" * 1000, b"\xff", b"JFIF", b"\x89PNG", b"RIFF....WAVE", b""])
def test_what_never_was_a_picture_is_not_an_image(data):
    expected = Reason.NOT_AN_IMAGE if data else Reason.EMPTY
    assert reason(data) is reason(data, decode_grey) is expected


def test_files_as_found_in_the_wild_decode_to_what_pillow_makes_of_them():
    if not (REAL / "odd.tar").exists():
        pytest.skip("the real radiographs are not here")
    with tarfile.open(REAL / "odd.tar") as tar:
        files = [tar.extractfile(member).read() for member in tar if member.isfile()]
    files += [path.read_bytes() for path in (REAL / "single").glob("*.jpg")]
    assert len(files) == 38
    for data in files:
        with Image.open(io.BytesIO(data)) as picture:
            picture.draft("L", picture.size)
            np.testing.assert_array_equal(decode(data, "none"), np.asarray(ImageOps.exif_transpose(picture)))
