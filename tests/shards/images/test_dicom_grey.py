"""More than 8 bits to 8: `--grey mimic` and `--grey window` of DICOM files."""

import io
import warnings

import numpy as np
import pytest
from dicoms import as_published, lut, radiograph, shapes, shown_by_pydicom, written
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom import dcmread
from pydicom.pixels.processing import apply_modality_lut, apply_voi_lut
from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

from cxrfast.errors import ShardError
from cxrfast.shards.images.bad_image import BadImage
from cxrfast.shards.images.decode import decode, decode_with_remarks


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


@settings(max_examples=60)
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
    for empty in ({}, {"WindowCenter": "", "WindowWidth": ""}):
        data = written(radiograph(pixels, 12, RescaleSlope="-2", RescaleIntercept="7", **empty))
        expected = 255 - (pixels - pixels.min()) * 255.0 / np.ptp(pixels)
        np.testing.assert_allclose(decode(data, "window"), expected, atol=0.5 + 1e-9)
    odd = shapes(15, 7, bits=8).astype(np.uint8)
    np.testing.assert_array_equal(decode(written(radiograph(odd)), "window"), odd)
    for grey in ("mimic", "window"):
        assert (decode(written(radiograph(np.full((9, 9), 700, np.uint16), 12)), grey) == 0).all(), "one value"


def test_a_voi_lut_comes_before_a_window_and_shows_what_pydicom_shows():
    entries = (np.sqrt(np.arange(4000)) * 1000).astype(int).tolist()
    dataset = radiograph(shapes(), 12, VOILUTSequence=lut(entries, 50, 16), WindowCenter="9", WindowWidth="9")
    expected = apply_voi_lut(dataset.pixel_array, dataset) / 65535 * 255
    assert abs(decode(written(dataset), "window") - expected).max() <= 0.5 + 1e-9


@settings(max_examples=60)
@given(
    st.sampled_from([ImplicitVRLittleEndian, ExplicitVRLittleEndian]),
    st.booleans(),
    st.booleans(),
    st.integers(-2048, 4000),
    st.integers(2, 5000),
)
def test_luts_show_what_pydicom_shows(syntax, signed, with_modality_lut, first, count):
    pixels = (shapes().astype(np.int16) - 2048) if signed else shapes()
    if with_modality_lut or not signed:
        first = abs(first)
    entries = (np.linspace(0, 1, count) ** 2 * 65_535).astype(int).tolist()
    dataset = radiograph(pixels, 12, VOILUTSequence=lut(entries, first, 16))
    if with_modality_lut:
        dataset.ModalityLUTSequence = lut((np.arange(4096)[::-1] // 2).tolist(), -2048 if signed else 0, 16)
    dataset.file_meta.TransferSyntaxUID = syntax
    data = written(dataset)
    read = dcmread(io.BytesIO(data))
    theirs = apply_voi_lut(apply_modality_lut(read.pixel_array, read), read)
    assert abs(decode(data, "window") - theirs / 257).max() <= 0.5 + 1e-9


def test_a_lut_with_entries_of_eight_bits_is_used_to_its_end():
    """pydicom 3.0 uses only its first 256 entries: once `theirs` is right, `apply_voi_lut` can replace ours."""
    entries = (np.arange(4096) // 16).tolist()
    dataset = radiograph(shapes(), 12, VOILUTSequence=lut(entries, 0, 8))
    np.testing.assert_array_equal(decode(written(dataset), "window"), shapes() // 16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = apply_voi_lut(dataset.pixel_array, dataset)
    assert (theirs != shapes() // 16).any()


def test_a_modality_lut_comes_before_the_voi_lut_which_may_start_below_zero():
    upside_down = lut(list(range(4095, -1, -1)), 0, 16)
    dataset = radiograph(shapes(), 12, ModalityLUTSequence=upside_down, VOILUTSequence=lut([0, 100, 255], 1000, 8))
    places = (4095 - shapes().astype(int) - 1000).clip(0, 2)
    np.testing.assert_array_equal(decode(written(dataset), "window"), np.array([0, 100, 255])[places])
    pixels = shapes(bits=4).astype(np.int16) - 8
    dataset = radiograph(pixels, 12, VOILUTSequence=lut([0, 50, 100, 255], -2, 8))
    expected = np.array([0, 50, 100, 255])[(pixels + 2).clip(0, 3)]
    np.testing.assert_array_equal(decode(written(dataset), "window"), expected)


@pytest.mark.parametrize(("bits", "white"), [(8, 255), (10, 1023), (12, 4095), (16, 65535)])
def test_white_is_the_highest_value_of_a_lut_s_bits_whether_an_entry_or_a_pixel_has_it(bits, white):
    entries = (np.arange(4096) * white // 4200).tolist()
    dataset = radiograph(shapes() // 2, 12, VOILUTSequence=lut(entries, 0, bits))
    expected = np.array(entries)[shapes() // 2] / white * 255
    assert abs(decode(written(dataset), "window") - expected).max() <= 0.5 + 1e-9


def test_entries_beyond_a_lut_s_bits_tell_their_number():
    dataset = radiograph(shapes(), 12, VOILUTSequence=lut(list(range(4096)), 0, 8))
    assert abs(decode(written(dataset), "window") - shapes() / 4095 * 255).max() <= 0.5 + 1e-9


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian])
@pytest.mark.parametrize(
    ("signed", "intercept", "first"),
    [
        (False, 0, 700),
        (False, 0, 40_000),
        (False, -1024, -900),
        (False, -40_000, -32_000 + 65_536),
        (True, 0, -2000),
        (True, 2048, 100),
    ],
)
def test_a_lut_starts_where_its_input_can_be(syntax, signed, intercept, first):
    """Whatever the VR says or, in implicit VR, does not say; see PS3.3, section C.11.2.1.1."""
    pixels = (shapes(bits=16).astype(int) - 2**15 * signed).astype(np.int16 if signed else np.uint16)
    entries = (np.arange(3000) * 65535 // 2999).tolist()
    dataset = radiograph(pixels, 16, RescaleSlope=1, RescaleIntercept=intercept, VOILUTSequence=lut(entries, first, 16))
    starts = first - 65_536 if intercept == -40_000 else first
    expected = np.array(entries)[(pixels.astype(int) + intercept - starts).clip(0, 2999)] / 257
    if syntax == ExplicitVRBigEndian:
        dataset.PixelData = pixels.byteswap().tobytes()
    dataset.file_meta.TransferSyntaxUID = syntax
    image, remarks = decode_with_remarks(written(dataset), "window")
    assert abs(image - expected).max() <= 0.5 + 1e-9
    assert not remarks


def test_a_dicom_file_asks_for_a_grey_transform_and_is_not_refused_for_the_lack_of_one():
    with pytest.raises(ShardError, match=r"--grey mimic .* or --grey window") as caught:
        decode(written(radiograph(shapes())), "none")
    assert not isinstance(caught.value, BadImage)
