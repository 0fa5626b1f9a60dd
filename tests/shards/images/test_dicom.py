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
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
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


def bare(data: bytes) -> bytes:
    """The file without preamble, prefix and group 0002."""
    start = max(data.find(tag) for tag in (b"\x08\0\x16\0UI", b"\x08\0\x16\0\x1a", b"\0\x08\0\x16UI"))
    return data[start:]


@pytest.mark.parametrize("left", ["the prefix", "zeros", "group 2", "nothing", "no name of the syntax"])
@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRLittleEndian])
def test_a_file_without_preamble_or_transfer_syntax_is_read_as_with_them(syntax, left):
    dataset = radiograph(shapes(), 12, WindowCenter="1500", WindowWidth="2000")
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    dataset.file_meta.TransferSyntaxUID = syntax
    whole = written(dataset)
    expected = decode(whole, "window")
    if left == "no name of the syntax":
        at = whole.index(b"\x02\0\x10\0UI")
        length = 8 + int.from_bytes(whole[at + 6 : at + 8], "little")
        data = whole[:at] + whole[at + length :]
    else:
        data = {
            "the prefix": whole[128:],
            "zeros": bytes(128) + whole[132:],
            "group 2": whole[132:],
            "nothing": bare(whole),
        }[left]
    np.testing.assert_array_equal(decode(data, "window"), expected)


def test_a_big_endian_file_without_its_group_2_is_read():
    dataset = radiograph(shapes(), 12, WindowCenter="1500", WindowWidth="2000")
    expected = decode(written(dataset), "window")
    dataset.PixelData = shapes().byteswap().tobytes()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRBigEndian
    np.testing.assert_array_equal(decode(bare(written(dataset)), "window"), expected)


def test_compressed_pixels_need_the_name_of_their_transfer_syntax():
    with pytest.raises(BadImage, match="unsupported format: compressed DICOM that does not name its transfer syntax"):
        decode(bare(written(rle(shapes(), 12))), "window")


def test_a_file_without_preamble_cut_short_anywhere_is_refused():
    whole = bare(written(radiograph(shapes(20, 20), 12)))
    for keep in range(1, len(whole)):
        assert reason(whole[:keep]) in (Reason.TRUNCATED, Reason.CORRUPT, Reason.NOT_AN_IMAGE), keep


@pytest.mark.parametrize(
    "data",
    [
        b"\x08\0\x05\0CS\x0a\0ISO_IR 100",  # one element
        b"\x08\0\x60\0CS\2\0CR\x08\0\x05\0CS\x0a\0ISO_IR 100",  # not in order
        b"\x08\0\x05\0CS\x0a\0ISO_IR 100\x28\0\x60\0CS\2\0CR",  # another group
        b"\x08\0\x05\0\xff\xff\xff\xffISO_IR 100" * 9,
        b"\0\x08\0\x05\0\0\0\x0aISO_IR 100\0\x08\0\x08\0\0\0\x0aISO_IR 100",  # big endian without representations
        b"\x02\0",
        b"DICM",
        bytes(128),
        bytes(4096),
        b"The patient was seen on Monday. " * 99,
    ],
)
def test_bytes_that_do_not_start_with_two_elements_are_no_dicom_file(data):
    assert reason(data) is Reason.NOT_AN_IMAGE


@pytest.mark.parametrize("surplus", [b"\0\0", bytes(4096), b"\xff" * 10, b" " * 512])
@pytest.mark.parametrize("bits", [8, 12])
@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRLittleEndian])
def test_padding_bytes_after_the_pixels_do_not_matter(syntax, bits, surplus):
    pixels = shapes(15, 7, bits).astype(np.uint8 if bits == 8 else np.uint16)
    dataset = radiograph(pixels, bits)
    dataset.file_meta.TransferSyntaxUID = syntax
    expected = decode(written(dataset), "window")
    dataset.PixelData += surplus
    np.testing.assert_array_equal(decode(written(dataset), "window"), expected)


def test_other_bytes_after_the_pixels_are_the_sign_of_a_wrong_header():
    dataset = radiograph(shapes(), 12)
    dataset.PixelData += bytes(range(100))
    assert reason(written(dataset)) is Reason.CORRUPT


@pytest.mark.parametrize("long", [False, True])
def test_jpeg_2000_in_a_jp2_file_is_read_like_its_codestream(long):
    dataset = jpeg_2000(shapes(), 12)
    expected = decode(written(dataset), "window")
    stream = next(pydicom.encaps.generate_frames(dataset.PixelData, number_of_frames=1)).rstrip(b"\0")
    height, width = shapes().shape
    header = struct.pack(">4s2LH4B", b"ihdr", height, width, 1, 11, 7, 1, 0)
    colour = struct.pack(">4s3BL", b"colr", 1, 0, 0, 17)
    inner = b"".join(struct.pack(">L", len(box) + 4) + box for box in (header, colour))
    code = struct.pack(">L4sQ", 1, b"jp2c", len(stream) + 16) if long else struct.pack(">L4s", 0, b"jp2c")
    start = b"\0\0\0\x0cjP  \r\n\x87\n" + struct.pack(">L", 20) + b"ftypjp2 \0\0\0\0jp2 "
    file = start + struct.pack(">L4s", len(inner) + 8, b"jp2h") + inner + code + stream
    np.testing.assert_array_equal(decode(written(framed(dataset, JPEG2000Lossless, file)), "window"), expected)
    for keep in range(12, len(file) - 8, 7):
        assert reason(written(framed(dataset, JPEG2000Lossless, file[:keep]))) in (Reason.TRUNCATED, Reason.CORRUPT)


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
        {"PhotometricInterpretation": "Monochrome2"},
    ],
)
@pytest.mark.filterwarnings("ignore:Invalid value for VR CS")
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
