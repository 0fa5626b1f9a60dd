"""PNG bytes → grey pixels of 8 or 16 bits.

Pillow returns half the rows of a truncated file and OpenCV's libpng writes to stderr, so chunks are checked and pixels
inflated here; OpenCV then only undoes the row filters, in a PNG that we wrote ourselves.
"""

import struct
import zlib

import cv2
import numpy as np

from cxrfast.shards.images.bad_image import MAX_PIXELS, BadImage, Reason, check_size

SIGNATURE = b"\x89PNG\r\n\x1a\n"
BIT_DEPTH = 24
"""Place in the file of the byte that says the bits per sample."""
GREY, RGB, PALETTE, GREY_ALPHA, RGB_ALPHA = 0, 2, 3, 4, 6
CHANNELS = {GREY: 1, RGB: 3, PALETTE: 1, GREY_ALPHA: 2, RGB_ALPHA: 4}
DEPTHS = {GREY: (1, 2, 4, 8, 16), RGB: (8, 16), PALETTE: (1, 2, 4, 8), GREY_ALPHA: (8, 16), RGB_ALPHA: (8, 16)}
ADAM7 = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))
"""First row, first column, row step and column step of each interlacing pass (PNG specification, section 8.2)."""
MAX_BYTES = 4 * MAX_PIXELS
"""Most bytes of unpacked pixels: 8-bit RGBA at the largest size."""


def decode_png(data: bytes) -> np.ndarray:
    """PNG bytes → uint8, or uint16 of a 16-bit file, (H, W); colour becomes luma (ITU-R 601). Raises BadImage.

    Alpha is ignored, not composited: it is constant in the radiographs that have it (a few hundred of NIH ChestX-ray14).
    Text, profiles, gamma, orientation and animation are ignored too, and so are significant bits (sBIT): samples fill the
    whole depth whatever their number (PNG specification, section 12.4). A wrong checksum and missing or extra rows are refused.
    """
    header, palette, packed = _read(data)
    width, height, depth, colour, *rest, interlaced = struct.unpack(">IIBBBBB", header)
    if depth not in DEPTHS.get(colour, ()) or any(rest) or interlaced > 1:
        raise BadImage(Reason.CORRUPT, "a PNG header with invalid values")
    check_size(height, width)
    rows = _rows(height, width, depth * CHANNELS[colour], interlaced)
    raw = _inflate(packed, sum(count * (1 + length) for count, length in rows))
    _check_filters(raw, rows)
    if colour == PALETTE:  # read as grey, or libpng would report wrong indexes on stderr
        header = struct.pack(">IIBBBBB", width, height, depth, GREY, 0, 0, interlaced)
    chunks = (_chunk(b"IHDR", header), _chunk(b"IDAT", zlib.compress(raw, 0)), _chunk(b"IEND", b""))
    del raw
    image = cv2.imdecode(np.frombuffer(SIGNATURE + b"".join(chunks), np.uint8), cv2.IMREAD_UNCHANGED)
    if image is None or image.shape[:2] != (height, width):
        raise BadImage(Reason.CORRUPT)
    if colour == PALETTE:
        return _look_up(palette, image // (255 // (2**depth - 1)))
    if colour in (RGB, RGB_ALPHA):
        return cv2.cvtColor(image, cv2.COLOR_BGR2GRAY if colour == RGB else cv2.COLOR_BGRA2GRAY)
    return np.ascontiguousarray(image[:, :, 0]) if image.ndim == 3 else image


def bare_png(data: bytes) -> bytes:
    """The PNG without text, profiles, animation and whatever else it holds besides its pixels and palette. Raises BadImage."""
    if not data.startswith(SIGNATURE):
        raise BadImage(Reason.CORRUPT, "not a PNG")
    decode_png(data)
    header, palette, packed = _read(data)
    chunks = [(b"IHDR", header), *([(b"PLTE", palette)] if palette else []), (b"IDAT", packed), (b"IEND", b"")]
    return SIGNATURE + b"".join(_chunk(kind, content) for kind, content in chunks)


def _read(data: bytes) -> tuple[bytes, bytes, bytes]:
    """Contents of IHDR, PLTE and all IDAT. Every chunk up to IEND is checked against its CRC."""
    header = palette = None
    packed: list[memoryview] = []
    view, at, kind = memoryview(data), len(SIGNATURE), b""
    while kind != b"IEND":
        end = at + 8 + int.from_bytes(view[at : at + 4])
        if end + 4 > len(data):
            raise BadImage(Reason.TRUNCATED)
        if zlib.crc32(view[at + 4 : end]) != int.from_bytes(view[end : end + 4]):
            raise BadImage(Reason.CORRUPT, "a PNG with a wrong checksum")
        kind, content = bytes(view[at + 4 : at + 8]), view[at + 8 : end]
        at = end + 4
        if header is None:
            if kind != b"IHDR" or len(content) != 13:
                raise BadImage(Reason.CORRUPT, "a PNG that does not start with its header")
            header = bytes(content)
        elif kind == b"PLTE":
            palette = bytes(content)
        elif kind == b"IDAT":
            packed.append(content)
        elif not kind[0] & 0x20 and kind != b"IEND":  # a capital letter: must not be ignored
            raise BadImage(Reason.UNSUPPORTED, "a PNG with an unknown critical chunk")
    return header or b"", palette or b"", b"".join(packed)


def _chunk(kind: bytes, content: bytes) -> bytes:
    checksum = zlib.crc32(content, zlib.crc32(kind))
    return b"".join((len(content).to_bytes(4), kind, content, checksum.to_bytes(4)))


def _rows(height: int, width: int, bits: int, interlaced: int) -> list[tuple[int, int]]:
    """(rows, bytes per row without its filter byte) of each pass; a single pass if not interlaced."""
    passes = ADAM7 if interlaced else ((0, 0, 1, 1),)
    sizes = [(len(range(top, height, down)), len(range(left, width, right))) for top, left, down, right in passes]
    return [(rows, (columns * bits + 7) // 8) for rows, columns in sizes if rows and columns]


def _inflate(packed: bytes, size: int) -> bytes:
    """Inflate the pixels and filter bytes: exactly `size` bytes, and never more than one extra in memory."""
    if size > MAX_BYTES:
        raise BadImage(Reason.TOO_LARGE, f"{size:,} bytes of pixels")
    stream = zlib.decompressobj()
    try:
        raw = stream.decompress(packed, size + 1)
    except zlib.error as error:
        raise BadImage(Reason.CORRUPT) from error
    if len(raw) > size:
        raise BadImage(Reason.CORRUPT, "a PNG with more rows than its header says")
    if len(raw) < size or not stream.eof:
        raise BadImage(Reason.TRUNCATED)
    return raw


def _check_filters(raw: bytes, rows: list[tuple[int, int]]) -> None:
    """Raise BadImage if a row's filter is not one of the five."""
    at, values = 0, np.frombuffer(raw, np.uint8)
    for count, length in rows:
        end = at + count * (1 + length)
        if values[at : end : 1 + length].max() > 4:
            raise BadImage(Reason.CORRUPT, "a PNG row with an unknown filter")
        at = end


def _look_up(palette: bytes, indexes: np.ndarray) -> np.ndarray:
    if not palette or len(palette) % 3 or indexes.max() >= len(palette) // 3:
        raise BadImage(Reason.CORRUPT, "a PNG whose palette lacks colours")
    colours = np.frombuffer(palette, np.uint8).reshape(1, -1, 3)
    return cv2.cvtColor(colours, cv2.COLOR_RGB2GRAY)[0][indexes]
