"""Which images of a set train, validate and test, and what their labels mean: for `cxrfast train` and for your own loop.

The rows table of a set comes in; row numbers and labels of a part go out. It reads and writes no files.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from cxrfast.errors import RunError
from cxrfast.labels import targets
from cxrfast.shards.format.info import SetInfo
from cxrfast.splits import PARTS, check_fold, check_official, official_masks, part_masks, shared_patients
from cxrfast.text import shown


@dataclass(frozen=True, kw_only=True)
class LabelledRows:
    """The rows and labels of one part of a set; `ShardSet.part` makes it."""

    name: str
    """train, val or test."""
    rows: np.ndarray
    """int64 (n,), ascending: for TrainOrder or EvalOrder."""
    labels: np.ndarray
    """float32 (images of the set, L), looked up by row: 1, 0, or NaN where a label does not count and in rows of other parts."""


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Which rows of a set are used, and how they are split."""

    labels: Sequence[str]
    """Label columns; a row that is blank in all of them has no labels."""
    split: str = "folds"
    """folds or official."""
    fold: int = 0
    unlabelled: str = "drop"
    """Rows without labels: drop or negative."""
    views: Sequence[str] = ()
    """View positions; none: all."""
    subset: np.ndarray | None = None
    """Row numbers; None: all."""
    limit: int | None = None
    """Rows of each part; None: all."""
    allow_shared_patients: bool = False
    """Use parts of which two hold the same patient."""

    def __str__(self) -> str:
        views = f", views {', '.join(self.views)}" if self.views else ""
        return f"split {self.split}, fold {self.fold}{views}"


def resolve_split(info: SetInfo, split: str, fold: int = 0) -> str:
    """`folds` or `official`; for `auto`, official if the set was built with a column of train, validate and test.

    Raises RunError if that split has no such fold.
    """
    found = split
    if split == "auto":
        found = "official" if info.source_options.get("split_column") and not info.own_folds else "folds"
    if found not in ("folds", "official"):
        raise RunError(f"split {found!r} is unknown: use one of folds, official, auto")
    if found == "official" and fold and split == "auto":
        raise RunError(
            f"--fold {fold}: the set was built with --split-column, and its split is used, which has no folds: give --fold 0, "
            "or --split folds"
        )
    check_fold(found, fold)
    return found


def check_unlabelled(unlabelled: str, blanks: Sequence[str]) -> None:
    """Raises RunError if rows without labels are used but none of their blank labels count; `blanks`: one per label."""
    if unlabelled == "negative" and set(blanks) == {"ignore"}:
        raise RunError(
            "--unlabelled negative --blank ignore: images without any label would have no label that counts: give one of them"
        )


def divide(table: pd.DataFrame, split: str, fold: int) -> dict[str, np.ndarray]:
    """Masks of train, val and test over all rows of a set, bool (images,) each."""
    if split == "official":
        return official_masks(table["split"].to_numpy())
    return part_masks(table["fold"].to_numpy(), table["block"].to_numpy(), fold)


def division(table: pd.DataFrame, split: str, fold: int) -> str:
    """Hash of the part of every row of a set.

    Sets with one id hold the same images, but their split column, or folds of their own, may differ.
    """
    masks = divide(table, split, fold)
    part = np.select([masks[name] for name in PARTS], [1, 2, 3], default=0).astype(np.uint8)
    return hashlib.sha256(part[np.argsort(table["row"].to_numpy())].tobytes()).hexdigest()[:16]


def masks_of_parts(table: pd.DataFrame, held: np.ndarray, selection: Selection) -> dict[str, np.ndarray]:
    """Masks of the rows of train, val and test, bool (images,) each; a part may be empty.

    `table`: the set's rows. `held`: int64, rows that are built. Raises RunError if a name or row of `selection` is not in the
    set, if its split lacks a part, or if two parts hold a patient and `selection` does not allow it.
    """
    parts = divide(table, selection.split, selection.fold)
    usable = table["row"].isin(held).to_numpy(copy=True)
    if selection.unlabelled == "drop":
        usable &= table[list(selection.labels)].notna().any(axis=1).to_numpy()
    if selection.subset is not None:
        if unknown := np.setdiff1d(selection.subset, table["row"]).tolist():
            raise RunError(
                f"--rows names row {unknown[0]}, which the set does not have: its rows are 0 to {table['row'].max():,}"
            )
        usable &= table["row"].isin(selection.subset).to_numpy()
    if selection.views:
        check_views(table["view"], selection.views)
        usable &= table["view"].isin(list(selection.views)).to_numpy()
    masks = {part: mask & usable for part, mask in parts.items()}
    if selection.limit is not None:
        masks = {part: mask & (np.cumsum(mask) <= selection.limit) for part, mask in masks.items()}
    if not selection.allow_shared_patients:
        refuse_shared_patients(table.assign(part=named(masks)), selection.split)
    return masks


def named(masks: Mapping[str, np.ndarray]) -> np.ndarray:
    """Name of each row's part, text (images,); "" where it is in none."""
    return np.select(list(masks.values()), list(masks), default="")


def check_views(column: pd.Series, views: Sequence[str]) -> None:
    """Raises RunError naming a view that no row has, and the views there are."""
    there = column.dropna().value_counts()
    if absent := [view for view in views if view not in there]:
        known = (
            ", ".join(f"{shown(str(view))} ({count:,})" for view, count in there.head(20).items()) or "none are known"
        )
        raise RunError(
            f"--view {shown(absent[0])}: no image of the set has this view position; those there are: {known}"
        )


def refuse_shared_patients(table: pd.DataFrame, split: str) -> None:
    """Raises RunError if a patient of `table` is in two of train, val and test (column part); names rows, no patients."""
    if found := shared_patients(table["patient_id"].tolist(), table["part"].tolist()):
        row = table["row"].tolist()
        raise RunError(
            f"--split {split}: {found.in_words(lambda at: f'row {row[at]}')}: the model would be tested on patients that it "
            "was trained on; use --split folds of a set that deals its own, or continue with --allow-shared-patients"
        )


def make_part(
    name: str,
    table: pd.DataFrame,
    held: np.ndarray,
    selection: Selection,
    policy: str | Mapping[str, str] = "u_zeros",
    blank: str | Mapping[str, str] = "negative",
) -> LabelledRows:
    """Rows and labels of one part. Raises RunError like `masks_of_parts`, for an unknown policy, and if the part is empty."""
    if name not in PARTS:
        raise RunError(f"part {shown(str(name))} is unknown: use one of {', '.join(PARTS)}")
    labels = list(selection.labels)
    if not labels:
        raise RunError(
            "the set has no labels, so no row is in a part: add labels with `cxrfast relabel`, or load all its images with "
            "EvalOrder(rows=reader.rows, …)"
        )
    blanks = per_label(blank, labels, "negative")
    check_unlabelled(selection.unlabelled, blanks)
    masks = masks_of_parts(table, held, selection)
    rows = np.flatnonzero(masks[name])
    if not len(rows):
        if selection.split == "official":
            check_official(official_masks(table["split"].to_numpy()))
        raise RunError(
            f"{selection}: the {name} part has no rows among the {len(held):,} of {len(table):,} that are built"
        )
    raw = table[labels].to_numpy(np.float32)[rows]
    target, counts = targets(raw, per_label(policy, labels, "u_zeros"), blanks, selection.unlabelled)
    known = np.full((len(table), len(labels)), np.nan, np.float32)
    known[rows] = np.where(counts, target, np.nan)
    return LabelledRows(name=name, rows=rows, labels=known)


def per_label(given: str | Mapping[str, str], labels: Sequence[str], default: str) -> list[str]:
    """One policy per label from one for all, or from those of some labels. Raises RunError for a label that is not there."""
    if isinstance(given, str):
        return [given] * len(labels)
    if absent := [label for label in given if label not in labels]:
        raise RunError(f"the set has no label {shown(str(absent[0]))}: its labels are {', '.join(map(shown, labels))}")
    return [given.get(label, default) for label in labels]
