"""DICOM files written by pydicom, decoded by `shards.dicom` through `images.decode`."""

import io
import pickle
import struct
import subprocess
import sys
import warnings
import zlib

import numpy as np
import pydicom
import pytest
from dicoms import (
    as_published,
    baseline,
    framed,
    jpeg_2000,
    lossless,
    lossless_jpeg,
    radiograph,
    reason,
    rle,
    shapes,
    written,
)
from pydicom.data import get_testdata_file
from pydicom.uid import (
    MPEG2MPML,
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    DigitalXRayImageStorageForPresentation,
    JPEG2000Lossless,
    JPEGExtended12Bit,
    JPEGLosslessSV1,
    RLELossless,
    SecondaryCaptureImageStorage,
)
from sets import REAL

from cxrfast.shards.images.bad_image import MAX_PIXELS, BadImage, Reason
from cxrfast.shards.images.decode import decode

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


def test_a_syntax_that_is_not_taken_is_named_and_a_deflated_bomb_not_unpacked():
    for syntax, name in ((MPEG2MPML, "MPEG2"), (DeflatedExplicitVRLittleEndian, "Deflated"), ("1.2.3.4", "1.2.3.4")):
        dataset = radiograph(shapes(), 12)
        data = written(dataset).replace(b"1.2.840.10008.1.2.1\0", syntax.encode().ljust(20, b"\0"))
        length = data.index(b"UI", data.index(b"\x02\0\x10\0")) + 2
        data = data[:length] + struct.pack("<H", max(20, len(syntax))) + data[length + 2 :]
        with pytest.raises(BadImage, match=f"unsupported format: DICOM, .*{name}"):
            decode(data, "window")
    head = written(radiograph(shapes(), 12))
    start = head.index(b"\x02\0\x10\0")
    syntax = b"\x02\0\x10\0UI" + struct.pack("<H", 22) + DeflatedExplicitVRLittleEndian.encode()
    packer = zlib.compressobj(1, wbits=-15)
    bomb = head[:start] + syntax + packer.compress(bytes(2**27)) + packer.flush()
    assert reason(bomb) is Reason.UNSUPPORTED


# Files that are not radiographs


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


def without(module: str, *datasets: pydicom.Dataset) -> list[str]:
    """What a process that lacks the module makes of the files: shape, or the exception's class and text; then of no image."""
    script = (
        f"import pickle, sys; sys.modules[{module!r}] = None\n"
        "from cxrfast.shards.images.decode import decode\n"
        "for data in pickle.load(sys.stdin.buffer):\n"
        "    try: print(decode(data, 'window').shape)\n"
        "    except Exception as error: print(type(error).__name__, error)"
    )
    files = pickle.dumps([*map(written, datasets), b"\0" * 200])
    done = subprocess.run([sys.executable, "-c", script], input=files, capture_output=True, check=True)
    assert not done.stderr
    return done.stdout.decode().splitlines()


@pytest.mark.parametrize(
    ("module", "missing"),
    [
        ("pydicom", ["plain", "rle", "baseline", "CT", "lossless", "jpeg_2000"]),
        ("pylibjpeg", ["lossless", "jpeg_2000"]),
        ("libjpeg", ["lossless"]),
        ("openjpeg", ["jpeg_2000"]),
    ],
)
def test_a_missing_module_is_an_error_that_names_the_extra_and_refuses_no_image(module, missing):
    files = {
        "plain": radiograph(shapes(), 12),
        "rle": rle(shapes(), 12),
        "baseline": baseline(shapes(bits=8).astype(np.uint8)),
        "CT": lossless(shapes(), 12),
        "lossless": lossless(shapes(), 12),
        "jpeg_2000": jpeg_2000(shapes(), 12),
    }
    files["CT"].Modality = "CT"
    if module in ("libjpeg", "openjpeg"):  # an entry point whose module is gone spoils all of pydicom's decoders
        files = {name: files[name] for name in missing}
    *said, no_image = without(module, *files.values())
    assert no_image == "BadImage not an image"
    for name, line in zip(files, said, strict=True):
        if name in missing:
            assert line.startswith("ShardError")
            assert "pip install 'cxrfast[dicom]'" in line
        else:
            assert line == ("BadImage not a radiograph: modality CT" if name == "CT" else "(60, 76)")


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
