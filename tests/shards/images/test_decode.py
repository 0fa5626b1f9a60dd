import io
import os
import pickle
import subprocess
import sys
import tarfile
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import REAL
from hypothesis import given, settings
from hypothesis import strategies as st
from mutator import jpeg_segments, png, png_chunks
from PIL import Image, ImageOps

from cxrfast.shards.images.decode import (
    MAX_PIXELS,
    BadImage,
    Reason,
    at_scales,
    decode,
    decode_grey,
    encode,
    resize,
    root_size,
)

LUMA = np.array([0.299, 0.587, 0.114])
"""ITU-R BT.601."""
SCALES = st.lists(st.sampled_from([8, 12, 16, 24, 32, 64, 100]), min_size=1, max_size=4, unique=True)
SIDES = st.integers(1, 260)
TESTS = Path(__file__).parents[2]


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


def smooth(*shape: int, seed: int = 0) -> np.ndarray:
    """Shapes that use the whole range of 8 bits and survive a JPEG."""
    image = cv2.GaussianBlur(noise(shape[0], int(np.prod(shape[1:])), seed).reshape(shape), (0, 0), 4)
    return cv2.normalize(image, None, 0, 255, cv2.NORM_MINMAX)


def saved(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def reason(data: bytes, how=lambda data: decode(data, "none")) -> Reason:
    with pytest.raises(BadImage) as caught:
        how(data)
    return caught.value.reason


@pytest.fixture(scope="module")
def real_files(real_tree: Path) -> list[Path]:
    """Sorted by size: small ones in colour first, the last ones of about 2500 × 1970 px."""
    return sorted(real_tree.rglob("*.jpg"), key=lambda path: path.stat().st_size)


# Resizing


@settings(max_examples=60, deadline=None)
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
    for shape in ((1, 1), (1, 5000), (3000, 2), (65_535, 1), (2, 65_535)):
        pictures = at_scales(np.full(shape, 77, np.uint8), [8, 64])
        assert all((picture == 77).all() for picture in pictures.values())
        pictures = at_scales(np.full(shape, 77, np.uint8), [8, 64], resize="pad")
        assert all(picture.shape == (scale, scale) for scale, picture in pictures.items())


@settings(max_examples=60, deadline=None)
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


def test_a_square_has_nothing_to_pad():
    image = noise(90, 90)
    np.testing.assert_array_equal(at_scales(image, [32], resize="pad")[32], at_scales(image, [32])[32])


def test_what_is_padded_is_black_and_the_rest_is_not():
    picture = at_scales(np.full((300, 600), 200, np.uint8), [64], resize="pad")[64]
    assert (picture[16:48] == 200).all()
    assert not picture[:16].any()
    assert not picture[48:].any()


# JPEG


def test_a_plain_file_is_decoded_as_ever_and_as_pillow_does(real_files):
    for path in [*real_files[:60], *real_files[-4:]]:
        data = path.read_bytes()
        with Image.open(path) as picture:
            picture.draft("L", picture.size)
            np.testing.assert_array_equal(decode_grey(data), np.asarray(picture.convert("L")), str(path))
        for grey in ("none", "mimic", "window"):
            np.testing.assert_array_equal(decode(data, grey), decode_grey(data))


def test_colour_becomes_luma():
    colour = smooth(64, 64, 3)
    data = saved(Image.fromarray(colour), quality=100, subsampling=0)
    assert abs(decode(data, "none") - colour @ LUMA).max() <= 3


def test_progressive_files_decode_to_the_same_pixels():
    picture = Image.fromarray(smooth(90, 70))
    sequential, progressive = (decode(saved(picture, progressive=kind), "none") for kind in (False, True))
    np.testing.assert_array_equal(sequential, progressive)


def exif(orientation: int, order: str = "big", kind: int = 3) -> bytes:
    """An APP1 segment that says so in its first directory, after another tag."""

    def number(value: int, size: int) -> bytes:
        return value.to_bytes(size, order)

    def entry(tag: int, kind: int, value: int) -> bytes:
        return number(tag, 2) + number(kind, 2) + number(1, 4) + number(value, 2) + number(0, 2)

    directory = number(2, 2) + entry(0x0100, 3, 99) + entry(0x0112, kind, orientation) + number(0, 4)
    start = b"MM\0*" if order == "big" else b"II*\0"
    return segment(0xE1, b"Exif\0\0" + start + number(8, 4) + directory)


def segment(marker: int, content: bytes) -> bytes:
    return bytes((0xFF, marker)) + (len(content) + 2).to_bytes(2) + content


def with_segments(data: bytes, *segments: bytes) -> bytes:
    return data[:2] + b"".join(segments) + data[2:]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("order", ["big", "little"])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_a_radiograph_stands_upright_whatever_its_exif_orientation(orientation, order, mode):
    picture = Image.fromarray(smooth(40, 56, 3)).convert(mode)
    data = with_segments(saved(picture), exif(orientation, order))
    with Image.open(io.BytesIO(data)) as stored:
        stored.draft("L", stored.size)
        upright = np.asarray(ImageOps.exif_transpose(stored))
    image = decode(data, "none")
    np.testing.assert_array_equal(image, upright)
    assert image.flags.c_contiguous


XMP = segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0<tiff:Orientation>3</tiff:Orientation>")


@pytest.mark.parametrize(
    ("segments", "turned"),
    [
        ([XMP, exif(6)], True),
        ([segment(0xE0, b"JFIF\0\1\1" + bytes(7)), segment(0xFE, exif(3)), exif(6), exif(3)], True),
        ([b"\xff\xff\xff", exif(6)], True),  # fill bytes
        ([XMP], False),
        ([exif(0)], False),
        ([exif(9)], False),
        ([exif(0x0600)], False),
        ([exif(6, kind=2)], False),  # not a number
        ([exif(6)[:20]], None),  # a length that reaches into what follows
        ([segment(0xE1, exif(6)[4:18])], False),
        ([segment(0xE1, b"Exif\0\0MM\0*" + b"\xff" * 40)], False),
        ([segment(0xE1, b"Exif\0\0")], False),
    ],
)
def test_only_an_orientation_that_is_one_turns_the_picture(segments, turned):
    data = saved(Image.fromarray(smooth(40, 56)))
    other = with_segments(data, *segments)
    if turned is None:
        assert reason(other) in (Reason.CORRUPT, Reason.TRUNCATED)
    else:
        straight = decode(data, "none")
        np.testing.assert_array_equal(decode(other, "none"), np.rot90(straight, -1) if turned else straight)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=80), st.sampled_from([b"MM\0*", b"II*\0"]))
def test_no_exif_segment_costs_an_image(content, order):
    data = saved(Image.fromarray(smooth(16, 24)))
    image = decode(with_segments(data, segment(0xE1, b"Exif\0\0" + order + content)), "none")
    assert image.size == 16 * 24


def adobe(data: bytes, transform: int | None) -> bytes:
    """The file with another colour transform in its Adobe segment (2: YCCK), or without such a segment."""
    parts = jpeg_segments(data)
    where = next(n for n, part in enumerate(parts) if part[:2] == b"\xff\xee")
    parts[where] = parts[where][:-1] + bytes((transform,)) if transform is not None else b""
    return b"".join(parts)


@pytest.mark.parametrize("transform", [0, 2, None])
@pytest.mark.parametrize("progressive", [False, True])
def test_inks_become_the_grey_that_they_print(transform, progressive):
    data = adobe(saved(Image.fromarray(smooth(48, 64, 4), "CMYK"), quality=95, progressive=progressive), transform)
    with Image.open(io.BytesIO(data)) as picture:
        inks = np.asarray(picture).astype(float)  # Pillow takes every file for one of Adobe's, which store 255 - ink
    light = 255 - inks if transform is not None else inks
    assert abs(decode(data, "none") - light[:, :, :3] @ LUMA * light[:, :, 3] / 255).max() <= 1.5


def test_paper_without_ink_is_white():
    assert (decode(saved(Image.new("CMYK", (16, 16), (0, 0, 0, 0))), "none") == 255).all()
    assert (decode(saved(Image.new("CMYK", (16, 16), (0, 0, 0, 255))), "none") == 0).all()


@settings(max_examples=20, deadline=None)
@given(SIDES, SIDES, st.integers(1, 100))
def test_what_is_encoded_is_a_baseline_grey_jpeg_of_that_quality(height, width, quality):
    data = encode(cv2.GaussianBlur(noise(height, width), (0, 0), 3), quality)
    ours, theirs = Image.open(io.BytesIO(data)), io.BytesIO()
    Image.new("L", (8, 8)).save(theirs, "JPEG", quality=quality)
    assert (ours.format, ours.mode, ours.size) == ("JPEG", "L", (width, height))
    assert "progressive" not in ours.info
    assert ours.quantization == Image.open(theirs).quantization


def test_quality_95_costs_a_grey_level_or_so():
    image = cv2.add(smooth(128, 128), noise(128, 128) // 32)
    again = decode_grey(encode(image, 95))
    assert np.abs(again.astype(int) - image).mean() < 1.5
    np.testing.assert_array_equal(decode_grey(encode(np.asfortranarray(image), 95)), again)


def test_what_follows_the_end_of_a_file_is_ignored():
    for data in (encode(smooth(40, 40), 95), saved(Image.fromarray(smooth(40, 40)), "PNG")):
        np.testing.assert_array_equal(decode(data + b"\0" * 300, "none"), decode(data, "none"))


@pytest.mark.parametrize("how", [decode_grey, lambda data: decode(data, "none")])
def test_a_jpeg_cut_short_anywhere_is_truncated(how):
    data = encode(noise(100, 100), 95)
    for keep in {2, 3, 20, *np.linspace(25, len(data) - 3, 40).astype(int).tolist()}:
        assert reason(data[:keep], how) is Reason.TRUNCATED, f"{keep} of {len(data)} bytes"


@pytest.mark.parametrize(
    ("at", "value", "expected"),
    [
        (1, 0xC3, Reason.UNSUPPORTED),  # lossless
        (1, 0xC9, Reason.UNSUPPORTED),  # arithmetic-coded
        (1, 0xCA, Reason.UNSUPPORTED),
        (1, 0xF7, Reason.UNSUPPORTED),  # JPEG-LS
        (4, 12, Reason.UNSUPPORTED),  # 12 bits
        (9, 2, Reason.UNSUPPORTED),  # two components
        (6, 0, Reason.UNSUPPORTED),  # height 0: it follows in a DNL segment
        (8, 0, Reason.CORRUPT),  # width 0
    ],
)
def test_a_jpeg_of_a_kind_that_is_not_taken_is_refused_by_its_header(at, value, expected):
    data = bytearray(encode(noise(16, 16), 95))
    data[data.index(b"\xff\xc0") + at] = value
    assert reason(bytes(data)) is expected


@pytest.mark.parametrize("how", [decode_grey, lambda data: decode(data, "none")])
def test_a_header_that_promises_too_many_pixels_is_refused_before_they_are_allocated(how):
    data = bytearray(encode(noise(16, 16), 95))
    size = data.index(b"\xff\xc0") + 5
    data[size : size + 4] = (MAX_PIXELS // 32_768 + 1).to_bytes(2) + (32_768).to_bytes(2)
    assert reason(bytes(data), how) is Reason.TOO_LARGE


def progressive_bomb(side: int, scans: int) -> bytes:
    """A valid grey JPEG: after one scan for the means, each further one says in few bytes that no block has more to it."""

    def packed(bits: str) -> bytes:
        return int(bits + "1" * (-len(bits) % 8), 2).to_bytes(-(-len(bits) // 8)).replace(b"\xff", b"\xff\0")

    def table(kind: int, symbol: int) -> bytes:
        return segment(0xC4, bytes((kind << 4, 1, *[0] * 15, symbol)))  # its one code is the bit 0

    blocks = (-(-side // 8)) ** 2
    runs = [len(run) for run in np.array_split(np.arange(blocks), -(-blocks // 2**15) + 1)]
    nothing = packed("".join(f"0{run - 2**14:014b}" for run in runs))
    bands = [(band, low) for low in range(10, -1, -1) for band in range(1, 64)][:scans]
    return b"".join(
        [
            b"\xff\xd8" + segment(0xDB, b"\0" + b"\1" * 64),
            segment(0xC2, b"\x08" + side.to_bytes(2) * 2 + b"\1\1\x11\0"),
            table(0, 0) + segment(0xDA, bytes((1, 1, 0, 0, 0, 0))) + packed("0" * blocks),
            table(1, 0xE0),
            *(
                segment(0xDA, bytes((1, 1, 0, band, band, (low + 1 if low < 10 else 0) << 4 | low))) + nothing
                for band, low in bands
            ),
            b"\xff\xd9",
        ]
    )


def test_a_small_file_cannot_ask_for_many_passes_over_many_pixels():
    assert decode(progressive_bomb(2048, 20), "none").shape == (2048, 2048)
    assert reason(progressive_bomb(8192, 100)) is Reason.TOO_LARGE


# PNG


KINDS = [
    (colour, depth)
    for colour, depths in {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}.items()
    for depth in depths
]
"""PNG's colour types (grey, RGB, palette, grey and alpha, RGB and alpha) and bits a sample."""
PASSES = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))


def unpacked(samples: np.ndarray, depth: int) -> bytes:
    """(rows, columns, channels) → filter bytes and samples of `depth` bits, rows padded to whole bytes."""
    rows = samples.reshape(len(samples), -1)
    bits = rows[:, :, None] >> np.arange(depth - 1, -1, -1) & 1
    packed = np.packbits(bits.reshape(len(rows), -1).astype(np.uint8), axis=1)
    return np.insert(packed, 0, 0, axis=1).tobytes()


def png_of(samples: np.ndarray, colour: int, depth: int, interlaced: bool, palette: np.ndarray | None = None) -> bytes:
    height, width = samples.shape[:2]
    header = width.to_bytes(4) + height.to_bytes(4) + bytes((depth, colour, 0, 0, interlaced))
    steps = PASSES if interlaced else ((0, 0, 1, 1),)
    parts = [samples[top::down, left::right] for top, left, down, right in steps]
    raw = b"".join(unpacked(part, depth) for part in parts if part.size)
    colours = [(b"PLTE", palette.astype(np.uint8).tobytes())] if palette is not None else []
    packed = zlib.compress(raw)
    halves = [(b"IDAT", packed[: len(packed) // 2]), (b"IDAT", packed[len(packed) // 2 :])]
    return png([(b"IHDR", header), *colours, *halves, (b"IEND", b"")])


@pytest.mark.parametrize(("colour", "depth"), KINDS)
@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (37, 50)])
def test_every_kind_of_png_becomes_its_luma_without_its_alpha(colour, depth, interlaced, shape):
    rng = np.random.default_rng(depth)
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    samples = rng.integers(0, 2**depth, (*shape, channels))
    palette = rng.integers(0, 256, (2**depth, 3)) if colour == 3 else None
    image = decode(png_of(samples, colour, depth, interlaced, palette), "none")
    if palette is not None:
        expected = (palette @ LUMA)[samples[:, :, 0]]
    else:
        light = samples[:, :, :3] @ LUMA if channels > 2 else samples[:, :, 0]
        expected = light * 255 / (2**depth - 1)
    assert image.shape == shape
    assert image.dtype == np.uint8
    assert abs(image - expected).max() <= (0.5 if channels < 3 and palette is None else 1)


def test_real_and_written_pngs_are_what_pillow_makes_of_them():
    files = [saved(Image.fromarray(smooth(90, 61)), "PNG"), saved(Image.fromarray(noise(90, 61)), "PNG", optimize=True)]
    files += [path.read_bytes() for path in sorted((REAL / "single").glob("*.png"))]
    for data in files:
        np.testing.assert_array_equal(decode(data, "none"), np.asarray(Image.open(io.BytesIO(data))))


def test_constant_alpha_changes_nothing():
    image = smooth(50, 40)
    opaque = np.dstack([image] * 3 + [np.full_like(image, 255)])
    for data in (saved(Image.fromarray(opaque), "PNG"), saved(Image.fromarray(opaque[:, :, 2:]), "PNG")):
        np.testing.assert_array_equal(decode(data, "none"), image)


def wide(image: np.ndarray) -> bytes:
    return cv2.imencode(".png", image.astype(np.uint16))[1].tobytes()


@given(st.lists(st.integers(0, 65_535), min_size=1, max_size=60))
@settings(deadline=None)
def test_sixteen_bits_keep_their_whole_range_unless_asked_to_be_stretched(values):
    pixels = np.array([values])
    np.testing.assert_array_equal(decode(wide(pixels), "none"), np.rint(pixels / 257))
    shown = decode(wide(pixels), "window")
    spread = pixels.max() - pixels.min()
    np.testing.assert_allclose(shown, (pixels - pixels.min()) * 255 / max(1, spread), atol=0.5 + 1e-9)


def test_sixteen_bits_are_prepared_as_mimic_was():
    pixels = smooth(60, 80).astype(np.uint16) * 13 + 700
    shifted = pixels - pixels.min()
    expected = cv2.equalizeHist((shifted / shifted.max() * 255).astype(np.uint8))
    np.testing.assert_array_equal(decode(wide(pixels), "mimic"), expected)


def test_a_png_cut_short_anywhere_is_truncated():
    data = png_of(noise(20, 30)[:, :, None], 0, 8, False)
    for keep in range(8, len(data)):
        assert reason(data[:keep]) is Reason.TRUNCATED, f"{keep} of {len(data)} bytes"


def test_no_single_bit_of_a_png_can_change_unnoticed():
    data = png([*png_chunks(png_of(noise(6, 5)[:, :, None], 0, 8, False))[:1], (b"tEXt", b"a\0b")])
    data += png_of(noise(6, 5)[:, :, None], 0, 8, False)[33:]
    assert decode(data, "none").shape == (6, 5)
    for position in range(len(data) * 8):
        spoilt = bytearray(data)
        spoilt[position // 8] ^= 1 << position % 8
        assert reason(bytes(spoilt)) in Reason


def replaced(data: bytes, kind: bytes, content: bytes) -> bytes:
    """The PNG with one chunk of that kind, checksum and all."""
    chunks = {name: held for name, held in png_chunks(data)}
    return png([(name, content if name == kind else held) for name, held in chunks.items()])


GREY = png_of(noise(20, 30)[:, :, None], 0, 8, False)
ROWS = np.insert(noise(20, 30), 0, 0, axis=1).tobytes()


def header(width: int, height: int, *rest: int) -> bytes:
    return width.to_bytes(4) + height.to_bytes(4) + bytes(rest)


SPOILT = {
    "half of the rows": (replaced(GREY, b"IDAT", zlib.compress(ROWS[: 31 * 10])), Reason.TRUNCATED),
    "half of the stream": (replaced(GREY, b"IDAT", zlib.compress(ROWS)[:300]), Reason.TRUNCATED),
    "a byte missing": (replaced(GREY, b"IDAT", zlib.compress(ROWS)[:-1]), Reason.TRUNCATED),
    "a row too many": (replaced(GREY, b"IDAT", zlib.compress(ROWS + ROWS[:31])), Reason.CORRUPT),
    "another checksum of the stream": (replaced(GREY, b"IDAT", zlib.compress(ROWS)[:-4] + b"abcd"), Reason.CORRUPT),
    "no stream": (replaced(GREY, b"IDAT", b"not packed at all"), Reason.CORRUPT),
    "an unknown filter": (replaced(GREY, b"IDAT", zlib.compress(ROWS[:310] + b"\5" + ROWS[311:])), Reason.CORRUPT),
    "an unknown depth": (replaced(GREY, b"IHDR", header(30, 20, 3, 0, 0, 0, 0)), Reason.CORRUPT),
    "an unknown colour": (replaced(GREY, b"IHDR", header(30, 20, 8, 5, 0, 0, 0)), Reason.CORRUPT),
    "no columns": (replaced(GREY, b"IHDR", header(0, 20, 8, 0, 0, 0, 0)), Reason.CORRUPT),
    "no palette": (replaced(GREY, b"IHDR", header(30, 20, 8, 3, 0, 0, 0)), Reason.CORRUPT),
    "a short palette": (png_of(noise(9, 9)[:, :, None], 3, 8, False, np.zeros((40, 3))), Reason.CORRUPT),
    "a chunk nobody knows": (png([*png_chunks(GREY)[:1], (b"NEWS", b""), *png_chunks(GREY)[1:]]), Reason.UNSUPPORTED),
    "no header": (png(png_chunks(GREY)[1:]), Reason.CORRUPT),
    "pixels for a wall": (replaced(GREY, b"IHDR", header(60_000, 60_000, 8, 0, 0, 0, 0)), Reason.TOO_LARGE),
    "a line round the world": (replaced(GREY, b"IHDR", header(2**26, 1, 8, 0, 0, 0, 0)), Reason.TOO_LARGE),
    "more colour than memory": (replaced(GREY, b"IHDR", header(8000, 8000, 16, 6, 0, 0, 0)), Reason.TOO_LARGE),
    "a bomb of pixels": (replaced(GREY, b"IDAT", zlib.compress(bytes(2**27), 1)), Reason.CORRUPT),
}


@pytest.mark.parametrize("what", SPOILT)
def test_a_png_that_was_written_wrong_is_refused(what):
    data, expected = SPOILT[what]
    assert reason(data) is expected


def test_text_profiles_and_animation_are_neither_read_nor_unpacked():
    bomb = zlib.compress(bytes(2**27), 1)
    others = [
        (b"iCCP", b"name\0\0" + zlib.compress(b"no profile")),
        (b"gAMA", bytes(4)),
        (b"eXIf", exif(6)[10:]),
        (b"acTL", bytes(8)),
        (b"zTXt", b"key\0\0" + bomb),
        (b"iTXt", b"key\0\1\0\0\0" + bomb),
    ]
    first, *rest = png_chunks(GREY)
    np.testing.assert_array_equal(decode(png([first, *others, *rest]), "none"), decode(GREY, "none"))


DECODE_ALL = """
import pickle, sys
from mutator import peak
from cxrfast.shards.images.decode import BadImage, decode
for data in pickle.load(sys.stdin.buffer):
    for grey in ("none", "mimic", "window"):
        try:
            decode(data, grey)
        except BadImage as error:
            print(error)
print(peak())
"""


def test_no_library_writes_to_stderr_and_no_bomb_takes_memory():
    jpeg = encode(noise(60, 60), 95)
    first, *rest = png_chunks(GREY)
    files = [data for data, _ in SPOILT.values()]
    files += [png([first, (b"iCCP", b"x\0\0" + zlib.compress(b"y")), (b"tRNS", b"\xff"), *rest]), GREY[:300]]
    files += [jpeg[:500], jpeg + b"junk", jpeg[:500] + b"\xff\xd0" + jpeg[520:], jpeg[:2] + b"\0\0" + jpeg[2:]]
    done = subprocess.run(
        [sys.executable, "-c", DECODE_ALL],
        input=pickle.dumps(files),
        capture_output=True,
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join((str(TESTS), str(TESTS.parent)))},
    )
    assert not done.stderr
    assert int(done.stdout.split()[-1]) < 400


# Other files


def test_no_bytes_are_empty():
    assert reason(b"") is Reason.EMPTY
    assert reason(b"", decode_grey) is Reason.EMPTY


@pytest.mark.parametrize("kind", ["BMP", "TIFF", "GIF", "WebP", "JPEG2000"])
def test_another_format_is_named(kind):
    with pytest.raises(BadImage, match=r"unsupported format: \w") as caught:
        decode(saved(Image.fromarray(noise(9, 9)), kind), "none")
    assert caught.value.reason is Reason.UNSUPPORTED


@pytest.mark.parametrize("kind", ["PNG", "BMP"])
def test_our_own_images_are_jpegs_and_nothing_else(kind):
    assert reason(saved(Image.fromarray(noise(9, 9)), kind), decode_grey) is Reason.NOT_AN_IMAGE


@pytest.mark.parametrize("data", [b"<html></html>", b"\0" * 1000, b"\xff", b"JFIF", b"\x89PNG", b"RIFF....WAVE"])
def test_what_never_was_a_picture_is_not_an_image(data):
    assert reason(data) is Reason.NOT_AN_IMAGE


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
