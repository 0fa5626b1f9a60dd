"""The trained networks of a study as one module: every scale and fold, the ensemble's weights and thresholds.

In: runs with predictions, then films or batches. Out: logits of each network, probabilities of each scale and of the
ensemble. Nothing here trains, and nothing is written.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional

from cxrfast.analysis.gradcam import gradcam
from cxrfast.analysis.join import check_same_study
from cxrfast.analysis.thresholds import ensemble_thresholds
from cxrfast.errors import RunError
from cxrfast.inference.choice import choose_members, recipe_of, reference_of
from cxrfast.inference.film import Film, prepared
from cxrfast.inference.table import Line, table_of
from cxrfast.models.classifier import Classifier
from cxrfast.models.precision import autocast, inference_precision, use_tf32
from cxrfast.runs.reference import Reference
from cxrfast.runs.run import Run
from cxrfast.runs.thresholds import shared_rule
from cxrfast.shards.format.recipe import ImageRecipe
from cxrfast.thresholds import Thresholds, mean_over_folds


def check_images(images: Mapping[int, Tensor], scales: Sequence[int]) -> None:
    """Raises RunError unless each of the scales has images uint8 (N, 1, scale, scale), with one N for all.

    Networks would take other sizes, channels and float pixels too, and answer wrongly.
    """
    wanted = ", ".join(f"{scale}: uint8 (N, 1, {scale}, {scale})" for scale in scales)
    if not isinstance(images, Mapping):
        raise RunError(f"the model takes images by scale, {{{wanted}}}, not a {type(images).__name__}")
    count = None
    for scale in scales:
        one = images.get(scale)
        if not isinstance(one, Tensor):
            raise RunError(f"the model takes images by scale, {{{wanted}}}: there are none of {scale} px")
        count = one.shape[0] if count is None and one.ndim else count
        if one.dtype != torch.uint8 or tuple(one.shape) != (count, 1, scale, scale):
            found = f"{str(one.dtype).removeprefix('torch.')} {tuple(one.shape)}"
            raise RunError(f"the model takes images by scale, {{{wanted}}}: those of {scale} px are {found}")


@dataclass(frozen=True, kw_only=True)
class Member:
    """One network: a scale and a fold."""

    name: str
    """`densenet121-256/fold-0`."""
    scale: int
    """Side of its images, px."""
    fold: int
    network: Classifier
    """In evaluation mode."""
    precision: str = "fp32"
    """Number format of its forward pass, as `cxrfast predict` uses it for the run; see `models.precision`."""
    micro_batch: int = 32
    """Images per forward pass."""
    thresholds: Thresholds | None = None
    """Thresholds for its own logits, chosen on its own validation rows."""


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What an ensemble makes of N films; L findings."""

    logits: dict[str, Tensor]
    """By member: float32 (N, L)."""
    scale_log_odds: dict[int, Tensor]
    """By scale: float64 (N, L), see `scales`."""
    log_odds: Tensor
    """Log-odds of the ensemble: float64 (N, L). Thresholds are compared with log-odds, which tell films apart where p is rounded to 1."""

    @property
    def scales(self) -> dict[int, Tensor]:
        """By scale: probabilities float64 (N, L), the mean over its folds."""
        return {scale: torch.sigmoid(odds) for scale, odds in self.scale_log_odds.items()}

    @property
    def ensemble(self) -> Tensor:
        """Probabilities float64 (N, L): the mean over folds of Σ_s w_fs σ(l_fs)."""
        return torch.sigmoid(self.log_odds)


class ScaleEnsemble(nn.Module):
    """Networks of every scale in every fold, and how they are combined.

        ensemble = ScaleEnsemble.from_runs(Run.find("runs"))
        ensemble.predict("film.png")

    members: by scale, then fold; each scale has the same folds. weights: by fold, float64 (L, S), in the order of `scales`.
    recipe: how the images of the training set were made; films are prepared the same way.
    """

    def __init__(
        self,
        *,
        labels: Sequence[str],
        recipe: ImageRecipe,
        members: Sequence[Member],
        weights: Mapping[int, np.ndarray],
        thresholds: Thresholds | None = None,
        reference: Reference | None = None,
    ) -> None:
        super().__init__()
        self.labels = tuple(labels)
        self.recipe = recipe
        self.members = tuple(sorted(members, key=lambda member: (member.scale, member.fold)))
        self.networks = nn.ModuleList(member.network for member in self.members)
        self.weights = {fold: np.asarray(w, np.float64) for fold, w in sorted(weights.items())}
        self.thresholds = thresholds
        self.reference = reference
        if [(m.scale, m.fold) for m in self.members] != [(s, f) for s in self.scales for f in self.folds]:
            raise RunError("an ensemble needs each of its scales in each of its folds, once")
        for fold in self.folds:
            if self.weights.get(fold, np.empty(0)).shape != (len(self.labels), len(self.scales)):
                raise RunError(
                    f"an ensemble of {len(self.scales)} scales needs weights of fold {fold} for each finding"
                )
        self.eval()

    @property
    def scales(self) -> tuple[int, ...]:
        """Sides of the images, px, ascending."""
        return tuple(sorted({member.scale for member in self.members}))

    @property
    def folds(self) -> tuple[int, ...]:
        return tuple(sorted({member.fold for member in self.members}))

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @classmethod
    def from_runs(
        cls, runs: Sequence[Run], device: torch.device | str = "cpu", *, shards: Path | None = None
    ) -> "ScaleEnsemble":
        """The runs of one architecture, with the weights that `cxrfast ensemble` fits on their validation logits.

        As there, of several architectures the one with several scales is taken, and only folds that every scale has. A single
        scale is an ensemble of itself. `shards`: where the runs' shard set is now, if it has moved.

        Raises RunError if the runs do not belong together, or if one has no weights or predictions.
        """
        groups = choose_members(runs)
        chosen = [run for group in groups.values() for run in group.values()]
        check_same_study(chosen)
        config = chosen[0].config
        folds = sorted(next(iter(groups.values())))
        rule = shared_rule(chosen)
        fitted = {fold: ensemble_thresholds([group[fold] for group in groups.values()], rule) for fold in folds}
        where = torch.device(device)
        members = [
            Member(
                name=run.name,
                scale=run.config.scale,
                fold=run.config.fold,
                network=run.load(where),
                precision=inference_precision(run.config.precision, where),
                micro_batch=max(1, run.config.micro_batch),
                thresholds=run.read_thresholds(),
            )
            for run in chosen
        ]
        return cls(
            labels=config.labels,
            recipe=recipe_of(chosen, shards),
            members=members,
            weights={fold: weights for fold, (weights, _) in fitted.items()},
            thresholds=mean_over_folds([thresholds for _, thresholds in fitted.values()]),
            reference=reference_of(chosen),
        )

    def prepare(self, film: Path | str | bytes | np.ndarray) -> Film:
        """A film at every scale, by the steps of the training set's build. `film`: a path, bytes, or pixels uint8 (H, W).

        Raises BadImage if it cannot be used.
        """
        return prepared(film, self.scales, self.recipe, self.reference)

    def forward(self, images: Mapping[int, Tensor]) -> Scores:
        """Scores of N films. images: by scale, uint8 (N, 1, scale, scale), on any device. Raises RunError for anything else."""
        check_images(images, self.scales)
        logits = {member.name: self._logits(member, images[member.scale].to(self.device)) for member in self.members}
        return self.combine(logits)

    def combine(self, logits: Mapping[str, Tensor]) -> Scores:
        """Scores from the logits of every member, float (N, L)."""
        by_scale = {
            s: torch.stack([logits[m.name] for m in self.members if m.scale == s]).double() for s in self.scales
        }
        weights = torch.from_numpy(np.stack([self.weights[fold] for fold in self.folds]))  # (K, L, S)
        every = torch.stack(list(by_scale.values()), -1)  # (K, N, L, S)
        mixed = log_odds(every, weights.to(every.device)[:, None], (0, 3))
        of_scales = {s: log_odds(one, torch.ones_like(one), (0,)) for s, one in by_scale.items()}
        return Scores(logits=dict(logits), scale_log_odds=of_scales, log_odds=mixed)

    def _logits(self, member: Member, images: Tensor) -> Tensor:
        """float32 (N, L), in micro-batches, as `training.predict.score` computes them."""
        if not len(images):  # of films that cannot be used; not every network takes no image
            return images.new_zeros((0, len(self.labels)), dtype=torch.float32)
        use_tf32(member.precision)
        with autocast(images.device, member.precision):
            return torch.cat([member.network(part).float() for part in images.split(member.micro_batch)])

    def predict(self, films: Any) -> pd.DataFrame:
        """Probabilities of one film or several: a path, bytes or pixels uint8 (H, W), or a sequence of them.

        One line per film, with the columns of the CSV that `cxrfast predict` writes. Raises BadImage if a film cannot be used.
        """
        given = [films] if isinstance(films, str | Path | bytes | np.ndarray) else list(films)
        ready = [self.prepare(film) for film in given]
        names = [str(film) if isinstance(film, str | Path) else "" for film in given]
        with torch.inference_mode():
            scores = self.forward(stacked(ready, self.scales))
        logits = np.stack([scores.logits[member.name].cpu().numpy() for member in self.members], axis=1)
        return table_of(self, [Line.of(name, film) for name, film in zip(names, ready, strict=True)], logits)

    def gradcam(self, images: Mapping[int, Tensor], label: str) -> dict[int, np.ndarray]:
        """Grad-CAM of a finding by scale: float32 (N, scale, scale) in [0, 1], the mean over folds.

        images: by scale, uint8 (N, 1, scale, scale); scales that are not given get no map. Raises RunError for anything else,
        and for a network whose feature map is not known.
        """
        check_images(images, [scale for scale in self.scales if scale in images])
        if label not in self.labels:
            raise RunError(f"the ensemble has no finding {label!r}: use one of {', '.join(self.labels)}")
        index = self.labels.index(label)
        maps: dict[int, list[np.ndarray]] = {scale: [] for scale in self.scales if scale in images}
        for member in (member for member in self.members if member.scale in images):
            found, _ = gradcam(member.network, images[member.scale].to(self.device), index)
            maps[member.scale].append(found.cpu().numpy())
        return {scale: np.stack(those).mean(axis=0) for scale, those in maps.items()}


def log_odds(logits: Tensor, weights: Tensor, over: tuple[int, ...]) -> Tensor:
    """log p - log(1 - p) of p = Σ w σ(l) / Σ w, summed over the dimensions `over`; finite for finite logits.

    logits and weights: float64, weights from 0, broadcast to the logits. `mixture.log_odds` does the same in NumPy.
    """
    if all(logits.shape[dimension] == 1 for dimension in over):
        return logits.sum(over)  # one network's logit, without rounding
    log_weights = weights.log()
    positive = torch.logsumexp(log_weights + functional.logsigmoid(logits), over)
    return positive - torch.logsumexp(log_weights + functional.logsigmoid(-logits), over)


def stacked(films: Sequence[Film], scales: Sequence[int]) -> dict[int, Tensor]:
    """By scale: uint8 (N, 1, scale, scale) of N films."""
    if not films:
        return {scale: torch.zeros((0, 1, scale, scale), dtype=torch.uint8) for scale in scales}
    return {scale: torch.from_numpy(np.stack([film.images[scale] for film in films]))[:, None] for scale in scales}
