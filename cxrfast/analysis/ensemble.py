"""One prediction from several scales: weights by finding, fitted on validation logits, against a plain mean.

In: run folders with predictions of val and test at two scales or more. Out: weights.csv, auroc.csv,
summary.md and weights.png in RUNS/ensemble/. Every fold is fitted and tested by itself; no fit sees a test row.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from rich.table import Table
from rich.text import Text

from cxrfast import metrics
from cxrfast.analysis.evaluate import (
    best_bold,
    by_name,
    cells,
    check_same_rows,
    check_same_study,
    folds_text,
    markdown_table,
    over_findings,
    plus_minus,
    read_answers,
    with_predictions,
)
from cxrfast.errors import RunError
from cxrfast.files import write_bytes
from cxrfast.progress import progress
from cxrfast.runs.lineage import marked_name, origin_footnote, origin_of, shared_origin
from cxrfast.runs.run import Run

FOLDER = "ensemble"

EPOCHS, LEARNING_RATE, DECAY = 100, 0.1, 0.96
"""Of the fit. The study gives epochs, rate and "exponential decay"; how fast it decays is our reading."""

GAP, STEPS = 1e-6, 5000
"""EM stops when it is provably within GAP nats of the optimum, or after STEPS steps."""


# Arrays


def combine(logits: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Probabilities p_f = Σ_s w_fs σ(l_fs), float64 (N, L) in [0, 1].

    logits: (S, N, L), one slice a scale. weights: (L, S), rows summing to one.
    """
    return np.clip(np.einsum("snl,ls->nl", metrics.sigmoid(logits), weights), 0.0, 1.0)


def vote(logits: np.ndarray) -> np.ndarray:
    """The plain mean of the scales' probabilities, float64 (N, L), from logits (S, N, L)."""
    return combine(logits, uniform(logits))


def uniform(logits: np.ndarray) -> np.ndarray:
    """Equal weights (L, S) for logits (S, N, L)."""
    return np.full((logits.shape[2], logits.shape[0]), 1.0 / logits.shape[0])


def fit(
    logits: np.ndarray,
    targets: np.ndarray,
    mask: np.ndarray | None = None,
    epochs: int = EPOCHS,
    lr: float = LEARNING_RATE,
    decay: float = DECAY,
) -> np.ndarray:
    """The study's stacking (Haque et al. 2023): weights float64 (L, S), rows summing to one.

    w = softmax(v) over the scales of each finding; v starts at 0, which is voting, and minimises the binary
    cross-entropy of Σ_s w_fs σ(l_fs). Published: learning rate 0.1 with exponential decay, 100 epochs. Our
    reading: Adam, full batch, rate × 0.96 an epoch. Findings do not influence each other.

    logits: (S, N, L), finite. targets: (N, L) in {0, 1}. mask: bool (N, L), True where an entry counts; None:
    all do. A finding without positives or without negatives keeps equal weights.
    """
    weights, defined = uniform(logits), _defined(targets, mask)
    if not defined.any():
        return weights
    ratio, share = (torch.from_numpy(a[..., defined]) for a in _ratios(logits, targets, mask))
    v = torch.zeros((int(defined.sum()), len(logits)), dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.Adam([v], lr=lr)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimiser, decay)
    for _ in range(epochs):
        optimiser.zero_grad()
        mixture = torch.einsum("snl,ls->nl", ratio, torch.softmax(v, dim=1))
        loss = -(share * mixture.log()).sum()
        loss.backward()
        optimiser.step()
        schedule.step()
    weights[defined] = torch.softmax(v.detach(), dim=1).numpy()
    return weights


def fit_em(logits: np.ndarray, targets: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    """The optimum of what `fit` minimises, by expectation maximisation: float64 (L, S), rows summing to one.

    The likelihood of a target is a mixture Σ_s w_s L_s of those by scale: its logarithm is concave in
    w. A step multiplies w_s by g_s, the mean of L_s / Σ_t w_t L_t (Dempster et al. 1977, section 4.3). By
    concavity no weights are better by more than max_s g_s - 1: it stops when that is below 1e-6 nats.

    Arguments and undefined findings as in `fit`.
    """
    weights, (ratio, share) = uniform(logits), _ratios(logits, targets, mask)
    for j in np.flatnonzero(_defined(targets, mask)):
        counted = share[:, j] > 0
        likelihood, w = np.ascontiguousarray(ratio[:, counted, j]), weights[j]
        for _ in range(STEPS):
            gain = (likelihood @ (1.0 / (w @ likelihood))) / likelihood.shape[1]
            if gain.max() - 1.0 < GAP:
                break
            w = w * gain
        weights[j] = w / w.sum()
    return weights


def mixture_bce(logits: np.ndarray, targets: np.ndarray, mask: np.ndarray | None, weights: np.ndarray) -> np.ndarray:
    """Binary cross-entropy of `combine`, nats, mean over unmasked entries, float64 (L,); NaN where none is.

    log p = logsumexp_s(log w_s + log σ(l_s)) and log(1 - p) with σ(-l_s): p is never rounded to 0 or 1.
    """
    with np.errstate(divide="ignore"):  # a weight of 0 takes its scale out: log 0 = -inf is meant
        terms = np.log(weights).T[:, None, :] + _log_likelihood(logits, targets)
    losses = -np.logaddexp.reduce(terms, axis=0)
    counted = np.ones(losses.shape, bool) if mask is None else mask
    n = counted.sum(axis=0)
    return np.where(n > 0, np.where(counted, losses, 0.0).sum(axis=0) / np.maximum(n, 1), np.nan)


def _log_likelihood(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """log of the probability that each scale gives to the actual target, float64 (S, N, L)."""
    return metrics.log_sigmoid(np.where(np.asarray(targets) > 0.5, logits, -np.asarray(logits)))


def _ratios(logits: np.ndarray, targets: np.ndarray, mask: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Likelihoods over the best scale's, (S, N, L) in [0, 1], and the entries' shares of the mean, (N, L).

    The shift by the largest term that keeps logsumexp from underflow; free of the weights, it is done once.
    """
    terms = _log_likelihood(logits, targets)
    counted = np.ones(terms.shape[1:]) if mask is None else mask.astype(np.float64)
    return np.exp(terms - terms.max(axis=0)), counted / np.maximum(counted.sum(axis=0), 1.0)


def _defined(targets: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    """bool (L,): the finding has positives and negatives."""
    positives, negatives = metrics.counts(targets, mask)
    return (positives > 0) & (negatives > 0)


# Runs


@dataclass(frozen=True)
class EnsembleResult:
    """What `ensemble` found, over the folds that all names have."""

    names: tuple[str, ...]
    """Groups of runs that were combined, by scale: densenet121-256, …"""
    scales: tuple[int, ...]
    """Of the names."""
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
        return tuple(marked_name(name, start) for name, start in zip(names, self.starts.values(), strict=True))

    @property
    def starts(self) -> dict[str, str]:
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
    groups = choose(runs, names)
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


def choose(runs: Path, names: Sequence[str] | None) -> dict[str, dict[int, Run]]:
    """Groups to combine, ascending in scale: name → fold → run. Raises RunError as `ensemble` does."""
    predicted, skipped = with_predictions(runs)
    known = {run.folder.parent.name: run.config for run in predicted}
    have = ", ".join(names or known)
    if unknown := sorted(set(names or ()) - set(known)):
        raise RunError(f"no predictions of {', '.join(unknown)} in {runs}: only those of {', '.join(known)}")
    if names is None:
        scales = {c.arch: {d.scale for d in known.values() if d.arch == c.arch} for c in known.values()}
        several = [arch for arch, those in scales.items() if len(those) > 1]
        names = [name for name, c in known.items() if c.arch in several]
        if len(several) > 1 or len(names) > sum(len(scales[arch]) for arch in several):
            raise RunError(
                f"{runs} holds several architectures with several scales, or one scale twice ({have}): "
                "move those not meant to another --runs folder, or give `names` in Python"
            )
    if len({known[name].scale for name in names}) < 2:
        waiting = f" (without predictions: {', '.join(skipped)})" if skipped else ""
        raise RunError(
            f"an ensemble needs predictions of one architecture at two scales or more, and {runs} "
            f"has only those of {have}{waiting}: train and predict another scale"
        )
    return by_name(run for run in predicted if run.folder.parent.name in names)


def _one_fold(runs: Sequence[Run]) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """The lines of `EnsembleResult.weights`, `.auroc` and `.bce` of one fold, from a run of each scale."""
    fold, labels = runs[0].config.fold, runs[0].config.labels
    logits, targets, mask = _join(runs, "val")
    fitted, optimum, fixed = fit(logits, targets, mask), fit_em(logits, targets, mask), uniform(logits)
    undefined = ~_defined(targets, mask)
    bce = pd.DataFrame(
        {"fold": fold, "label": labels}
        | {
            name: np.where(undefined, np.nan, mixture_bce(logits, targets, mask, weights))
            for name, weights in (("voting", fixed), ("stacked", fitted), ("optimum", optimum))
        }
    )
    shown = [np.where(undefined[:, None], np.nan, w) for w in (fitted, optimum)]
    weights = pd.concat(
        [
            pd.DataFrame(
                {
                    "label": labels,
                    "name": run.folder.parent.name,
                    "scale": run.config.scale,
                    "start": origin_of(run.config),
                    "fold": fold,
                    "weight": shown[0][:, s],
                    "em_weight": shown[1][:, s],
                }
            )
            for s, run in enumerate(runs)
        ]
    )
    logits, targets, mask = _join(runs, "test")
    scores = {run.folder.parent.name: one for run, one in zip(runs, logits, strict=True)}
    scores |= {"voting": vote(logits), "stacked": combine(logits, fitted)}
    auroc = pd.concat(
        [
            pd.DataFrame(
                {"fold": fold, "label": labels, "method": method, "auroc": metrics.auroc(score, targets, mask)}
            )
            for method, score in scores.items()
        ]
    )
    return weights, auroc, bce


def _join(runs: Sequence[Run], part: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits float32 (S, N, L), targets (N, L) and mask (N, L) of runs of one fold, joined by row."""
    answers = [read_answers(run, part) for run in runs]
    for other in answers[1:]:
        check_same_rows(answers[0], other)
    return np.stack([mine.logits for mine in answers]), *answers[0].targets()


# Tables and figure


def _gains(result: EnsembleResult, method: str) -> np.ndarray:
    """Test AUROC of `method` minus that of each finding's best single scale, fold by fold, float64 (K, L)."""
    single = {name: result.matrix(name) for name in result.names}
    undefined = single[result.names[0]]  # NaN there in every fold, as at every scale
    best = [single.get(name, undefined)[:, j] for j, name in enumerate(result.best_single())]
    return result.matrix(method) - np.stack(best, axis=1)


def to_markdown(result: EnsembleResult) -> str:
    """AUROC of every method with the gains over the best single scale, mean weights, and how to read them."""
    best, weights = result.best_single(), result.mean_weights()
    columns = [result.matrix(method) for method in result.methods]
    gains = [_gains(result, method) for method in ("voting", "stacked")]
    means, shared = over_findings([*columns, *gains])
    texts = [cells(values) for values in columns] + [cells(values, "+") for values in gains]
    short = dict(zip(result.names, result.short_names, strict=True))
    lines = [
        [label, short.get(best[j], best[j]), *(text[j] for text in texts)] for j, label in enumerate(result.labels)
    ]
    mean = [cells(v, "+" if i >= len(columns) else "")[0] for i, v in enumerate(means)]
    head = ["Finding", "Best single", *result.short_names, "voting", "stacked", "Voting − best", "Stacked − best"]
    weight_lines = [
        [label, *("undefined" if np.isnan(w) else f"{w:.2f}" for w in weights[j])]
        for j, label in enumerate(result.labels)
    ]
    return (
        "# Ensemble of scales, AUROC of the test rows\n\n"
        f"Mean ± standard deviation over {folds_text(result.folds)}.\n\n"
        f"{markdown_table(head, [*lines, ['Mean', '', *mean]])}\n{_notes(result, shared)}\n"
        "## Weights\n\nOf the stacked ensemble, mean over folds.\n\n"
        f"{markdown_table(['Finding', *result.short_names], weight_lines)}"
    )


def _notes(result: EnsembleResult, shared: int) -> str:
    """What a reader must know to use the numbers, a Markdown list."""
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
    if note := origin_footnote(result.starts):
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
    return "".join(f"- {note}\n" for note in notes)


def to_table(result: EnsembleResult) -> Table:
    """Mean AUROC of every method for a terminal, the best of each finding bold; deviations are in summary.md."""
    table = Table(
        title=f"AUROC of the test rows, mean over {folds_text(result.folds)}",
        caption="gain: of stacked over the best single scale. "
        "Validation logits served both early stopping and the ensemble's fit.\n" + origin_footnote(result.starts),
    )
    table.add_column("Finding", overflow="fold")
    for method in (*result.short_names, "voting", "stacked", "gain"):
        table.add_column(Text(method), justify="right", overflow="fold")
    columns, gain = [result.matrix(method) for method in result.methods], _gains(result, "stacked")
    overall = over_findings([*columns, gain])[0]
    # Findings and then their mean, methods and then the gain.
    means = np.stack(
        [metrics.mean_sd(np.hstack(both))[0] for both in zip([*columns, gain], overall, strict=True)], axis=1
    )
    for label, line in zip((*result.labels, "Mean"), means, strict=True):
        entries = best_bold([plus_minus(mean, np.nan) for mean in line[:-1]], line[:-1])
        table.add_row(Text(label), *entries, plus_minus(line[-1], np.nan, "+"), end_section=label == result.labels[-1])
    return table


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
    """weights.csv, auroc.csv, summary.md and weights.png, each whole or absent."""
    folder.mkdir(exist_ok=True)
    for name, table in (("weights.csv", result.weights), ("auroc.csv", result.auroc)):
        write_bytes(folder / name, table.to_csv(index=False, lineterminator="\n").encode())
    write_bytes(folder / "summary.md", to_markdown(result).encode())
    image = io.BytesIO()
    weights_figure(result).savefig(image, format="png", metadata={"Software": None})
    write_bytes(folder / "weights.png", image.getvalue())
