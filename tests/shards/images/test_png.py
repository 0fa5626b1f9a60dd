import io
import pickle
import subprocess
import sys
import zlib

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mutator import png, png_chunks
from pictures import LUMA, exif, noise, reason, saved, smooth
from PIL import Image
from sets import REAL

from cxrfast.shards.images.bad_image import Reason
from cxrfast.shards.images.decode import decode, encode

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


def wide(image: np.ndarray) -> bytes:
    return cv2.imencode(".png", image.astype(np.uint16))[1].tobytes()


@given(st.lists(st.integers(0, 65_535), min_size=1, max_size=60))
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


def test_a_png_cut_short_anywhere_is_truncated_and_no_single_bit_can_change_unnoticed():
    data = png([*png_chunks(png_of(noise(6, 5)[:, :, None], 0, 8, False))[:1], (b"tEXt", b"a\0b")])
    data += png_of(noise(6, 5)[:, :, None], 0, 8, False)[33:]
    assert decode(data, "none").shape == (6, 5)
    for keep in range(8, len(data)):
        assert reason(data[:keep]) is Reason.TRUNCATED, f"{keep} of {len(data)} bytes"
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
    "an unknown critical chunk": (
        png([*png_chunks(GREY)[:1], (b"NEWS", b""), *png_chunks(GREY)[1:]]),
        Reason.UNSUPPORTED,
    ),
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
from cxrfast.shards.images.bad_image import BadImage
from cxrfast.shards.images.decode import decode
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
    command = [sys.executable, "-c", DECODE_ALL]
    done = subprocess.run(command, input=pickle.dumps(files), capture_output=True, check=True)
    assert not done.stderr
    assert int(done.stdout.split()[-1]) < 400
