"""Grad-CAM (Selvaraju et al. 2017, section 3): where in a radiograph a finding's logit comes from.

In: a trained run and a finding. Out: one map per image, for a few positives, in the run's maps.zarr, and a figure
that names images only by their row: ids may be paths, and hold names. Nothing here changes a weight.
"""

import shlex
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch.nn import functional

from cxrfast.analysis.maps import batches, stored
from cxrfast.errors import RunError
from cxrfast.figures import figure_text
from cxrfast.files import write_figure
from cxrfast.labels import targets
from cxrfast.metrics import sigmoid
from cxrfast.models.classifier import Classifier
from cxrfast.models.feature_map import map_and_logits
from cxrfast.models.precision import without_tf32
from cxrfast.runs.arrays import read_array
from cxrfast.runs.folder import file_name
from cxrfast.runs.run import Run


def gradcam(model: Classifier, image: torch.Tensor, label: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Maps float32 (N, H, W) in [0, 1] for the logit of index `label`, and that logit (N,).

    `image`: uint8 (N, 1, H, W). The gradient of the logit with respect to the last feature map, averaged over
    positions, weighs the map's channels (equation 1); the positive part of their sum (equation 2) is enlarged
    bilinearly and divided by its maximum. A map is zero if no position supports the finding. Evaluation mode, no
    autocast. Raises NotDefined for a network without a feature map, see `models.feature_map`.
    """
    with torch.enable_grad(), without_tf32():
        features, logits = map_and_logits(model, image)
        # In evaluation mode images are independent: the gradient of the sum holds the gradient of each.
        (gradient,) = torch.autograd.grad(logits[:, label].sum(), features)
    weights = gradient.mean((2, 3), keepdim=True)
    positive = functional.relu((weights * features.detach()).sum(1, keepdim=True))
    maps = functional.interpolate(positive, size=image.shape[-2:], mode="bilinear", align_corners=False)[:, 0]
    largest = maps.amax((1, 2), keepdim=True)
    return torch.where(largest > 0, maps / largest, 0).float(), logits[:, label].detach()


PART = "test"

ARRAYS = ("rows", "maps", "logits")
"""Fields of `Maps`, as they are called in maps.zarr."""


@dataclass(frozen=True)
class Maps:
    """Grad-CAM of one finding on a few of a run's images."""

    rows: np.ndarray
    """int64 (n,)"""
    maps: np.ndarray
    """float32 (n, H, W) in [0, 1]"""
    logits: np.ndarray
    """float32 (n,)"""
    part: str
    """Where the rows are from: train, val or test."""


def gradcam_run(
    run: Run,
    label: str,
    images: int = 8,
    shards: Path | None = None,
    device: torch.device | str = "cpu",
) -> Maps:
    """Maps of the `images` positives among the test rows with the highest logits, stored in the run's maps.zarr.

    Without predictions, the first positives. Raises RunError for an unknown finding, without positives, for a run
    without weights, for another shard set, and while another process writes into the run.
    """
    if images < 1:
        raise RunError(f"Grad-CAM needs at least one image, not {images}")
    with run.lock("computing Grad-CAM maps") as held:
        return _gradcam_run(held, label, images, shards, device)


def _gradcam_run(run: Run, label: str, images: int, shards: Path | None, device: torch.device | str) -> Maps:
    index = _index(run, label)
    rows = positives(run, label, PART)[:images]
    model = run.load(device)
    loaded = batches(run, rows, shards, device, f"gradcam {run.name} {label}")
    found = [[tensor.float().cpu() for tensor in gradcam(model, batch.image, index)] for batch in loaded]
    maps, logits = (torch.cat(parts).numpy() for parts in zip(*found, strict=True))
    result = Maps(rows, maps, logits, PART)
    arrays = {f"{_group(label)}/{name}": getattr(result, name) for name in ARRAYS}
    run.add_maps(arrays, {_group(label): {"part": PART, "config_hash": run.hash}})
    return result


def positives(run: Run, label: str, part: str) -> np.ndarray:
    """int64: the rows of `part` with the finding, under the run's label policy. Raises RunError without any.

    Highest logit first if the run has predictions, else in the order of the table.
    """
    index = _index(run, label)
    frame = run.rows()
    frame = frame[frame["part"] == part]
    raw = frame[list(run.config.labels)].to_numpy(np.float32)
    target, mask = targets(raw, run.config.policies, run.config.blanks, run.config.unlabelled)
    rows = frame["row"].to_numpy(np.int64, copy=True)[(target[:, index] == 1) & mask[:, index]]
    if run.has_predictions:
        predicted = run.read_predictions(part)
        order = np.argsort(-predicted.logits[:, index], kind="stable")
        rows = predicted.row[order][np.isin(predicted.row[order], rows)]
    if not len(rows):
        raise RunError(f"{run.name}: none of the {len(frame):,} images in its {part} part has {label}")
    return rows


def read_gradcam(run: Run, label: str) -> Maps:
    """Raises RunError if there are no maps of this finding, or only another configuration's."""
    _index(run, label)
    name, command = _group(label), f"cxrfast gradcam {run.folder} --label {shlex.quote(label)}"
    group, known = stored(run, name, f"Grad-CAM of {label}", command)
    return Maps(**{array: read_array(group, f"{name}/{array}", f"`{command}`") for array in ARRAYS}, part=known["part"])


def _index(run: Run, label: str) -> int:
    if label not in run.config.labels:
        raise RunError(f"{run.name} has no finding {label!r}: use one of {', '.join(run.config.labels)}")
    return run.config.labels.index(label)


def _group(label: str) -> str:
    """Group of a finding's maps in maps.zarr."""
    return f"gradcam/{file_name(label)}"


# Figure


def figure(run: Run, label: str, shards: Path | None = None) -> Figure:
    """Each image next to the same image under its map, two pairs per line; titled with its row and its probability.

    The images are read from the shard set. Raises RunError as `read_gradcam` does.
    """
    found = read_gradcam(run, label)
    images = np.concatenate([batch.image[:, 0].numpy() for batch in batches(run, found.rows, shards)])
    probabilities = sigmoid(found.logits)
    columns = min(2, len(images))
    lines = -(-len(images) // columns)
    result = Figure(figsize=(4.7 * columns + 0.8, 2.5 * lines + 0.4), layout="constrained")
    widths = [1, 1, 0.1] * columns  # the narrow column keeps pairs apart
    grid = result.add_gridspec(lines, len(widths) - 1, width_ratios=widths[:-1])
    for i in range(len(images)):
        y, x = i // columns, 3 * (i % columns)
        alone, under = result.add_subplot(grid[y, x]), result.add_subplot(grid[y, x + 1])
        for axes in (alone, under):
            axes.imshow(images[i], cmap="gray", vmin=0, vmax=255)
            axes.set_axis_off()
        # Transparent where the map is low: the radiograph stays readable.
        shown = under.imshow(found.maps[i], cmap="inferno", vmin=0, vmax=1, alpha=0.6 * found.maps[i])
        alone.set_title(f"row {found.rows[i]}", fontsize="small")
        empty = "" if found.maps[i].any() else ", map is zero"
        under.set_title(f"probability {probabilities[i]:.2f}{empty}", fontsize="small")
    bar = result.colorbar(shown, ax=result.axes, shrink=0.8, aspect=30)
    bar.set_label("Grad-CAM / the image's maximum")
    result.suptitle(f"{figure_text(label)}: {figure_text(run.name)}, {found.part} part", fontsize="medium")
    return result


def save_figure(run: Run, label: str, shards: Path | None = None) -> Path:
    """Write `figure` as a PNG into the run. Returns its path."""
    path = run.gradcam_path(label)
    with run.lock("drawing Grad-CAM maps"):
        write_figure(path, figure(run, label, shards), dpi=150)
    return path
