"""DICOM's stored values → grey, as a viewer shows them: modality LUT, then VOI LUT, window or lowest to highest value.

What means nothing (a window of width 0, a LUT without entries) is ignored with a remark, as viewers do. Import only where
pydicom is installed.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

import numpy as np
from pydicom.dataset import Dataset
from pydicom.uid import ExplicitVRBigEndian

from cxrfast.shards.images.bad_image import BadImage, Reason
from cxrfast.shards.images.remark import Remark

DECIMAL = re.compile(r"[+-]?(\d+([.,]\d*)?|[.,]\d+)([eE][+-]?\d+)?", re.ASCII)
"""A decimal string (PS3.5, section 6.2), and one whose writer used a decimal comma."""
THOUSANDS = re.compile(r"[+-]?[1-9]\d{0,2},\d{3}", re.ASCII)
"""One and a half, or fifteen hundred: nobody can tell."""
BINARY = {"FL", "FD", "SL", "SS", "UL", "US"}
"""Value representations of numbers that are not text."""


@dataclass
class Display:
    """How one image's stored values become grey, and what is noteworthy about that."""

    dataset: Dataset
    remarks: list[Remark] = field(default_factory=list)

    def table(self, codes: np.ndarray) -> np.ndarray:
        """uint8 (2^stored,): grey of each stored value, from the lowest. `codes` are the image's pixels, as places in it.

        Padding is black, also where the image is inverted, and takes no part in a stretch. Raises BadImage.
        """
        dataset = self.dataset
        stored = stored_values(dataset)
        padding = is_padding(stored, dataset)
        with np.errstate(over="ignore", invalid="ignore"):  # values beyond any window are black or white
            values = self._modality(stored)
            fractions = self._voi(values)
            if fractions is None:
                present = np.flatnonzero(np.bincount(codes.ravel(), minlength=len(stored)) * ~padding)
                fractions = stretched(values, values[present])
        if np.isnan(fractions).any():
            raise BadImage(Reason.CORRUPT, "a LUT or window that gives no numbers")
        table = (fractions.clip(0, 1) * 255 + 0.5).astype(np.uint8)
        if self._inverted():
            table = 255 - table
        table[padding] = 0
        return table

    def _inverted(self) -> bool:
        """MONOCHROME1 is inverted. A presentation LUT shape must say the same (PS3.3, section C.8.11.3): it changes nothing."""
        inverted = is_inverted(self.dataset)
        shape = str(self.dataset.get("PresentationLUTShape") or "").strip(" \0").upper()
        if shape in ("IDENTITY", "INVERSE") and (shape == "INVERSE") != inverted:
            self.remarks.append(Remark.SHAPE)
        return inverted

    def _modality(self, stored: np.ndarray) -> np.ndarray:
        """Stored values through the modality LUT, or the rescale slope and intercept (PS3.3, section C.11.1)."""
        dataset = self.dataset
        if dataset.get("ModalityLUTSequence"):
            looked_up = self._looked_up(stored, "ModalityLUTSequence", Remark.RESCALE)
            if looked_up is not None:
                return looked_up[0]
        slope, intercept = (numbers(dataset, name) for name in ("RescaleSlope", "RescaleIntercept"))
        if slope and intercept:
            if slope[0] and intercept[0] is not None:
                values = stored * slope[0] + intercept[0]
                if np.isfinite(values[[0, -1]]).all() and math.isfinite(values[-1] - values[0]):
                    return values
            self.remarks.append(Remark.RESCALE)
        return stored

    def _voi(self, values: np.ndarray) -> np.ndarray | None:
        """Fraction of white of each value by the VOI LUT or the first valid window; None if the image has neither."""
        if self.dataset.get("VOILUTSequence"):
            looked_up = self._looked_up(
                np.rint(values).clip(-(2**20), 2**20).astype(np.int64), "VOILUTSequence", Remark.LUT
            )
            if looked_up is not None:
                entries, white = looked_up
                return entries / white
        centres, widths = (numbers(self.dataset, name) for name in ("WindowCenter", "WindowWidth"))
        if not centres and not widths:
            return None
        function = self._function()
        for centre, width in zip_longest(centres, widths):
            if centre is not None and width is not None and (width >= 1 or (width > 0 and function is not linear)):
                return function(values, centre, width)
            if Remark.WINDOW not in self.remarks:
                self.remarks.append(Remark.WINDOW)
        return None

    def _function(self) -> Callable[[np.ndarray, float, float], np.ndarray]:
        name = str(self.dataset.get("VOILUTFunction") or "LINEAR").strip(" \0").upper()
        if name not in FUNCTIONS:
            self.remarks.append(Remark.FUNCTION)
        return FUNCTIONS.get(name, linear)

    def _looked_up(self, values: np.ndarray, sequence: str, invalid: Remark) -> tuple[np.ndarray, int] | None:
        """Whole numbers through the first LUT of a sequence, and the LUT's white; None, with a remark, if it is invalid."""
        try:
            entries, first, white = read_lut(self.dataset[sequence].value[0], values, self.dataset)
        except Exception:  # pydicom's parsers raise all kinds of exceptions for a damaged element
            self.remarks.append(invalid)
            return None
        return entries[(values - first).clip(0, len(entries) - 1)], white


def stored_values(dataset: Dataset) -> np.ndarray:
    """int64 (2^stored,): all values that the pixels can have, ascending."""
    values = np.arange(2**dataset.BitsStored)
    return values - 2 ** (dataset.BitsStored - 1) if dataset.PixelRepresentation else values


def is_inverted(dataset: Dataset) -> bool:
    """Are low values white?"""
    return dataset.PhotometricInterpretation == "MONOCHROME1"


def is_padding(stored: np.ndarray, dataset: Dataset) -> np.ndarray:
    """bool, like `stored`: values that pad the image to a rectangle (PS3.3, section C.7.5.1.1.2).

    A value is taken by its sixteen bits: files of unsigned pixels name it as a signed number and the other way round.
    """
    ends = [whole_number(dataset, name) for name in ("PixelPaddingValue", "PixelPaddingRangeLimit")]
    if ends[0] is None:
        return np.zeros(stored.shape, bool)
    offset = 2**15 if dataset.PixelRepresentation else 0
    known = [(end + offset) % 2**16 - offset for end in ends if end is not None]
    return (stored >= min(known)) & (stored <= max(known))


def padding_widens(codes: np.ndarray, dataset: Dataset) -> bool:
    """Would a stretch from the lowest to the highest pixel be narrower without the padding?"""
    if whole_number(dataset, "PixelPaddingValue") is None:
        return False
    stored = stored_values(dataset)
    counts = np.bincount(codes.ravel(), minlength=len(stored))
    present, inside = np.flatnonzero(counts), np.flatnonzero(counts * ~is_padding(stored, dataset))
    return bool(inside.size) and (present[0], present[-1]) != (inside[0], inside[-1])


def stretched(values: np.ndarray, present: np.ndarray) -> np.ndarray:
    """Position of each value between the lowest (0) and the highest (1) of those present; all 0 where they are equal."""
    if not present.size:
        return np.zeros(values.shape)
    low, high = present.min(), present.max()
    return (values - low) / ((high - low) or 1)


def linear(values: np.ndarray, centre: float, width: float) -> np.ndarray:
    """PS3.3, section C.11.2.1.2.1; width ≥ 1. Of width 1, values above centre - 0.5 are white."""
    if width == 1:
        return (values > centre - 0.5).astype(float)
    return (values - (centre - 0.5)) / (width - 1) + 0.5


def linear_exact(values: np.ndarray, centre: float, width: float) -> np.ndarray:
    """PS3.3, section C.11.2.1.3.2; width > 0."""
    return (values - centre) / width + 0.5


def sigmoid(values: np.ndarray, centre: float, width: float) -> np.ndarray:
    """PS3.3, section C.11.2.1.3.1; width > 0."""
    return 1 / (1 + np.exp(-4 * (values - centre) / width))


FUNCTIONS = {"LINEAR": linear, "LINEAR_EXACT": linear_exact, "SIGMOID": sigmoid}
"""VOI LUT Function → (values, centre, width) to fractions of white, before they are clipped to 0 and 1."""


def read_lut(item: Dataset, values: np.ndarray, dataset: Dataset) -> tuple[np.ndarray, int, int]:
    """A modality or VOI LUT (PS3.3, sections C.11.1.1 and C.11.2.1.1): its entries, the first value it maps, and its white.

    White is the highest value of the descriptor's bits per entry, whether an entry has it or not. Raises an exception
    where the LUT is damaged. Not by pydicom 3.0: it uses only the first 256 of a VOI LUT's 8-bit entries, and refuses a
    modality LUT of 12 bits.
    """
    count, first, bits = item.LUTDescriptor
    count = count % 2**16 or 2**16
    data = item.LUTData
    if isinstance(data, bytes):
        big = dataset.file_meta.TransferSyntaxUID == ExplicitVRBigEndian
        data = np.frombuffer(data, "u1" if len(data) < 2 * count else ">u2" if big else "<u2")
    entries = np.atleast_1d(data).astype(np.int64)[:count] % 2**16
    if len(entries) < count:
        raise ValueError(f"a LUT of {len(entries):,} entries, not {count:,}")
    bits = max(bits if 1 <= bits <= 16 else 0, int(entries.max()).bit_length())
    if not bits:
        raise ValueError("a LUT of zeros that does not state its bits")
    implicit = dataset.file_meta.TransferSyntaxUID.is_implicit_VR
    return entries, first_mapped(first, values, implicit), 2**bits - 1


def first_mapped(first: int, values: np.ndarray, implicit: bool) -> int:
    """The first value that a LUT maps, with the sign that its input has.

    Implicit VR does not say whether the sixteen bits are signed: they are if the LUT's input can be negative. An explicit
    VR is believed unless no input reaches its number.
    """
    low, high = int(values.min()), int(values.max())
    if implicit:
        first %= 2**16
    return first - 2**16 if first >= 2**15 and low < 0 and (implicit or first > high) else first


def numbers(dataset: Dataset, name: str) -> list[float | None]:
    """The numbers of an element, None for one that means nothing; [] where it is missing or empty.

    pydicom would refuse a decimal comma.
    """
    element = dataset.get_item(name)
    if element is None or not element.value:
        return []
    if element.VR in BINARY or not isinstance(element.value, bytes):
        value = dataset[name].value
        return [float(v) if math.isfinite(v) else None for v in ([value] if isinstance(value, int | float) else value)]
    text = element.value.decode("latin-1").strip(" \0")
    return [number(part) for part in text.split("\\")] if text else []


def number(text: str) -> float | None:
    """A decimal string's value, with a point or a comma; None if it is not a finite number, or a comma may mean thousands."""
    text = text.strip(" \0")
    if not DECIMAL.fullmatch(text) or THOUSANDS.fullmatch(text):
        return None
    value = float(text.replace(",", "."))
    return value if math.isfinite(value) else None


def whole_number(dataset: Dataset, name: str) -> int | None:
    """The first whole number of an element; None if it is missing, empty or something else."""
    try:
        value: Any = dataset[name].value
        if isinstance(value, bytes):
            return int.from_bytes(value[:2], "little")
        return int(value if isinstance(value, int | float | str) else value[0])
    except Exception:  # pydicom's parsers raise all kinds of exceptions for a damaged element
        return None
