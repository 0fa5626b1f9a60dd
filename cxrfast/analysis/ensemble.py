"""One prediction from several scales: weights by finding, fitted on validation logits, against a plain mean.

In: run folders with predictions of val and test at two scales or more. Out: weights.csv, auroc.csv,
summary.md, summary.tex and weights.png in RUNS/ensemble/. Every fold is fitted and tested by itself; no fit sees a test row.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from cxrfast import metrics
from cxrfast.analysis.join import (
    check_same_study,
    choose_scales,
    join_logits,
)
from cxrfast.analysis.mixture import (
    DECAY,
    EPOCHS,
    LEARNING_RATE,
    combine,
    fit_weights,
    fit_weights_by_em,
    has_both_classes,
    mixture_bce,
    uniform,
    vote,
)
from cxrfast.analysis.scores import best_bold, cells, folds_text, plus_minus, undefined_note
from cxrfast.errors import RunError
from cxrfast.files import write_bytes
from cxrfast.progress import progress
from cxrfast.runs.lineage import marked_name, origin_footnote, origin_of, shared_origin
from cxrfast.runs.run import Run
from cxrfast.tables import Cell, Table

FOLDER = "ensemble"


@dataclass(frozen=True)
class EnsembleResult:
    """What `ensemble` found, over the folds that all names have."""

    names: tuple[str, ...]
    """Groups of runs that were combined, by scale: densenet121-256, …"""
    scales: tuple[int, ...]
    """Scale of each name, px."""
    labels: tuple[str, ...]
    folds: tuple[int, ...]
    left_out: dict[str, list[int]]
    """By name: folds that some other name lacks."""
    weights: pd.DataFrame
    """label, name, scale, start, fold, weight, em_weight; NaN where validation lacks positives or negatives."""
    auroc: pd.DataFrame
    """fold, label, method (a name, voting or stacked), auroc of the test rows; NaN where undefined."""
    bce: pd.DataFrame
    """fold, label, voting, stacked, optimum: cross-entropy of the validation rows; NaN as in `weights`."""

    @property
    def methods(self) -> tuple[str, ...]:
        return (*self.names, "voting", "stacked")

    @property
    def short_names(self) -> tuple[str, ...]:
        """`256 px`, …; the names where one scale comes twice. Marked if they started from another run."""
        unique = len(set(self.scales)) == len(self.scales)
        names = [f"{scale} px" for scale in self.scales] if unique else self.names
        return tuple(marked_name(name, start) for name, start in zip(names, self.origins.values(), strict=True))

    @property
    def origins(self) -> dict[str, str]:
        """By name: where the first weights came from, see `lineage.shared_origin`."""
        return {n: shared_origin(self.weights.loc[self.weights["name"] == n, "start"]) for n in self.names}

    def matrix(self, method: str) -> np.ndarray:
        """Test AUROC of a method, float64 (K, L), NaN where undefined."""
        lines = self.auroc[self.auroc["method"] == method]
        wide = lines.pivot(index="fold", columns="label", values="auroc")
        return wide[list(self.labels)].to_numpy(np.float64)

    def mean_weights(self, column: str = "weight") -> np.ndarray:
        """Mean over the folds that were fitted, float64 (L, S), NaN where none was."""
        columns = []
        for name in self.names:
            lines = self.weights[self.weights["name"] == name]
            wide = lines.pivot(index="fold", columns="label", values=column)[list(self.labels)]
            columns.append(metrics.mean_sd(wide.to_numpy(np.float64))[0])
        return np.stack(columns, axis=1)

    def best_single(self) -> list[str]:
        """By finding: the name with the highest mean test AUROC, or "undefined"."""
        means = np.stack([metrics.mean_sd(self.matrix(name))[0] for name in self.names], axis=1)
        return ["undefined" if np.isnan(row).any() else self.names[row.argmax()] for row in means]


def ensemble(runs: Path, names: list[str] | None = None) -> EnsembleResult:
    """Fit and test the ensemble in every fold that all `names` have predicted; write RUNS/ensemble/.

    names: groups of runs, such as densenet121-256; None: all of the one architecture that has several scales.

    Raises RunError if there are fewer than two scales, if they share no fold, if it is unclear which groups are
    meant, or if runs differ in shard set, label policy, or rows and labels of a fold.
    """
    groups = choose_scales(runs, names)
    check_same_study([run for group in groups.values() for run in group.values()])
    folds = sorted(set.intersection(*(set(group) for group in groups.values())))
    if not folds:
        held = "; ".join(f"{name}: {folds_text(sorted(group))}" for name, group in groups.items())
        raise RunError(f"no fold has predictions of all scales ({held}): train and predict the missing ones")
    parts = []
    with progress("ensemble", len(folds), unit="folds") as advance:
        for fold in folds:
            parts.append(_one_fold([group[fold] for group in groups.values()]))
            advance(note=f"fold {fold}")
    weights, auroc, bce = (pd.concat(frames, ignore_index=True) for frames in zip(*parts, strict=True))
    configs = [group[folds[0]].config for group in groups.values()]
    left_out = {name: sorted(rest) for name, group in groups.items() if (rest := set(group) - set(folds))}
    result = EnsembleResult(
        tuple(groups), tuple(c.scale for c in configs), configs[0].labels, tuple(folds), left_out, weights, auroc, bce
    )
    write(runs / FOLDER, result)
    return result


def _one_fold(runs: Sequence[Run]) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """The lines of `EnsembleResult.weights`, `.auroc` and `.bce` of one fold, from a run of each scale."""
    fitted, weights, bce = _fit_fold(runs)
    return weights, _test_fold(runs, fitted), bce


def _fit_fold(runs: Sequence[Run]) -> tuple[np.ndarray, pd.DataFrame, pd.DataFrame]:
    """Weights (L, S) of the stacked ensemble, fitted on the validation rows, then the lines of weights and bce."""
    fold, labels = runs[0].config.fold, runs[0].config.labels
    logits, targets, mask = join_logits(runs, "val")
    fitted, optimum = fit_weights(logits, targets, mask), fit_weights_by_em(logits, targets, mask)
    undefined = ~has_both_classes(targets, mask)
    bce = pd.DataFrame(
        {"fold": fold, "label": labels}
        | {
            name: np.where(undefined, np.nan, mixture_bce(logits, targets, mask, weights))
            for name, weights in (("voting", uniform(logits)), ("stacked", fitted), ("optimum", optimum))
        }
    )
    weight, em_weight = (np.where(undefined[:, None], np.nan, w) for w in (fitted, optimum))
    lines = [
        pd.DataFrame(
            {
                "label": labels,
                "name": run.folder.parent.name,
                "scale": run.config.scale,
                "start": origin_of(run.config),
                "fold": fold,
                "weight": weight[:, s],
                "em_weight": em_weight[:, s],
            }
        )
        for s, run in enumerate(runs)
    ]
    return fitted, pd.concat(lines), bce


def _test_fold(runs: Sequence[Run], fitted: np.ndarray) -> pd.DataFrame:
    """AUROC of the test rows by each scale alone, by voting and by the `fitted` weights (L, S)."""
    fold, labels = runs[0].config.fold, runs[0].config.labels
    logits, targets, mask = join_logits(runs, "test")
    scores = {run.folder.parent.name: one for run, one in zip(runs, logits, strict=True)}
    scores |= {"voting": vote(logits), "stacked": combine(logits, fitted)}
    lines = [
        pd.DataFrame({"fold": fold, "label": labels, "method": method, "auroc": metrics.auroc(score, targets, mask)})
        for method, score in scores.items()
    ]
    return pd.concat(lines)


# Tables and figure


def _gains(result: EnsembleResult, method: str) -> np.ndarray:
    """Test AUROC of `method` minus that of each finding's best single scale, fold by fold, float64 (K, L)."""
    single = {name: result.matrix(name) for name in result.names}
    undefined = single[result.names[0]]  # NaN there in every fold, as at every scale
    best = [single.get(name, undefined)[:, j] for j, name in enumerate(result.best_single())]
    return result.matrix(method) - np.stack(best, axis=1)


def ensemble_table(result: EnsembleResult, brief: bool = True) -> Table:
    """AUROC of every method and what the ensembles gain over the best single scale, the best of each finding bold.

    `brief`, for a terminal: means and the gain of stacking alone, without deviations.
    """
    columns = [result.matrix(method) for method in result.methods]
    gains = [_gains(result, method) for method in (["stacked"] if brief else ["voting", "stacked"])]
    shown, undefined = undefined_note(result.labels, columns, "test")
    overall, shared = metrics.over_findings([*columns, *gains])
    # Findings and then their mean.
    both = [np.hstack(values) for values in zip([*columns, *gains], overall, strict=True)]
    means = np.stack([metrics.mean_sd(values)[0] for values in both], axis=1)
    write = (
        (lambda values, sign="": [plus_minus(mean, sign=sign) for mean in metrics.mean_sd(values)[0]])
        if brief
        else cells
    )
    texts = [write(values, "+" if i >= len(columns) else "") for i, values in enumerate(both)]
    names = [*result.labels, "Mean"]
    best = [*result.best_single(), ""]
    short = dict(zip(result.names, result.short_names, strict=True))
    rows: list[list[str | Cell]] = [
        [
            names[j],
            *([] if brief else [short.get(best[j], best[j])]),
            *best_bold([text[j] for text in texts[: len(columns)]], means[j, : len(columns)]),
            *(text[j] for text in texts[len(columns) :]),
        ]
        for j in (*shown, len(result.labels))
    ]
    single, gain = ([], ["gain"]) if brief else (["Best single"], ["Voting − best", "Stacked − best"])
    notes = (
        [
            "gain: of stacked over the best single scale. "
            "Validation logits served both early stopping and the ensemble's fit.",
            origin_footnote(result.origins),
        ]
        if brief
        else _notes(result, shared)
    )
    return Table(
        f"Ensemble of scales, AUROC of the test rows, mean{'' if brief else ' ± standard deviation'} over "
        f"{folds_text(result.folds)}",
        ["Finding", *single, *result.short_names, "voting", "stacked", *gain],
        rows,
        "\n".join(filter(None, [undefined, *notes])),
        text=single,
        total=True,
    )


def weights_table(result: EnsembleResult) -> Table:
    """Mean weights of the stacked ensemble."""
    weights = result.mean_weights()
    shown, undefined = undefined_note(result.labels, [weights.T], "validation")
    rows = [[result.labels[j], *(f"{w:.2f}" for w in weights[j])] for j in shown]
    title = f"Weights of the stacked ensemble, mean over {folds_text(result.folds)}"
    return Table(title, ["Finding", *result.short_names], rows, undefined)


def _notes(result: EnsembleResult, shared: int) -> list[str]:
    """What a reader must know to use the numbers."""
    fitted = result.bce.dropna()
    weights, best = result.mean_weights(), result.best_single()
    both = [j for j, name in enumerate(best) if name in result.names and not np.isnan(weights[j]).any()]
    top = sum(result.names[weights[j].argmax()] == best[j] for j in both)
    notes = [
        "Validation logits served both early stopping and the ensemble's fit; test rows served neither.",
        "The best single scale is the one with the highest mean test AUROC, a choice that favours it; "
        "gains over it are taken fold by fold.",
        f"Mean: over the {shared} of {len(result.labels)} findings that are defined in every fold.",
        f"The largest weight is that of the best single scale for {top} of {len(both)} findings.",
    ]
    if len(fitted):
        gap = fitted["stacked"] - fitted["optimum"]
        notes.append(
            f"Cross-entropy of the validation rows: stacking ({EPOCHS} epochs, learning rate "
            f"{LEARNING_RATE:g}, × {DECAY:g} an epoch) ends {gap.mean():.4f} nats above the optimum "
            f"that EM finds, at most {gap.max():.4f}; "
            f"voting lies {(fitted['voting'] - fitted['optimum']).mean():.4f} above it."
        )
    if note := origin_footnote(result.origins):
        notes.append(note)
    for fold, lines in result.bce[result.bce["stacked"].isna()].groupby("fold"):
        missing = ", ".join(lines["label"])
        notes.append(
            f"Fold {fold}: validation rows lack positives or negatives of {missing}; "
            "no weights can be fitted, so stacked is voting there."
        )
    if result.left_out:
        held = "; ".join(f"{name}: {folds_text(folds)}" for name, folds in result.left_out.items())
        notes.append(f"Left out, since not every scale has them: {held}.")
    return notes


def weights_figure(result: EnsembleResult) -> Figure:
    """Mean weights as one stacked bar a finding, scales ascending from left to right; 900 px wide."""
    weights, labels = result.mean_weights(), result.labels
    figure = Figure(figsize=(9.0, 1.3 + 0.32 * len(labels)), dpi=100, layout="constrained")
    axes = figure.subplots()
    colours = matplotlib.colormaps["YlGnBu"](np.linspace(0.2, 0.9, len(result.names)))
    left, place = np.zeros(len(labels)), np.arange(len(labels))
    undefined = np.isnan(weights).any(axis=1)
    for s, (name, colour) in enumerate(zip(result.short_names, colours, strict=True)):
        width = np.where(undefined, 0.0, weights[:, s])
        bars = axes.barh(place, width, left=left, height=0.78, color=colour, edgecolor="white", label=name)
        ink = "white" if colour[:3] @ (0.299, 0.587, 0.114) < 0.55 else "#222222"
        numbers = [f"{w:.2f}" if w >= 0.05 else "" for w in width]
        axes.bar_label(bars, numbers, label_type="center", color=ink, fontsize=8)
        left += width
    if undefined.any():
        axes.barh(
            place[undefined],
            1.0,
            height=0.78,
            color="none",
            edgecolor="#999999",
            hatch="///",
            linewidth=0.5,
            label="undefined",
        )
    axes.set_yticks(place, labels)
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.set_xlabel(f"weight of each scale, mean over {folds_text(result.folds)}")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.margins(y=0.01)
    figure.legend(loc="outside upper center", ncols=min(6, len(result.names) + 1), frameon=False)
    return figure


def write(folder: Path, result: EnsembleResult) -> None:
    """weights.csv, auroc.csv, summary.md, summary.tex and weights.png, each whole or absent."""
    folder.mkdir(exist_ok=True)
    for name, table in (("weights.csv", result.weights), ("auroc.csv", result.auroc)):
        write_bytes(folder / name, table.to_csv(index=False, lineterminator="\n").encode())
    tables = (ensemble_table(result, brief=False), weights_table(result))
    write_bytes(folder / "summary.md", "\n".join(table.markdown() for table in tables).encode())
    write_bytes(folder / "summary.tex", "\n".join(table.latex() for table in tables).encode())
    image = io.BytesIO()
    weights_figure(result).savefig(image, format="png", metadata={"Software": None})
    write_bytes(folder / "weights.png", image.getvalue())
