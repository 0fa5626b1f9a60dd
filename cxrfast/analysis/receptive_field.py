"""Effective receptive fields of runs: how much of a radiograph one unit of the last feature map uses.

In: a trained run and a few of its validation images. Out: a map of squared input gradients in the run's maps.zarr,
numbers that summarise it, and a figure with one panel per scale. Nothing here changes a weight.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from cxrfast.analysis.maps import batches, stored
from cxrfast.errors import RunError
from cxrfast.figures import figure_text
from cxrfast.runs.arrays import read_array
from cxrfast.runs.run import Run, part_rows

if TYPE_CHECKING:
    import torch

THRESHOLD = 1 - 0.9545
"""Fraction of the maximum: pixels above it belong to the effective receptive field (Luo et al. 2016, section 4)."""


@dataclass(frozen=True)
class Erf:
    """A run's effective receptive field."""

    run: str
    """Name of the run."""
    map: np.ndarray
    """float32 (H, W), maximum 1."""
    images: int
    """Number of validation images averaged over."""
    seed: int
    """Seed of the translations."""
    size: float
    """`erf_size`, px."""
    fraction: float
    """`size` as a share of the image's side."""
    radius_50: float
    """`energy_radius` that holds half of the map's sum, px."""
    radius_95: float
    theoretical: int | None
    """Theoretical receptive field, px; None where none is known."""
    config_hash: str
    """Hash of the run's configuration."""

    def in_words(self) -> str:
        """One line for people."""
        known = f"theoretical {self.theoretical} px" if self.theoretical else "theoretical unknown"
        return (
            f"{self.run}: ERF {self.size:.0f} px, {100 * self.fraction:.0f} % of the side ({known}); "
            f"half of its energy within {self.radius_50:.0f} px of its centre, "
            f"95 % within {self.radius_95:.0f} px; {self.images} images"
        )


def erf(
    run: Run,
    images: int = 64,
    shards: Path | None = None,
    device: "torch.device | str" = "cpu",
    seed: int = 0,
) -> Erf:
    """Measure the field on the run's first `images` validation images, in fp32, and store it in maps.zarr.

    Raises RunError for a run without weights or validation rows, for another shard set, and while another process writes
    into the run.
    """
    with run.lock("measuring its receptive field") as held:
        return _erf(held, images, shards, device, seed)


def _erf(run: Run, images: int, shards: Path | None, device: "torch.device | str", seed: int) -> Erf:
    from cxrfast.models import receptive_field as fields  # torch, which figures do without

    frame = run.rows(["row", "part"])
    rows = part_rows(frame, "val")[: max(images, 0)]
    if not len(rows):
        raise RunError(
            f"{run.name}: a receptive field needs at least one validation image, not {images} of "
            f"{(frame['part'] == 'val').sum():,}"
        )
    model, scale = run.load(device), run.config.scale
    moved = (
        fields.shifted(batch.image, fields.draw_shifts(seed, batch.row.cpu().numpy(), scale))
        for batch in batches(run, rows, shards, device, f"erf {run.name}")
    )
    found = fields.effective_receptive_field(model, moved).astype(np.float32)
    size, theoretical = erf_size(found), None
    with suppress(RunError):  # none is known for some architectures
        theoretical = fields.theoretical_receptive_field(run.config.arch, scale)[0]
    result = Erf(
        run=run.name,
        map=found,
        images=len(rows),
        seed=seed,
        size=size,
        fraction=size / scale,
        radius_50=energy_radius(found, 0.5),
        radius_95=energy_radius(found, 0.95),
        theoretical=theoretical,
        config_hash=run.hash,
    )
    numbers = {name: value for name, value in asdict(result).items() if name not in ("map", "run")}
    run.add_maps({"erf": found}, {"erf": numbers})
    return result


def read_erf(run: Run) -> Erf:
    """Raises RunError if it has not been measured, or only for another configuration."""
    command = f"cxrfast erf {run.folder}"
    group, numbers = stored(run, "erf", "effective receptive field", command)
    return Erf(run=run.name, map=read_array(group, "erf", f"`{command}`"), **numbers)


def has_erf(run: Run) -> bool:
    """True if the field of this configuration is stored."""
    group = run.open_maps()
    return group is not None and group.attrs.get("erf", {}).get("config_hash") == run.hash


FLOOR = 1e-4
"""Fraction of the maximum where the figure's colours end."""


def erf_figure(runs: Sequence[Run]) -> Figure:
    """One panel per scale and group of runs; the folds' maps are averaged.

    Colours are logarithmic; the square has the area of the effective receptive field. Raises RunError as
    `read_erf` does.
    """
    groups: dict[tuple[int, str], list[Erf]] = {}
    for run in sorted(runs, key=lambda run: (run.config.arch, run.config.scale)):
        groups.setdefault((run.config.scale, run.folder.parent.name), []).append(read_erf(run))
    if not groups:
        raise RunError("no runs to draw receptive fields of")
    columns = min(4, len(groups))
    lines = -(-len(groups) // columns)
    result = Figure(figsize=(3.0 * columns + 1.2, 3.2 * lines + 0.4), layout="constrained")
    panels = result.subplots(lines, columns, squeeze=False).ravel()
    for axes in panels[len(groups) :]:
        axes.set_axis_off()
    for axes, ((side, name), found) in zip(panels, groups.items(), strict=False):
        erf_map = np.mean([e.map for e in found], axis=0)
        size = erf_size(erf_map)
        shares = np.maximum(erf_map / (erf_map.max() or 1), FLOOR)
        shown = axes.imshow(shares, norm=LogNorm(FLOOR, 1), cmap="magma", extent=(0, side, side, 0))
        # A square as large as the image fits only in its middle, wherever the centre of mass is.
        y, x = (min(max(c + 0.5 - size / 2, 0), side - size) for c in energy_centre(erf_map))
        axes.add_patch(Rectangle((x, y), size, size, fill=False, edgecolor="cyan", linewidth=1.5))
        known = f"theoretical {found[0].theoretical} px, " if found[0].theoretical else ""
        many = f"{len(found)} folds × " if len(found) > 1 else ""
        area = f"{side} px: ERF {size:.0f} px, {100 * size / side:.0f} % of the side"
        axes.set_title(f"{area}\n{known}{many}{found[0].images} images", fontsize="small")
        axes.set_xticks([0, side // 2, side])
        axes.set_yticks([0, side // 2, side])
        axes.set_xlabel(f"px, {figure_text(name, 30)}")
    bar = result.colorbar(shown, ax=panels.tolist(), shrink=0.8, extend="min")
    bar.set_label("squared gradient / maximum")
    return result


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
