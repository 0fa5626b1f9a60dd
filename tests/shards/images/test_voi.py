"""Padding, windows and LUTs of DICOM files as they are written, by `--grey window`; see `test_dicom_grey` for valid ones."""

import numpy as np
import pytest
from dicoms import as_published, lut, radiograph, shapes, shown_by_pydicom, written
from pydicom.dataset import Dataset

from cxrfast.shards.images.decode import decode, decode_with_remarks
from cxrfast.shards.images.remark import Remark

# Padding


def padded(dataset: Dataset, value: int, place: tuple = np.s_[:, :10]) -> tuple[Dataset, np.ndarray]:
    """The image with `value` in some of its pixels, and where they are."""
    pixels = dataset.pixel_array.copy()
    pixels[place] = value
    dataset.PixelData = pixels.tobytes()
    where = np.zeros(pixels.shape, bool)
    where[place] = True
    return dataset, where


@pytest.mark.parametrize("window", [{}, {"WindowCenter": "2000", "WindowWidth": "1500"}])
@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize(
    ("kind", "value", "vr"),
    [
        ("u2", 65_535, "US"),
        ("u2", 0, "US"),
        ("u2", 63_536, "SS"),
        ("i2", -2000, "SS"),
        ("i2", -2000, "US"),
        ("i2", 4095, "SS"),
    ],
)
def test_padding_is_black_and_takes_no_part_in_the_stretch(window, photometric, kind, value, vr):
    pixels = (shapes() // 2 + 700).astype(kind)
    plain = radiograph(pixels, 16, PhotometricInterpretation=photometric, **window)
    expected = decode(written(plain), "window")
    dataset, where = padded(plain, value, np.s_[:5, 10:])
    name = value % 65_536 if vr == "US" else (value + 32_768) % 65_536 - 32_768
    dataset.add_new("PixelPaddingValue", vr, name)
    image, remarks = decode_with_remarks(written(dataset), "window")
    inside = pixels[~where]
    if not window:
        expected = (pixels.astype(float) - inside.min()) / np.ptp(inside.astype(int)) * 255
        expected = np.floor(255 - expected + 0.5) if photometric == "MONOCHROME1" else np.floor(expected + 0.5)
    assert abs(image.astype(int) - expected)[~where].max() <= (0 if window or photometric == "MONOCHROME2" else 1)
    assert (image[where] == 0).all()
    assert not remarks


def test_without_its_tag_a_padding_value_is_a_pixel_like_any_other():
    dataset, where = padded(radiograph(shapes() // 2 + 700, 16), 65_535)
    image, remarks = decode_with_remarks(written(dataset), "window")
    assert image[~where].max() < 12
    assert (image[where] == 255).all()
    assert not remarks


@pytest.mark.parametrize("ends", [(0, 99), (99, 0)])
def test_all_values_up_to_the_range_limit_are_padding_in_either_order(ends):
    pixels = shapes().clip(100)
    where = np.s_[:, :10]
    pixels[where] = np.arange(10) * 11
    dataset = radiograph(pixels, 12, PixelPaddingValue=ends[0], PixelPaddingRangeLimit=ends[1])
    dataset.PhotometricInterpretation = "MONOCHROME1"
    image = decode(written(dataset), "window")
    assert (image[where] == 0).all()
    assert (image[:, 10:].min(), image[:, 10:].max()) == (0, 255)


@pytest.mark.parametrize("elements", [{"PixelPaddingRangeLimit": 4095}, {"PixelPaddingValue": None}])
def test_a_limit_without_a_value_or_an_empty_value_is_no_padding(elements):
    dataset = radiograph(shapes(), 12)
    for name, value in elements.items():
        dataset.add_new(name, "US", value)
    np.testing.assert_array_equal(
        decode(written(dataset), "window"), decode(written(radiograph(shapes(), 12)), "window")
    )


def test_an_image_that_is_all_padding_is_black_and_remarked_on():
    dataset = radiograph(np.full((20, 30), 4095, np.uint16), 12, PixelPaddingValue=4095)
    image, remarks = decode_with_remarks(written(dataset), "window")
    assert (image == 0).all()
    assert remarks == [Remark.UNIFORM]


@pytest.mark.parametrize(("value", "remarks"), [(65_535, [Remark.PADDING]), (0, [Remark.PADDING]), (1000, [])])
def test_mimic_stretches_padding_too_as_mimic_cxr_jpg_did_and_says_so(value, remarks):
    dataset, _ = padded(radiograph(shapes() // 2 + 700, 16, PixelPaddingValue=value), value)
    assert decode_with_remarks(written(dataset), "mimic")[1] == remarks
    np.testing.assert_array_equal(
        decode(written(dataset), "mimic"), as_published(dataset.pixel_array.astype(int), False)
    )


# Windows as they are written

SHORT_LUT = lut(list(range(100)), 0, 16)
SHORT_LUT[0].LUTDescriptor = [200, 0, 16]
WINDOW = {"WindowCenter": "2000", "WindowWidth": "1500"}


def with_texts(dataset: Dataset, **texts: str) -> bytes:
    """The file with the texts of its decimal strings, which pydicom would not write."""
    for name in texts:
        setattr(dataset, name, "1" * 16)
    data = written(dataset)
    for text in texts.values():
        data = data.replace(b"1" * 16, text.encode().ljust(16), 1)
    return data


@pytest.mark.parametrize(
    ("centre", "width", "same"),
    [
        ("2000,5", "1500,5", ("2000.5", "1500.5")),
        ("2000,5\\9", "1500\\,5", ("2000.5", "1500")),
        ("+2.0005e3", " 1500 ", ("2000.5", "1500")),
        ("2000.5\0", "1500\0\0", ("2000.5", "1500")),
        ("abc\\2000.5", "9\\1500", ("2000.5", "1500")),
        ("7\\2000.5", "-9\\1500", ("2000.5", "1500")),
    ],
)
def test_a_window_is_read_as_its_writer_meant_it(centre, width, same):
    expected = decode(written(radiograph(shapes(), 12, WindowCenter=same[0], WindowWidth=same[1])), "window")
    data = with_texts(radiograph(shapes(), 12), WindowCenter=centre, WindowWidth=width)
    np.testing.assert_array_equal(decode(data, "window"), expected)


@pytest.mark.parametrize(
    ("centre", "width"),
    [
        ("2000", "0"),
        ("2000", "-1500"),
        ("2000", "0.5"),
        ("2000", "NaN"),
        ("2000", "inf"),
        ("2000", "1e999"),
        ("2000", "1.500,5"),
        ("2000", "1,500"),
        ("2000", "wide"),
        ("2000", "1_500"),
        ("nan", "1500"),
        ("", "1500"),
        ("2000", ""),
        ("2000\\1", "\\-5"),
    ],
)
def test_a_window_that_means_nothing_is_ignored_with_one_remark(centre, width):
    data = with_texts(radiograph(shapes(), 12), WindowCenter=centre, WindowWidth=width)
    image, remarks = decode_with_remarks(data, "window")
    np.testing.assert_array_equal(image, decode(written(radiograph(shapes(), 12)), "window"))
    assert remarks == [Remark.WINDOW]


@pytest.mark.parametrize("function", ["LINEAR_EXACT", "SIGMOID"])
def test_a_window_narrower_than_one_is_valid_where_it_is_not_linear(function):
    elements = {"RescaleSlope": "0.0001", "RescaleIntercept": "0", "WindowCenter": "0.2", "WindowWidth": "0.25"}
    dataset = radiograph(shapes(), 12, VOILUTFunction=function, **elements)
    image, remarks = decode_with_remarks(written(dataset), "window")
    assert abs(image - shown_by_pydicom(dataset)).max() <= 0.5 + 1e-6
    assert not remarks


def test_a_window_far_narrower_than_a_grey_level_is_black_and_white():
    dataset = radiograph(shapes(), 12, VOILUTFunction="LINEAR_EXACT", WindowCenter="2000.5", WindowWidth="1e-300")
    np.testing.assert_array_equal(decode(written(dataset), "window"), np.where(shapes() > 2000, 255, 0))


def test_a_linear_window_of_width_one_is_black_and_white():
    image = decode(written(radiograph(shapes(), 12, WindowCenter="2000", WindowWidth="1")), "window")
    np.testing.assert_array_equal(image, np.where(shapes() > 1999, 255, 0))


def test_a_window_in_binary_numbers_is_read():
    dataset = radiograph(shapes(), 12)
    expected = decode(written(radiograph(shapes(), 12, **WINDOW)), "window")
    dataset.add_new("WindowCenter", "FD", [2000.0, 7.0])
    dataset.add_new("WindowWidth", "US", 1500)
    np.testing.assert_array_equal(decode(written(dataset), "window"), expected)


@pytest.mark.parametrize("centre", [float("inf"), float("nan")])
def test_a_binary_number_that_is_not_finite_is_no_window(centre):
    dataset = radiograph(shapes(), 12)
    dataset.add_new("WindowCenter", "FD", centre)
    dataset.add_new("WindowWidth", "FD", 1500.0)
    image, remarks = decode_with_remarks(written(dataset), "window")
    np.testing.assert_array_equal(image, decode(written(radiograph(shapes(), 12)), "window"))
    assert remarks == [Remark.WINDOW]


@pytest.mark.filterwarnings("ignore:Invalid value for VR CS")
@pytest.mark.parametrize("function", ["", " ", "linear", "LINEAR "])
def test_an_empty_voi_lut_function_is_linear(function):
    window = {"WindowCenter": "2000", "WindowWidth": "1500"}
    expected = decode(written(radiograph(shapes(), 12, **window)), "window")
    image, remarks = decode_with_remarks(written(radiograph(shapes(), 12, VOILUTFunction=function, **window)), "window")
    np.testing.assert_array_equal(image, expected)
    assert not remarks


@pytest.mark.parametrize(
    ("elements", "plain", "remark"),
    [
        ({"VOILUTFunction": "CUBIC"}, {}, Remark.FUNCTION),
        ({"VOILUTSequence": [Dataset()]}, {}, Remark.LUT),
        ({"VOILUTSequence": SHORT_LUT}, {}, Remark.LUT),
        ({"ModalityLUTSequence": SHORT_LUT}, {}, Remark.RESCALE),
        ({"RescaleSlope": "0", "RescaleIntercept": "7"}, {}, Remark.RESCALE),
        ({"RescaleSlope": "1e308", "RescaleIntercept": "7"}, {}, Remark.RESCALE),
        ({"PresentationLUTShape": "INVERSE"}, {}, Remark.SHAPE),
        (
            {"PresentationLUTShape": "IDENTITY", "PhotometricInterpretation": "MONOCHROME1"},
            {"PhotometricInterpretation": "MONOCHROME1"},
            Remark.SHAPE,
        ),
        ({"PresentationLUTShape": "IDENTITY"}, {}, None),
        (
            {"PresentationLUTShape": "INVERSE", "PhotometricInterpretation": "MONOCHROME1"},
            {"PhotometricInterpretation": "MONOCHROME1"},
            None,
        ),
    ],
)
def test_what_else_means_nothing_is_ignored_with_a_remark(elements, plain, remark):
    image, remarks = decode_with_remarks(written(radiograph(shapes(), 12, **WINDOW, **elements)), "window")
    np.testing.assert_array_equal(image, decode(written(radiograph(shapes(), 12, **WINDOW, **plain)), "window"))
    assert remarks == ([remark] if remark else [])
    assert decode_with_remarks(written(radiograph(shapes(), 12, **WINDOW, **elements)), "mimic")[1] == []


@pytest.mark.parametrize("slope", ["nan", "x", "0,", "0,0"])
def test_a_rescale_slope_that_means_nothing_is_ignored(slope):
    image, remarks = decode_with_remarks(
        with_texts(radiograph(shapes(), 12, RescaleIntercept="7"), RescaleSlope=slope), "window"
    )
    np.testing.assert_array_equal(image, decode(written(radiograph(shapes(), 12)), "window"))
    assert remarks == [Remark.RESCALE]


@pytest.mark.parametrize(("slope", "grey"), [("1e30", 255), ("-1e30", 0)])
def test_values_far_beyond_a_lut_get_its_last_or_first_entry(slope, grey):
    luts = {"VOILUTSequence": lut([0, 100, 255], 10, 8), "RescaleSlope": slope, "RescaleIntercept": "0"}
    image = decode(written(radiograph(shapes().clip(1), 12, **luts)), "window")
    assert (image == grey).all()


def test_a_rescale_slope_with_a_decimal_comma_is_a_number():
    window = {"WindowCenter": "1000", "WindowWidth": "700"}
    expected = decode(written(radiograph(shapes(), 12, RescaleSlope="0.5", RescaleIntercept="7", **window)), "window")
    data = with_texts(radiograph(shapes(), 12, RescaleIntercept="7", **window), RescaleSlope="0,5")
    np.testing.assert_array_equal(decode(data, "window"), expected)
