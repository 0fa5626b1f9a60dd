import io
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cxrfast.shards.images import MAX_PIXELS, BadImage, Reason, at_scales, decode_grey, encode, resize, root_size

SCALES = st.lists(st.sampled_from([8, 12, 16, 24, 32, 64, 100]), min_size=1, max_size=4, unique=True)
SIDES = st.integers(1, 260)


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width), np.uint8)


def area_weights(n: int, m: int) -> np.ndarray:
    """(m, n): what share of output pixel i each of the n input pixels covers; m ≤ n."""
    edges = np.arange(m + 1) * n / m
    covered = np.minimum(edges[1:, None], np.arange(1, n + 1)) - np.maximum(edges[:-1, None], np.arange(n))
    return np.clip(covered, 0, None) * m / n


def linear_weights(n: int, m: int) -> np.ndarray:
    """(m, n): bilinear interpolation at pixel centres, edges repeated; m ≥ n."""
    at = np.clip((np.arange(m) + 0.5) * n / m - 0.5, 0, n - 1)
    return np.clip(1 - abs(at[:, None] - np.arange(n)), 0, None)


def reason(data: bytes) -> Reason:
    with pytest.raises(BadImage) as caught:
        decode_grey(data)
    return caught.value.reason


@pytest.fixture(scope="module")
def real_files(real_tree: Path) -> list[Path]:
    """Sorted by size: small ones in colour first, the last ones of about 2500 × 1970 px."""
    return sorted(real_tree.rglob("*.jpg"), key=lambda path: path.stat().st_size)


# Resizing


@settings(max_examples=60, deadline=None)
@given(SIDES, SIDES, SCALES, SCALES)
def test_the_pixels_of_a_scale_do_not_depend_on_the_other_scales_asked_for(height, width, scales, others):
    image = noise(height, width)
    together = at_scales(image, sorted({*scales, *others}))
    for scale in scales:
        alone = at_scales(image, [scale])[scale]
        assert alone.shape == (scale, scale)
        assert alone.dtype == np.uint8
        np.testing.assert_array_equal(together[scale], alone)


@given(st.integers(1, 60_000), st.integers(1, 60_000), st.integers(8, 4096))
def test_the_root_is_the_largest_doubling_of_the_scale_within_the_shorter_side(height, width, scale):
    root, side = root_size(height, width, scale), min(height, width)
    assert (root // scale).bit_count() == 1
    assert root % scale == 0
    assert root == scale if side < scale else root <= side < 2 * root


@pytest.mark.parametrize("power", [0, 1, 2, 3, 4])
def test_a_whole_power_of_two_is_one_exact_block_mean(power):
    image = noise(32 << power, 32 << power, seed=power)
    mean = image.reshape(32, 1 << power, 32, 1 << power).mean(axis=(1, 3))
    assert abs(at_scales(image, [32])[32] - mean).max() <= 0.5 + 1e-6


def test_rounding_does_not_add_up_over_the_scales():
    image = noise(512, 512)
    for scale, picture in at_scales(image, [32, 64, 128, 256]).items():
        # one halving rounds half up and adds 1/8 of a grey level; in steps, 64 px would have three of them
        assert abs(picture.mean() - image.mean()) < 0.16, f"{scale} px"


@settings(max_examples=60, deadline=None)
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


def test_enlarging_agrees_with_torch():
    image = noise(37, 53)
    oracle = torch.nn.functional.interpolate(torch.tensor(image)[None, None].float(), (128, 128), mode="bilinear")
    assert abs(resize(image, 128, 128) - oracle[0, 0].numpy()).max() <= 1


def test_thin_and_tiny_images_become_squares():
    for shape in ((1, 1), (1, 5000), (3000, 2)):
        pictures = at_scales(np.full(shape, 77, np.uint8), [8, 64])
        assert all((picture == 77).all() for picture in pictures.values())


# Bytes


def test_grey_is_what_pillow_s_decoder_makes_of_real_radiographs(real_files):
    for path in [*real_files[:60], *real_files[-4:]]:
        with Image.open(path) as picture:
            picture.draft("L", picture.size)
            np.testing.assert_array_equal(decode_grey(path.read_bytes()), np.asarray(picture.convert("L")), str(path))


def test_colour_becomes_luma():
    colour = cv2.GaussianBlur(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8), (0, 0), 4)
    file = io.BytesIO()
    Image.fromarray(colour).save(file, "JPEG", quality=100, subsampling=0)
    luma = colour @ np.array([0.299, 0.587, 0.114])
    assert abs(decode_grey(file.getvalue()) - luma).max() <= 3


def test_progressive_files_decode_to_the_same_pixels():
    pixels, files = Image.fromarray(cv2.GaussianBlur(noise(90, 70), (0, 0), 2)), [io.BytesIO(), io.BytesIO()]
    for file, progressive in zip(files, (False, True), strict=True):
        pixels.save(file, "JPEG", quality=90, progressive=progressive)
    np.testing.assert_array_equal(*(decode_grey(file.getvalue()) for file in files))


@settings(max_examples=20, deadline=None)
@given(SIDES, SIDES, st.integers(1, 100))
def test_what_is_encoded_is_a_baseline_grey_jpeg_of_that_quality(height, width, quality):
    data = encode(cv2.GaussianBlur(noise(height, width), (0, 0), 3), quality)
    ours, theirs = Image.open(io.BytesIO(data)), io.BytesIO()
    Image.new("L", (8, 8)).save(theirs, "JPEG", quality=quality)
    assert (ours.format, ours.mode, ours.size) == ("JPEG", "L", (width, height))
    assert "progressive" not in ours.info
    assert ours.quantization == Image.open(theirs).quantization


def test_quality_95_costs_a_grey_level_or_so(phantoms):
    image = decode_grey(next(phantoms.rglob("*.jpg")).read_bytes())
    again = decode_grey(encode(image, 95))
    assert np.abs(again.astype(int) - image).mean() < 1.5
    np.testing.assert_array_equal(decode_grey(encode(np.asfortranarray(image), 95)), again)


# Images that cannot be used


def test_no_bytes_are_empty():
    assert reason(b"") is Reason.EMPTY


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "GIF"])
def test_another_format_is_not_an_image(kind):
    file = io.BytesIO()
    Image.fromarray(noise(9, 9)).save(file, kind)
    assert reason(file.getvalue()) is Reason.NOT_AN_IMAGE


@pytest.mark.parametrize("data", [b"<html></html>", b"\0" * 1000, b"\xff", b"JFIF"])
def test_what_never_was_a_picture_is_not_an_image(data):
    assert reason(data) is Reason.NOT_AN_IMAGE


def test_a_file_cut_short_anywhere_is_truncated():
    data = encode(noise(100, 100), 95)
    for keep in {2, 3, 20, *np.linspace(25, len(data) - 3, 40).astype(int).tolist()}:
        assert reason(data[:keep]) is Reason.TRUNCATED, f"{keep} of {len(data)} bytes"


def test_a_header_that_promises_too_many_pixels_is_refused_before_they_are_allocated():
    data = bytearray(encode(noise(16, 16), 95))
    size = data.index(b"\xff\xc0") + 5
    data[size : size + 4] = (MAX_PIXELS // 32_768 + 1).to_bytes(2) + (32_768).to_bytes(2)
    assert reason(bytes(data)) is Reason.TOO_LARGE


def mutate(data: bytes, rng: np.random.Generator) -> bytes:
    """One accident: flipped bytes, a hole, a lost or doubled stretch, a lost end, another file's blocks."""
    image, at, length = bytearray(data), int(rng.integers(len(data))), int(rng.integers(1, 600))
    match rng.integers(6):
        case 0:
            for position in rng.integers(len(data), size=rng.integers(1, 20)):
                image[position] ^= int(rng.integers(1, 256))
        case 1:
            image[at : at + length] = bytes(len(image[at : at + length]))
        case 2:
            del image[at : at + length]
        case 3:
            image[at:at] = image[at : at + length]
        case 4:
            del image[at:]
        case _:
            header = int(rng.integers(2, 700))  # quantisation, size and Huffman tables
            image[header] = int(rng.integers(256))
    return bytes(image)


def test_a_damaged_radiograph_decodes_or_is_a_bad_image_and_nothing_else(real_files):
    rng = np.random.default_rng(5)
    refused: set[Reason] = set()
    decoded = 0
    for n in range(150):
        data = mutate(real_files[n].read_bytes(), rng)
        try:
            image = decode_grey(data)
        except BadImage as error:
            refused.add(error.reason)
            continue
        decoded += 1
        assert image.ndim == 2
        assert image.dtype == np.uint8
    assert decoded > 10
    assert {Reason.TRUNCATED, Reason.CORRUPT} <= refused
