"""Logits of a study's runs, joined with their labels by row, after checks that the runs belong together.

In: run folders with predictions; no shard set, no GPU. Runs that did not answer the same questions are never joined.
"""

import shlex
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np

from cxrfast.analysis.answers import Answers, read_answers
from cxrfast.analysis.other_set import OtherTest, again
from cxrfast.analysis.scores import fold_numbers
from cxrfast.config import TrainConfig, label_differences, recipe_in_words
from cxrfast.errors import RunError
from cxrfast.runs.external import known_names
from cxrfast.runs.external import names as external_names
from cxrfast.runs.lineage import FROM_RUN, origin_of, shared_origin
from cxrfast.runs.remarks import unfinished
from cxrfast.runs.run import Run
from cxrfast.splits import PARTS
from cxrfast.text import shown
from cxrfast.units import counted

MAY_DIFFER = ("precision", "micro_batch", "epochs", "allow_shared_patients", "allow_partial", "weighted_validation")
"""Fields of TrainConfig in which the folds of a group may differ: a machine chose them, a version of cxrfast did not know
them, or they ask no other question. A study that was interrupted may hold both; the tables say so."""


def rules_note(groups: Mapping[str, Mapping[int, Run]]) -> str:
    """How rows and labels were chosen, and where the folds of a group differ, as paragraphs below a table.

    groups: by name, then by fold; all of one study.
    """
    configs = {name: [run.config for run in group.values()] for name, group in groups.items()}
    config = next(iter(configs.values()))[0]
    policies = [config.policy, *(f"{label} {policy}" for label, policy in config.label_policies)]
    blank = {"": "negative", **dict(config.blank)}
    blanks = [blank.pop(""), *(f"{label} {policy}" for label, policy in blank.items())]
    left = {"drop": "left out", "negative": "negative"}[config.unlabelled]
    sharing = [name for name, those in configs.items() if any(c.allow_shared_patients for c in those)]
    whose = "" if len(sharing) == len(groups) else f" of {', '.join(sharing)}"
    shared = f"; patients{whose} may be in two parts (--allow-shared-patients)" if sharing else ""
    rules = (
        f"Split: {config.split}{shared}. Uncertain labels: {', '.join(policies)}; blank labels: {', '.join(blanks)}; images "
        f"without any label: {left}."
    )
    firsts = {name: those[0] for name, those in configs.items()}
    return "\n".join([rules, *_rows_note(firsts), *_recipe_note(firsts), *_folds_note(groups)])


def _rows_note(configs: Mapping[str, TrainConfig]) -> list[str]:
    """One sentence about groups that use only some rows of the set; none if all use all."""
    chosen = {}
    for name, config in configs.items():
        views = [f"views {', '.join(config.views)}"] if config.views else []
        limit = [f"the first {config.limit:,} of each part"] if config.limit is not None else []
        subset = [f"those of --rows (hash {config.subset})"] if config.subset is not None else []
        chosen[name] = "; ".join([*views, *limit, *subset]) or "all"
    if len(set(chosen.values())) > 1:
        return [f"Rows differ. {'. '.join(f'{name}: {text}' for name, text in chosen.items())}."]
    return [f"Rows: only {text}." for text in set(chosen.values()) if text != "all"]


def _recipe_note(configs: Mapping[str, TrainConfig]) -> list[str]:
    """One sentence about how the optimisation differs from the study's; none if it does not."""
    told = {name: recipe_in_words(config) for name, config in configs.items()}
    if len(set(told.values())) == 1:
        return [f"Recipe: {text}." for text in set(told.values()) if text]
    return [f"Recipes differ. {'. '.join(f'{name}: {text or STUDY}' for name, text in told.items())}."]


STUDY = "the study's"


def _folds_note(groups: Mapping[str, Mapping[int, Run]]) -> list[str]:
    """One sentence per group whose folds differ in one of MAY_DIFFER."""
    notes = []
    for name, group in groups.items():
        told = []
        for field in MAY_DIFFER:
            if field == "allow_partial":  # a mark says so
                continue
            folds: dict[object, list[int]] = {}
            for fold, run in sorted(group.items()):
                folds.setdefault(getattr(run.config, field), []).append(fold)
            if len(folds) > 1:
                values = ", ".join(f"{value} ({fold_numbers(those)})" for value, those in folds.items())
                told.append(f"{field.replace('_', ' ')} {values}")
        if told:
            notes.append(f"Folds of {name} differ: {'; '.join(told)}.")
    return notes


@dataclass(frozen=True)
class Predicted:
    """Runs below a folder that have predictions, and the names of those that are left out."""

    runs: list[Run]
    without: list[str]
    """Those without predictions."""
    unfinished: list[str]
    """Those that are unfinished, if only finished ones were asked for."""


def with_predictions(
    runs: Path, finished_only: bool = False, damaged: Collection[str] = (), on: str | None = None, own: bool = True
) -> Predicted:
    """The runs that have predictions; `finished_only`: and whose training is done. Raises RunError if there is none.

    `on`: name of another set that they must have predictions on; `own`: their own set's rows must be predicted, too.
    """
    found = Run.find(runs, damaged)
    predicted = [run for run in found if (run.has_predictions or not own) and (on is None or on in external_names(run))]
    if not predicted:
        raise RunError(_nothing_predicted(runs, found, on))
    states = {run.name: unfinished(run) for run in predicted} if finished_only else {}
    rest = [name for name, state in states.items() if state]
    if len(rest) == len(predicted):
        raise RunError(
            f"no run in {runs} that has predictions is finished ({', '.join(f'{name}: {states[name]}' for name in rest[:3])}"
            f"{', …' if len(rest) > 3 else ''}): finish the training, or leave out --finished-only"
        )
    chosen = [run for run in predicted if run.name not in rest]
    return Predicted(chosen, [run.name for run in found if run not in predicted], rest)


def _nothing_predicted(runs: Path, found: Sequence[Run], on: str | None) -> str:
    none = "the only run" if len(found) == 1 else f"none of the {len(found):,} runs"
    has = "has no predictions" if len(found) == 1 else "has predictions"
    if on is None or any(on in external_names(run) for run in found):
        return f"{none} in {runs} {has}: `cxrfast predict {runs}`"
    there = known_names(found)
    known = f"the other sets that runs were tried on are {there}" if there else "the runs were tried on no other set"
    return f"{none} in {runs} {has} on {shown(on)} ({known}): `cxrfast predict {runs} SET --on {shlex.quote(on)}`"


def by_name(runs: Iterable[Run]) -> dict[str, dict[int, Run]]:
    """Runs by the name of their group, then by fold, in the order given.

    Raises RunError if a group holds two scales, two architectures or a fold twice, or if its folds differ in more than
    MAY_DIFFER: its mean would mean nothing.
    """
    groups: dict[str, dict[int, Run]] = {}
    for run in runs:
        group = groups.setdefault(run.folder.parent.name, {})
        for other in group.values():
            _check_equal(other, run, {"scale": "scale", "architecture": "arch"})
            if other.config.fold == run.config.fold:
                _refuse(other, run, f"both are fold {run.config.fold}")
            same = {name: getattr(run.config, name) for name in ("fold", "weights", *MAY_DIFFER)}
            if run.config.schedule == other.config.schedule == "cosine":
                del same["epochs"]  # they shape the schedule
            differences = run.config.differences(replace(other.config, **same)) + _start_differences(run, other)
            if differences:
                _refuse(other, run, f"their configurations differ ({'; '.join(differences)})")
        group[run.config.fold] = run
    return groups


def _start_differences(run: Run, other: Run) -> list[str]:
    """How the first weights of two folds differ; empty if they are one file, or each is from its own fold of one group."""
    mine, theirs = (shared_origin([origin_of(one)]) for one in (run, other))
    is_one_group = mine == theirs and mine.startswith(FROM_RUN)
    path, hashes = run.config.weights, [one.origin.sha256 or "" for one in (run, other)]
    if all(hashes) and hashes[0] == hashes[1]:
        return []
    if path != other.config.weights:
        return [] if is_one_group else [f"weights: {path}, not {other.config.weights}"]
    if not all(hashes) or (is_one_group and run.origin.run):  # earlier versions recorded no hash
        return []
    return [
        f"weights: {path} held sha256 {hashes[0][:12]} for one and {hashes[1][:12]} for the other when they started"
    ]


def check_same_study(runs: Sequence[Run]) -> None:
    """Raises RunError naming two runs whose shard set, findings, split or label policies differ, or two folds whose raw
    labels do, or that test the same rows."""
    for run in runs[1:]:
        _check_equal(runs[0], run, {"set id": "set_id", "split": "split", "label policy": "policy"})
        if run.config.labels != runs[0].config.labels:
            told = label_differences(run.config.labels, runs[0].config.labels)
            _refuse(runs[0], run, f"the second has the labels of the first {told}")
        _check_equal(runs[0], run, {"policy for images without any label": "unlabelled"})
        for what, field in (("label policy", "policies"), ("policy for blank", "blanks")):
            by_label = zip(run.config.labels, getattr(runs[0].config, field), getattr(run.config, field), strict=True)
            for label, one, other in by_label:
                if one != other:
                    _refuse(runs[0], run, f"{what} {label}: {one} is not {other}")
    by_fold: dict[int, Run] = {}
    for run in runs:
        by_fold.setdefault(run.config.fold, run)  # one per fold: `check_same_rows` compares the runs of a fold
    first, *others = by_fold.values()
    mine = _read_labels(first)
    tested = [(first, mine.row[mine.is_test])]
    for run in others:
        theirs = _read_labels(run)
        row, here, there = np.intersect1d(mine.row, theirs.row, return_indices=True)
        _check_same_labels(first, run, row, mine.raw[here], theirs.raw[there], "shared")
        tests = theirs.row[theirs.is_test]
        for earlier, others_tests in tested if run.config.split == "folds" else ():
            if len(both := np.intersect1d(others_tests, tests)):
                why = f"both test {counted(len(both), 'row')}, such as row {both[0]}, though their folds differ"
                _refuse(earlier, run, f"{why}: their sets deal the folds in different ways")
        tested.append((run, tests))


class _Labels(NamedTuple):
    """Rows of a run, all parts."""

    row: np.ndarray
    """int64 (n,)"""
    raw: np.ndarray
    """float32 (n, L): raw labels."""
    is_test: np.ndarray
    """bool (n,)"""


def _read_labels(run: Run) -> _Labels:
    labels = list(run.config.labels)
    rows = run.rows(["row", "part", *labels])
    return _Labels(
        rows["row"].to_numpy(np.int64), rows[labels].to_numpy(np.float32), (rows["part"] == "test").to_numpy()
    )


def _check_equal(first: Run, second: Run, fields: dict[str, str]) -> None:
    for what, field in fields.items():
        one, other = getattr(first.config, field), getattr(second.config, field)
        if one != other:
            _refuse(first, second, f"{what} {one} is not {other}")


def _refuse(first: Run, second: Run, why: str) -> NoReturn:
    raise RunError(
        f"{first.name} and {second.name} cannot be joined: {why}; "
        "move one of them to another --runs folder, or retrain it like the other"
    )


def check_same_rows(first: Answers, second: Answers) -> None:
    """Raises RunError if two runs of one fold do not hold the same rows with the same raw labels."""
    if len(apart := np.setxor1d(first.row, second.row)):
        one, other = first.run.config, second.run.config
        known = [
            f"{name}: {getattr(one, name)}, not {getattr(other, name)}"
            for name in ("views", "limit", "subset")
            if getattr(one, name) != getattr(other, name)
        ]
        why = f" ({'; '.join(known)})" if known else ""
        what = f"{len(apart):,} {first.part} rows are" if len(apart) > 1 else f"1 {first.part} row is"
        _refuse(first.run, second.run, f"{what} in only one of them, such as row {apart[0]}{why}")
    is_same = np.array_equal(first.is_labelled, second.is_labelled)
    if first.part not in PARTS:
        is_same &= np.array_equal(first.raw, second.raw, equal_nan=True)
        if not is_same:
            names = f"{first.run.name} and {second.run.name}"
            raise RunError(f"{names} cannot be joined: {first.part} was relabelled between them: {again(first.part)}")
    _check_same_labels(first.run, second.run, first.row, first.raw, second.raw, first.part)


def _check_same_labels(first: Run, second: Run, row: np.ndarray, raw: np.ndarray, other: np.ndarray, what: str) -> None:
    """Raises RunError if raw labels, (n, L) each, of `row` differ: the set was relabelled between two trainings."""
    differ = ~((raw == other) | (np.isnan(raw) & np.isnan(other)))
    if differ.any():
        at, j = np.argwhere(differ)[0]
        example = f"{first.config.labels[j]} of row {row[at]}: {raw[at, j]:g} is not {other[at, j]:g}"
        how_many = (
            f"{differ.sum():,} labels of {what} rows differ, such as"
            if differ.sum() > 1
            else f"1 label of {what} rows differs,"
        )
        _refuse(first, second, f"{how_many} {example}")


def choose_scales(
    runs: Path,
    names: Sequence[str] | None,
    finished_only: bool = False,
    damaged: Collection[str] = (),
    on: str | None = None,
) -> tuple[dict[str, dict[int, Run]], list[str]]:
    """Groups to combine, ascending in scale: name → fold → run; and the names of the unfinished runs that are left out.

    `on`: name of another set that they must have predictions on. Raises RunError as `ensemble` does.
    """
    found = with_predictions(runs, finished_only, damaged, on)
    predicted, skipped = found.runs, found.without
    known = {run.folder.parent.name: run.config for run in predicted}
    have = ", ".join(names or known)
    if unknown := sorted(set(names or ()) - set(known)):
        raise RunError(f"no predictions of {', '.join(unknown)} in {runs}, which has {', '.join(known)}")
    if names is None:
        names = names_to_combine(predicted, runs)
    if len({known[name].scale for name in names}) < 2:
        waiting = f" (without predictions: {', '.join(skipped)})" if skipped else ""
        waiting += f" (unfinished: {', '.join(found.unfinished)})" if found.unfinished else ""
        raise RunError(
            f"an ensemble needs predictions of one architecture at two scales or more, and {runs} has them only for "
            f"{have}{waiting}: train and predict another scale"
        )
    return by_name(run for run in predicted if run.folder.parent.name in names), found.unfinished


def names_to_combine(runs: Iterable[Run], where: object) -> list[str]:
    """Names of the groups of the one architecture that has several scales; none if no architecture has.

    Raises RunError, saying that `where` holds them, if several architectures have or if a scale comes twice.
    """
    known = {run.folder.parent.name: run.config for run in runs}
    scales = {c.arch: {d.scale for d in known.values() if d.arch == c.arch} for c in known.values()}
    several = [arch for arch, those in scales.items() if len(those) > 1]
    names = [name for name, c in known.items() if c.arch in several]
    if len(several) > 1 or len(names) > sum(len(scales[arch]) for arch in several):
        raise RunError(
            f"{where} holds several architectures with several scales, or one scale twice ({', '.join(known)}): "
            "move those not meant to another --runs folder, or give `names` in Python"
        )
    return names


def join_logits(
    runs: Sequence[Run], part: str, test: OtherTest | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits float32 (S, N, L), targets (N, L) and mask (N, L) of runs of one fold, joined by row.

    `test`: of another set, in place of the part.
    """
    answers = [test.read(run) if test else read_answers(run, part) for run in runs]
    for other in answers[1:]:
        check_same_rows(answers[0], other)
    return np.stack([mine.logits for mine in answers]), *answers[0].targets()
