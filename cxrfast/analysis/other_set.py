"""Runs of a study on another set than their own: which rows and findings count, and what a reader must know about them.

In: what `cxrfast predict RUNS SET` left in the runs. Out: answers for tables, and the paragraphs below them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from cxrfast.analysis.answers import Answers, LabelRules, check_finite, labelled_rows
from cxrfast.errors import RunError, did_you_mean
from cxrfast.labels import BLANKS, POLICIES, UNLABELLED
from cxrfast.runs.external import Matching, OtherSet, read_external
from cxrfast.runs.overlap import Overlap, overlap, overlap_note
from cxrfast.runs.run import Run
from cxrfast.shards.parts import check_unlabelled
from cxrfast.text import shown
from cxrfast.units import counted


@dataclass(frozen=True, kw_only=True)
class OtherRules:
    """Rules for the labels of another set, where they are not to be those of the runs. None, empty: those of the runs."""

    policy: str | None = None
    label_policies: tuple[tuple[str, str], ...] = ()
    blank: tuple[tuple[str, str], ...] = ()
    """Label and policy; label "" is all those that are not named."""
    unlabelled: str | None = None

    def change(self, rules: LabelRules, labels: Sequence[str], name: str) -> LabelRules:
        """`rules` of `labels` with what is given here. Raises RunError for labels that are not among them, and for policies
        that do not exist."""
        policies = _changed("--label-policy", rules.policies, self.policy, self.label_policies, POLICIES, labels, name)
        general = dict(self.blank).get("")
        named = tuple(pair for pair in self.blank if pair[0])
        blanks = _changed("--blank", rules.blanks, general, named, BLANKS, labels, name)
        unlabelled = self.unlabelled or rules.unlabelled
        if unlabelled not in UNLABELLED:
            raise RunError(f"--unlabelled {unlabelled} is unknown: use one of {', '.join(UNLABELLED)}")
        check_unlabelled(unlabelled, blanks)
        return replace(rules, policies=policies, blanks=blanks, unlabelled=unlabelled)


def _changed(
    option: str,
    values: Sequence[str],
    general: str | None,
    by_label: Sequence[tuple[str, str]],
    known: Sequence[str],
    labels: Sequence[str],
    name: str,
) -> tuple[str, ...]:
    given = dict(by_label)
    if absent := [label for label in given if label not in labels]:
        raise RunError(
            f"{option} {absent[0]}={given[absent[0]]}: {did_you_mean(absent, labels)}the findings that the runs and {name} share "
            f"are {', '.join(map(shown, labels))}"
        )
    found = tuple(given.get(label, general or value) for label, value in zip(labels, values, strict=True))
    if unknown := [value for value in (general, *given.values()) if value is not None and value not in known]:
        raise RunError(f"policy {unknown[0]!r} is unknown: use one of {', '.join(known)}")
    return found


AS_TRAINED = OtherRules()
"""The rules of the runs."""


@dataclass(frozen=True, kw_only=True)
class OtherTest:
    """The rows and findings of another set on which all runs of a study are tested."""

    name: str
    other: OtherSet
    labels: tuple[str, ...]
    """Findings that are tested; those that the set has no labels of count nowhere."""
    rules: LabelRules
    """For `labels`."""
    matching: Matching
    overlaps: tuple[Overlap, ...]
    """One per run."""
    leave_out: np.ndarray | None
    """bool (n,): rows of patients and images that some run knows; None: they stay."""
    note: str
    """Which rows and findings count, and what they share with the runs', as paragraphs."""

    @classmethod
    def of(
        cls,
        runs: Sequence[Run],
        name: str,
        given: OtherRules,
        without_shared: bool = False,
        every_finding: bool = False,
    ) -> "OtherTest":
        """The test of runs of one study that have predictions on the set called `name`.

        `without_shared`: leave out the rows whose patient or image is among the rows of any of the runs. `every_finding`: also
        those that the set has no labels of. Raises RunError if predictions are damaged, of different sets or of other rows,
        if no finding is in both (unless `every_finding`), and for rules that do not fit.
        """
        first, others = runs[0], runs[1:]
        external = read_external(first, name)
        row, matching = external.rows["row"].to_numpy(), Matching.of(first.config.labels, external.other.labels)
        overlaps = [overlap(first, external)]
        for run in others:
            theirs = read_external(run, name, ids=False)
            if theirs.other.set_id != external.other.set_id:
                raise RunError(
                    f"{first.name} and {run.name} cannot be joined: their predictions named {name} are of two sets "
                    f"({external.other.set_id} and {theirs.other.set_id}): {again(name)}"
                )
            if not np.array_equal(theirs.rows["row"].to_numpy(), row) or theirs.other.labels != external.other.labels:
                what = "labels" if theirs.other.labels != external.other.labels else "rows"
                raise RunError(
                    f"{first.name} and {run.name} cannot be joined: they predicted other {what} of {name}, which was built, "
                    f"relabelled or filtered (--view) since: {again(name)}"
                )
            overlaps.append(overlap(run, replace(theirs, rows=external.rows)))  # one set has the same ids
        if not matching.both and not every_finding:
            raise RunError(_nothing_in_common(first, external.other, matching))
        labels = first.config.labels if every_finding else matching.both
        own = LabelRules.of(first.config, labels)
        rules = given.change(own, labels, name)
        known = np.any([one.mask for one in overlaps], axis=0)
        if without_shared and known.all():
            raise RunError(
                f"--without-shared-patients leaves no row of {name}: all patients are among the rows of the runs"
            )
        leave_out = known if without_shared else None
        told = [_rows_note(external.other, len(row), leave_out), _findings_note(name, matching)]
        told += [rules.in_words(labels) + (" These are not the rules of the runs." if rules != own else "")]
        told += [overlap_note(name, overlaps, external.other.knows_files)]
        told += [_recipe_note(external.other)]
        return cls(
            name=name,
            other=external.other,
            labels=labels,
            rules=rules,
            matching=matching,
            overlaps=tuple(overlaps),
            leave_out=leave_out,
            note="\n".join(filter(None, told)),
        )

    def with_rules(self, of_runs: str) -> str:
        """`note`, then how the runs' own rows were chosen, from `join.rules_note`."""
        return f"{self.note}\nTraining of the runs. {of_runs}"

    def read(self, run: Run) -> Answers:
        """The run's answers for `labels`, without the rows that are left out."""
        external = read_external(run, self.name, ids=False)
        check_finite(run, external.logits, self.name)
        answers = Answers(
            run,
            self.name,
            external.rows["row"].to_numpy(np.int64),
            external.rows.reindex(columns=list(self.labels)).to_numpy(np.float32),
            external.logits[:, [run.config.labels.index(label) for label in self.labels]],
            self.labels,
            self.rules,
            labelled_rows(external.rows[list(external.other.labels)].to_numpy(np.float32)),
        )
        return answers if self.leave_out is None else answers.without(self.leave_out)


def other_folder(name: str) -> str:
    """Name of the folder of results on another set, next to the files of the runs' own."""
    return f"on-{name}"


def again(name: str) -> str:
    """What to do about predictions that do not fit."""
    return f"predict all of them again with `cxrfast predict RUNS SET --on {name}`"


def _nothing_in_common(run: Run, other: OtherSet, matching: Matching) -> str:
    labels = f"its labels are {', '.join(other.labels)}" if other.labels else "it has no labels"
    near = "".join(f"{text}; " for text in matching.near_misses())
    return (
        f"{other.name} has no label of a finding of the runs ({labels}; findings: {', '.join(run.config.labels)}), so nothing can "
        f"be evaluated: {near}`cxrfast relabel` gives a set other labels, then predict again; `cxrfast table` has the probabilities"
    )


def _rows_note(other: OtherSet, rows: int, leave_out: np.ndarray | None) -> str:
    views = f" of the views {', '.join(other.views)}" if other.views else ""
    partial = ", whose build was not finished," if other.is_partial else ""
    left = 0 if leave_out is None else int(leave_out.sum())
    text = f"Every network scores the same {counted(rows - left, 'row')}{views} of {other.name} (set {other.set_id[:8]}){partial}"
    text = text.rstrip(",")
    if leave_out is None:
        return text + "."
    return f"{text}; {counted(left, 'row')} of patients or images that the runs know are left out (--without-shared-patients)."


def _findings_note(name: str, matching: Matching) -> str:
    missing = f"{name} has no labels of {', '.join(matching.only_run)}." if matching.only_run else ""
    near = "".join(f" {text}" for text in matching.near_misses())
    return missing + near


def _recipe_note(other: OtherSet) -> str:
    if not other.recipe:
        return ""
    return f"Images of {other.name} were made otherwise than those the runs were trained on: {other.recipe}."
