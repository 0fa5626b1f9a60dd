"""DICOM files made from pixels, in every transfer syntax that has an encoder."""

import io

import cv2
import numpy as np
import pytest
import simplejpeg
from pydicom import dcmwrite
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.pixels.processing import apply_modality_lut, apply_voi_lut
from pydicom.uid import (
    ComputedRadiographyImageStorage,
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLosslessSV1,
    RLELossless,
)

from cxrfast.shards.images.bad_image import BadImage, Reason
from cxrfast.shards.images.decode import decode


def radiograph(pixels: np.ndarray, stored: int = 0, **elements) -> Dataset:
    """An uncompressed CR image of uint8, uint16 or int16 pixels (H, W); `elements` are set as given, None removes one."""
    bits = 8 * pixels.itemsize
    dataset = Dataset()
    dataset.SOPClassUID, dataset.SOPInstanceUID = ComputedRadiographyImageStorage, "1.2.3"
    dataset.Modality = "CR"
    dataset.Rows, dataset.Columns = pixels.shape
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = bits, stored or bits, (stored or bits) - 1
    dataset.PixelRepresentation = int(pixels.dtype.kind == "i")
    dataset.PixelData = pixels.tobytes() + b"\0" * (pixels.nbytes % 2)
    dataset["PixelData"].VR = "OW"
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    for name, value in elements.items():
        if value is None:
            delattr(dataset, name)
        else:
            setattr(dataset, name, value)
    return dataset


def written(dataset: Dataset) -> bytes:
    """The file's bytes."""
    file = io.BytesIO()
    dataset.preamble = b"\0" * 128
    dcmwrite(file, dataset, enforce_file_format=False)
    return file.getvalue()


def framed(dataset: Dataset, syntax: str, frame: bytes) -> Dataset:
    """The same image with one compressed frame for its pixels."""
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.PixelData = encapsulate([frame])
    dataset["PixelData"].is_undefined_length = True
    return dataset


def baseline(pixels: np.ndarray) -> Dataset:
    frame = simplejpeg.encode_jpeg(np.ascontiguousarray(pixels)[:, :, None], 90, "GRAY")
    return framed(radiograph(pixels), JPEGBaseline8Bit, frame)


def lossless(pixels: np.ndarray, stored: int) -> Dataset:
    return framed(radiograph(pixels, stored), JPEGLosslessSV1, lossless_jpeg(pixels, stored))


def rle(pixels: np.ndarray, stored: int) -> Dataset:
    dataset = radiograph(pixels, stored)
    dataset.compress(RLELossless, generate_instance_uid=False)
    return dataset


def jpeg_2000(pixels: np.ndarray, stored: int) -> Dataset:
    dataset = radiograph(pixels, stored)
    dataset.compress(JPEG2000Lossless, generate_instance_uid=False)
    return dataset


def lossless_jpeg(pixels: np.ndarray, bits: int) -> bytes:
    """JPEG process 14, selection value 1 (ITU-T T.81, annex H): Huffman-coded differences to the pixel on the left."""
    values = pixels.astype(int)
    before = np.empty_like(values)
    before[:, 1:], before[1:, 0], before[0, 0] = values[:, :-1], values[:-1, 0], 2 ** (bits - 1)
    differences = (values - before + 2**15) % 2**16 - 2**15
    codes = []
    for difference in differences.ravel().tolist():
        category = abs(difference).bit_length()
        rest = difference if difference >= 0 else difference + 2**category - 1
        # each category has a code of five bits, its own number; category 16 (-32,768) has no bits after it
        codes.append(f"{category:05b}" + (f"{rest:0{category}b}" if 0 < category < 16 else ""))
    stream = "".join(codes)
    stream += "1" * (-len(stream) % 8)
    scan = int(stream, 2).to_bytes(len(stream) // 8).replace(b"\xff", b"\xff\0")
    height, width = pixels.shape
    frame = bytes((bits,)) + height.to_bytes(2) + width.to_bytes(2) + b"\1\1\x11\0"
    table = b"\0" + bytes([0, 0, 0, 0, 17, *[0] * 11]) + bytes(range(17))
    segments = ((0xC3, frame), (0xC4, table), (0xDA, b"\1\1\0\1\0\0"))
    head = b"".join(b"\xff" + bytes((kind,)) + (len(body) + 2).to_bytes(2) + body for kind, body in segments)
    return b"\xff\xd8" + head + scan + b"\xff\xd9"


def shapes(height: int = 60, width: int = 76, bits: int = 12) -> np.ndarray:
    """uint16 (H, W) that uses all values of `bits` bits."""
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


def shown_by_pydicom(dataset: Dataset) -> np.ndarray:
    """pydicom's own chain on every pixel, from what it makes of the lowest to what it makes of the highest value: 0–255."""
    pixels = apply_voi_lut(apply_modality_lut(dataset.pixel_array, dataset), dataset)
    slope, intercept = float(dataset.get("RescaleSlope", 1)), float(dataset.get("RescaleIntercept", 0))
    signed = dataset.PixelRepresentation * 2 ** (dataset.BitsStored - 1)
    low, high = (slope * value + intercept for value in (-signed, 2**dataset.BitsStored - 1 - signed))
    return (pixels - low) / (high - low) * 255
