"""What the films look like that a run was validated on: grey levels, layout, aspect and size, with the range that is usual.

Made while `cxrfast predict` reads the run's own validation rows, from few pixels of each, and stored as reference.json with
the recipe of the set's images. Nothing in it tells one film from another. Arrays in, numbers out; only the last two functions
touch a file.
"""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypedDict

import msgspec
import numpy as np

from cxrfast.errors import RunError, ShardError
from cxrfast.files import read_file, write_json
from cxrfast.runs.folder import LARGEST_TEXT
from cxrfast.runs.records import checked
from cxrfast.shards.format.recipe import ImageRecipe

if TYPE_CHECKING:
    from cxrfast.runs.run import Run

SAMPLED = 64
"""Pixels per side, at least, that are looked at; every k-th pixel of a larger image."""

MOST_FILMS = 2000
"""Validation films that are looked at: the first ones, since rows are in random order."""

QUANTILES = (0.02, 0.1, 0.25, 0.5, 0.75, 0.9, 0.98)
"""Of a film's grey levels."""

CELLS = 4
"""Cells per side of the layout of brightness."""

TAIL, DEVIATIONS = 0.003, 2.75
"""Fraction of like films that each check may flag, and the number of standard deviations above which a normal distribution
has it."""

FOLDS = 5
"""Distances are measured on films that the mean and spread were not estimated on, in turns."""


def sampled(images: Any) -> Any:
    """uint8 (…, H, W), an array or a tensor → every k-th row and column, SAMPLED or more of each; a view."""
    step = max(1, min(images.shape[-2:]) // SAMPLED)
    return images[..., ::step, ::step]


def features(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Grey levels float64 (N, 7), their QUANTILES, and layout float64 (N, 16) of uint8 (N, H, W), as `sampled` gives them.

    Layout: mean grey of 4 × 4 cells, in row order, less the film's mean, over its standard deviation; so that a film that is
    darker or of less contrast has the same.
    """
    n, height, width = images.shape
    size = height * width
    places = np.arange(n)[:, None]
    held = np.bincount((images.reshape(n, -1) + 256 * places).ravel(), minlength=256 * n).reshape(n, 256)
    below = np.cumsum(held, axis=1)  # pixels of each level or darker
    ranks = np.array([min(size - 1, int(q * size)) for q in QUANTILES])
    levels = (below[:, :, None] <= ranks).sum(axis=1).astype(np.float64)
    rows, columns = (np.arange(CELLS + 1) * side // CELLS for side in (height, width))
    sums = np.add.reduceat(np.add.reduceat(images, rows[:-1], axis=1, dtype=np.int64), columns[:-1], axis=2)
    cells = (sums / (np.diff(rows)[:, None] * np.diff(columns))).reshape(n, -1)
    cells -= cells.mean(axis=1, keepdims=True)
    return levels, cells / np.maximum(cells.std(axis=1, keepdims=True), 1.0)


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Where features of like films lie: a mean, a covariance, and how far from it is still usual."""

    mean: tuple[float, ...]
    precision: tuple[tuple[float, ...], ...]
    """Inverse of the covariance, which is shrunk towards a multiple of the identity where there are few films."""
    limit: float
    """Distance (Mahalanobis 1936) that about 3 of 1,000 like films exceed."""

    def distance(self, values: np.ndarray) -> np.ndarray:
        """Distances float64 (N,) of features (N, D)."""
        return _distance(values, *self._arrays)

    @cached_property
    def _arrays(self) -> tuple[np.ndarray, np.ndarray]:
        return np.array(self.mean), np.array(self.precision)


@dataclass(frozen=True, kw_only=True)
class Reference:
    """What the training set's films look like at one scale."""

    films: int
    """Number of validation films that it was made from."""
    grey: Spread
    layout: Spread
    upright: float
    """How much nearer a film may come to the usual layout when it is turned upside down; see `turned`."""
    aspect: tuple[float, float]
    """Usual width / height, lowest and highest."""
    shorter: int
    """Usual length of the shorter side, lowest, px."""

    def turned(self, layout: np.ndarray) -> np.ndarray:
        """How much nearer layouts (N, 16) come to the usual one when upside down, also mirrored; squared distances, (N,)."""
        return _turned(layout, self.layout)

    def json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Any) -> "Reference":
        """What `json` returned, checked, since it may come from elsewhere. Raises ValueError."""
        known = msgspec.convert(value, cls)
        for spread, length in ((known.grey, len(QUANTILES)), (known.layout, CELLS**2)):
            if {len(spread.mean), len(spread.precision), *map(len, spread.precision)} != {length}:
                raise ValueError("a mean or a covariance has another length")
            numbers = [*spread.mean, *np.ravel(spread.precision), spread.limit, *known.aspect, known.upright]
            if not np.isfinite(numbers).all():
                raise ValueError("a number is not finite")
        return known


def _distance(values: np.ndarray, mean: np.ndarray, precision: np.ndarray) -> np.ndarray:
    apart = values - mean
    return np.sqrt(np.maximum(((apart @ precision) * apart).sum(axis=1), 0.0))


def _turned(layout: np.ndarray, usual: Spread) -> np.ndarray:
    cells = layout.reshape(-1, CELLS, CELLS)
    as_is, flipped, rotated = (
        usual.distance(each.reshape(len(cells), -1)) ** 2 for each in (cells, cells[:, ::-1], cells[:, ::-1, ::-1])
    )
    return as_is - np.minimum(flipped, rotated)


def _moments(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean (D,) and inverse covariance (D, D) of values (N, D)."""
    n, d = values.shape
    mean = values.mean(axis=0)
    apart = values - mean
    covariance = apart.T @ apart / max(1, n - 1)
    share = d / (n + d)  # the fewer films, the less their correlations are believed
    shrunk = (1 - share) * covariance + share * np.diag(np.diag(covariance))
    floor = 1e-3 * max(float(np.trace(shrunk)) / d, 1e-6)
    return mean, np.linalg.inv(shrunk + floor * np.eye(d))


def spread_of(values: np.ndarray) -> Spread:
    """Mean, covariance and usual distance of features (N, D) of N films."""
    mean, precision = _moments(values)
    distances = []
    for k in range(min(FOLDS, len(values))):
        others = np.arange(len(values)) % FOLDS != k
        if others.sum() > 1:
            distances.append(_distance(values[~others], *_moments(values[others])))
    found = np.concatenate(distances) if distances else np.ones(1)
    logs = np.log(np.maximum(found, 1e-6))
    limit = max(float(np.exp(logs.mean() + DEVIATIONS * logs.std())), float(np.quantile(found, 1 - TAIL)))
    return Spread(mean=tuple(mean.tolist()), precision=tuple(map(tuple, precision.tolist())), limit=limit)


LEAST_TURNED = 10.0
"""Twice the logarithm of how much likelier a film must be upside down than as it is, to be called so."""

LEAST_FILMS = 20
"""Validation films below which nothing is said about what is usual."""


def reference_of(samples: np.ndarray, sizes: np.ndarray) -> Reference | None:
    """The reference of films: `sampled` pixels uint8 (N, h, w), and source sizes int (M, 2): height, width, px.

    None for fewer than LEAST_FILMS.
    """
    if len(samples) < LEAST_FILMS or not len(sizes):
        return None
    levels, layout = features(samples)
    aspects, shorter = sizes[:, 1] / sizes[:, 0], sizes.min(axis=1)
    usual = spread_of(layout)
    upright = max(LEAST_TURNED, float(np.quantile(_turned(layout, usual), 1 - TAIL)))
    low, high = np.quantile(aspects, [TAIL / 2, 1 - TAIL / 2])
    return Reference(
        films=len(samples),
        grey=spread_of(levels),
        layout=usual,
        upright=upright,
        aspect=(float(low), float(high)),
        shorter=int(np.quantile(shorter, TAIL)),
    )


def merged(references: Sequence[Reference]) -> Reference:
    """The reference of several folds' validation films together, at one scale."""
    weights = np.array([each.films for each in references], np.float64)
    weights /= weights.sum()

    def spread(parts: Sequence[Spread]) -> Spread:
        means = np.array([part.mean for part in parts])
        mean = weights @ means
        covariance = sum(
            w * (np.linalg.inv(np.array(part.precision)) + np.outer(m - mean, m - mean))
            for w, part, m in zip(weights, parts, means, strict=True)
        )
        limit = math.exp(float(weights @ np.log([part.limit for part in parts])))
        precision = np.linalg.inv(covariance)
        return Spread(mean=tuple(mean.tolist()), precision=tuple(map(tuple, precision.tolist())), limit=limit)

    return Reference(
        films=sum(each.films for each in references),
        grey=spread([each.grey for each in references]),
        layout=spread([each.layout for each in references]),
        upright=max(each.upright for each in references),
        aspect=(min(each.aspect[0] for each in references), max(each.aspect[1] for each in references)),
        shorter=min(each.shorter for each in references),
    )


class ReferenceFile(TypedDict):
    """reference.json."""

    config_hash: str
    set_id: str
    recipe: dict[str, Any]
    """Recipe of the set's images, see `ImageRecipe`: new films are prepared by it, also where the set is not at hand."""
    reference: dict[str, Any] | None
    """None: there were too few validation films."""


def write_reference(run: "Run", reference: Reference | None, recipe: ImageRecipe) -> None:
    """Replace the run's reference.json."""
    run.check_lease()
    content: ReferenceFile = {
        "config_hash": run.hash,
        "set_id": run.config.set_id,
        "recipe": asdict(recipe),
        "reference": reference.json() if reference else None,
    }
    write_json(run.reference_path, content)


def read_reference(run: "Run") -> tuple[Reference | None, ImageRecipe] | None:
    """The run's reference and recipe; None if an earlier version predicted it. Raises RunError if they are damaged or another
    run's."""
    path, again = run.reference_path, f"delete it, then run `cxrfast predict {run.folder}` again"
    if not os.path.lexists(path):
        return None
    try:
        content = checked(json.loads(read_file(path, LARGEST_TEXT)), ReferenceFile)
        known = content["reference"]
        found = None if known is None else Reference.from_json(known), ImageRecipe(**content["recipe"])
    except (OSError, ValueError, TypeError, RecursionError, ShardError) as error:
        raise RunError(f"{path} is damaged ({error}): {again}") from error
    if (content["config_hash"], content["set_id"]) != (run.hash, run.config.set_id):
        raise RunError(f"{path} belongs to another run: {again}")
    return found
