"""How well the runs of a study rank findings: AUROC and average precision by run, joined over folds.

In: run folders with predictions; no shard set, no GPU. Out: auroc.csv, auroc_summary.csv and auroc.md in
RUNS/evaluation/. Runs that did not answer the same questions are never joined, and what is undefined is shown
as that, never as a number.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pandas as pd
from rich.table import Table
from rich.text import Text
from sklearn.metrics import average_precision_score

from cxrfast import metrics
from cxrfast.errors import RunError
from cxrfast.files import write_bytes
from cxrfast.labels import targets
from cxrfast.progress import progress
from cxrfast.runs.lineage import FROM_RUN, marked_name, origin_footnote, origin_of, shared_origin
from cxrfast.runs.run import Run
from cxrfast.splits import PARTS
from cxrfast.tables import markdown_table

FOLDER = "evaluation"


@dataclass(frozen=True)
class Evaluation:
    """The tables of `evaluate`. A name is that of the folder around a scale's folds: densenet121-256."""

    part: str
    """train, val or test."""
    names: tuple[str, ...]
    """Groups of runs, by architecture and scale."""
    labels: tuple[str, ...]
    """Findings, in the order of the logits."""
    table: pd.DataFrame
    """A line a run and finding: name, scale, start, fold, label, part, auroc, auprc, positives, negatives."""
    positives: dict[str, int]
    """By finding: rows of the part that hold it, over all folds, each row counted once."""
    skipped: tuple[str, ...]
    """Runs without predictions."""

    def matrix(self, name: str, metric: str = "auroc") -> np.ndarray:
        """float64 (K, L) of one group, folds ascending, NaN where undefined."""
        lines = self.table[self.table["name"] == name]
        wide = lines.pivot(index="fold", columns="label", values=metric)
        return wide[list(self.labels)].to_numpy(np.float64)

    @property
    def starts(self) -> dict[str, str]:
        """By name: where the first weights came from, see `lineage.shared_origin`."""
        return {n: shared_origin(self.table.loc[self.table["name"] == n, "start"]) for n in self.names}

    def folds(self, name: str) -> list[int]:
        return sorted(int(fold) for fold in self.table.loc[self.table["name"] == name, "fold"].unique())

    def summary(self) -> pd.DataFrame:
        """A line a group and finding: name, scale, start, label, part, folds, folds_defined, auroc_mean, auroc_sd,
        auprc_mean, auprc_sd, positives.

        sd: sample standard deviation over the folds where the finding is defined; NaN with fewer than two.
        """
        frames = []
        for name in self.names:
            auroc, auprc = self.matrix(name), self.matrix(name, "auprc")
            scale = self.table.loc[self.table["name"] == name, "scale"].iloc[0]
            columns = {
                f"{metric}_{statistic}": value
                for metric, values in (("auroc", auroc), ("auprc", auprc))
                for statistic, value in zip(("mean", "sd"), metrics.mean_sd(values), strict=True)
            }
            frames.append(
                pd.DataFrame(
                    {
                        "name": name,
                        "scale": scale,
                        "start": self.starts[name],
                        "label": self.labels,
                        "part": self.part,
                        "folds": len(auroc),
                        "folds_defined": (~np.isnan(auroc)).sum(axis=0),
                        **columns,
                        "positives": [self.positives[label] for label in self.labels],
                    }
                )
            )
        return pd.concat(frames, ignore_index=True)


def evaluate(runs: Path, part: str = "test") -> Evaluation:
    """Score every run below `runs` that has predictions of `part`; write the tables into RUNS/evaluation/.

    Tables of the test part are auroc.*, those of another auroc-<part>.*: neither takes the other's place.

    Raises RunError if no run has predictions, if runs cannot be joined, or if a run predicted other rows than
    the part's.
    """
    if part not in PARTS:
        raise RunError(f"part {part!r} is unknown: use one of {', '.join(PARTS)}")
    predicted, skipped = with_predictions(runs)
    names = tuple(by_name(predicted))
    check_same_study(predicted)
    answers: dict[int, Answers] = {}  # one a fold: rows and labels, which all runs of the fold share
    frames = []
    with progress("evaluate", len(predicted), unit="runs") as advance:
        for run in predicted:
            mine = read_answers(run, part)
            check_same_rows(answers.setdefault(run.config.fold, mine), mine)
            frames.append(score(mine))
            advance(note=run.name)
    labels = predicted[0].config.labels
    positives = dict(zip(labels, distinct_positives(answers.values()), strict=True))
    table = pd.concat(frames, ignore_index=True)
    evaluation = Evaluation(part, names, labels, table, positives, tuple(skipped))
    write(runs / FOLDER, evaluation)
    return evaluation


# Runs that belong together


@dataclass(frozen=True)
class Answers:
    """What a run says of one part of its rows, beside what is known of them."""

    run: Run
    part: str
    row: np.ndarray
    """int64 (n,), ascending, unique."""
    raw: np.ndarray
    """float32 (n, L): 1, 0, -1 (uncertain) or NaN (blank)."""
    logits: np.ndarray
    """float32 (n, L), finite."""

    def targets(self) -> tuple[np.ndarray, np.ndarray]:
        """Targets float32 (n, L) in {0, 1} and mask bool (n, L), by the run's label policy."""
        return targets(self.raw, self.run.config.policies)


def with_predictions(runs: Path) -> tuple[list[Run], list[str]]:
    """The runs that have predictions, and the names of those that have none. Raises RunError if none has."""
    found = Run.find(runs)
    predicted = [run for run in found if run.has_predictions]
    if not predicted:
        raise RunError(f"none of the {len(found)} runs in {runs} has predictions: `cxrfast predict {runs}/*/fold-*`")
    return predicted, [run.name for run in found if not run.has_predictions]


def by_name(runs: Iterable[Run]) -> dict[str, dict[int, Run]]:
    """Runs by the name of their group, then by fold, in the order given.

    Raises RunError if a group holds two scales, two architectures or a fold twice: its mean means nothing.
    """
    groups: dict[str, dict[int, Run]] = {}
    for run in runs:
        group = groups.setdefault(run.folder.parent.name, {})
        for other in group.values():
            _check_equal(other, run, {"scale": "scale", "architecture": "arch"})
            if other.config.fold == run.config.fold:
                _refuse(other, run, f"both are fold {run.config.fold}")
            own_fold: dict[str, Any] = {"fold": run.config.fold}
            mine, theirs = (shared_origin([origin_of(r.config)]) for r in (run, other))
            if mine == theirs and mine.startswith(FROM_RUN):  # each from its own fold of one group
                own_fold["weights"] = run.config.weights
            if differences := run.config.differences(replace(other.config, **own_fold)):
                _refuse(other, run, f"their configurations differ ({'; '.join(differences)})")
        group[run.config.fold] = run
    return groups


def check_same_study(runs: Sequence[Run]) -> None:
    """Raises RunError naming two runs whose shard set, findings or label policy differ, or two folds whose raw labels do."""
    for run in runs[1:]:
        _check_equal(runs[0], run, {"set id": "set_id", "labels": "labels", "label policy": "policy"})
    by_fold: dict[int, Run] = {}
    for run in runs:
        by_fold.setdefault(run.config.fold, run)  # one of each: the runs of a fold are compared by `check_same_rows`
    first, *others = by_fold.values()
    labels = list(first.config.labels)
    mine = first.rows().set_index("row")[labels]
    for run in others:
        theirs = run.rows().set_index("row")[labels]
        row = mine.index.intersection(theirs.index)
        raw, other = (frame.loc[row].to_numpy(np.float32) for frame in (mine, theirs))
        _check_same_labels(first, run, row.to_numpy(), raw, other, "shared")


def _check_equal(first: Run, second: Run, fields: dict[str, str]) -> None:
    for what, field in fields.items():
        one, other = getattr(first.config, field), getattr(second.config, field)
        if one != other:
            _refuse(first, second, f"{what} {one} is not {other}")


def _refuse(first: Run, second: Run, why: str) -> NoReturn:
    raise RunError(
        f"{first.name} and {second.name} cannot be joined: {why}; "
        "move one of them to another --runs folder, or train it again like the other"
    )


def read_answers(run: Run, part: str) -> Answers:
    """Join a run's logits with its own raw labels, by row.

    Raises RunError if the rows predicted are not exactly the part's, or if a logit is not finite.
    """
    again = f"predict again with `cxrfast predict {run.folder}`"
    labels, predictions = list(run.config.labels), run.read_predictions(part)
    rows = run.rows()
    rows = rows.loc[rows["part"] == part, ["row", *labels]].sort_values("row")
    row = rows["row"].to_numpy(np.int64)
    if not np.array_equal(row, predictions.row):
        missing, extra = len(np.setdiff1d(row, predictions.row)), len(np.setdiff1d(predictions.row, row))
        raise RunError(
            f"{run.name}: of the {len(row):,} {part} rows {missing:,} have no prediction, "
            f"and {extra:,} other rows have one: {again}"
        )
    shape = len(row), len(labels)
    if predictions.logits.shape != shape:
        raise RunError(f"{run.name}: logits of {part} are {predictions.logits.shape}, not {shape}: {again}")
    if not np.isfinite(predictions.logits).all():
        raise RunError(f"{run.name}: some {part} logits are not finite, its weights diverged: train it again")
    return Answers(run, part, row, rows[labels].to_numpy(np.float32), predictions.logits)


def check_same_rows(first: Answers, second: Answers) -> None:
    """Raises RunError if two runs of one fold do not hold the same rows with the same raw labels."""
    apart = np.setxor1d(first.row, second.row)
    if len(apart):
        _refuse(
            first.run, second.run, f"{len(apart):,} {first.part} rows are in one of them only, such as row {apart[0]}"
        )
    _check_same_labels(first.run, second.run, first.row, first.raw, second.raw, first.part)


def _check_same_labels(first: Run, second: Run, row: np.ndarray, raw: np.ndarray, other: np.ndarray, what: str) -> None:
    """Raises RunError if raw labels, (n, L) each, of `row` differ: the set was relabelled between two trainings."""
    differ = ~((raw == other) | (np.isnan(raw) & np.isnan(other)))
    if differ.any():
        at, j = np.argwhere(differ)[0]
        example = f"{first.config.labels[j]} of row {row[at]}: {raw[at, j]:g} is not {other[at, j]:g}"
        _refuse(first, second, f"{differ.sum():,} labels of {what} rows differ, such as {example}")


# Scores


def score(answers: Answers) -> pd.DataFrame:
    """The lines of one run: name, scale, start, fold, label, part, auroc, auprc, positives, negatives.

    auprc is scikit-learn's average precision; like auroc it is NaN where either class is missing.
    """
    config, (target, mask) = answers.run.config, answers.targets()
    positives, negatives = metrics.counts(target, mask)
    auprc = [
        average_precision_score(t[m], s[m]) if p and n else np.nan
        for t, s, m, p, n in zip(target.T, answers.logits.T, mask.T, positives, negatives, strict=True)
    ]
    return pd.DataFrame(
        {
            "name": answers.run.folder.parent.name,
            "scale": config.scale,
            "start": origin_of(config),
            "fold": config.fold,
            "label": config.labels,
            "part": answers.part,
            "auroc": metrics.auroc(answers.logits, target, mask),
            "auprc": auprc,
            "positives": positives,
            "negatives": negatives,
        }
    )


def distinct_positives(answers: Iterable[Answers]) -> list[int]:
    """How many rows hold each finding, (L,), over all folds. A row that several folds share counts once."""
    rows, positive = [], []
    for mine in answers:
        target, mask = mine.targets()
        rows.append(mine.row)
        positive.append((target > 0.5) & mask)
    _, first = np.unique(np.concatenate(rows), return_index=True)
    return [int(n) for n in np.concatenate(positive)[first].sum(axis=0)]


# Tables


def plus_minus(mean: float, sd: float, sign: str = "") -> str:
    """`0.912 ± 0.004`; the mean alone without a deviation; `undefined` for NaN. `sign`: "+" for gains."""
    if np.isnan(mean):
        return "undefined"
    return f"{mean:{sign}.3f}" + ("" if np.isnan(sd) else f" ± {sd:.3f}")


def cells(values: np.ndarray, sign: str = "") -> list[str]:
    """The cell of each finding from float64 (K, L), with the folds it is defined in if those are not all."""
    defined = (~np.isnan(values)).sum(axis=0)
    return [
        plus_minus(mean, sd, sign) + (f" ({n} of {len(values)} folds)" if 0 < n < len(values) else "")
        for mean, sd, n in zip(*metrics.mean_sd(values), defined, strict=True)
    ]


def over_findings(columns: Sequence[np.ndarray]) -> tuple[list[np.ndarray], int]:
    """Mean over findings of each column (K, L), as (K, 1); and how many findings it is over.

    Only findings that are defined in every fold of every column count: all columns average the same ones.
    """
    shared = ~np.isnan(np.concatenate(columns)).any(axis=0)
    if not shared.any():
        return [np.full((len(values), 1), np.nan) for values in columns], 0
    return [values[:, shared].mean(axis=1, keepdims=True) for values in columns], int(shared.sum())


def folds_text(folds: Sequence[int]) -> str:
    """`5 folds (0, 1, 2, 3, 4)`."""
    return f"{len(folds)} fold{'s' if len(folds) != 1 else ''} ({', '.join(map(str, folds))})"


def to_markdown(evaluation: Evaluation) -> str:
    """Findings × groups, AUROC as mean ± sd over folds, with what a reader must know to use the numbers."""
    columns = [evaluation.matrix(name) for name in evaluation.names]
    means, shared = over_findings(columns)
    folds = {name: folds_text(evaluation.folds(name)) for name in evaluation.names}
    one = next(iter(folds.values())) if len(set(folds.values())) == 1 else None
    over = one or "; ".join(f"{name}: {text}" for name, text in folds.items())
    texts = [cells(values) for values in columns]
    lines = [
        [label, f"{evaluation.positives[label]:,}", *(text[j] for text in texts)]
        for j, label in enumerate(evaluation.labels)
    ]
    lines.append(["Mean", "", *(cells(values)[0] for values in means)])
    text = (
        f"# AUROC, {evaluation.part} rows\n\nMean ± standard deviation over folds. {over}.\n\n"
        + markdown_table(["Finding", "Positives", *(marked_name(n, s) for n, s in evaluation.starts.items())], lines)
        + f"\nMean: over the {shared} of {len(evaluation.labels)} findings that are defined in every "
        "fold of every column. Positives: rows that hold the finding, over all folds. "
        "Undefined: no positives or no negatives.\n"
    )
    if note := origin_footnote(evaluation.starts):
        text += f"\n{note}\n"
    if evaluation.skipped:
        text += f"\nWithout predictions, left out: {', '.join(evaluation.skipped)}.\n"
    return text


def best_bold(entries: Sequence[str], values: np.ndarray) -> list[Text]:
    """`entries` for a terminal: that of the highest value bold if there are two, those of NaN dim."""
    known = ~np.isnan(values)
    best = values[known].max() if known.sum() > 1 else np.inf
    styles = ["bold" if value == best else "" if k else "dim" for value, k in zip(values, known, strict=True)]
    return [Text(entry, style=style) for entry, style in zip(entries, styles, strict=True)]


def to_table(evaluation: Evaluation) -> Table:
    """The Markdown table for a terminal, the best group of each finding in bold."""
    columns = [evaluation.matrix(name) for name in evaluation.names]
    means, texts = np.array([metrics.mean_sd(v)[0] for v in columns]), [cells(v) for v in columns]
    skipped = f"without predictions: {', '.join(evaluation.skipped)}" if evaluation.skipped else ""
    caption = "\n".join(filter(None, (origin_footnote(evaluation.starts), skipped)))
    table = Table(title=f"AUROC, {evaluation.part} rows, mean ± sd over folds", caption=caption)
    table.add_column("Finding", overflow="fold")
    table.add_column("Positives", justify="right")
    for name, start in evaluation.starts.items():
        head = (
            "".join(name.rpartition("-")[:2]),
            marked_name(name.rpartition("-")[2], start),
            folds_text(evaluation.folds(name)).split(" (")[0],
        )
        table.add_column(Text("\n".join(head).strip()), justify="right", overflow="fold")
    for j, label in enumerate(evaluation.labels):
        entries = best_bold([text[j] for text in texts], means[:, j])
        table.add_row(Text(label), f"{evaluation.positives[label]:,}", *entries)
    table.add_section()
    overall = over_findings(columns)[0]
    best = best_bold([cells(v)[0] for v in overall], np.array([v.mean() for v in overall]))
    table.add_row("Mean", "", *best)
    return table


def write(folder: Path, evaluation: Evaluation) -> None:
    """auroc.csv, auroc_summary.csv and auroc.md, each whole or absent."""
    folder.mkdir(exist_ok=True)
    stem = "auroc" if evaluation.part == "test" else f"auroc-{evaluation.part}"
    for name, table in ((f"{stem}.csv", evaluation.table), (f"{stem}_summary.csv", evaluation.summary())):
        write_bytes(folder / name, table.to_csv(index=False, lineterminator="\n").encode())
    write_bytes(folder / f"{stem}.md", to_markdown(evaluation).encode())
