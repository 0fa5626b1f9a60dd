"""Receptive fields: how much of a radiograph one unit of the last feature map can see, and how much it does.

In: a trained run and a few of its validation images. Out: a map of squared input gradients in the run's
maps.zarr, the numbers that sum it up, and a figure with one panel a scale. Nothing here changes a weight.
"""

import operator
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import fx, nn

from cxrfast.errors import RunError
from cxrfast.models.classifier import Classifier
from cxrfast.models.precision import without_tf32
from cxrfast.pipelines.loader import Loader
from cxrfast.pipelines.order import EvalOrder
from cxrfast.progress import progress
from cxrfast.runs.arrays import read_array
from cxrfast.runs.run import Run, part_rows

THRESHOLD = 1 - 0.9545
"""Of the maximum: pixels above it belong to the effective receptive field (Luo et al. 2016, section 4)."""

BATCH_PIXELS = 2**18
"""In a batch, at most, unless one image has more: a backward pass through DenseNet121 holds 3 kB a pixel."""


# Theoretical receptive field

_POINTWISE = {operator.add, operator.iadd, operator.mul, operator.imul, torch.add, torch.mul, torch.cat}
_POINTWISE_NAMES = {"relu", "relu_", "sigmoid", "stochastic_depth", "layer_norm", "permute", "contiguous"}
_POINTWISE_MODULES = (
    nn.modules.batchnorm._NormBase,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.Dropout,
    nn.Identity,
    nn.Linear,
    nn.ReLU,
    nn.ReLU6,
    nn.SiLU,
    nn.GELU,
    nn.Sigmoid,
    nn.Hardsigmoid,
    nn.Hardswish,
)
_GLOBAL = (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)

Field = tuple[int, int]


def theoretical_receptive_field(arch: str) -> Field:
    """Side of the square of input pixels that a unit of the last feature map depends on, and its stride, px.

    densenet121: 2071 and 32. Raises RunError for architectures without a convolutional feature map (swin_t).
    """
    with torch.device("meta"):  # shapes alone are enough: no weights are made
        layers = Classifier(arch, 1).feature_layers
    try:
        return receptive_field(layers)
    except RunError as error:
        raise RunError(f"no theoretical receptive field is known for {arch}: {error}") from error


def receptive_field(layers: nn.Module) -> Field:
    """Field r and stride j of the output of `layers`, px.

    Kernel k with stride s and dilation d turns (r, j) into (r + d·(k - 1)·j, j·s); where branches meet, the
    larger field counts (Araujo, Norris and Sim 2019, "Computing receptive fields of convolutional neural
    networks", Distill). The gate of a squeeze-and-excitation block, which sees the whole image through a
    global mean, is left out. Raises RunError naming a layer that is neither a kernel nor pointwise.
    """
    graph = fx.symbolic_trace(layers)
    fields: dict[fx.Node, Field | None] = {}
    for node in graph.graph.nodes:
        before = [f for n in node.all_input_nodes if (f := fields[n])]
        widest = (max(r for r, _ in before), max(j for _, j in before)) if before else None
        if node.op == "placeholder":
            fields[node] = (1, 1)
        elif node.op == "call_module":
            fields[node] = _after(graph.get_submodule(str(node.target)), widest)
        elif node.op in ("get_attr", "output") or _is_pointwise(node.target):
            fields[node] = widest
        else:
            raise RunError(f"what {getattr(node.target, '__name__', node.target)} does to it is unknown")
    field = fields[node]
    if field is None:
        raise RunError("the layers end in a global pool")
    return field


def _after(module: nn.Module, field: Field | None) -> Field | None:
    """The field behind one layer; None behind a global pool, whose output is no feature map any more."""
    if isinstance(module, _GLOBAL):
        return None
    if isinstance(module, (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d)):
        if field is None:
            return None
        kernel, stride = _largest(module.kernel_size), _largest(module.stride)
        dilation = _largest(getattr(module, "dilation", 1))  # AvgPool2d has none
        return field[0] + dilation * (kernel - 1) * field[1], field[1] * stride
    if isinstance(module, _POINTWISE_MODULES):
        return field
    raise RunError(f"what a {type(module).__name__} does to it is unknown")


def _is_pointwise(target: Any) -> bool:
    return target in _POINTWISE or getattr(target, "__name__", target) in _POINTWISE_NAMES


def _largest(value: Any) -> int:
    return max(value) if isinstance(value, tuple) else int(value)


# Effective receptive field: pure functions


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients of the weights, which saves memory; afterwards all is as it was."""
    modes = [(module, module.training) for module in model.modules()]
    wanted = [(p, p.requires_grad) for p in model.parameters()]
    model.eval().requires_grad_(False)
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for p, grad in wanted:
            p.requires_grad_(grad)


def draw_shifts(seed: int, rows: np.ndarray, side: int) -> np.ndarray:
    """int64 (N, 2): px downwards and to the right, uniform in ±side / 2, drawn from (seed, row) alone.

    A row is moved by the same fraction of the side at every scale.
    """
    words = [np.random.Philox(key=np.array([seed, row], np.uint64)).random_raw(2) for row in rows.tolist()]
    unit = np.array(words, np.float64).reshape(-1, 2) / 2**64
    return np.rint((unit - 0.5) * side).astype(np.int64)


def shifted(images: torch.Tensor, shifts: np.ndarray) -> torch.Tensor:
    """Images (N, C, H, W), each moved by its own (down, right) px, at most a side; black is moved in."""
    out = torch.zeros_like(images)
    height, width = images.shape[-2:]
    for source, target, (down, right) in zip(images, out, shifts.tolist(), strict=True):
        target[:, max(down, 0) : height + min(down, 0), max(right, 0) : width + min(right, 0)] = source[
            :, max(-down, 0) : height + min(-down, 0), max(-right, 0) : width + min(-right, 0)
        ]
    return out


def squared_gradients(model: Classifier, images: torch.Tensor) -> torch.Tensor:
    """float64 (N, H, W): squared gradients of the last feature map's centre with respect to the input pixels.

    `images`: uint8 (N, 1, H, W). The centre is position (h // 2, w // 2), summed over its channels: with an
    even number of positions up to half a stride below and right of the image's. The gradient is taken at the
    output of `normalise`, since integers have none, and summed over its three channels before it is squared,
    because they are copies of one grey level and move together. That sum is our reading of the study.
    """
    with torch.enable_grad(), without_tf32():
        pixels = model.normalise(images).detach().requires_grad_()
        features = model.feature_layers(pixels)
        centre = features[:, :, features.shape[2] // 2, features.shape[3] // 2]
        # In evaluation mode images do not touch each other: the gradient of the sum is each image's own.
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
    """Side, px, of the square of as many pixels as lie above 1 - 0.9545 of the map's maximum; 0 for zeros.

    Luo et al. count like this in a map of gradients. Ours holds their squares, as the study's, and falls off
    faster. Single pixels stand out where few images are averaged, and the size comes out smaller: compare sizes
    of equally many images, or `energy_radius`.
    """
    return float(np.sqrt((erf_map > THRESHOLD * erf_map.max()).sum()))


def energy_centre(erf_map: np.ndarray) -> tuple[float, float]:
    """Row and column of the map's centre of mass; the image's centre for a map of zeros."""
    weight = erf_map.astype(np.float64) if erf_map.any() else np.ones(erf_map.shape)
    y, x = np.indices(erf_map.shape)
    return float((y * weight).sum() / weight.sum()), float((x * weight).sum() / weight.sum())


def energy_radius(erf_map: np.ndarray, share: float) -> float:
    """Radius, px, of the circle about the centre of mass that holds `share` of the map's sum; 0 for zeros."""
    if not erf_map.any():
        return 0.0
    (cy, cx), (y, x) = energy_centre(erf_map), np.indices(erf_map.shape)
    distance = np.hypot(y - cy, x - cx).ravel()
    order = np.argsort(distance)
    held = np.cumsum(erf_map.ravel()[order].astype(np.float64))
    return float(distance[order][np.searchsorted(held, share * held[-1])])


# Runs


@dataclass(frozen=True)
class Erf:
    """A run's effective receptive field."""

    run: str
    """Name of the run."""
    map: np.ndarray
    """float32 (H, W), maximum 1."""
    images: int
    """Averaged over this many validation images."""
    seed: int
    """Of the translations."""
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
    """Of the run's configuration."""

    def describe(self) -> str:
        """One line for people."""
        known = f"theoretical {self.theoretical} px" if self.theoretical else "theoretical unknown"
        return (
            f"{self.run}: ERF {self.size:.0f} px, {100 * self.fraction:.0f} % of the side ({known}); "
            f"half of its energy within {self.radius_50:.0f} px of its centre, "
            f"95 % within {self.radius_95:.0f} px; {self.images} images"
        )


def small_batches(rows: np.ndarray, scale: int) -> EvalOrder:
    """`rows` in their order, in batches that a backward pass can afford."""
    return EvalOrder(rows=rows, micro_batch=max(1, BATCH_PIXELS // scale**2))


def erf(
    run: Run,
    images: int = 64,
    shards: Path | None = None,
    device: torch.device | str = "cpu",
    seed: int = 0,
    quiet: bool = False,
) -> Erf:
    """Measure the field on the run's first `images` validation images, in fp32, and keep it in maps.zarr.

    Raises RunError for a run without weights or validation rows, and for another shard set.
    """
    frame = run.rows()
    rows = part_rows(frame, "val")[: max(images, 0)]
    if not len(rows):
        raise RunError(
            f"{run.name}: a receptive field needs at least one validation image; {images} of its "
            f"{(frame['part'] == 'val').sum():,} were asked for"
        )
    model, scale = run.load(device), run.config.scale
    with run.reader(shards) as reader, progress(f"erf {run.name}", len(rows), quiet=quiet) as advance:

        def batches() -> Iterator[torch.Tensor]:
            for batch in Loader(reader, small_batches(rows, scale), device=device):
                yield shifted(batch.image, draw_shifts(seed, batch.row.cpu().numpy(), scale))
                advance(len(batch.row))

        found = effective_receptive_field(model, batches()).astype(np.float32)
    result = _summarise(
        found,
        run=run.name,
        images=len(rows),
        seed=seed,
        config_hash=run.config.hash,
        theoretical=_theoretical_or_none(run.config.arch),
    )
    numbers = {name: value for name, value in asdict(result).items() if name not in ("map", "run")}
    run.add_maps({"erf": found}, {"erf": numbers})
    return result


def _summarise(erf_map: np.ndarray, **known: Any) -> Erf:
    """A map with the numbers that sum it up; `known` are the fields that it does not tell."""
    size = erf_size(erf_map)
    return Erf(
        map=erf_map,
        size=size,
        fraction=size / erf_map.shape[0],
        radius_50=energy_radius(erf_map, 0.5),
        radius_95=energy_radius(erf_map, 0.95),
        **known,
    )


def _theoretical_or_none(arch: str) -> int | None:
    try:
        return theoretical_receptive_field(arch)[0]
    except RunError:
        return None


def read_erf(run: Run) -> Erf:
    """Raises RunError if it has not been measured, or for another configuration."""
    group, advice = run.open_maps(), f"`cxrfast erf {run.folder}`"
    if group is None or "erf" not in group:
        raise RunError(f"{run.name} has no effective receptive field yet: {advice}")
    numbers = group.attrs["erf"]
    if numbers["config_hash"] != run.config.hash:
        raise RunError(f"the receptive field in {run.maps_path} belongs to another run: measure again with {advice}")
    return Erf(run=run.name, map=read_array(group, "erf", advice), **numbers)


def has_erf(run: Run) -> bool:
    """True if the field of this very configuration is stored."""
    group = run.open_maps()
    return group is not None and group.attrs.get("erf", {}).get("config_hash") == run.config.hash


# Figure

FLOOR = 1e-4
"""Of the maximum: where the figure's colours end."""


def figure(runs: Sequence[Run]) -> Figure:
    """A panel for each scale, and each name that runs were given; the folds' maps are averaged.

    Colours are logarithmic; the square has the area of the effective receptive field. Raises RunError as
    `read_erf` does.
    """
    groups: dict[tuple[int, str], list[Erf]] = {}
    for run in sorted(runs, key=lambda run: (run.config.arch, run.config.scale)):
        groups.setdefault((run.config.scale, run.folder.parent.name), []).append(read_erf(run))
    if not groups:
        raise RunError("there are no runs to draw receptive fields of")
    columns = min(4, len(groups))
    lines = -(-len(groups) // columns)
    result = Figure(figsize=(3.0 * columns + 1.2, 3.2 * lines + 0.4), layout="constrained")
    panels = result.subplots(lines, columns, squeeze=False).ravel()
    for axes in panels[len(groups) :]:
        axes.set_axis_off()
    for axes, ((_, name), found) in zip(panels, groups.items(), strict=False):
        shown = _draw(axes, found)
        axes.set_xlabel(f"px, {name}")
    bar = result.colorbar(shown, ax=panels.tolist(), shrink=0.8, extend="min")
    bar.set_label("squared gradient / maximum")
    return result


def _draw(axes: Axes, found: Sequence[Erf]) -> Any:
    """One scale: the mean of the folds' maps, each with maximum 1."""
    erf_map = np.mean([e.map for e in found], axis=0)
    side, size = erf_map.shape[0], erf_size(erf_map)
    shares = np.maximum(erf_map / (erf_map.max() or 1), FLOOR)
    shown = axes.imshow(shares, norm=LogNorm(FLOOR, 1), cmap="magma", extent=(0, side, side, 0))
    # A square as large as the image fits only in its middle, wherever the centre of mass lies.
    y, x = (min(max(c + 0.5 - size / 2, 0), side - size) for c in energy_centre(erf_map))
    axes.add_patch(Rectangle((x, y), size, size, fill=False, edgecolor="cyan", linewidth=1.5))
    known = f"theoretical {found[0].theoretical} px, " if found[0].theoretical else ""
    many = f"{len(found)} folds × " if len(found) > 1 else ""
    axes.set_title(
        f"{side} px: ERF {size:.0f} px, {100 * size / side:.0f} % of the side\n{known}{many}{found[0].images} images",
        fontsize="small",
    )
    axes.set_xticks([0, side // 2, side])
    axes.set_yticks([0, side // 2, side])
    return shown
