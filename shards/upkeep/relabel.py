"""Other labels for the images of a shard set, from a table keyed by image, study or path.

In: a set's rows.parquet and set.json, and a CSV, TSV or Parquet table. Out: the same two files and SHA256SUMS with the
table's labels in place of all former ones. Never touched: tars, manifests, folds, reference columns and the set id.
"""

import hashlib
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd

from cxrfast.errors import ShardError
from cxrfast.files import sha256, sync_folder, write_bytes
from cxrfast.labels import EARLIER, MIMIC
from cxrfast.progress import progress
from cxrfast.shards.format.checksums import read_sums, sums_bytes
from cxrfast.shards.format.info import SetInfo, read_set
from cxrfast.shards.format.lock import Lock
from cxrfast.shards.format.names import RELABELLING, is_temporary
from cxrfast.shards.format.rows import COLUMNS, REFERENCE, label_names, read_rows, reference_names, write_rows
from cxrfast.shards.sources.tables import columns_of, filled, raw_labels, read_table
from cxrfast.shards.storage import Tree
from cxrfast.shards.upkeep.match import BY, alike, match_ids, shared_tail

KEYS = {**dict.fromkeys(("imageid", "dicomid", "imageindex"), "image_id"), "studyid": "study_id", "path": "path"}
"""Column of the set by the plain name (see `_plain`) of the table's column that holds its ids."""

NO_LABELS = {
    *("subjectid", "patientid", "sex", "patientsex", "patientgender", "age", "patientage", "followup"),
    *("split", "view", "viewposition", "frontallateral", "appa", "studydate", "studytime"),
    *("row", "rows", "columns", "bytes", "height", "width", "fold", "block", "index", "indexlevel0"),
}
"""Plain names of columns that tables of this field hold beside their ids and labels."""


@dataclass(frozen=True, kw_only=True)
class Relabelled:
    """What became of the labels of a set."""

    info: SetInfo
    """As it is now."""
    before: tuple[str, ...]
    """The labels that went."""
    table: str
    key: str
    """The table's column by which lines and images were matched."""
    by: str
    """What it holds: image_id, study_id or path."""
    tail: int
    """If it holds paths: how many parts at their ends were compared."""
    matched: int
    """Images with a line in the table; the others are blank now."""
    labelled: int
    """Images with at least one label that is not blank."""
    unmatched: pd.DataFrame
    """A line an id that only one side knows, sorted: what `by` says, only_in (set or table), images of the set."""
    left: list[str]
    """Columns of the table that may be labels, too, and were not taken."""


def relabel(
    folder: Path,
    table: str | Path,
    *,
    labels: list[str] | None = None,
    key: str | None = None,
    unmatched: Path | None = None,
    quiet: bool = False,
) -> Relabelled:
    """Replace all labels of the set by those of `table`: a local path or an fsspec URL of a .csv, .tsv (.gz) or .parquet.

    `labels`: columns to take; default: those of the set's labels and of MIMIC's fourteen, or if there are none all but
    those of ids and bookkeeping. `key`: the column of image ids, study ids or paths; default: by its name. `unmatched`: a CSV file for the ids that only one side knows. Images that the table does not
    list become blank. Raises ShardError, with nothing written, for a table that is not of this set or holds other
    values than 1, 0, -1 and blank. A run killed at any instant is finished by the same call.
    """
    folder = Path(folder)
    info = read_set(folder)
    if unmatched is not None:
        _check_target(Path(unmatched), folder)
    found = read_labels(str(table), labels, key, info.labels)
    with Lock(folder), progress("relabelling", info.images, quiet=quiet) as advance:
        result = _replace_labels(folder, found, unmatched)
        advance(info.images)
    return result


def _check_target(unmatched: Path, folder: Path) -> None:
    """Raises ShardError for a file that must not or cannot be written."""
    if unmatched.resolve().is_relative_to(folder.resolve()):
        raise ShardError(f"--unmatched {unmatched} lies in the set {folder}: choose a file outside of it")
    if unmatched.is_dir():
        raise ShardError(f"--unmatched {unmatched} is a folder: name a file")
    if not os.access(unmatched.parent, os.W_OK | os.X_OK):
        raise ShardError(f"--unmatched {unmatched}: there is no folder {unmatched.parent} that can be written into")


def _replace_labels(folder: Path, found: "Labels", unmatched: Path | None) -> Relabelled:
    _check_undamaged(folder)
    info, rows = read_set(folder), read_rows(folder / "rows.parquet", relabelling=True)
    rows = rows.astype(dict.fromkeys(BY, object))  # pandas looks Arrow's text up ten times more slowly
    by = found.by or most_known(found, rows)
    known, tail = rows[by], tail_by(found, rows, by)
    ids = match_ids(found.ids, known, tail, f"{found.key} of {found.table}")
    if not ids.isin(known).any():
        raise ShardError(
            f"no {found.key} of {found.table} is in {folder} (the table's are like {ids.iloc[0]!r}, the {by}s of the set "
            f"like {known.iloc[0]!r}): give the table of these images, or another --key; nothing was changed"
        )
    strangers = _strangers(ids, known)
    if unmatched is not None:
        write_bytes(Path(unmatched), strangers.to_csv(index=False, lineterminator="\n").encode())
    values = found.values.set_axis(pd.Index(ids)).reindex(known).set_axis(rows.index)
    before, info = label_names(rows), replace(info, labels=found.values.columns.tolist(), labels_from=found.source)
    write_labels(folder, info, pd.concat([rows[list(COLUMNS)], values, rows[list(reference_names(rows))]], axis=1))
    return Relabelled(
        info=info,
        before=before,
        table=found.table,
        key=found.key,
        by=by,
        tail=tail,
        matched=int(known.isin(ids).sum()),
        labelled=int(values.notna().any(axis=1).sum()),
        unmatched=strangers,
        left=found.left,
    )


def tail_by(found: "Labels", rows: pd.DataFrame, by: str) -> int:
    """`match.shared_tail` if the set's column `by` is that of paths, else 0."""
    return shared_tail(found.ids, rows[by]) if by == "path" else 0


def most_known(found: "Labels", rows: pd.DataFrame) -> str:
    """Of `match.BY`, the column of the set that holds most of the table's ids."""

    def count(by: str) -> int:
        return int(alike(found.ids, rows[by], tail_by(found, rows, by), found.table).isin(rows[by]).sum())

    return max(BY, key=count)


# The table


@dataclass(frozen=True, kw_only=True)
class Labels:
    """What a table says."""

    table: str
    source: str
    """Its file name and the sha256 of its bytes, as set.json names it."""
    key: str
    """Its column of ids."""
    by: str | None
    """The column of the set that `key` is by its name, one of `match.BY`; None where the name does not tell."""
    ids: pd.Series
    """Text, as the table writes them."""
    values: pd.DataFrame
    """float32, a column a label: 1, 0, -1 or NaN; lines as in `ids`."""
    left: list[str]
    """Columns that may be labels, too, and were not taken."""


class Fetched(Tree):
    """A tree that reads each file once: a table's columns are looked at, then some of them are read, then it is hashed."""

    def __init__(self, location: str) -> None:
        super().__init__(location)
        self._bytes: dict[str, bytes] = {}

    def read(self, path: str) -> bytes:
        if path not in self._bytes:
            self._bytes[path] = super().read(path)
        return self._bytes[path]


def read_labels(table: str, asked: list[str] | None, key: str | None, present: list[str]) -> Labels:
    """Ids and labels of a table; `present`: the set's labels. Raises ShardError for whatever is wrong with it."""
    head, chain, rest = table.partition("::")  # zip://labels.csv::archive.zip
    folder, slash, name = head.rpartition("/")
    tree = Fetched(folder + slash + chain + rest or ".")
    columns = columns_of(tree, name)
    key, by = find_key(columns, table, key)
    labels, left = find_labels(columns, table, key, asked, present)
    lines = read_table(tree, name, [key, *labels.values()])
    if lines.empty:
        raise ShardError(f"{table} holds no lines: give a table of ids and labels")
    try:
        values = pd.DataFrame({label: raw_labels(lines[column], table) for label, column in labels.items()})
    except ShardError as error:
        raise ShardError(f"{error}; choose the columns that are labels with --label, once for each") from None
    source = f"{name} sha256:{hashlib.sha256(tree.read(name)).hexdigest()}"
    ids = filled(lines[key], table)
    return Labels(table=table, source=source, key=key, by=by, ids=ids, values=values, left=left)


def _plain(name: str) -> str:
    """`Image Index` → `imageindex`."""
    return re.sub("[^a-z0-9]", "", name.lower())


def find_key(columns: list[str], table: str, key: str | None) -> tuple[str, str | None]:
    """The table's column of ids, and the set's column that it holds by its name. Raises ShardError where it is not clear."""
    known = [name for name in columns if _plain(name) in KEYS]
    if key is None:
        known = [name for name in known if KEYS[_plain(name)] != "path"] or known  # tables of ids may tell paths, too
        if len(known) != 1:
            what = f"has the id columns {', '.join(known)}" if known else f"has no id column ({', '.join(columns)})"
            raise ShardError(f"{table} {what}: name that of image ids, study ids or paths with --key COLUMN")
        key = known[0]
    if key not in columns:
        raise ShardError(f"{table} has no column {key!r} (--key): its columns are {', '.join(columns)}")
    return key, KEYS.get(_plain(key))


def find_labels(
    columns: list[str], table: str, key: str, asked: list[str] | None, present: list[str]
) -> tuple[dict[str, str], list[str]]:
    """{label: its column}, in MIMIC's order if they are its fourteen, else in the table's; and the columns left.

    Raises ShardError for one that is absent, or that a rows table cannot hold as a label.
    """
    labels = {_label_of(name, columns): name for name in columns}
    if absent := [name for name in asked or () if name not in columns and name not in labels]:
        raise ShardError(f"{table} has no column {absent[0]!r} (--label): its columns are {', '.join(columns)}")
    if asked:
        taken = {label: name for label, name in labels.items() if label in asked or name in asked}
        likely = taken
    else:
        likely = {label: name for label, name in labels.items() if name != key and not _is_bookkeeping(name)}
        taken = {label: name for label, name in likely.items() if label in MIMIC or label in present} or likely
    if not taken:
        raise ShardError(f"{table} has no label columns ({', '.join(columns)}): name them with --label COLUMN")
    for label, name in taken.items():
        if label in COLUMNS or name == key or label.startswith(REFERENCE):
            raise ShardError(
                f"{name!r} of {table} cannot be a label, the name means something else in a set: rename it"
            )
    if set(taken) == set(MIMIC):
        taken = {label: taken[label] for label in MIMIC}
    return taken, [name for label, name in likely.items() if label not in taken]


def _label_of(name: str, columns: list[str]) -> str:
    """A column's name, or the present one of a finding that was renamed."""
    now = EARLIER.get(name, name)
    return name if now in columns else now


def _is_bookkeeping(name: str) -> bool:
    plain = _plain(name)
    return not name.strip() or plain in NO_LABELS or plain in KEYS or plain.startswith("unnamed")


def _strangers(ids: pd.Series, known: pd.Series) -> pd.DataFrame:
    """Ids that only one side knows; `images` says how many images of the set go without labels for it."""
    lost = known[~known.isin(ids)].value_counts().sort_index()
    alone = sorted(ids[~ids.isin(known)])
    return pd.DataFrame(
        {
            known.name: [*lost.index, *alone],
            "only_in": ["set"] * len(lost) + ["table"] * len(alone),
            "images": [*lost.tolist(), *[0] * len(alone)],
        }
    )


# The set


def _check_undamaged(folder: Path) -> None:
    """Raises ShardError if the files to be replaced are not those that were signed: damage would be signed anew."""
    if (folder / "SHA256SUMS").exists():
        sums = read_sums(folder)
        for name in ("rows.parquet", "set.json"):
            if name in sums and (folder / name).is_file() and sha256(folder / name) != sums[name]:
                raise ShardError(f"{folder / name} is not as it was written: `cxrfast verify` lists what is damaged")


def write_labels(folder: Path, info: SetInfo, rows: pd.DataFrame) -> None:
    """Write rows.parquet and set.json, and their hashes into SHA256SUMS, so that no reader takes one for the other's.

    SHA256SUMS is renamed to `RELABELLING` first and back last. While a file of that name is there `read_rows` and
    `verify` refuse the set, whatever else is written; only a relabelling reads on, and one that was killed is finished by
    the same call. The other files' hashes are kept, not taken anew: damage stays visible. A set that no build has
    finished has no SHA256SUMS before or after.
    """
    sums, underway = folder / "SHA256SUMS", folder / RELABELLING
    for stale in filter(is_temporary, list(folder.iterdir())):  # of a killed relabelling
        stale.unlink(missing_ok=True)
    if sums.exists():
        os.replace(sums, underway)
    elif not underway.exists():
        write_bytes(underway, b"")
    sync_folder(folder)
    write_rows(folder / "rows.parquet", rows, info)
    info.write(folder)
    if underway.stat().st_size:
        known = read_sums(folder, RELABELLING)
        known |= {name: sha256(folder / name) for name in ("rows.parquet", "set.json")}
        write_bytes(underway, sums_bytes(known))
        os.replace(underway, sums)
    else:
        underway.unlink()
    sync_folder(folder)


def describe(result: Relabelled, folder: Path, shown: int = 20) -> str:
    """What a person wants to know after a relabelling."""
    info = result.info
    one, many = ("study", "studies") if result.by == "study_id" else ("image", "images")
    how = f"{result.key} (by the last {result.tail} parts of each path)" if result.by == "path" else result.key
    gone = [name for name in result.before if name not in info.labels]
    lines = [
        f"{result.matched:,} of {info.images:,} images found in {result.table} by {how}, "
        f"{result.labelled:,} have a label",
        f"labels: {', '.join(info.labels)}" + (f" (gone: {', '.join(gone)})" if gone else ""),
    ]
    if result.left:
        lines.append(f"not taken: {', '.join(result.left)} (name them with --label)")
    for side, where in (("set", "in the set alone, blank now"), ("table", "in the table alone")):
        ids = result.unmatched.loc[result.unmatched["only_in"] == side, result.by].tolist()
        if ids:
            more = f" and {len(ids) - shown:,} more (--unmatched FILE lists all)" if len(ids) > shown else ""
            lines.append(f"{where}: {len(ids):,} {many if len(ids) > 1 else one}: {', '.join(ids[:shown])}{more}")
    lines.append(f"set {info.id} in {folder}: relabelled; runs keep the labels that they were trained on")
    if 2 * (blank := info.images - result.labelled) > info.images:
        lines.append(
            f"warning: {blank:,} of {info.images:,} images have no label now and are left out of training: "
            "is this the table of these images?"
        )
    return "\n".join(lines)
