"""Replace the labels of a shard set with the labels in a table keyed by image, study or path.

Rewrites rows.parquet, set.json and their lines in SHA256SUMS. Never touches tars, manifests, folds, reference or kept
columns, or the set id.
"""

import os
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd

from cxrfast.errors import ShardError
from cxrfast.files import sha256, write_bytes
from cxrfast.progress import progress
from cxrfast.shards.format.checksums import check_undamaged, listed_sums, sums_bytes
from cxrfast.shards.format.info import SetInfo, read_set
from cxrfast.shards.format.lock import Lock
from cxrfast.shards.format.names import SET_FILES, is_temporary
from cxrfast.shards.format.rows import COLUMNS, kept_names, label_names, read_rows, reference_names, write_rows
from cxrfast.shards.sources.ids import check_join
from cxrfast.shards.upkeep.id_matching import ID_COLUMNS, best_column, check_patients, match_ids, shared_tail
from cxrfast.shards.upkeep.label_table import LabelTable, read_label_table
from cxrfast.tables import csv_text

SHOWN = 20
"""Unmatched ids that a summary lists."""


@dataclass(frozen=True, kw_only=True)
class Relabelled:
    """Result of a relabelling."""

    info: SetInfo
    """Description with the new labels."""
    before: tuple[str, ...]
    """The former labels."""
    table: str
    key: str
    """Column of the table that was matched with images."""
    by: str
    """What it holds: image_id, study_id or path."""
    tail: int
    """For paths: number of trailing parts that were compared."""
    matched: int
    """Images found in the table; the others are blank now."""
    labelled: int
    """Images with at least one label."""
    unmatched: pd.DataFrame
    """One line per id of only one side, sorted: the column `by`, only_in (set or table), images of the set."""
    left: list[str]
    """Columns of the table that might be labels and were not taken."""
    notes: tuple[str, ...] = ()
    """Sentences about how the table was read."""

    def summary(self, folder: Path) -> str:
        """The result as text."""
        info = self.info
        how = f"{self.key} (by the last {self.tail} parts of each path)" if self.by == "path" else self.key
        gone = [name for name in self.before if name not in info.labels]
        lines = [
            f"{self.matched:,} of {info.images:,} images found in {self.table} by {how}, "
            f"{self.labelled:,} have a label",
            f"labels: {', '.join(info.labels)}" + (f" (removed: {', '.join(gone)})" if gone else ""),
        ]
        if self.left:
            lines.append(f"not used: {', '.join(self.left)} (name them with --label)")
        lines += self.notes
        lines += self._ids_alone("set", "only in the set, now blank")
        lines += self._ids_alone("table", "only in the table")
        lines.append(f"set {info.id} in {folder}: relabelled; existing runs keep the labels they were trained on")
        if 2 * (blank := info.images - self.labelled) > info.images:
            lines.append(
                f"warning: {blank:,} of {info.images:,} images have no label now and are left out of training: "
                "is this the table of these images?"
            )
        return "\n".join(lines)

    def _ids_alone(self, side: str, where: str) -> list[str]:
        """A line that lists the first ids found only in `side`; no line if there are none."""
        ids = self.unmatched.loc[self.unmatched["only_in"] == side, self.by].tolist()
        if not ids:
            return []
        one, many = ("study", "studies") if self.by == "study_id" else ("image", "images")
        more = f" and {len(ids) - SHOWN:,} more (--unmatched FILE lists all)" if len(ids) > SHOWN else ""
        return [f"{where}: {len(ids):,} {many if len(ids) > 1 else one}: {', '.join(ids[:SHOWN])}{more}"]


def relabel(
    folder: Path,
    table: str | Path,
    *,
    labels: list[str] | None = None,
    key: str | None = None,
    unmatched: Path | None = None,
    allow_unmatched: bool = False,
) -> Relabelled:
    """Replace all labels of the set with the ones in `table`, a path or fsspec URL of a .csv, .tsv (.gz) or .parquet.

    `labels`: columns to take; default: the set's labels and MIMIC's fourteen, or without any of these all columns except
    ids and bookkeeping. `key`: the column of image ids, study ids or paths; default: by its name. `unmatched`: a CSV file
    for ids of only one side. Images not in the table become blank. Raises ShardError, with nothing written, for a table of
    other images, one that shares less than 99 % of the ids of either side or gives images to other patients of the set unless
    `allow_unmatched`, or one with values other than 1, 0, -1 and blank. The same call finishes a run that was killed.
    """
    folder = Path(folder)
    info = read_set(folder)
    if unmatched is not None:
        unmatched = Path(unmatched)
        _check_target(unmatched, folder)
    read = read_label_table(str(table), labels, key, info.labels)
    with Lock(folder), progress("relabelling", info.images) as advance:
        result = _replace_labels(folder, read, unmatched, allow_unmatched)
        advance(info.images)
    return result


def _check_target(unmatched: Path, folder: Path) -> None:
    """Raises ShardError if the file cannot or must not be written."""
    if unmatched.resolve().is_relative_to(folder.resolve()):
        raise ShardError(f"--unmatched {unmatched} is inside the set {folder}: choose a file outside it")
    if unmatched.is_dir():
        raise ShardError(f"--unmatched {unmatched} is a folder: name a file")
    if not os.access(unmatched.parent, os.W_OK | os.X_OK):
        raise ShardError(f"--unmatched {unmatched}: there is no writable folder {unmatched.parent}")


def _replace_labels(folder: Path, table: LabelTable, unmatched: Path | None, allow_unmatched: bool) -> Relabelled:
    check_undamaged(folder)  # else damage would be signed
    info = read_set(folder)
    rows = read_rows(folder / "rows.parquet", info)
    rows = rows.astype(dict.fromkeys(ID_COLUMNS, object))  # pandas looks Arrow's text up ten times more slowly
    by = table.by or best_column(table.ids, rows)
    known = rows[by]
    tail = shared_tail(table.ids, known)
    ids = match_ids(table.ids, known, tail, f"{table.key} of {table.location}")
    if not ids.isin(known).any():
        raise ShardError(
            f"no {table.key} of {table.location} is in {folder} (the table has ids like {ids.iloc[0]!r}, the set has "
            f"{by}s like {known.iloc[0]!r}): give the table of these images, or another --key; nothing was changed"
        )
    if table.patients is not None and not allow_unmatched:
        check_patients(table.patients, ids, rows, by, table.location)
    alone = _ids_of_one_side(ids, known)
    if unmatched is not None:
        write_bytes(unmatched, csv_text(alone).encode())
    what = "studies" if by == "study_id" else "images"
    names = {"images": str(folder), "table": table.location, "what": what}
    check_join(
        known, ids, allowed=allow_unmatched, advice=" (--unmatched FILE lists them); nothing was changed", **names
    )
    values = table.values.set_axis(pd.Index(ids)).reindex(known).set_axis(rows.index)
    before, info = label_names(rows), replace(info, labels=table.values.columns.tolist(), labels_from=table.source)
    carried = [*reference_names(rows), *kept_names(rows)]
    write_labels(folder, info, pd.concat([rows[list(COLUMNS)], values, rows[carried]], axis=1))
    return Relabelled(
        info=info,
        before=before,
        table=table.location,
        key=table.key,
        by=by,
        tail=tail,
        matched=int(known.isin(ids).sum()),
        labelled=int(values.notna().any(axis=1).sum()),
        unmatched=alone,
        left=table.left,
        notes=table.notes,
    )


def _ids_of_one_side(ids: pd.Series, known: pd.Series) -> pd.DataFrame:
    """Ids only in the table or only in the set; `images`: images of the set that are left without labels."""
    in_set = known[~known.isin(ids)].value_counts().sort_index()
    in_table = sorted(ids[~ids.isin(known)])
    return pd.DataFrame(
        {
            known.name: [*in_set.index, *in_table],
            "only_in": ["set"] * len(in_set) + ["table"] * len(in_table),
            "images": [*in_set.tolist(), *[0] * len(in_table)],
        }
    )


def write_labels(folder: Path, info: SetInfo, rows: pd.DataFrame) -> None:
    """Write set.json, then rows.parquet, and their hashes into SHA256SUMS.

    The rename of rows.parquet replaces labels and description together. If it is killed before or after that, `verify` finds
    the old hash of one of them and the same call writes the rest. Hashes of other files are kept, so damage stays visible. SHA256SUMS of an unfinished set
    stays as it is.
    """
    for stale in filter(is_temporary, list(folder.iterdir())):  # of a killed relabelling
        stale.unlink(missing_ok=True)
    info.write(folder)
    write_rows(folder / "rows.parquet", rows, info)
    sums = listed_sums(folder)
    if sums.keys() & set(SET_FILES):
        new = {name: sha256(folder / name) for name in ("rows.parquet", "set.json")}
        write_bytes(folder / "SHA256SUMS", sums_bytes({**sums, **new}))
