"""Findings are seen at the sizes that they are planted for, and at no smaller one."""

from dataclasses import replace

import cv2
import numpy as np
import pytest

from cxrfast.phantoms.anatomy import Anatomy, heart
from cxrfast.phantoms.cohort import Image, stream
from cxrfast.phantoms.drawing import draw
from cxrfast.phantoms.findings import FINDINGS


def of_kind(kind: str) -> list[str]:
    return [name for name, finding in FINDINGS.items() if finding.kind == kind]


def pair(finding: str, view: str, patient: int, size: int = 512) -> tuple[np.ndarray, np.ndarray]:
    """The same phantom without and with one finding."""
    image = Image(patient, patient, patient, 0, 0, "", view, size, round(0.82 * size), (), 0, 0.0)
    return draw(image, 5), draw(replace(image, present=(finding,)), 5)


def reduced(pixels: np.ndarray, at: int) -> np.ndarray:
    return cv2.resize(pixels.astype(np.float32), (at, at), interpolation=cv2.INTER_AREA)


def difference(finding: str, view: str, patient: int, at: int) -> np.ndarray:
    """Absolute difference in grey levels, averaged over cells of an `at`×`at` image."""
    without, present = pair(finding, view, patient)
    return np.abs(reduced(present, at) - reduced(without, at))


@pytest.mark.parametrize("view", ["PA", "AP", "LATERAL"])
@pytest.mark.parametrize("finding", of_kind("large"))
def test_large_findings_survive_16_pixels(finding, view):
    for patient in range(2):
        found = difference(finding, view, patient, at=16)
        assert found.mean() > 0.6
        assert found.max() > 25


@pytest.mark.parametrize("finding", of_kind("middle"))
def test_middle_findings_are_there_at_64_pixels(finding):
    for patient in range(2):
        assert difference(finding, "PA", patient, at=64).max() > 5


@pytest.mark.parametrize("view", ["PA", "LATERAL"])
@pytest.mark.parametrize("finding", of_kind("fine"))
def test_fine_findings_are_seen_at_native_size_and_gone_at_a_sixteenth(finding, view):
    for patient in range(2):
        without, present = (pixels.astype(int) for pixels in pair(finding, view, patient))
        assert np.abs(present - without).max() > 25
        assert 20 < (np.abs(present - without) > 8).sum() < 1500
        for at in (16, 32):
            found = reduced(present, at) - reduced(without, at)
            assert np.abs(found).mean() < 0.05
            assert np.abs(found).max() < 2


@pytest.mark.parametrize("size", [512, 1024])
def test_fine_findings_are_one_or_two_native_pixels_wide(size):
    without, present = (pixels.astype(int) for pixels in pair("Pneumothorax", "PA", 1, size))
    bright = present - without > 8
    assert bright.any()
    runs = np.diff(np.pad(bright, ((0, 0), (1, 1))).astype(int), axis=1)
    widths = np.nonzero(runs == -1)[1] - np.nonzero(runs == 1)[1]
    assert np.median(widths) <= 2


def test_cardiothoracic_ratios_leave_a_gap():
    ratios = []
    for patient in range(100):
        a = Anatomy.of(stream(0, "patient", patient))
        ratios.append([np.ptp(heart(a, ratio)[0][:, 0]) / (2 * a.half) for ratio in a.heart])
    normal, large = np.array(ratios).T
    assert 0.40 < normal.min() < normal.max() < 0.50
    assert 0.55 < large.min() < large.max() < 0.67


def test_a_patient_keeps_the_anatomy_and_differs_from_others():
    image = Image(0, 0, 0, 0, 0, "", "PA", 128, 105, (), 0, 0.0)
    small = [
        cv2.resize(draw(i, 0), (16, 16), interpolation=cv2.INTER_AREA).astype(float)
        for i in (image, replace(image, index=1, study=1), replace(image, patient=1))
    ]
    assert np.corrcoef(small[0].ravel(), small[1].ravel())[0, 1] > 0.9
    assert np.abs(small[0] - small[2]).mean() > 1
