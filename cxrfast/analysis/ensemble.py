"""One prediction from several scales: weights by finding, fitted on validation logits, against a plain mean.

In: run folders with predictions of val and test at two scales or more. Out: weights.csv, auroc.csv, summary.md,
summary.tex and weights.png in RUNS/ensemble/. Every fold is fitted and tested by itself; no fit sees a test row.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from cxrfast import metrics
from cxrfast.analysis import mixture
from cxrfast.analysis.join import check_same_study, choose_scales, join_logits, rules_note
from cxrfast.analysis.marks import footnotes, marked
from cxrfast.analysis.other_set import AS_TRAINED, OtherRules, OtherTest, other_folder
from cxrfast.analysis.scores import (
    by_fold,
    folds_text,
    is_defined,
    left_out_note,
    mean_note,
    score_rows,
    shared_folds,
    undefined_note,
)
from cxrfast.errors import RunError
from cxrfast.figures import add_legend, figure_text
from cxrfast.files import make_own_folder, write_bytes, write_figure
from cxrfast.progress import Advance, progress
from cxrfast.runs.lineage import origin_of
from cxrfast.runs.remarks import remarks_on
from cxrfast.runs.run import Run
from cxrfast.tables import Table, csv_text

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
    """label, name, scale, start, fold, weight, em_weight, remark; NaN where validation lacks positives or negatives.

    remark: what to know about the run, see `runs.remarks`; "" if nothing."""
    auroc: pd.DataFrame
    """fold, label, method (a name, voting or stacked), auroc of the tested rows, NaN where undefined, and remark."""
    bce: pd.DataFrame
    """fold, label, voting, stacked, optimum: cross-entropy of the validation rows; NaN as in `weights`."""
    rules: str = ""
    """How rows and labels were chosen, the same for all runs."""
    unfinished: tuple[str, ...] = ()
    """Unfinished runs that were left out."""
    on: str | None = None
    """Name of another set whose rows were tested; None: the test rows of the runs' own."""

    @property
    def short_names(self) -> tuple[str, ...]:
        """`256 px`, …; the names where one scale comes twice. With the signs that the footnotes explain."""
        unique = len(set(self.scales)) == len(self.scales)
        names = [f"{scale} px" for scale in self.scales] if unique else self.names
        return tuple(marked(dict(zip(self.names, names, strict=True)), self.weights).values())

    @property
    def footnotes(self) -> str:
        """Explanations of the signs, one paragraph each."""
        return footnotes(self.weights)

    def matrix(self, method: str) -> np.ndarray:
        """Test AUROC of a method, float64 (K, L), NaN where undefined."""
        return by_fold(self.auroc[self.auroc["method"] == method], self.labels, "auroc")

    def gains(self, method: str) -> np.ndarray:
        """Test AUROC of `method` minus the one of each finding's best single scale, fold by fold, float64 (K, L)."""
        single = np.stack([self.matrix(name) for name in self.names])  # (S, K, L)
        best = [self.names.index(name) if name in self.names else 0 for name in self.best_single()]
        return self.matrix(method) - single[best, :, range(len(best))].T

    def mean_weights(self) -> np.ndarray:
        """Mean over the folds that were fitted, float64 (L, S), NaN where none was."""
        lines = [self.weights[self.weights["name"] == name] for name in self.names]
        return np.stack([metrics.mean_sd(by_fold(one, self.labels, "weight"))[0] for one in lines], axis=1)

    def best_single(self) -> list[str]:
        """By finding: the name with the highest mean test AUROC, or "undefined"."""
        means = np.stack([metrics.mean_sd(self.matrix(name))[0] for name in self.names], axis=1)
        return ["undefined" if np.isnan(row).any() else self.names[row.argmax()] for row in means]


def ensemble(
    runs: Path,
    names: list[str] | None = None,
    *,
    finished_only: bool = False,
    damaged: Collection[str] = (),
    on: str | None = None,
    rules: OtherRules = AS_TRAINED,
    without_shared_patients: bool = False,
) -> EnsembleResult:
    """Fit and test the ensemble in every fold that all `names` have predicted; write RUNS/ensemble/.

    names: groups of runs, such as densenet121-256; None: all of the one architecture that has several scales.
    finished_only: leave out runs whose training is not done; otherwise they are marked.
    damaged: names of runs to leave out.
    on: name of another set, on which the weights fitted on the runs' own validation rows are tested; RUNS/ensemble/on-NAME/ is
    written then. rules, without_shared_patients: as in `evaluate_on`.

    Raises RunError if there are fewer than two scales, if they share no fold, if it is unclear which groups are
    meant, or if runs differ in shard set, label policy, or rows and labels of a fold.
    """
    groups, unfinished = choose_scales(runs, names, finished_only, damaged, on)
    check_same_study([run for group in groups.values() for run in group.values()])
    folds = shared_folds(groups)
    if not folds:
        held = "; ".join(f"{name}: {folds_text(group)}" for name, group in groups.items())
        raise RunError(f"no fold has predictions of all scales ({held}): train and predict the missing ones")
    remarks = remarks_on(group[fold] for group in groups.values() for fold in folds)
    tested = [group[fold] for group in groups.values() for fold in folds]
    test = OtherTest.of(tested, on, rules, without_shared_patients) if on else None
    parts = []
    with progress("ensemble", STEPS * len(folds), unit="steps") as advance:
        for fold in folds:
            parts.append(_fold([group[fold] for group in groups.values()], remarks, test, advance))
    weights, auroc, bce = (pd.concat(frames, ignore_index=True) for frames in zip(*parts, strict=True))
    configs = [group[folds[0]].config for group in groups.values()]
    left_out = {name: sorted(rest) for name, group in groups.items() if (rest := set(group) - set(folds))}
    chosen = rules_note({name: {k: group[k] for k in folds} for name, group in groups.items()})
    result = EnsembleResult(
        tuple(groups),
        tuple(c.scale for c in configs),
        test.matching.both if test else configs[0].labels,
        tuple(folds),
        left_out,
        weights,
        auroc,
        bce,
        test.with_rules(chosen) if test else chosen,
        tuple(unfinished),
        on,
    )
    write(runs / FOLDER, result)
    return result


STEPS = 4
"""Steps of a fold that the progress bar counts: to read validation logits, to fit weights, to find their optimum, to test."""


def _fold(
    runs: Sequence[Run], remarks: Mapping[Path, str], test: OtherTest | None, advance: Advance
) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """The lines of `EnsembleResult.weights`, `.auroc` and `.bce` of one fold, from a run of each scale; remarks by folder.

    `test`: another set's rows to test on."""
    name = f"fold {runs[0].config.fold}"
    labels = test.matching.both if test else runs[0].config.labels
    of_fold = {"fold": runs[0].config.fold, "label": labels}
    at = [runs[0].config.labels.index(label) for label in labels]
    logits, targets, mask = (values[..., at] for values in join_logits(runs, "val"))
    advance(note=f"{name}: weights")
    fitted = mixture.fit_weights(logits, targets, mask)  # (L, S)
    advance(note=f"{name}: optimum")
    optimum = mixture.fit_weights_by_em(logits, targets, mask)  # (L, S)
    advance(note=f"{name}: test")
    can_fit = mixture.has_both_classes(targets, mask)
    compared = {"voting": mixture.uniform(logits), "stacked": fitted, "optimum": optimum}
    bce = {
        name: np.where(can_fit, mixture.mixture_bce(logits, targets, mask, w), np.nan) for name, w in compared.items()
    }
    weights = [
        pd.DataFrame(
            {
                "label": labels,
                "name": run.folder.parent.name,
                "scale": run.config.scale,
                "start": origin_of(run),
                "fold": run.config.fold,
                "weight": np.where(can_fit, fitted[:, s], np.nan),
                "em_weight": np.where(can_fit, optimum[:, s], np.nan),
                "remark": remarks[run.folder],
            }
        )
        for s, run in enumerate(runs)
    ]
    logits, targets, mask = join_logits(runs, "test", test)
    scores = {run.folder.parent.name: one for run, one in zip(runs, logits, strict=True)}
    scores |= {"voting": mixture.vote(logits), "stacked": mixture.log_odds(logits, fitted)}
    told = {run.folder.parent.name: remarks[run.folder] for run in runs}
    of_all = "; ".join(f"{name}: {remark}" for name, remark in told.items() if remark)
    auroc = [
        pd.DataFrame(
            {
                **of_fold,
                "method": method,
                "auroc": metrics.auroc(score, targets, mask),
                "remark": told.get(method, of_all),
            }
        )
        for method, score in scores.items()
    ]
    advance(note=name)
    return pd.concat(weights), pd.concat(auroc), pd.DataFrame({**of_fold, **bce})


# Tables and figure


def ensemble_table(result: EnsembleResult, brief: bool = True) -> Table:
    """AUROC of every method and what the ensembles gain over the best single scale, the best of each finding bold.

    `brief`, for a terminal: means and the gain of stacking alone, without deviations.
    """
    columns = [result.matrix(method) for method in (*result.names, "voting", "stacked")]
    gains = {"Stacked − best": result.gains("stacked")}
    if not brief:
        gains = {"Voting − best": result.gains("voting"), **gains}
    rows = score_rows(result.labels, columns, list(gains.values()), deviations=not brief)
    short = dict(zip(result.names, result.short_names, strict=True))
    best = {} if brief else {"Best single": dict(zip(result.labels, map(short.get, result.best_single()), strict=True))}
    notes = [undefined_note(result.labels, columns, result.on or "test"), *_notes(result, columns, brief)]
    return Table(
        f"Ensemble of scales, AUROC {f'on {result.on}' if result.on else 'of the test rows'}, mean{'' if brief else ' ± standard deviation'} over "
        f"{folds_text(result.folds)}",
        ["Finding", *best, *result.short_names, "voting", "stacked", *gains],
        [[label, *(names.get(label) or "" for names in best.values()), *cells] for label, cells in rows],
        "\n".join(filter(None, notes)),
        text=[*best],
        total=True,
    )


def _notes(result: EnsembleResult, columns: Sequence[np.ndarray], brief: bool) -> list[str]:
    """What a reader must know to use the numbers; `brief`: the most important of it."""
    caution = "Validation logits served both early stopping and the ensemble's fit; test rows served neither."
    if result.on:
        caution = (
            f"Weights were fitted on the validation rows of the runs' own set and tested on {result.on}. Those validation "
            "logits served early stopping, too."
        )
    left_out = f"Left out, unfinished: {', '.join(result.unfinished)}." if result.unfinished else ""
    if brief:
        return [caution, result.footnotes, left_out]
    fitted, weights, best = result.bce.dropna(), result.mean_weights(), result.best_single()
    both = [j for j, name in enumerate(best) if name in result.names and not np.isnan(weights[j]).any()]
    top = sum(result.names[weights[j].argmax()] == best[j] for j in both)
    gap, voting = fitted["stacked"] - fitted["optimum"], fitted["voting"] - fitted["optimum"]
    unfitted = result.bce[result.bce["stacked"].isna()].groupby("fold")["label"].agg(", ".join)
    folds_without = {missing: unfitted.index[unfitted == missing].tolist() for missing in unfitted.unique()}
    return [
        caution,
        "The best single scale has the highest mean test AUROC, a choice that favours it; gains over it are taken fold by fold.",
        mean_note(result.labels, columns),
        f"The best single scale has the largest weight for {top} of {len(both)} findings.",
        f"Cross-entropy of the validation rows: stacking ({mixture.EPOCHS} epochs, learning rate {mixture.LEARNING_RATE:g}, × {mixture.DECAY:g} per "
        f"epoch) ends {gap.mean():.4f} nats above the optimum that EM finds, at most {gap.max():.4f}; voting is "
        f"{voting.mean():.4f} above it."
        if len(fitted)
        else "",
        result.footnotes,
        result.rules,
        *(
            f"Validation rows of {folds_text(folds)} lack positives or negatives of {missing}: no weights can be fitted, so "
            "stacked is voting there."
            for missing, folds in folds_without.items()
        ),
        left_out_note(result.left_out, "scale"),
        left_out,
    ]


def weights_table(result: EnsembleResult) -> Table:
    """Mean weights of the stacked ensemble."""
    weights = result.mean_weights()
    shown = np.flatnonzero(is_defined([weights.T]))
    return Table(
        f"Weights of the stacked ensemble, mean over {folds_text(result.folds)}",
        ["Finding", *result.short_names],
        [[result.labels[j], *(f"{w:.2f}" for w in weights[j])] for j in shown],
        undefined_note(result.labels, [weights.T], "validation"),
    )


def weights_figure(result: EnsembleResult) -> Figure:
    """Mean weights as one stacked bar per finding that has any, scales ascending from left to right; 900 px wide."""
    weights = result.mean_weights()
    shown = np.flatnonzero(is_defined([weights.T]))
    figure = Figure(figsize=(9.0, 1.3 + 0.32 * len(shown)), dpi=100, layout="constrained")
    axes = figure.subplots()
    colours = matplotlib.colormaps["YlGnBu"](np.linspace(0.2, 0.9, len(result.names)))
    left, scales = np.zeros(len(shown)), []
    for width, name, colour in zip(weights[shown].T, result.short_names, colours, strict=True):
        bars = axes.barh(range(len(shown)), width, left=left, height=0.78, color=colour, edgecolor="white", label=name)
        scales.append(bars)
        ink = "white" if colour[:3] @ (0.299, 0.587, 0.114) < 0.55 else "#222222"
        numbers = [f"{w:.2f}" if w >= 0.05 else "" for w in width]
        axes.bar_label(bars, numbers, label_type="center", color=ink, fontsize=8)
        left += width
    axes.set_yticks(range(len(shown)), [figure_text(result.labels[j]) for j in shown])
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.set_xlabel(f"weight of each scale, mean over {folds_text(result.folds)}")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.margins(y=0.01)
    add_legend(figure, scales, result.short_names, loc="outside upper center", ncols=min(6, len(result.names)))
    return figure


def write(folder: Path, result: EnsembleResult) -> None:
    """weights.csv, auroc.csv, summary.md, summary.tex and weights.png, each whole or absent; in a folder on-<name> of their own
    if another set was tested."""
    make_own_folder(folder)
    if result.on:
        make_own_folder(folder := folder / other_folder(result.on))
    tables = ensemble_table(result, brief=False), weights_table(result)
    for name, text in {
        "weights.csv": csv_text(result.weights),
        "auroc.csv": csv_text(result.auroc),
        "summary.md": "\n".join(table.markdown() for table in tables),
        "summary.tex": "\n".join(table.latex() for table in tables),
    }.items():
        write_bytes(folder / name, text.encode())
    write_figure(folder / "weights.png", weights_figure(result))
