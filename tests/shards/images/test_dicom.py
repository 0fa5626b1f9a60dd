"""DICOM files written by pydicom, decoded by `shards.dicom` through `images.decode`."""

import io
import os
import struct
import subprocess
import sys
import warnings
import zlib
from pathlib import Path

import cv2
import numpy as np
import pydicom
import pytest
from conftest import REAL
from dicoms import baseline, framed, jpeg_2000, lossless, lossless_jpeg, radiograph, rle, written
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset
from pydicom.pixels.processing import apply_modality_lut, apply_voi_lut
from pydicom.uid import (
    MPEG2MPML,
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    DigitalXRayImageStorageForPresentation,
    ExplicitVRBigEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGExtended12Bit,
    JPEGLosslessSV1,
    RLELossless,
    SecondaryCaptureImageStorage,
)

from cxrfast.errors import ShardError
from cxrfast.shards.images.bad_image import MAX_PIXELS
from cxrfast.shards.images.decode import BadImage, Reason, decode

ROOT = Path(__file__).parents[3]


def shapes(height: int = 60, width: int = 76, bits: int = 12) -> np.ndarray:
    """uint16 (H, W) of that many bits, from end to end."""
    rng = np.random.default_rng(bits)
    image = cv2.GaussianBlur(rng.random((height, width)), (0, 0), 4)
    return np.rint(cv2.normalize(image, None, 0, 2**bits - 1, cv2.NORM_MINMAX)).astype(np.uint16)


def lut(entries: list[int], first: int, bits: int) -> list[Dataset]:
    """A modality or VOI LUT sequence."""
    item = Dataset()
    item.add_new("LUTDescriptor", "US" if first >= 0 else "SS", [len(entries) % 2**16, first, bits])
    item.add_new("LUTData", "US", entries)
    return [item]


def reason(data: bytes, grey: str = "window") -> Reason:
    with pytest.raises(BadImage) as caught:
        decode(data, grey)
    return caught.value.reason


def as_published(pixels: np.ndarray, inverted: bool) -> np.ndarray:
    """Johnson et al. 2019 (arXiv:1901.07042), step by step."""
    shifted = pixels - pixels.min()
    image = (shifted / shifted.max() * 255).astype(np.uint8)
    return cv2.equalizeHist(cv2.bitwise_not(image) if inverted else image)


# Grey


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_mimic_is_what_mimic_cxr_jpg_published(photometric, bits):
    pixels = shapes(bits=bits) // 2 + 3
    data = written(radiograph(pixels, bits, PhotometricInterpretation=photometric, RescaleSlope=-1, RescaleIntercept=5))
    np.testing.assert_array_equal(decode(data, "mimic"), as_published(pixels, photometric == "MONOCHROME1"))


@pytest.mark.parametrize("grey", ["mimic", "window"])
def test_signed_pixels_keep_their_order(grey):
    pixels = shapes().astype(np.int16) - 2048
    data = written(radiograph(pixels, 12))
    np.testing.assert_array_equal(decode(data, grey), decode(written(radiograph(shapes(), 12)), grey))
    if grey == "mimic":
        np.testing.assert_array_equal(decode(data, grey), as_published(pixels.astype(int), False))


@pytest.mark.parametrize("grey", ["mimic", "window"])
@pytest.mark.parametrize("signed", [False, True])
def test_what_else_is_in_a_pixel_s_word_does_not_show(grey, signed):
    pixels, rng = shapes(bits=10), np.random.default_rng(0)
    clean = radiograph(pixels, 10, PixelRepresentation=int(signed))
    junk = radiograph(pixels | rng.integers(0, 64, pixels.shape, np.uint16) << 10, 10, PixelRepresentation=int(signed))
    low = pixels << 4 | rng.integers(0, 16, pixels.shape, np.uint16) | rng.integers(0, 4, pixels.shape, np.uint16) << 14
    shifted = radiograph(low, 10, HighBit=13, PixelRepresentation=int(signed))
    expected = decode(written(clean), grey)
    for dataset in (junk, shifted):
        np.testing.assert_array_equal(decode(written(dataset), grey), expected)


def test_eight_bits_and_an_odd_number_of_pixels_are_fine():
    pixels = shapes(15, 7, bits=8).astype(np.uint8)
    np.testing.assert_array_equal(decode(written(radiograph(pixels)), "window"), pixels)


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRBigEndian])
@pytest.mark.parametrize("bits", [8, 12])
def test_the_order_of_bytes_does_not_show(syntax, bits):
    pixels = shapes(bits=bits).astype(np.uint8 if bits == 8 else np.uint16)
    dataset = radiograph(pixels, bits, WindowCenter="500", WindowWidth="900", VOILUTSequence=lut([0, 5, 9], 2, 8))
    expected = decode(written(dataset), "window")
    if syntax == ExplicitVRBigEndian:
        dataset.PixelData = (pixels.view(np.uint16) if bits == 8 else pixels).byteswap().tobytes()
    dataset.file_meta.TransferSyntaxUID = syntax
    np.testing.assert_array_equal(decode(written(dataset), "window"), expected)


def shown_by_pydicom(dataset: Dataset) -> np.ndarray:
    """pydicom's own chain on every pixel, from what it makes of the lowest to what it makes of the highest value: 0–255."""
    pixels = apply_voi_lut(apply_modality_lut(dataset.pixel_array, dataset), dataset)
    slope, intercept = float(dataset.get("RescaleSlope", 1)), float(dataset.get("RescaleIntercept", 0))
    signed = dataset.PixelRepresentation * 2 ** (dataset.BitsStored - 1)
    low, high = (slope * value + intercept for value in (-signed, 2**dataset.BitsStored - 1 - signed))
    return (pixels - low) / (high - low) * 255


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["LINEAR", "LINEAR_EXACT", "SIGMOID", None]),
    st.floats(-3000, 6000),
    st.floats(1, 9000),
    st.sampled_from([(1, 0), (1, -1024), (0.25, 3.5), (-1, 4095)]),
    st.booleans(),
)
def test_a_window_shows_what_pydicom_shows(function, centre, width, rescale, signed):
    pixels = shapes().astype(np.int16) - 2048 if signed else shapes()
    dataset = radiograph(
        pixels,
        12,
        WindowCenter=[f"{centre:.5g}", "1"],
        WindowWidth=[f"{width:.5g}", "2"],
        RescaleSlope=str(rescale[0]),
        RescaleIntercept=str(rescale[1]),
    )
    if function:
        dataset.VOILUTFunction = function
    with np.errstate(over="ignore"):
        expected = shown_by_pydicom(dataset)
    assert abs(decode(written(dataset), "window") - expected).max() <= 0.5 + 1e-6
    dataset.PhotometricInterpretation = "MONOCHROME1"
    assert abs(255 - decode(written(dataset), "window").astype(int) - expected).max() <= 1


def test_without_a_window_the_lowest_value_is_black_and_the_highest_white():
    pixels = shapes() // 3 + 100
    image = decode(written(radiograph(pixels, 12, RescaleSlope="-2", RescaleIntercept="7")), "window")
    np.testing.assert_allclose(image, 255 - (pixels - pixels.min()) * 255.0 / np.ptp(pixels), atol=0.5 + 1e-9)


def test_an_empty_window_is_none():
    dataset = radiograph(shapes(), 12, WindowCenter="", WindowWidth="")
    np.testing.assert_array_equal(
        decode(written(dataset), "window"), decode(written(radiograph(shapes(), 12)), "window")
    )


def test_one_value_everywhere_is_an_image_too():
    for grey in ("mimic", "window"):
        assert (decode(written(radiograph(np.full((9, 9), 700, np.uint16), 12)), grey) == 0).all()


def test_a_voi_lut_comes_before_a_window_and_shows_what_pydicom_shows():
    entries = (np.sqrt(np.arange(4000)) * 1000).astype(int).tolist()
    dataset = radiograph(shapes(), 12, VOILUTSequence=lut(entries, 50, 16), WindowCenter="9", WindowWidth="9")
    expected = apply_voi_lut(dataset.pixel_array, dataset) / max(entries) * 255
    assert abs(decode(written(dataset), "window") - expected).max() <= 0.5 + 1e-9


def test_a_lut_with_entries_of_eight_bits_is_used_to_its_end():
    """pydicom 3.0 uses but its first 256 entries: when this fails for `theirs`, its own `apply_voi_lut` can be used."""
    entries = (np.arange(4096) // 16).tolist()
    dataset = radiograph(shapes(), 12, VOILUTSequence=lut(entries, 0, 8))
    np.testing.assert_array_equal(decode(written(dataset), "window"), shapes() // 16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = apply_voi_lut(dataset.pixel_array, dataset)
    assert (theirs != shapes() // 16).any()


def test_a_modality_lut_comes_before_the_voi_lut():
    upside_down = lut(list(range(4095, -1, -1)), 0, 16)
    dataset = radiograph(shapes(), 12, ModalityLUTSequence=upside_down, VOILUTSequence=lut([0, 100, 255], 1000, 8))
    places = (4095 - shapes().astype(int) - 1000).clip(0, 2)
    np.testing.assert_array_equal(decode(written(dataset), "window"), np.array([0, 100, 255])[places])


def test_a_lut_may_start_below_zero():
    pixels = shapes(bits=4).astype(np.int16) - 8
    dataset = radiograph(pixels, 12, VOILUTSequence=lut([0, 50, 100, 255], -2, 8))
    np.testing.assert_array_equal(
        decode(written(dataset), "window"), np.array([0, 50, 100, 255])[(pixels + 2).clip(0, 3)]
    )


@pytest.mark.parametrize(
    "elements",
    [
        {"WindowCenter": "1", "WindowWidth": "-5"},
        {"WindowCenter": "1", "WindowWidth": "0"},
        {"WindowCenter": "1", "WindowWidth": "9", "RescaleSlope": "0", "RescaleIntercept": "7"},
        {"WindowCenter": "10", "WindowWidth": "9", "VOILUTFunction": "CUBIC"},
        {"VOILUTSequence": [Dataset()]},
    ],
)
def test_a_window_that_means_nothing_is_corrupt(elements):
    data = written(radiograph(shapes(), 12, **elements))
    assert reason(data) is Reason.CORRUPT
    assert decode(data, "mimic").shape == (60, 76)


def test_a_lut_shorter_than_it_says_is_corrupt():
    sequence = lut(list(range(100)), 0, 16)
    sequence[0].LUTDescriptor = [200, 0, 16]
    assert reason(written(radiograph(shapes(), 12, VOILUTSequence=sequence))) is Reason.CORRUPT


def test_a_dicom_file_asks_for_a_grey_transform_and_is_not_refused_for_the_lack_of_one():
    with pytest.raises(ShardError, match=r"--grey mimic .* or --grey window") as caught:
        decode(written(radiograph(shapes())), "none")
    assert not isinstance(caught.value, BadImage)


# Transfer syntaxes


@pytest.mark.parametrize("bits", [8, 12, 16])
@pytest.mark.parametrize("how", [lossless, rle, jpeg_2000])
def test_a_losslessly_compressed_radiograph_has_the_pixels_of_the_plain_one(how, bits):
    pixels = shapes(bits=bits).astype(np.uint8 if bits == 8 else np.uint16)
    for grey in ("mimic", "window"):
        expected = decode(written(radiograph(pixels, bits)), grey)
        np.testing.assert_array_equal(decode(written(how(pixels, bits)), grey), expected)


def test_a_baseline_frame_is_decoded_as_a_jpeg_file_is():
    dataset = baseline(shapes(bits=8).astype(np.uint8))
    frame = next(pydicom.encaps.generate_frames(dataset.PixelData, number_of_frames=1))
    dataset.WindowCenter, dataset.WindowWidth = "128", "256"
    np.testing.assert_array_equal(decode(written(dataset), "window"), decode(frame, "none"))


@pytest.mark.parametrize(
    "name", ["MR_small_jpeg_ls_lossless.dcm", "JPGExtended.dcm", "J2K_pixelrep_mismatch.dcm", "MR_small_RLE.dcm"]
)
def test_files_of_other_writers_have_the_pixels_that_pydicom_finds(name):
    dataset = pydicom.dcmread(get_testdata_file(name, download=False))
    dataset.Modality = "DX"
    pixels = dataset.pixel_array.astype(int)
    np.testing.assert_array_equal(decode(written(dataset), "mimic"), as_published(pixels, False))


def test_a_real_radiograph_and_its_negative():
    names = ("1.2.276.0.7230010.3.1.4.8323329.6904.1517875201.850819.dcm", "Fake_MONOHR1.dcm")
    files = [REAL / "dicom" / name for name in names]
    if not all(path.exists() for path in files):
        pytest.skip("the real radiographs are not here")
    radiograph, negative = (path.read_bytes() for path in files)
    np.testing.assert_array_equal(decode(negative, "window"), 255 - decode(radiograph, "window"))
    image = decode(radiograph, "mimic")
    assert image.shape == (1024, 1024)
    assert image[400:600, 480:560].mean() > 2 * image[300:500, 250:350].mean()  # the spine is brighter than a lung


def test_a_syntax_that_is_not_taken_is_named():
    for syntax, name in ((MPEG2MPML, "MPEG2"), (DeflatedExplicitVRLittleEndian, "Deflated"), ("1.2.3.4", "1.2.3.4")):
        dataset = radiograph(shapes(), 12)
        data = written(dataset).replace(b"1.2.840.10008.1.2.1\0", syntax.encode().ljust(20, b"\0"))
        length = data.index(b"UI", data.index(b"\x02\0\x10\0")) + 2
        data = data[:length] + struct.pack("<H", max(20, len(syntax))) + data[length + 2 :]
        with pytest.raises(BadImage, match=f"unsupported format: DICOM, .*{name}"):
            decode(data, "window")


def test_a_deflated_bomb_is_not_unpacked():
    head = written(radiograph(shapes(), 12))
    start = head.index(b"\x02\0\x10\0")
    syntax = b"\x02\0\x10\0UI" + struct.pack("<H", 22) + DeflatedExplicitVRLittleEndian.encode()
    packer = zlib.compressobj(1, wbits=-15)
    data = head[:start] + syntax + packer.compress(bytes(2**27)) + packer.flush()
    assert reason(data) is Reason.UNSUPPORTED


# Files that are no radiograph


@pytest.mark.parametrize(
    ("elements", "expected"),
    [
        ({"Modality": "CT"}, Reason.NOT_A_RADIOGRAPH),
        ({"Modality": "MG"}, Reason.NOT_A_RADIOGRAPH),
        ({"Modality": "OT"}, Reason.NOT_A_RADIOGRAPH),
        ({"Modality": "", "SOPClassUID": CTImageStorage}, Reason.NOT_A_RADIOGRAPH),
        ({"NumberOfFrames": "2"}, Reason.MULTI_FRAME),
        ({"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB"}, Reason.UNSUPPORTED),
        ({"PhotometricInterpretation": "PALETTE COLOR"}, Reason.UNSUPPORTED),
        ({"BitsAllocated": 32, "BitsStored": 32, "HighBit": 31}, Reason.UNSUPPORTED),
        ({"BitsAllocated": 1, "BitsStored": 1, "HighBit": 0}, Reason.UNSUPPORTED),
        ({"BitsStored": 17}, Reason.CORRUPT),
        ({"BitsStored": 0}, Reason.CORRUPT),
        ({"HighBit": 3}, Reason.CORRUPT),
        ({"Rows": 0}, Reason.CORRUPT),
        ({"Rows": None}, Reason.CORRUPT),
        ({"Rows": 61}, Reason.TRUNCATED),
        ({"Rows": 59}, Reason.CORRUPT),
        ({"Rows": 65_535, "Columns": 65_535}, Reason.TOO_LARGE),
        ({"PixelData": None}, Reason.TRUNCATED),
    ],
)
def test_what_a_header_says_is_believed_before_its_pixels(elements, expected):
    assert reason(written(radiograph(shapes(), 12, **elements))) is expected


@pytest.mark.parametrize(
    "elements",
    [
        {"Modality": "DX"},
        {"Modality": "RG"},
        {"Modality": "DR"},
        {"Modality": None},
        {"Modality": "", "SOPClassUID": DigitalXRayImageStorageForPresentation},
        {"Modality": "", "SOPClassUID": SecondaryCaptureImageStorage},
        {"Modality": None, "SOPClassUID": "1.2.276.0.7230010.3.1.0.1"},  # a de-identified file
        {"Modality": None, "SOPClassUID": None},
        {"NumberOfFrames": "1"},
        {"HighBit": None},
    ],
)
def test_a_radiograph_is_taken_whatever_else_it_lacks(elements):
    expected = decode(written(radiograph(shapes(), 12)), "window")
    np.testing.assert_array_equal(decode(written(radiograph(shapes(), 12, **elements)), "window"), expected)


def test_the_modality_is_named():
    with pytest.raises(BadImage, match="not a radiograph: modality CT"):
        decode(written(radiograph(shapes(), Modality="CT")), "mimic")


@pytest.mark.parametrize("how", [lambda: radiograph(shapes(20, 20), 12), lambda: rle(shapes(20, 20), 12)])
def test_a_dicom_file_cut_short_anywhere_is_refused(how):
    data = written(how())
    end = data.rindex(b"\xfe\xff\xdd\xe0") if b"\xfe\xff\xdd\xe0" in data else len(data)
    for keep in range(132, end):
        assert reason(data[:keep]) in (Reason.TRUNCATED, Reason.CORRUPT), keep


@pytest.mark.parametrize("how", [lossless, jpeg_2000, rle])
def test_a_frame_cut_short_is_refused_though_the_file_is_whole(how):
    dataset = how(shapes(), 12)
    frame = next(pydicom.encaps.generate_frames(dataset.PixelData, number_of_frames=1))
    syntax = dataset.file_meta.TransferSyntaxUID
    for keep in np.linspace(len(frame) // 4, len(frame) - 8, 12).astype(int).tolist():
        cut = framed(radiograph(shapes(), 12), syntax, frame[:keep])
        assert reason(written(cut)) in (Reason.TRUNCATED, Reason.CORRUPT), keep


def test_a_frame_larger_than_its_file_says_is_refused_before_it_is_unpacked():
    side = 2 * int(MAX_PIXELS**0.5)
    frame = bytearray(lossless_jpeg(shapes(), 12))
    frame[7:11] = side.to_bytes(2) * 2
    assert reason(written(framed(radiograph(shapes(), 12), JPEGLosslessSV1, bytes(frame)))) is Reason.CORRUPT
    dataset = jpeg_2000(shapes(), 12)
    frame = bytearray(next(pydicom.encaps.generate_frames(dataset.PixelData, number_of_frames=1)))
    frame[8:16] = (2**20).to_bytes(4) * 2
    assert reason(written(framed(radiograph(shapes(), 12), JPEG2000Lossless, bytes(frame)))) is Reason.CORRUPT
    runs = struct.pack("<16L", 2, 64, 64 + 2**20, *[0] * 13) + b"\x81\0" * 2**20  # each two bytes become 128
    dataset = framed(radiograph(shapes(), 12), RLELossless, runs)
    assert (decode(written(dataset), "window") == 0).all()


@pytest.mark.parametrize("process", [0xC2, 0xC9])
def test_a_frame_of_another_process_is_unsupported(process):
    frame = lossless_jpeg(shapes(), 12).replace(b"\xff\xc3", bytes((0xFF, process)))
    assert reason(written(framed(radiograph(shapes(), 12), JPEGExtended12Bit, frame))) is Reason.UNSUPPORTED


# The environment


def without(module: str, data: bytes) -> str:
    """What a process that lacks the module says to the file: the exception's class and text."""
    script = (
        f"import sys; sys.modules[{module!r}] = None\n"
        "from cxrfast.shards.images.decode import decode\n"
        "try: print(decode(sys.stdin.buffer.read(), 'window').shape)\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], input=data, capture_output=True, check=True, env=env)
    assert not done.stderr
    return done.stdout.decode()


def test_without_pydicom_the_error_names_the_extra_and_no_image_is_refused():
    for dataset in (radiograph(shapes()), radiograph(shapes(), Modality="CT")):
        said = without("pydicom", written(dataset))
        assert said.startswith("ShardError")
        assert "pip install 'cxrfast[dicom]'" in said
    assert without("pydicom", b"\0" * 200) == "BadImage not an image\n"


@pytest.mark.parametrize(("module", "how"), [("libjpeg", lossless), ("openjpeg", jpeg_2000), ("pylibjpeg", lossless)])
def test_without_a_decoder_the_error_names_the_extra_and_no_image_is_refused(module, how):
    said = without(module, written(how(shapes(), 12)))
    assert said.startswith("ShardError")
    assert "pip install 'cxrfast[dicom]'" in said


def test_what_needs_no_decoder_is_the_same_without_one():
    for how in (lambda pixels: radiograph(pixels, 12), lambda pixels: rle(pixels, 12)):
        assert without("pylibjpeg", written(how(shapes()))) == "(60, 76)\n"
    assert without("pylibjpeg", written(baseline(shapes(bits=8).astype(np.uint8)))) == "(60, 76)\n"
    ct = lossless(shapes(), 12)
    ct.Modality = "CT"
    assert without("pylibjpeg", written(ct)) == "BadImage not a radiograph: modality CT\n"


def test_what_pydicom_warns_of_is_refused_and_not_warned_of():
    data = written(radiograph(shapes(), 12))
    cut = data[: data.index(b"1.2.840.10008.5.1.4") + 14]
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert pydicom.dcmread(io.BytesIO(cut)).SOPClassUID == "1.2.840.10008."
        assert seen
        seen.clear()
        assert reason(cut) is Reason.TRUNCATED
        assert not seen
