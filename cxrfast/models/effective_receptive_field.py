"""The effective receptive field: how strongly the centre of the last feature map depends on each input pixel.

A model and images come in, a map and its size and radii go out. Nothing here changes a weight or touches a file.
"""

from collections.abc import Iterable

import numpy as np
import torch

from cxrfast.errors import RunError
from cxrfast.models.classifier import Classifier, frozen
from cxrfast.models.precision import without_tf32

THRESHOLD = 1 - 0.9545
"""Fraction of the maximum: pixels above it belong to the effective receptive field (Luo et al. 2016, section 4)."""


def draw_shifts(seed: int, rows: np.ndarray, side: int) -> np.ndarray:
    """Shifts of rows, px down and right: int64 (N, 2), uniform in ±side / 2, a function of seed and row only.

    A row moves by the same fraction of the side at every scale.
    """
    words = [np.random.Philox(key=np.array([seed, row], np.uint64)).random_raw(2) for row in rows.tolist()]
    unit = np.array(words, np.float64).reshape(-1, 2) / 2**64
    return np.rint((unit - 0.5) * side).astype(np.int64)


def shifted(images: torch.Tensor, shifts: np.ndarray) -> torch.Tensor:
    """Images (N, C, H, W), each moved by its own (down, right) px, at most one side; black fills the gap."""
    out = torch.zeros_like(images)
    height, width = images.shape[-2:]
    for source, target, (down, right) in zip(images, out, shifts.tolist(), strict=True):
        target[:, max(down, 0) : height + min(down, 0), max(right, 0) : width + min(right, 0)] = source[
            :, max(-down, 0) : height + min(-down, 0), max(-right, 0) : width + min(-right, 0)
        ]
    return out


def squared_gradients(model: Classifier, images: torch.Tensor) -> torch.Tensor:
    """float64 (N, H, W): squared gradients of the last feature map's centre with respect to the input pixels.

    `images`: uint8 (N, 1, H, W). The centre is position (h // 2, w // 2), summed over its channels; if the number of
    positions is even, it is up to half a stride below and right of the image's centre. The gradient is taken at the
    output of `normalise`, since integers have none, and summed over its three channels before it is squared,
    because they are copies of one grey level and move together. That sum is our reading of the study.
    """
    with torch.enable_grad(), without_tf32():
        pixels = model.normalise(images).detach().requires_grad_()
        features = model.feature_layers(pixels)
        centre = features[:, :, features.shape[2] // 2, features.shape[3] // 2]
        # In evaluation mode images are independent: the gradient of the sum holds the gradient of each.
        (gradient,) = torch.autograd.grad(centre.sum(), pixels)
    return gradient.sum(1).double().square()


def effective_receptive_field(model: Classifier, batches: Iterable[torch.Tensor]) -> np.ndarray:
    """float64 (H, W), maximum 1: `squared_gradients` averaged over the images of all `batches`.

    `batches`: uint8 (N, 1, H, W) on the model's device, `shifted` by large random translations before, so
    that the mean shows the network rather than the thorax. All zeros if no pixel reaches the centre. Raises
    RunError without images. Source: Luo, Li, Urtasun and Zemel 2016, "Understanding the effective receptive
    field in deep convolutional neural networks"; squares and translations are the study's.
    """
    total, count = None, 0
    with frozen(model):
        for images in batches:
            part = squared_gradients(model, images).sum(0)
            total, count = part if total is None else total + part, count + len(images)
    if total is None or count == 0:
        raise RunError("a receptive field needs at least one image")
    mean = (total / count).cpu().numpy()
    return mean / (mean.max() or 1.0)


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
