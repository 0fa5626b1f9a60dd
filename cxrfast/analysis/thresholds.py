"""Thresholds of a study: what they do on validation rows, on which they were chosen, and on test rows, by scale and ensemble.

In: run folders with predictions; no shard set, no GPU. Out: thresholds.json of each run, and thresholds.csv, thresholds.md
and thresholds.tex in RUNS/evaluation/. Each fold by itself; no test row enters the choice of a threshold or a weight.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from cxrfast import metrics
from cxrfast.analysis import mixture
from cxrfast.analysis.answers import read_answers
from cxrfast.analysis.evaluate import FOLDER
from cxrfast.analysis.join import (
    by_name,
    check_same_study,
    choose_scales,
    join_logits,
    rules_note,
    with_predictions,
)
from cxrfast.analysis.marks import footnotes, marked
from cxrfast.analysis.scores import fold_numbers, folds_text, left_out_note, score_cell, shared_folds
from cxrfast.errors import RunError
from cxrfast.files import make_own_folder, write_bytes
from cxrfast.progress import progress
from cxrfast.runs.lineage import origin_of
from cxrfast.runs.remarks import remarks_on
from cxrfast.runs.run import Run
from cxrfast.runs.thresholds import shared_rule
from cxrfast.tables import Cell, Table, csv_text
from cxrfast.thresholds import Rule, Thresholds, choose

PARTS = ("val", "test")
CLASSES = ("positives", "negatives")
COUNTS = ("tp", "fp", "tn", "fn")
RATIOS = ("sensitivity", "specificity", "ppv", "npv")

FEW = 20
"""Validation rows of a class below which one of them moves sensitivity or specificity by more than 0.05."""

SIGN = "§"
"""Follows the name of a finding with few positives or negatives."""


@dataclass(frozen=True)
class ThresholdResult:
    """What the thresholds of a study do. Groups of runs are named by the folder around their folds: densenet121-256."""

    rule: Rule
    names: tuple[str, ...]
    """Groups of runs, by architecture and scale."""
    scales: tuple[int, ...]
    """Scale of each name, px."""
    ensemble: str | None
    """Name of the stacked ensemble in `table`; None: these runs make none."""
    labels: tuple[str, ...]
    table: pd.DataFrame
    """One line per group, or ensemble, fold and finding: label, name, scale (<NA> for the ensemble), start, fold, compared,
    rule, threshold (a probability), threshold_logit, then for val and test positives, negatives, tp, fp, tn, fn, sensitivity,
    specificity, ppv and npv, as val_tp; remark. Missing: no threshold, or undefined. compared, remark: as in `Evaluation`."""
    rules: str
    """How rows and labels were chosen, the same for all runs."""
    notes: tuple[str, ...]
    """What is left out, and why."""

    @property
    def lines(self) -> pd.DataFrame:
        """Lines of the folds that all groups have, or all lines if there is no such fold."""
        return self.table[self.table["compared"]] if self.table["compared"].any() else self.table

    @property
    def shown_names(self) -> dict[str, str]:
        """By name: `256 px`, …, `ensemble`; the names where one scale comes twice. With the signs that footnotes explain."""
        unique = len(set(self.scales)) == len(self.scales)
        names = {name: f"{s} px" if unique else name for name, s in zip(self.names, self.scales, strict=True)}
        return marked(names, self._runs) | ({self.ensemble: self.ensemble} if self.ensemble else {})

    @property
    def footnotes(self) -> str:
        return footnotes(self._runs)

    @property
    def _runs(self) -> pd.DataFrame:
        return self.lines[self.lines["name"].isin(self.names)]


# Choice


def choose_thresholds(runs: Path, rule: Rule | None = None, *, finished_only: bool = False) -> None:
    """Choose the thresholds of every run below `runs` that has predictions, on its validation rows, and write them.

    rule: None: the one that the runs' thresholds were chosen by before, or Youden's if there are none. Nothing is written
    unless all can be. Raises RunError if a run cannot be read or another process writes into one, and for runs of several
    rules.
    """
    predicted = with_predictions(runs, finished_only).runs
    rule = rule or shared_rule(predicted)
    with ExitStack() as stack:
        locked = [stack.enter_context(run.lock("choosing thresholds")) for run in predicted]
        chosen = []
        for run in locked:
            answers = read_answers(run, "val")
            chosen.append((run, choose(answers.logits, *answers.targets(), rule), len(answers.row)))
        for run, thresholds, rows in chosen:
            run.write_thresholds(thresholds, rows)


def ensemble_thresholds(runs: Sequence[Run], rule: Rule) -> tuple[np.ndarray, Thresholds]:
    """Weights float64 (L, S) of the stacked ensemble of one fold's runs, one per scale, and thresholds of its log-odds.

    Both are fitted on the validation rows. The ensemble of one scale is that scale.
    """
    logits, targets, mask = join_logits(runs, "val")
    weights = mixture.fit_weights(logits, targets, mask)
    scores = mixture.log_odds(logits, weights) if len(runs) > 1 else logits[0]
    return weights, choose(scores, targets, mask, rule)


# Evaluation


def evaluate_thresholds(runs: Path, *, finished_only: bool = False, damaged: Collection[str] = ()) -> ThresholdResult:
    """Count what the stored thresholds of every run below `runs` do, and those of each fold's ensemble; write the tables.

    Options as those of `evaluate`. Raises RunError as it does, and if a run has no thresholds or if their rules differ.
    """
    found = with_predictions(runs, finished_only, damaged)
    groups = by_name(found.runs)
    check_same_study(found.runs)
    missing = [run.name for run in found.runs if run.read_thresholds() is None]
    if missing:
        raise RunError(f"{missing[0]} has no thresholds: choose them with `cxrfast thresholds {runs}`")
    rule = shared_rule(found.runs)
    stacks, why_none = _stacks(runs, finished_only, damaged)
    shared, remarks = shared_folds(groups), remarks_on(found.runs)
    name = _free_name(groups)
    frames = []
    with progress("thresholds", len(found.runs) + len(stacks), unit="models") as advance:
        for run in found.runs:
            frames.append(_lines_of_run(run, remarks[run.folder]))
            advance(note=run.name)
        for fold, members in stacks.items():
            frames.append(_lines_of_ensemble(members, name, rule, remarks))
            advance(note=f"{name}, fold {fold}")
    table = pd.concat(frames, ignore_index=True)
    first = [next(iter(group.values())).config for group in groups.values()]
    left_out = {name: sorted(rest) for name, group in groups.items() if shared and (rest := set(group) - set(shared))}
    result = ThresholdResult(
        rule,
        tuple(groups),
        tuple(config.scale for config in first),
        name if stacks else None,
        first[0].labels,
        table.assign(compared=table["fold"].isin(shared))[COLUMNS],
        rules_note({name: {k: group[k] for k in shared or group} for name, group in groups.items()}),
        tuple(
            filter(
                None,
                (
                    why_none,
                    left_out_note(left_out, "scale"),
                    f"Left out, without predictions: {', '.join(found.without)}." if found.without else "",
                    f"Left out, unfinished: {', '.join(found.unfinished)}." if found.unfinished else "",
                    f"Left out, damaged: {', '.join(damaged)}." if damaged else "",
                ),
            )
        ),
    )
    write(runs / FOLDER, result)
    return result


COLUMNS = [
    *("label", "name", "scale", "start", "fold", "compared", "rule", "threshold", "threshold_logit"),
    *(f"{part}_{what}" for part in PARTS for what in (*CLASSES, *COUNTS, *RATIOS)),
    "remark",
]


def _stacks(runs: Path, finished_only: bool, damaged: Collection[str]) -> tuple[dict[int, list[Run]], str]:
    """By fold: the runs to combine, ascending in scale; and why there are none, if a reader would expect some."""
    try:
        groups, _ = choose_scales(runs, None, finished_only, damaged)
    except RunError:
        predicted = with_predictions(runs, finished_only, damaged).runs
        several = len({run.config.scale for run in predicted}) > 1
        return {}, "No ensemble; `cxrfast ensemble` says why." if several else ""
    return {fold: [group[fold] for group in groups.values()] for fold in shared_folds(groups)}, ""


def _free_name(groups: Collection[str]) -> str:
    """What tables call the ensemble: a name that no group of runs has."""
    name = "ensemble"
    while name in groups:
        name = f"stacked {name}"
    return name


def _lines_of_run(run: Run, remark: str) -> pd.DataFrame:
    thresholds = run.read_thresholds()
    assert thresholds is not None  # checked before
    known = {}
    for part in PARTS:
        answers = read_answers(run, part)
        known[part] = (answers.logits, *answers.targets())
    more = {"name": run.folder.parent.name, "scale": run.config.scale, "start": origin_of(run), "remark": remark}
    return _lines(run, thresholds, known, more)


def _lines_of_ensemble(runs: Sequence[Run], name: str, rule: Rule, remarks: Mapping[Path, str]) -> pd.DataFrame:
    weights, thresholds = ensemble_thresholds(runs, rule)
    known = {}
    for part in PARTS:
        logits, targets, mask = join_logits(runs, part)
        known[part] = (mixture.log_odds(logits, weights), targets, mask)
    told = "; ".join(f"{run.folder.parent.name}: {remarks[run.folder]}" for run in runs if remarks[run.folder])
    return _lines(runs[0], thresholds, known, {"name": name, "scale": pd.NA, "start": "", "remark": told})


Known = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Scores, targets and mask of a part, (N, L) each."""


def _lines(run: Run, thresholds: Thresholds, known: Mapping[str, Known], more: Mapping[str, object]) -> pd.DataFrame:
    """Lines of `ThresholdResult.table` of one run, or of the ensemble of its fold, without `compared`."""
    fold, rule, has_none = run.config.fold, str(thresholds.rule), np.isnan(thresholds.array)
    columns: dict[str, object] = {"label": run.config.labels, **more, "fold": fold, "rule": rule}
    columns |= {"threshold": thresholds.probabilities, "threshold_logit": thresholds.array}
    for part, (scores, targets, mask) in known.items():
        found = metrics.at_thresholds(scores, targets, mask, thresholds.array)
        columns |= {f"{part}_{name}": n for name, n in zip(CLASSES, metrics.counts(targets, mask), strict=True)}
        columns |= {f"{part}_{name}": pd.array(getattr(found, name), "Int64") for name in COUNTS}
        columns |= {f"{part}_{name}": getattr(found, name) for name in RATIOS}
    lines = pd.DataFrame(columns).astype({"scale": "Int64"})
    lines.loc[has_none, [f"{part}_{name}" for part in PARTS for name in COUNTS]] = pd.NA
    return lines


# Tables


def thresholds_table(result: ThresholdResult, brief: bool = True) -> Table:
    """A row for each finding with a threshold, and for each scale and the ensemble: mean over folds, counts summed over them.

    `brief`, for a terminal: without standard deviations.
    """
    rows: list[list[str | Cell]] = []
    few = few_rows(result)
    for label in result.labels:
        of_label = result.lines[result.lines["label"] == label]
        if of_label["threshold"].isna().all():
            continue
        for number, (name, shown) in enumerate(result.shown_names.items()):
            lines = of_label[of_label["name"] == name]
            first = (label + (SIGN if label in few else "")) if not number else ""
            rows.append([first, shown, *_cells(lines, deviations=not brief)])
    folds = result.lines.groupby("name")["fold"].unique()
    over = dict.fromkeys(folds_text(those.tolist()) for those in folds)
    return Table(
        f"Thresholds by the rule {result.rule}, chosen on validation rows; mean{'' if brief else ' ± standard deviation'} over "
        f"{'; '.join(over)}",
        [
            *("Finding", "Scale", "Threshold", "Validation\nsensitivity", "Validation\nspecificity"),
            *("Test\nsensitivity", "Test\nspecificity", "PPV", "NPV", "TP/FP/TN/FN"),
        ],
        rows,
        "\n".join(filter(None, [*_notes(result), *_few_note(few)])),
        text=["Scale"],
    )


def _cells(lines: pd.DataFrame, deviations: bool) -> list[str | Cell]:
    """Cells of one finding and group from its lines, one per fold."""
    logit = metrics.mean_sd(lines["threshold_logit"].to_numpy(np.float64)[:, None])[0][0]
    if np.isnan(logit):
        return [Cell("no verdict", "dim"), *([""] * 7)]
    of_folds = lines["threshold"].notna().sum()
    some = "" if of_folds == len(lines) else f" ({of_folds} of {len(lines)} folds)"
    ratios = ("val_sensitivity", "val_specificity", *(f"test_{name}" for name in RATIOS))
    counts = (f"{lines[f'test_{name}'].sum():,}" for name in COUNTS)
    return [
        _probability(float(logit)) + some,
        *(score_cell(lines[name].to_numpy(np.float64), "", deviations) for name in ratios),
        "/".join(counts),
    ]


def _probability(logit: float) -> str:
    """σ(logit) with three digits, never 0 or 1."""
    p, q = metrics.sigmoid(np.array([logit, -logit]))
    if p < 0.0005:
        return f"{p:.1e}" if p > 0 else "< 1e-300"
    return f"{p:.3f}" if q >= 0.0005 else f"1 − {q:.1e}" if q > 0 else "1 − 1e-300"


def few_rows(result: ThresholdResult) -> dict[str, str]:
    """By finding with a threshold: its smallest number of validation positives or negatives, as `12 positives in fold 0`.

    Only of findings with fewer than FEW.
    """
    lines = result.lines[result.lines["threshold"].notna()]
    found = {}
    for label in result.labels:
        of_label = lines[lines["label"] == label]
        smallest = [
            (int(line[f"val_{name}"]), f"{name if line[f'val_{name}'] != 1 else name[:-1]} in fold {line['fold']}")
            for _, line in of_label.iterrows()
            for name in CLASSES
        ]
        if smallest and min(smallest)[0] < FEW:
            found[label] = "{:,} {}".format(*min(smallest))
    return found


def _few_note(few: Mapping[str, str]) -> Iterator[str]:
    if few:
        told = ", ".join(f"{label} ({what})" for label, what in few.items())
        yield f"{SIGN} Fewer than {FEW} validation positives or negatives, so the threshold is uncertain: {told}."


def _notes(result: ThresholdResult) -> Iterator[str]:
    """What a reader must know to use the numbers."""
    yield (
        "Thresholds as probabilities. Validation rows served early stopping, the ensemble's weights and the choice of "
        "thresholds; test rows served none of them. PPV and NPV hold for the prevalence among the test rows. TP/FP/TN/FN: "
        "test rows, summed over folds."
    )
    yield from _none_notes(result)
    yield result.rules
    yield result.footnotes
    yield from result.notes


def _none_notes(result: ThresholdResult) -> Iterator[str]:
    """Which findings have no threshold, and why."""
    none = result.lines[result.lines["threshold"].isna()]
    for name in CLASSES:
        lacking = none[none[f"val_{name}"] == 0]
        folds = lacking.groupby("label", sort=False)["fold"].unique()
        if len(folds):
            told = ", ".join(f"{label} ({fold_numbers(each.tolist())})" for label, each in folds.items())
            yield f"No verdict, since no validation row is {name[:-1]}: {told}."
    rest = none[(none["val_positives"] > 0) & (none["val_negatives"] > 0)]
    if len(rest):
        told = ", ".join(
            f"{label}, {shown} ({fold_numbers(those)})"
            for label in result.labels
            for name, shown in result.shown_names.items()
            if (those := rest[(rest["label"] == label) & (rest["name"] == name)]["fold"].tolist())
        )
        yield f"No verdict, since no threshold is better than chance (J > 0): {told}."


def write(folder: Path, result: ThresholdResult) -> None:
    """thresholds.csv, thresholds.md and thresholds.tex, each whole or absent."""
    make_own_folder(folder)
    table = thresholds_table(result, brief=False)
    for name, text in {
        "thresholds.csv": csv_text(result.table),
        "thresholds.md": table.markdown(),
        "thresholds.tex": table.latex(),
    }.items():
        write_bytes(folder / name, text.encode())
