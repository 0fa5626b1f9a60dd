"""Size, centre and radius of an effective receptive field: maps in, numbers out; pure numpy, so that tables need no torch."""

import numpy as np

THRESHOLD = 1 - 0.9545
"""Fraction of the maximum: pixels above it belong to the effective receptive field (Luo et al. 2016, section 4)."""


def erf_size(erf_map: np.ndarray) -> float:
    """Side, px, of a square with as many pixels as exceed 1 - 0.9545 of the map's maximum; 0 for zeros.

    Luo et al. count pixels of a map of gradients; ours holds squares, as the study's does, and falls off faster.
    Single pixels stand out where few images are averaged, which makes the size smaller: compare sizes over the same
    number of images, or compare `energy_radius`.
    """
    return float(np.sqrt((erf_map > THRESHOLD * erf_map.max()).sum()))


def energy_centre(erf_map: np.ndarray) -> tuple[float, float]:
    """Row and column of the map's centre of mass; the image's centre for a map of zeros."""
    weight = erf_map.astype(np.float64) if erf_map.any() else np.ones(erf_map.shape)
    y, x = np.indices(erf_map.shape)
    return float((y * weight).sum() / weight.sum()), float((x * weight).sum() / weight.sum())


def energy_radius(erf_map: np.ndarray, share: float) -> float:
    """Radius, px, of the circle around the centre of mass that holds `share` of the map's sum; 0 for zeros."""
    if not erf_map.any():
        return 0.0
    (cy, cx), (y, x) = energy_centre(erf_map), np.indices(erf_map.shape)
    distance = np.hypot(y - cy, x - cx).ravel()
    order = np.argsort(distance)
    held = np.cumsum(erf_map.ravel()[order].astype(np.float64))
    return float(distance[order][np.searchsorted(held, share * held[-1])])
