"""Tables of labels: CSV, TSV or Parquet → ids as text and labels as numbers.

Column names, or the caller, say which column holds the ids and which are labels.
"""

import hashlib
import re
from dataclasses import dataclass

import pandas as pd

from cxrfast.errors import ShardError, did_you_mean
from cxrfast.labels import EARLIER, MIMIC
from cxrfast.shards.format.rows import KEPT, REFERENCE, RESERVED
from cxrfast.shards.sources.ids import normal_ids
from cxrfast.shards.sources.table_files import columns_of, read_table
from cxrfast.shards.sources.tables.text_columns import filled, notes_on_words, raw_labels
from cxrfast.shards.storage import Tree
from cxrfast.text import find_fault, label_fault, masked, without_credentials

KEYS = {
    **dict.fromkeys(("imageid", "dicomid", "imageindex"), "image_id"),
    "studyid": "study_id",
    **dict.fromkeys(("path", "file", "filename"), "path"),
}
"""The set's id column by the plain name (see `_plain`) of the table's."""

FILES = ("file", "filename")
"""Plain names of columns that hold paths or image ids, and count only where no other column of ids is there."""

PATIENTS = ("subjectid", "patientid", "patientnr")
"""Plain names of columns of patients."""

BOOKKEEPING = {
    *PATIENTS,
    *("sex", "patientsex", "patientgender", "age", "patientage", "followup"),
    *("split", "view", "viewposition", "frontallateral", "appa", "studydate", "studytime"),
    *("row", "rows", "columns", "bytes", "height", "width", "fold", "block", "index", "indexlevel0"),
}
"""Plain names of columns that are neither ids nor labels."""


@dataclass(frozen=True, kw_only=True)
class LabelTable:
    """Ids and labels read from a table."""

    location: str
    """Path or URL."""
    source: str
    """File name and sha256, as recorded in set.json."""
    key: str
    """Name of the id column."""
    by: str | None
    """The set's column with the same ids, judging by the name `key`; None if the name does not say."""
    ids: pd.Series
    """Text, as written in the table."""
    values: pd.DataFrame
    """float32, one column per label: 1, 0, -1 or NaN; same lines as `ids`."""
    left: list[str]
    """Columns that may be labels too but were not read."""
    patients: pd.Series | None = None
    """Text, as written in the table, same lines as `ids`; None unless one column is called as patients usually are."""
    notes: tuple[str, ...] = ()
    """Sentences to report, such as how words were read as labels."""


class CachedTree(Tree):
    """A tree that reads each file once: a table is opened for its header, for its columns and for its hash."""

    def __init__(self, location: str) -> None:
        super().__init__(location)
        self._bytes: dict[str, bytes] = {}

    def read(self, path: str) -> bytes:
        if path not in self._bytes:
            self._bytes[path] = super().read(path)
        return self._bytes[path]


def read_label_table(location: str, asked: list[str] | None, key: str | None, present: list[str]) -> LabelTable:
    """Read the column `key` and the label columns `asked`; if None, `find_key` and `choose_labels` decide.

    `present`: the set's labels. Raises ShardError for anything wrong with the table.
    """
    head, chain, rest = location.partition("::")  # zip://labels.csv::archive.zip
    location = masked(location)
    folder, slash, name = head.rpartition("/")
    tree = CachedTree(folder + slash + chain + rest or ".")
    columns = columns_of(tree, name)
    key, by = find_key(columns, location, key)
    labels, left = choose_labels(columns, location, key, asked, present)
    people = [c for c in columns if _plain(c) in PATIENTS and c != key and c not in labels.values()]
    lines = read_table(tree, name, [key, *labels.values()], optional=people if len(people) == 1 else ())
    if lines.empty:
        raise ShardError(f"{location} holds no lines: give a table of ids and labels")
    try:
        values = pd.DataFrame({label: raw_labels(lines[column], location) for label, column in labels.items()})
    except ShardError as error:
        raise ShardError(f"{error}; name each label column with --label") from None
    source = f"{without_credentials(name).partition('?')[0]} sha256:{hashlib.sha256(tree.read(name)).hexdigest()}"
    ids = filled(lines[key], location)
    if by != "path":
        normal_ids(
            ids, location
        )  # only to refuse what is not an id: sets of earlier versions hold ids as tables write them
    notes = notes_on_words(lines[list(labels.values())])
    patients = lines[people[0]] if len(people) == 1 else None
    return LabelTable(
        location=location,
        source=source,
        key=key,
        by=by,
        ids=ids,
        values=values,
        left=left,
        patients=patients,
        notes=notes,
    )


def _plain(name: str) -> str:
    """`Image Index` → `imageindex`."""
    return re.sub("[^a-z0-9]", "", name.lower())


def find_key(columns: list[str], table: str, key: str | None) -> tuple[str, str | None]:
    """The table's id column, and the set's column with the same ids if the name says. Raises ShardError if unclear."""
    known = [name for name in columns if _plain(name) in KEYS]
    if key is None:
        known = [name for name in known if KEYS[_plain(name)] != "path"] or known  # tables with ids may have paths too
        known = [name for name in known if _plain(name) not in FILES] or known
        if len(known) != 1:
            what = f"has the id columns {', '.join(known)}" if known else f"has no id column ({', '.join(columns)})"
            raise ShardError(f"{table} {what}: name the column of image ids, study ids or paths with --key COLUMN")
        key = known[0]
    if key not in columns:
        hint = did_you_mean([key], columns)
        raise ShardError(f"{table} has no column {key!r} (--key): {hint}its columns are {', '.join(columns)}")
    return key, None if _plain(key) in FILES else KEYS.get(_plain(key))


def choose_labels(
    columns: list[str], table: str, key: str, asked: list[str] | None, present: list[str]
) -> tuple[dict[str, str], list[str]]:
    """{label: its column} for the labels to read, and the columns that may be labels too but are not read.

    Labels are in MIMIC's order if they are its fourteen, else in the table's. Raises ShardError for a missing one, and for
    a name that rows.parquet uses for something else.
    """
    # a renamed finding is called by its present name, unless the table has a column of that name
    column_of = {name if (now := EARLIER.get(name, name)) in columns else now: name for name in columns}
    if asked:
        if unknown := [name for name in asked if name not in columns and name not in column_of]:
            hint = did_you_mean(unknown[:1], columns)
            raise ShardError(
                f"{table} has no column {unknown[0]!r} (--label): {hint}its columns are {', '.join(columns)}"
            )
        candidates = {label: name for label, name in column_of.items() if label in asked or name in asked}
        taken = candidates
    else:
        candidates = {label: n for label, n in column_of.items() if n != key and not _is_bookkeeping(n)}
        known = {label: name for label, name in candidates.items() if label in MIMIC or label in present}
        taken = known or candidates
    if not taken:
        raise ShardError(f"{table} has no label columns ({', '.join(columns)}): name them with --label COLUMN")
    for label, name in taken.items():
        if label in RESERVED or name == key or label.startswith((REFERENCE, KEPT)):
            raise ShardError(
                f"{name!r} of {table} cannot be a label: a set uses that name for something else, rename it"
            )
    if fault := find_fault(taken, label_fault):
        raise ShardError(f"{table}: the label {fault}: rename its column")
    left = [name for label, name in candidates.items() if label not in taken]
    return {label: taken[label] for label in (MIMIC if set(taken) == set(MIMIC) else taken)}, left


def _is_bookkeeping(name: str) -> bool:
    plain = _plain(name)
    return not name.strip() or plain in BOOKKEEPING or plain in KEYS or plain.startswith("unnamed")
