import io
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from mutator import jpeg_segments
from pictures import LUMA, exif, noise, reason, saved, segment, smooth
from PIL import Image, ImageOps

from cxrfast.shards.images.bad_image import MAX_PIXELS, Reason
from cxrfast.shards.images.decode import decode, encode
from cxrfast.shards.images.jpeg import decode_grey

SIDES = st.integers(1, 260)


@pytest.fixture(scope="module")
def real_files(real_tree):
    """Sorted by size: small ones in colour first, the last ones of about 2500 × 1970 px."""
    return sorted(real_tree.rglob("*.jpg"), key=lambda path: path.stat().st_size)


def test_a_plain_file_is_decoded_as_ever_and_as_pillow_does(real_files):
    for path in [*real_files[:60], *real_files[-4:]]:
        data = path.read_bytes()
        with Image.open(path) as picture:
            picture.draft("L", picture.size)
            np.testing.assert_array_equal(decode_grey(data), np.asarray(picture.convert("L")), str(path))
        for grey in ("none", "mimic", "window"):
            np.testing.assert_array_equal(decode(data, grey), decode_grey(data))


@pytest.mark.parametrize("progressive", [False, True])
def test_colour_becomes_luma_and_paper_without_ink_is_white(progressive):
    colour = smooth(64, 64, 3)
    data = saved(Image.fromarray(colour), quality=100, subsampling=0, progressive=progressive)
    assert abs(decode(data, "none") - colour @ LUMA).max() <= 3
    np.testing.assert_array_equal(
        decode(saved(Image.fromarray(colour[:, :, 0]), progressive=progressive), "none"),
        decode(saved(Image.fromarray(colour[:, :, 0])), "none"),
    )
    for ink, light in ((0, 255), (255, 0)):
        assert (
            decode(saved(Image.new("CMYK", (16, 16), (0, 0, 0, ink)), progressive=progressive), "none") == light
        ).all()


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


@settings(max_examples=200)
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


@settings(max_examples=20)
@given(SIDES, SIDES, st.integers(1, 100))
def test_what_is_encoded_is_a_baseline_grey_jpeg_of_that_quality(height, width, quality):
    data = encode(cv2.GaussianBlur(noise(height, width), (0, 0), 3), quality)
    ours, theirs = Image.open(io.BytesIO(data)), io.BytesIO()
    Image.new("L", (8, 8)).save(theirs, "JPEG", quality=quality)
    assert (ours.format, ours.mode, ours.size) == ("JPEG", "L", (width, height))
    assert "progressive" not in ours.info
    assert ours.quantization == Image.open(theirs).quantization


@settings(max_examples=60)
@given(SIDES, SIDES, st.integers(1, 100), st.booleans())
def test_an_accurate_jpeg_has_pillow_s_bytes_and_the_fast_one_turbojpeg_s(height, width, quality, transposed):
    image = cv2.GaussianBlur(noise(height, width), (0, 0), 1)
    image = image.T if transposed else image
    saved_by_pillow = io.BytesIO()
    Image.fromarray(image).save(saved_by_pillow, "JPEG", quality=quality)
    assert encode(image, quality) == encode(image, quality, "accurate") == saved_by_pillow.getvalue()
    fast = simplejpeg.encode_jpeg(np.ascontiguousarray(image)[:, :, None], quality, "GRAY")
    assert encode(image, quality, "fast") == fast


def test_the_accurate_dct_is_nearer_to_the_image_and_its_files_are_no_larger():
    image = cv2.add(smooth(512, 512), noise(512, 512) // 16)
    data = {dct: encode(image, 95, dct) for dct in ("accurate", "fast")}
    errors = {dct: np.square(decode_grey(jpeg).astype(float) - image).mean() for dct, jpeg in data.items()}
    assert errors["accurate"] < 0.95 * errors["fast"]
    assert len(data["accurate"]) <= len(data["fast"])


def test_any_number_of_threads_encodes_the_same_bytes():
    images = [cv2.add(smooth(256, 256), noise(256, 256) // (4 + n)) for n in range(8)]
    expected = [encode(image, 95) for image in images]
    for threads in range(1, 9):
        with ThreadPoolExecutor(threads) as pool:
            assert list(pool.map(lambda image: encode(image, 95), images)) == expected


def test_quality_95_costs_a_grey_level_or_so():
    image = cv2.add(smooth(128, 128), noise(128, 128) // 32)
    again = decode_grey(encode(image, 95))
    assert np.abs(again.astype(int) - image).mean() < 1.5
    np.testing.assert_array_equal(decode_grey(encode(np.asfortranarray(image), 95)), again)


def test_what_follows_the_end_of_a_file_is_ignored():
    for data in (encode(smooth(40, 40), 95), saved(Image.fromarray(smooth(40, 40)), "PNG")):
        np.testing.assert_array_equal(decode(data + b"\0" * 300, "none"), decode(data, "none"))


@pytest.mark.parametrize("how", [decode_grey, lambda data: decode(data, "none")])
def test_a_jpeg_cut_short_anywhere_is_truncated_and_one_that_promises_too_many_pixels_too_large(how):
    data = bytearray(encode(noise(100, 100), 95))
    for keep in {2, 3, 20, *np.linspace(25, len(data) - 3, 40).astype(int).tolist()}:
        assert reason(bytes(data[:keep]), how) is Reason.TRUNCATED, f"{keep} of {len(data)} bytes"
    size = data.index(b"\xff\xc0") + 5
    data[size : size + 4] = (MAX_PIXELS // 32_768 + 1).to_bytes(2) + (32_768).to_bytes(2)
    assert reason(bytes(data), how) is Reason.TOO_LARGE, "before they are allocated"


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
