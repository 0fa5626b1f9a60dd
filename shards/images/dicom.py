"""DICOM bytes → uint8 grey pixels, low values dark. Import only when a DICOM file turns up: pydicom is an optional extra.

Header values are checked before anything is unpacked. A missing decoder is an error that names it, never a refused image:
which images a set holds must not depend on what is installed.
"""

import io
import struct
import warnings
from itertools import pairwise
from typing import Any

import numpy as np

from cxrfast.errors import ShardError
from cxrfast.shards.images.bad_image import BadImage, Reason, check_size
from cxrfast.shards.images.grey import as_mimic
from cxrfast.shards.images.jpeg import BASELINE, EOI, EXTENDED, JPEG_LS, LOSSLESS, decode_grey, read_frame
from cxrfast.shards.images.remark import Remark

try:
    from pydicom.dataelem import RawDataElement
    from pydicom.dataset import Dataset
    from pydicom.encaps import encapsulate, generate_frames
    from pydicom.filereader import read_dataset, read_partial, read_preamble
    from pydicom.pixels import get_decoder
    from pydicom.uid import UID

    from cxrfast.shards.images import voi
except ImportError as missing:
    raise ShardError("DICOM files need pydicom: pip install 'cxrfast[dicom]'") from missing

RADIOGRAPHY = ("CR", "DX", "DR", "RG")
"""Modalities of radiographs: computed, digital, film (PS3.3, section C.7.3.1.1.1); DR is not standard, but files use it."""
RADIOGRAPHS = {
    "1.2.840.10008.5.1.4.1.1.1": "Computed Radiography",
    "1.2.840.10008.5.1.4.1.1.1.1": "Digital X-Ray, for presentation",
    "1.2.840.10008.5.1.4.1.1.1.1.1": "Digital X-Ray, for processing",
    "1.2.840.10008.5.1.4.1.1.7": "Secondary Capture",
}
"""SOP classes (PS3.6, annex A) accepted when the modality is absent; so are classes that the annex does not list."""

IMPLICIT, EXPLICIT, BIG_ENDIAN = "1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2"
JPEG = {f"1.2.840.10008.1.2.4.{n}" for n in (50, 51, 57, 70, 80, 81)}
"""Baseline, extended, lossless (two), JPEG-LS (two)."""
JPEG_2000 = {f"1.2.840.10008.1.2.4.{n}" for n in (90, 91, 201, 202, 203)}
"""JPEG 2000, plain and high-throughput."""
RLE = "1.2.840.10008.1.2.5"
SYNTAXES = {IMPLICIT, EXPLICIT, BIG_ENDIAN, RLE, *JPEG, *JPEG_2000}
"""Supported transfer syntaxes. Not deflated: pydicom would inflate a file of any size before its header can be read."""

PIXEL_DATA = 0x7FE00010
UNDEFINED = 0xFFFFFFFF
"""Length of an element that ends with a delimiter."""
AS_STORED: dict[str, Any] = {"raw": True, "correct_unused_bits": False}
"""Options for pydicom, which would otherwise take the lowest bits for the stored ones."""
TAGS: list = [
    0x00080016,  # SOP class
    0x00080060,  # modality
    *(0x00280000 + n for n in (0x0002, 0x0004, 0x0008, 0x0010, 0x0011, 0x0100, 0x0101, 0x0102, 0x0103)),  # the pixels
    *(0x00280000 + n for n in (0x0120, 0x0121)),  # padding
    *(0x00280000 + n for n in (0x1050, 0x1051, 0x1052, 0x1053, 0x1056, 0x3000, 0x3010)),  # what their values mean
    0x20500020,  # presentation LUT shape
    PIXEL_DATA,
]


def decode_dicom(data: bytes, grey: str) -> tuple[np.ndarray, list[Remark]]:
    """DICOM bytes, preamble included → uint8 (H, W) by the grey transform `mimic` or `window`, and remarks.

    `mimic`: stored values without modality or VOI LUT and with any padding, the way MIMIC-CXR-JPG was made
    (`grey.as_mimic`). `window`: as a viewer shows them (`voi.Display`). MONOCHROME1 is inverted. Colour, several frames and
    modalities other than radiography are refused. Raises BadImage, or ShardError if a decoder is missing.
    """
    if grey not in ("mimic", "window"):
        raise ShardError("DICOM files need a grey transform: --grey mimic (as MIMIC-CXR-JPG was made) or --grey window")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what pydicom warns about is either refused here or harmless
        try:
            dataset = _read(data)
            _check(dataset)
            codes = _codes(dataset)
            if grey == "mimic":
                remarks = [Remark.PADDING] if voi.padding_widens(codes, dataset) else []
                return as_mimic(codes, voi.is_inverted(dataset)), remarks
            display = voi.Display(dataset)
            return display.table(codes)[codes], display.remarks
        except (ShardError, MemoryError):
            raise
        except EOFError as error:
            raise BadImage(Reason.TRUNCATED) from error
        except Exception as error:  # pydicom's parsers raise all kinds of exceptions for a damaged element
            raise BadImage(Reason.CORRUPT) from error


def _read(data: bytes) -> Dataset:
    """Read the elements in TAGS, once the transfer syntax is known to be supported.

    A file that names no transfer syntax is read by what its first element looks like, little endian and implicit unless
    it has a value representation (PS3.10 asks for the name, PS3.5, section 10.1, for the default).
    """
    file = io.BytesIO(data)
    read_preamble(file, False)
    meta = read_dataset(file, False, True, stop_when=lambda tag, vr, length: tag >> 16 != 2)
    _check_whole(meta)
    if "TransferSyntaxUID" in meta and meta.TransferSyntaxUID not in SYNTAXES:
        raise BadImage(Reason.UNSUPPORTED, f"DICOM, {UID(meta.TransferSyntaxUID).name}")
    file.seek(0)
    dataset = read_partial(file, stop_when=lambda tag, vr, length: tag > PIXEL_DATA, specific_tags=TAGS)
    _check_whole(dataset)
    if "TransferSyntaxUID" not in meta:
        if "PixelData" in dataset and dataset["PixelData"].is_undefined_length:
            raise BadImage(Reason.UNSUPPORTED, "compressed DICOM that does not name its transfer syntax")
        implicit, little = dataset.original_encoding
        dataset.file_meta.TransferSyntaxUID = UID(IMPLICIT if implicit else EXPLICIT if little else BIG_ENDIAN)
    return dataset


def _check_whole(dataset: Dataset) -> None:
    """Raise BadImage if the file ends inside an element; pydicom returns the part that is there."""
    for element in map(dataset.get_item, dataset.keys()):
        if isinstance(element, RawDataElement) and len(element.value or b"") < element.length != UNDEFINED:
            raise BadImage(Reason.TRUNCATED)


def _check(dataset: Dataset) -> None:
    """Raise BadImage unless the header describes one grey radiograph of a sensible size."""
    modality = str(dataset.get("Modality") or "").strip().upper()
    kind = UID(str(dataset.get("SOPClassUID") or dataset.file_meta.get("MediaStorageSOPClassUID") or ""))
    if modality and modality not in RADIOGRAPHY:
        raise BadImage(Reason.NOT_A_RADIOGRAPH, f"modality {modality}")
    if "PixelData" not in dataset:
        raise BadImage(Reason.TRUNCATED, "no pixels")
    if not modality and kind.name != kind and kind not in RADIOGRAPHS:
        raise BadImage(Reason.NOT_A_RADIOGRAPH, kind.name)
    frames = int(dataset.get("NumberOfFrames") or 1)
    if frames > 1:
        raise BadImage(Reason.MULTI_FRAME, f"{frames:,}")
    dataset.PhotometricInterpretation = photometric = str(dataset.PhotometricInterpretation).strip(" \0").upper()
    if dataset.SamplesPerPixel != 1 or photometric not in ("MONOCHROME1", "MONOCHROME2"):
        raise BadImage(Reason.UNSUPPORTED, f"DICOM in colour ({photometric})")
    check_size(int(dataset.Rows), int(dataset.Columns))
    allocated, stored, high = dataset.BitsAllocated, dataset.BitsStored, _high_bit(dataset)
    if allocated not in (8, 16):
        raise BadImage(Reason.UNSUPPORTED, f"DICOM of {allocated} bits per pixel")
    if not 1 <= stored <= high + 1 <= allocated or dataset.PixelRepresentation not in (0, 1):
        raise BadImage(Reason.CORRUPT, f"{stored} bits stored in {allocated}, the highest is {high}")


def _high_bit(dataset: Dataset) -> int:
    return dataset.get("HighBit", dataset.BitsStored - 1)


def _codes(dataset: Dataset) -> np.ndarray:
    """uint8 or uint16 (H, W): only the stored bits (PS3.5, section 8.1.1), ordered like the values they represent."""
    pixels = _unpacked(dataset) if dataset.file_meta.TransferSyntaxUID.is_encapsulated else _native(dataset)
    if pixels.shape != (dataset.Rows, dataset.Columns) or pixels.dtype.kind not in "iu":
        raise BadImage(Reason.CORRUPT, "pixel data that does not match its header")
    bits = pixels.astype(pixels.dtype.newbyteorder("="), copy=False).view(f"u{pixels.itemsize}")
    stored = dataset.BitsStored
    codes = (bits >> (_high_bit(dataset) + 1 - stored)) & bits.dtype.type(2**stored - 1)
    return codes ^ codes.dtype.type(2 ** (stored - 1)) if dataset.PixelRepresentation else codes  # flips the sign bit


def _native(dataset: Dataset) -> np.ndarray:
    """Uncompressed pixels. More bytes than the image has are padding if they are all the same; else the header is wrong."""
    expected, found = dataset.Rows * dataset.Columns * dataset.BitsAllocated // 8, len(dataset.PixelData)
    surplus = dataset.PixelData[expected + expected % 2 :]
    if found < expected or surplus.strip(surplus[:1]):
        raise BadImage(
            Reason.TRUNCATED if found < expected else Reason.CORRUPT, f"{found:,} bytes of pixels, not {expected:,}"
        )
    if surplus:
        dataset.PixelData = dataset.PixelData[: -len(surplus)]
    return get_decoder(dataset.file_meta.TransferSyntaxUID).as_array(dataset, **AS_STORED)[0]


def _unpacked(dataset: Dataset) -> np.ndarray:
    """Decode the one frame, if its own header agrees with the file's: decoders allocate what the former says."""
    syntax = dataset.file_meta.TransferSyntaxUID
    frame = next(generate_frames(dataset.PixelData, number_of_frames=1))
    size = dataset.Rows, dataset.Columns
    if syntax in JPEG_2000 and frame[4:8] == b"jP  ":
        frame = _codestream(frame)
        dataset.PixelData = encapsulate([frame])
    if syntax == RLE:
        return _run_lengths(frame, dataset)
    if syntax in JPEG:
        found = read_frame(frame)
        if found is None or (found.height, found.width, found.components) != (*size, 1):
            raise BadImage(Reason.CORRUPT, "a frame that does not match its header")
        if found.process in (BASELINE, EXTENDED) and found.precision == 8:
            return decode_grey(frame)
        if found.process not in (EXTENDED, LOSSLESS, JPEG_LS):
            raise BadImage(Reason.UNSUPPORTED, f"DICOM, JPEG process SOF{found.process - 0xC0}")
    elif _jpeg_2000_size(frame) != size:
        raise BadImage(Reason.CORRUPT, "a frame that does not match its header")
    if not frame.rstrip(b"\0\xff").endswith(EOI):  # the same two bytes in all these formats
        raise BadImage(Reason.TRUNCATED)
    decoder = get_decoder(syntax)
    if "pylibjpeg" not in decoder.available_plugins:
        raise ShardError(f"no decoder for DICOM files in {syntax.name}: pip install 'cxrfast[dicom]'")
    return decoder.as_array(dataset, index=0, decoding_plugin="pylibjpeg", **AS_STORED)[0]


def _run_lengths(frame: bytes, dataset: Dataset) -> np.ndarray:
    """Decode PackBits, one segment for each byte of a pixel, highest first (PS3.5, annex G).

    Not by pydicom, which unpacks bombs to any size, nor by pylibjpeg-rle, which panics on damage.
    """
    planes, size = dataset.BitsAllocated // 8, dataset.Rows * dataset.Columns
    count, *starts = struct.unpack("<16L", frame[:64])
    if count != planes:
        raise BadImage(Reason.CORRUPT, f"{count} run-length segments, not {planes}")
    pixels = np.zeros(size, f"u{planes}")
    for start, end in pairwise([*starts[:planes], len(frame)]):
        segment, plane, at = frame[start:end], bytearray(), 0
        while len(plane) < size and at < len(segment):
            run = segment[at]
            if run < 128:
                plane += segment[at + 1 : at + 2 + run]
                at += 2 + run
            else:
                plane += segment[at + 1 : at + 2] * (257 - run if run > 128 else 0)
                at += 2 if run > 128 else 1
        if len(plane) < size:
            raise BadImage(Reason.TRUNCATED)
        pixels = (pixels << (8 * (planes - 1))) | np.frombuffer(plane, np.uint8, size)
    return pixels.reshape(dataset.Rows, dataset.Columns)


def _codestream(file: bytes) -> bytes:
    """The JPEG 2000 codestream in a JP2 file (ISO 15444-1, annex I), which DICOM does not allow but some writers store."""
    at = 0
    while at + 8 <= len(file):
        length, kind = int.from_bytes(file[at : at + 4]), file[at + 4 : at + 8]
        header = 16 if length == 1 else 8
        if length == 1:
            length = int.from_bytes(file[at + 8 : at + 16])
        if kind == b"jp2c":
            return file[at + header : at + length if length else len(file)]
        if length < header:
            break
        at += length
    raise BadImage(Reason.CORRUPT, "a JP2 file without a codestream")


def _jpeg_2000_size(frame: bytes) -> tuple[int, int] | None:
    """(height, width) of a codestream with one component, from its SIZ segment (ISO 15444-1, section A.5.1)."""
    if frame[:4] != b"\xff\x4f\xff\x51" or int.from_bytes(frame[40:42]) != 1:
        return None
    right, bottom, left, top = struct.unpack(">4L", frame[8:24])
    return bottom - top, right - left
