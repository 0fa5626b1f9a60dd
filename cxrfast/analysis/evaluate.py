"""How well the runs of a study rank findings: AUROC and average precision by run, joined over folds.

In: run folders with predictions; no shard set, no GPU. Out: auroc.csv, auroc_summary.csv, auroc.md and auroc.tex in
RUNS/evaluation/. Runs that did not answer the same questions are never joined; what is undefined is never a number.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.metrics import average_precision_score

from cxrfast import metrics
from cxrfast.analysis.answers import Answers, read_answers
from cxrfast.analysis.join import Predicted, by_name, check_same_rows, check_same_study, rules_note, with_predictions
from cxrfast.analysis.marks import footnotes, group_remark, marked, origins
from cxrfast.analysis.other_set import AS_TRAINED, OtherRules, OtherTest, other_folder
from cxrfast.analysis.scores import (
    by_fold,
    folds_text,
    left_out_note,
    mean_note,
    score_rows,
    shared_folds,
    undefined_note,
)
from cxrfast.errors import RunError
from cxrfast.files import make_own_folder, write_bytes
from cxrfast.progress import progress
from cxrfast.runs.lineage import origin_of
from cxrfast.runs.remarks import remarks_on
from cxrfast.runs.run import Run
from cxrfast.splits import PARTS
from cxrfast.tables import Table, csv_text

FOLDER = "evaluation"


@dataclass(frozen=True)
class Evaluation:
    """The tables of `evaluate`. Groups of runs are named by the folder around their folds: densenet121-256."""

    part: str
    """train, val, test, or the name of another set."""
    names: tuple[str, ...]
    """Groups of runs, by architecture and scale."""
    labels: tuple[str, ...]
    """In the order of the logits."""
    table: pd.DataFrame
    """One line per run and finding: name, scale, start, fold, label, part, auroc, auprc, positives, negatives, compared,
    remark.

    compared: every group has this fold. remark: what to know about the run, see `runs.remarks`; "" if nothing.
    """
    positives: dict[str, int]
    """By finding: rows of the part that hold it, over the folds of `lines`, each row counted once."""
    skipped: tuple[str, ...]
    """Runs without predictions."""
    rules: str = ""
    """How rows and labels were chosen, the same for all runs."""
    unfinished: tuple[str, ...] = ()
    """Unfinished runs that were left out."""
    damaged: tuple[str, ...] = ()
    """Damaged runs that were left out."""
    is_other_set: bool = False
    """Whether the rows are those of another set than the runs' own."""

    @property
    def is_compared(self) -> bool:
        """Whether some fold is in every group; if not, the columns of the tables do not compare."""
        return bool(self.table["compared"].any())

    @property
    def lines(self) -> pd.DataFrame:
        """Lines of the folds that all groups have, or all lines if there is no such fold."""
        return self.table[self.table["compared"]] if self.is_compared else self.table

    @property
    def folds(self) -> dict[str, list[int]]:
        """By name: the folds of `lines`, ascending."""
        folds = self.lines.groupby("name")["fold"].unique()
        return {name: sorted(folds[name].tolist()) for name in self.names}

    @property
    def left_out(self) -> dict[str, list[int]]:
        """By name: folds that are not in `lines`, ascending."""
        folds = self.table.groupby("name")["fold"].unique()
        rest = {name: sorted(set(folds[name].tolist()) - set(those)) for name, those in self.folds.items()}
        return {name: those for name, those in rest.items() if those}

    def matrix(self, name: str) -> np.ndarray:
        """AUROC of one group, float64 (K, L), folds ascending, NaN where undefined."""
        return by_fold(self.lines[self.lines["name"] == name], self.labels, "auroc")

    @property
    def origins(self) -> dict[str, str]:
        """By name: where the first weights came from."""
        return origins(self.table)

    def marked(self, shown: Mapping[str, str] | None = None) -> dict[str, str]:
        """By name: what tables and figures show, with the signs that their footnotes explain. `shown`: default: the names."""
        return marked(shown or {name: name for name in self.names}, self.lines)

    @property
    def footnotes(self) -> str:
        """Explanations of the signs, one paragraph each."""
        return footnotes(self.lines)

    def summary(self) -> pd.DataFrame:
        """One line per group and finding: name, scale, start, label, part, compared, folds, folds_defined, auroc_mean,
        auroc_sd, auprc_mean, auprc_sd, positives, remark.

        Means are over the folds that all groups have (`compared`), or over each group's own if there is no such fold.
        sd: sample standard deviation over the folds where the finding is defined; NaN with fewer than two.
        """
        table = self.lines.assign(start=self.lines["name"].map(self.origins))
        lines = table.groupby(["name", "scale", "start", "label", "part", "compared"], sort=False).agg(
            folds=("fold", "size"),
            folds_defined=("auroc", "count"),
            auroc_mean=("auroc", "mean"),
            auroc_sd=("auroc", "std"),
            auprc_mean=("auprc", "mean"),
            auprc_sd=("auprc", "std"),
        )
        remarks = group_remark(self.lines)
        return lines.reset_index().assign(
            positives=lambda frame: frame["label"].map(self.positives),
            remark=lambda frame: frame["name"].map(remarks),
        )


def evaluate(
    runs: Path, part: str = "test", *, finished_only: bool = False, damaged: Collection[str] = ()
) -> Evaluation:
    """Score every run below `runs` that has predictions of `part`; write the tables into RUNS/evaluation/.

    `finished_only`: leave out runs whose training is not done; otherwise they are marked.

    Raises RunError if no run has predictions, if runs cannot be joined, or if a run predicted other rows than
    the part's.
    """
    if part not in PARTS:
        raise RunError(f"part {part!r} is unknown: use one of {', '.join(PARTS)}")
    found = with_predictions(runs, finished_only, damaged)
    groups = by_name(found.runs)
    check_same_study(found.runs)
    evaluation = _evaluation(found, groups, part, damaged, lambda run: read_answers(run, part))
    write(runs / FOLDER, evaluation)
    return evaluation


def evaluate_on(
    runs: Path,
    name: str,
    rules: OtherRules = AS_TRAINED,
    *,
    without_shared_patients: bool = False,
    finished_only: bool = False,
    damaged: Collection[str] = (),
) -> Evaluation:
    """Score every run below `runs` that has predictions on another set, which `cxrfast predict` called `name`.

    All networks score the same rows. `rules`: for that set's labels; default: those of the runs. `without_shared_patients`:
    leave out rows whose patient or image is among the rows of any of the runs.

    Writes nothing. Raises RunError as `evaluate` and `OtherTest.of` do.
    """
    found = with_predictions(runs, finished_only, damaged, name, own=False)
    groups = by_name(found.runs)
    check_same_study(found.runs)
    test = OtherTest.of(found.runs, name, rules, without_shared_patients)
    evaluation = _evaluation(found, groups, name, damaged, test.read, same_rows=True)
    return replace(evaluation, rules=test.with_rules(evaluation.rules), is_other_set=True)


def _evaluation(
    found: Predicted,
    groups: Mapping[str, Mapping[int, Run]],
    part: str,
    damaged: Collection[str],
    read: Callable[[Run], Answers],
    same_rows: bool = False,
) -> Evaluation:
    """The evaluation of what `read` reads from each run; `same_rows`: in all folds."""
    predicted = found.runs
    shared, remarks = shared_folds(groups), remarks_on(predicted)
    lines: dict[str, pd.DataFrame] = {}
    held: list[tuple[np.ndarray, np.ndarray]] = []  # by fold
    labels: tuple[str, ...] = ()
    with progress("evaluate", len(predicted), unit="runs") as advance:
        answers: Answers | None = None
        for fold in sorted({run.config.fold for run in predicted}):  # one fold in memory at a time
            answers = answers if same_rows else None
            for run in (run for run in predicted if run.config.fold == fold):
                mine = read(run)
                labels = mine.labels
                if answers is None:
                    answers = mine
                    if fold in shared or not shared or same_rows:
                        held.append((mine.row, _held(mine)))
                check_same_rows(answers, mine)
                lines[run.name] = score(mine).assign(compared=fold in shared, remark=remarks[run.folder])
                advance(note=run.name)
    positives = dict(zip(labels, distinct_positives(held), strict=True))
    table = pd.concat([lines[run.name] for run in predicted], ignore_index=True)
    return Evaluation(
        part,
        tuple(groups),
        labels,
        table,
        positives,
        tuple(found.without),
        rules_note({name: {k: group[k] for k in shared or group} for name, group in groups.items()}),
        tuple(found.unfinished),
        tuple(damaged),
    )


def score(answers: Answers) -> pd.DataFrame:
    """The lines of one run in `Evaluation.table`.

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
            "start": origin_of(answers.run),
            "fold": config.fold,
            "label": answers.labels,
            "part": answers.part,
            "auroc": metrics.auroc(answers.logits, target, mask),
            "auprc": auprc,
            "positives": positives,
            "negatives": negatives,
        }
    )


def _held(answers: Answers) -> np.ndarray:
    """bool (n, L): the findings that each row holds."""
    target, mask = answers.targets()
    return (target > 0.5) & mask


def distinct_positives(held: Iterable[tuple[np.ndarray, np.ndarray]]) -> list[int]:
    """Number of rows that hold each finding, (L,), over all folds. A row that several folds share counts once.

    held: rows (n,) of each fold, and the findings that they hold, bool (n, L).
    """
    rows, findings = zip(*held, strict=True)
    _, first = np.unique(np.concatenate(rows), return_index=True)
    return [int(n) for n in np.concatenate(findings)[first].sum(axis=0)]


def auroc_table(evaluation: Evaluation) -> Table:
    """Findings × groups, AUROC as mean ± sd over folds, the best group of each finding bold."""
    labels, columns = evaluation.labels, [evaluation.matrix(name) for name in evaluation.names]
    folds = {name: folds_text(those) for name, those in evaluation.folds.items()}
    same = len(set(folds.values())) == 1
    over = folds[evaluation.names[0]] if same else "; ".join(f"{name}: {text}" for name, text in folds.items())
    notes = (
        ""
        if evaluation.is_compared
        else "No fold is in every column: the columns do not compare, and no value is bold.",
        f"Mean ± standard deviation over {over}. Positives: rows that hold the finding, over all these folds. "
        + mean_note(labels, columns),
        left_out_note(evaluation.left_out, "column"),
        evaluation.rules,
        undefined_note(labels, columns, evaluation.part),
        evaluation.footnotes,
        _skipped_note(evaluation),
        f"Left out, unfinished: {', '.join(evaluation.unfinished)}." if evaluation.unfinished else "",
        f"Left out, damaged: {', '.join(evaluation.damaged)}." if evaluation.damaged else "",
    )
    rows = score_rows(labels, columns, compared=evaluation.is_compared)
    counts = {label: f"{n:,}" for label, n in evaluation.positives.items()}
    return Table(
        f"AUROC on {evaluation.part}" if evaluation.is_other_set else f"AUROC, {evaluation.part} rows",
        ["Finding", "Positives", *evaluation.marked().values()],
        [[label, counts.get(label, ""), *cells] for label, cells in rows],
        "\n".join(filter(None, notes)),
        total=True,
    )


def _skipped_note(evaluation: Evaluation) -> str:
    if not evaluation.skipped:
        return ""
    on = f" on {evaluation.part}" if evaluation.is_other_set else ""
    make = f" (`cxrfast predict RUN SET --on {evaluation.part}`)" if on else ""
    return f"Left out, without predictions{on}{make}: {', '.join(evaluation.skipped)}."


def write(folder: Path, evaluation: Evaluation) -> None:
    """auroc.csv, auroc_summary.csv, auroc.md and auroc.tex, each whole or absent; auroc-<part>.* if not of the test part, and
    in a folder on-<name> of their own if of another set."""
    make_own_folder(folder)
    stem = "auroc" if evaluation.part == "test" or evaluation.is_other_set else f"auroc-{evaluation.part}"
    if evaluation.is_other_set:
        make_own_folder(folder := folder / other_folder(evaluation.part))
    table = auroc_table(evaluation)
    for name, text in {
        f"{stem}.csv": csv_text(evaluation.table),
        f"{stem}_summary.csv": csv_text(evaluation.summary()),
        f"{stem}.md": table.markdown(),
        f"{stem}.tex": table.latex(),
    }.items():
        write_bytes(folder / name, text.encode())
