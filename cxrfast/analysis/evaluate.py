"""How well the runs of a study rank findings: AUROC and average precision by run, joined over folds.

In: run folders with predictions; no shard set, no GPU. Out: auroc.csv, auroc_summary.csv, auroc.md and
auroc.tex in RUNS/evaluation/. Runs that did not answer the same questions are never joined, and what is undefined is shown
as that, never as a number.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.metrics import average_precision_score

from cxrfast import metrics
from cxrfast.analysis.join import Answers, by_name, check_same_rows, check_same_study, read_answers, with_predictions
from cxrfast.analysis.scores import best_bold, cells, folds_text, undefined_note
from cxrfast.errors import RunError
from cxrfast.files import write_bytes
from cxrfast.progress import progress
from cxrfast.runs.lineage import marked_name, origin_footnote, origin_of, shared_origin
from cxrfast.splits import PARTS
from cxrfast.tables import Cell, Table

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
    """One line per run and finding: name, scale, start, fold, label, part, auroc, auprc, positives, negatives."""
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
    def origins(self) -> dict[str, str]:
        """By name: where the first weights came from, see `lineage.shared_origin`."""
        return {n: shared_origin(self.table.loc[self.table["name"] == n, "start"]) for n in self.names}

    def folds(self, name: str) -> list[int]:
        return sorted(int(fold) for fold in self.table.loc[self.table["name"] == name, "fold"].unique())

    def summary(self) -> pd.DataFrame:
        """One line per group and finding: name, scale, start, label, part, folds, folds_defined, auroc_mean, auroc_sd,
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
                        "start": self.origins[name],
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


def auroc_table(evaluation: Evaluation) -> Table:
    """Findings × groups, AUROC as mean ± sd over folds, the best group of each finding bold."""
    columns = [evaluation.matrix(name) for name in evaluation.names]
    shown, undefined = undefined_note(evaluation.labels, columns, evaluation.part)
    texts, means = [cells(values) for values in columns], [metrics.mean_sd(values)[0] for values in columns]
    overall, shared = metrics.over_findings(columns)
    rows: list[list[str | Cell]] = [
        [
            evaluation.labels[j],
            f"{evaluation.positives[evaluation.labels[j]]:,}",
            *best_bold([text[j] for text in texts], np.array([mean[j] for mean in means])),
        ]
        for j in shown
    ]
    mean_row = best_bold([cells(values)[0] for values in overall], np.array([values.mean() for values in overall]))
    folds = {name: folds_text(evaluation.folds(name)) for name in evaluation.names}
    one = next(iter(folds.values())) if len(set(folds.values())) == 1 else None
    over = one or "; ".join(f"{name}: {text}" for name, text in folds.items())
    notes = (
        f"Mean ± standard deviation over {over}. Positives: rows that hold the finding, over all folds. "
        f"Mean: over the {shared} of {len(evaluation.labels)} findings that every fold of every column defines.",
        undefined,
        origin_footnote(evaluation.origins),
        f"Without predictions, left out: {', '.join(evaluation.skipped)}." if evaluation.skipped else "",
    )
    return Table(
        f"AUROC, {evaluation.part} rows",
        ["Finding", "Positives", *(marked_name(name, start) for name, start in evaluation.origins.items())],
        [*rows, ["Mean", "", *mean_row]],
        "\n".join(filter(None, notes)),
        total=True,
    )


def write(folder: Path, evaluation: Evaluation) -> None:
    """auroc.csv, auroc_summary.csv, auroc.md and auroc.tex, each whole or absent."""
    folder.mkdir(exist_ok=True)
    stem = "auroc" if evaluation.part == "test" else f"auroc-{evaluation.part}"
    for name, frame in ((f"{stem}.csv", evaluation.table), (f"{stem}_summary.csv", evaluation.summary())):
        write_bytes(folder / name, frame.to_csv(index=False, lineterminator="\n").encode())
    table = auroc_table(evaluation)
    write_bytes(folder / f"{stem}.md", table.markdown().encode())
    write_bytes(folder / f"{stem}.tex", table.latex().encode())
