"""Remarks on runs whose numbers a reader must not take at face value: unfinished ones, those trained on a part of their set,
and those whose set has other labels now.

In: run folders, and their shard sets where they can be reached. Writes nothing.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd

from cxrfast.errors import RunError, ShardError
from cxrfast.runs.run import Run
from cxrfast.shards.shard_set import ShardSet
from cxrfast.units import counted

PARTLY_BUILT = "trained on a partly built set (--allow-partial)"


def remarks_on(runs: Iterable[Run]) -> dict[Path, str]:
    """What to know about each run, by its folder; "" if there is nothing. Several remarks are joined by `; `.

    Reads the labels of each set once. Nothing is said about a set that is no longer where it was.
    """
    sets: dict[tuple[Path, str], LabelsNow | None] = {}
    found = {}
    for run in runs:
        where = run.shards, run.config.set_id
        if where not in sets:
            sets[where] = LabelsNow.of(run)
        known = sets[where]
        change = known.compare(run) if known else None
        state = unfinished(run)
        remarks = [f"unfinished, {state}"] if state else []
        remarks += [PARTLY_BUILT] if run.config.allow_partial else []
        remarks += [f"its set has other labels now, {change.brief()}"] if change else []
        if known and not change and not run.config.allow_partial and (unused := known.unused_rows(run)):
            remarks.append(f"its set has {counted(unused, 'row')} now that it did not have")
        found[run.folder] = "; ".join(remarks)
    return found


def unfinished(run: Run) -> str:
    """Where the training stands, as `preempted after 1 of 50 epochs`; "" if it is done."""
    try:
        state = run.state()
    except RunError:
        return f"{run.state_path.name} is damaged"
    name, epoch = state.get("state"), state.get("epoch")
    if name == "done":
        return ""
    if name not in ("running", "preempted", "failed"):
        return f"{run.state_path.name} does not say that it is done" if state else f"{run.state_path.name} is missing"
    most = given if type(given := state.get("epochs")) is int else run.config.epochs
    return f"{name} after {epoch:,} of {counted(most, 'epoch')}" if type(epoch) is int else name


@dataclass(frozen=True, kw_only=True)
class Relabelling:
    """How the labels of a set differ from those that a run was trained on."""

    labels: int
    """Labels of the run's rows that are different now."""
    rows: int
    """Rows that hold them."""
    example: str
    """One of them, as `Edema of row 5: 1 then, 0 now`."""
    gone: tuple[str, ...]
    """Labels of the run that the set no longer has."""
    new_rows: int
    """Rows outside the run that had no label then and have one now."""

    def brief(self) -> str:
        """`12 labels of 9 rows`, without commas."""
        told = [f"{counted(self.labels, 'label')} of {counted(self.rows, 'row')}"] if self.labels else []
        told += [f"{counted(self.new_rows, 'row')} labelled since"] if self.new_rows else []
        told += [f"{counted(len(self.gone), 'label')} removed"] if self.gone else []
        return " and ".join(told)

    def in_words(self) -> str:
        """What is different now, in full."""
        differ = "differs" if self.labels == 1 else "differ"
        told = []
        if self.labels:
            told.append(
                f"{counted(self.labels, 'label')} of {counted(self.rows, 'row')} {differ}, such as {self.example}"
            )
        if self.new_rows:
            told.append(
                f"{counted(self.new_rows, 'row')} without any label then {'has' if self.new_rows == 1 else 'have'} one now"
            )
        if self.gone:
            told.append(f"the set no longer has {', '.join(self.gone)}")
        return "; ".join(told)


class LabelsNow:
    """The labels that a shard set holds now, to compare runs with.

    `table`: its rows, if they are read already. Raises ShardError if they cannot be read.
    """

    def __init__(self, shard_set: ShardSet, table: pd.DataFrame | None = None) -> None:
        self.shard_set, self.labels = shard_set, list(shard_set.info.labels)
        self.table = shard_set.rows(["row", "view", *self.labels]) if table is None else table
        self.raw = _small(self.table[self.labels])

    @classmethod
    def of(cls, run: Run) -> "LabelsNow | None":
        """The labels of the set that a run was trained on; None if that set is not there any more, or cannot be read."""
        try:
            shard_set = ShardSet(run.shards)
            return cls(shard_set) if shard_set.info.id == run.config.set_id else None
        except (ShardError, OSError, ValueError):  # the path comes from the run's folder, and may be anything
            return None

    def compare(self, run: Run) -> Relabelling | None:
        """None if the run has the labels of now. Raises RunError if its rows cannot be read."""
        names = [label for label in run.config.labels if label in self.labels]
        row, then = self._rows(run, names)
        now = self.raw[row][:, [self.labels.index(name) for name in names]]
        differ = then != now
        gone = tuple(label for label in run.config.labels if label not in names)
        new_rows = self.unused_rows(run, row) if self.shard_set.info.labels_from else 0
        if not (differ.any() or gone or new_rows):
            return None
        example = ""
        if differ.any():
            at, j = np.argwhere(differ)[0]
            example = f"{names[j]} of row {row[at]}: {_value(then[at, j])} then, {_value(now[at, j])} now"
        return Relabelling(
            labels=int(differ.sum()),
            rows=int(differ.any(axis=1).sum()),
            example=example,
            gone=gone,
            new_rows=new_rows,
        )

    def unused_rows(self, run: Run, row: np.ndarray | None = None) -> int:
        """Number of rows that the run would use if it started now, and that are not among its rows (`row`, if known).

        0 where that cannot be told: for runs of some rows only, and where the set's build is not finished.
        """
        config = run.config
        if config.limit is not None or config.subset is not None or self._quarantined is None:
            return 0
        usable = np.ones(len(self.table), bool)
        if config.unlabelled == "drop":
            usable &= (self.raw != BLANK).any(axis=1)
        if config.views:
            usable &= self.table["view"].isin(config.views).to_numpy()
        usable[self._rows(run, [])[0] if row is None else row] = False
        usable[self._quarantined] = False
        return int(usable.sum())

    def _rows(self, run: Run, names: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Rows of the run, int64 (n,), and their raw labels as `_small`, (n, len(names)); without rows that no set has."""
        rows = run.rows(["row", *names])
        rows = rows[rows["row"].between(0, len(self.table) - 1)]
        return rows["row"].to_numpy(np.int64), _small(rows[names])

    @cached_property
    def _quarantined(self) -> np.ndarray | None:
        """int64: rows of the set in quarantine; None if that is not known, as while it is built."""
        try:
            rows = self.shard_set.quarantined()
        except ShardError:
            return None
        return rows[(rows >= 0) & (rows < len(self.table))]


def relabelling_note(run: Run, shard_set: ShardSet) -> str:
    """A warning about a run that goes on with labels that its set no longer has; "" if it has them, or cannot be read."""
    try:
        change = LabelsNow(shard_set).compare(run)
    except ShardError:
        return ""
    if change is None:
        return ""
    return (
        f"{run.name} keeps the labels that it was started with, and its set was relabelled since: {change.in_words()}; to use "
        "the new labels, train in another --runs folder"
    )


BLANK = 2
"""A blank label in `_small`."""


def _small(raw: pd.DataFrame) -> np.ndarray:
    """Raw labels as int8 (n, L): a quarter of the memory, and blanks are equal."""
    found = np.empty(raw.shape, np.int8)
    with np.errstate(invalid="ignore"):  # no set holds other values, but a run from elsewhere may
        for j, name in enumerate(raw):
            found[:, j] = np.nan_to_num(raw[name].to_numpy(np.float32), nan=BLANK)
    return found


def _value(raw: int) -> str:
    return "blank" if raw == BLANK else f"{raw}"
