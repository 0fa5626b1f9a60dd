"""The source for any other dataset: a table with one line per image.

Options name its columns; the path and patient columns need no option if they have a usual name.
"""

import posixpath
import shlex
from collections.abc import Sequence

import pandas as pd

from cxrfast.errors import ShardError
from cxrfast.shards.sources.ids import normal_ids
from cxrfast.shards.sources.image_files import SUFFIX, as_in_tree, by_name
from cxrfast.shards.sources.kept import kept_columns, notes_on_commas
from cxrfast.shards.sources.parts import read_parts
from cxrfast.shards.sources.source import Source
from cxrfast.shards.sources.table_files import columns_of, read_table
from cxrfast.shards.sources.tables.text_columns import (
    filled,
    lines,
    looks_like_labels,
    notes_on_words,
    pixels,
    raw_labels,
)
from cxrfast.shards.storage import URL, Tree, relative
from cxrfast.text import masked

PATHS = (("path", "file", "filename"), ("filepath", "file_path", "file_name", "file name", "image_path", "image path"))
PATIENTS = (
    ("patient_id", "subject_id", "patient"),
    (
        "patientid",
        "patient id",
        "patientnr",
        "patient nr",
        "patient_nr",
        "patient_no",
        "subjectid",
        "subject id",
        "subject",
    ),
)
"""Usual names of the columns of paths and of patients, in lower case, the most usual first."""


def table(
    tree: Tree,
    *,
    table: str,
    label: Sequence[str] = (),
    keep: Sequence[str] = (),
    find_by_name: bool = False,
    path_column: str | None = None,
    patient_column: str | None = None,
    image_column: str | None = None,
    study_column: str | None = None,
    view_column: str | None = None,
    split_column: str | None = None,
    height_column: str | None = None,
    width_column: str | None = None,
) -> Source:
    """Any CSV, TSV (or .gz) or Parquet table with one line per image.

    `table`: path in the tree, absolute path or URL; `label`: the label columns; `keep`: columns to carry along. Without
    `image_column` an image's id is its path without suffix; without `study_column` each image is its own study.
    `split_column` holds train, validate and test, or folds, 0 to 4. `find_by_name`: look for files by their names alone.
    """
    labels, keep = ((given,) if isinstance(given, str) else tuple(given) for given in (label, keep))
    place, file, table = _place(tree, table)
    header = columns_of(place, file)
    path_column = path_column or _usual(header, "path", PATHS, table)
    patient_column = patient_column or _usual(header, "patient", PATIENTS, table)
    refuse_lists({"label": labels, "keep": keep}, header)
    ids = [c for c in (path_column, patient_column, image_column, study_column) if c]
    other = [c for c in (view_column, split_column, height_column, width_column) if c]
    used = list(dict.fromkeys((*ids, *other, *labels, *keep)))
    rows = _read(place, file, used, ids, header if not labels else [])
    path = filled(rows[path_column], table)
    path = by_name(tree, path, table) if find_by_name else as_in_tree(tree, _below(tree, path))
    if repeated := _repeated(path):
        raise ShardError(f"{table} lists {repeated}: keep one line per image, such as one with all its labels")
    image = normal_ids(rows[image_column], table) if image_column else path.str.replace(SUFFIX, "", regex=True)
    if repeated := _repeated(image):
        raise ShardError(f"{table} lists image {repeated}: name a column of unique ids with --image-column")
    parts = read_parts(rows[split_column], table) if split_column else {}
    frame = pd.DataFrame(
        {
            "image_id": image,
            "study_id": normal_ids(rows[study_column], table) if study_column else image,
            "patient_id": normal_ids(rows[patient_column], table),
            "path": path,
            **{name: raw_labels(rows[name], table) for name in labels},
            **(kept := kept_columns(rows, keep)),
            "view": rows[view_column] if view_column else None,
            "split": None,
            **parts,
            "height": pixels(rows[height_column], table) if height_column else None,
            "width": pixels(rows[width_column], table) if width_column else None,
        }
    )
    return Source(
        images=frame,
        labels=labels,
        counts=_without_part(frame, split_column) if "split" in parts else {},
        notes=(*notes_on_words(rows[list(dict.fromkeys(labels))]), *notes_on_commas(rows, kept)),
        kept=keep,
        label_like=_label_like(rows, header, used),
    )


def _place(tree: Tree, table: str) -> tuple[Tree, str, str]:
    """Where the table is: a tree, its name there, and its name in messages."""
    if not is_outside(table):
        return tree, table, table
    folder, _, file = table.rpartition("/")
    return Tree(folder or "/"), file, masked(table)


def _without_part(frame: pd.DataFrame, split_column: str | None) -> dict[str, int]:
    """Number of images that a split leaves out, under the words for it."""
    return {f"images in no part ({split_column} is blank)": int(frame["split"].isna().sum())}


def _label_like(rows: pd.DataFrame, header: Sequence[str], used: Sequence[str]) -> tuple[str, ...]:
    """Columns that nobody asked for and that look like labels."""
    return tuple(name for name in header if name in rows and name not in used and looks_like_labels(rows[name]))


def _read(place: Tree, file: str, used: list[str], ids: list[str], others: list[str]) -> pd.DataFrame:
    """The `used` columns of a table, and those of `others` that can be read."""
    more = [name for name in others if name not in used and others.count(name) == 1]
    try:
        return read_table(place, file, used, optional=more, ids=ids)
    except ShardError:  # perhaps for a column that nothing depends on
        return read_table(place, file, used, ids=ids)


def is_outside(table: str) -> bool:
    """Is this the location of a table that need not be in the source tree: an absolute path or a URL?"""
    return bool(URL.match(table)) or posixpath.isabs(table)


def _usual(header: list[str], what: str, names: tuple[tuple[str, ...], ...], table: str) -> str:
    """The only column with one of the usual names for `what`, in any case; later names count where no earlier one is there."""
    matches = ([c for c in header if c.lower() in group] for group in names)
    found = next(filter(None, matches), [])
    if len(found) != 1:
        raise ShardError(
            f"which column of {table} holds the {what} of an image? name it with --{what}-column "
            f"(its columns: {', '.join(header)})"
        )
    return found[0]


def refuse_lists(options: dict[str, Sequence[str]], header: list[str]) -> None:
    """Raises ShardError for `--label a,b` where the table has the columns a and b: a name may hold a comma, so none is split."""
    for option, names in options.items():
        for name in (name for name in names if "," in name and name not in header):
            parts = [part.strip() for part in name.split(",")]
            if all(part in header for part in parts):
                raise ShardError(
                    f"--{option} {name!r} is not a column: give each column of its own: "
                    + " ".join(f"--{option} {shlex.quote(part)}" for part in parts)
                )


def _repeated(column: pd.Series) -> str:
    """The first value that is in several lines, with these, and how many others are, in words; "" if none is."""
    if not (twice := column.duplicated(keep=False)).any():
        return ""
    first, others = column[twice].iloc[0], column[twice].nunique() - 1
    more = f", and {others:,} more in several lines" if others else ""
    return f"{first} in {lines(column.index[column == first])}{more}"


def _below(tree: Tree, column: pd.Series) -> pd.Series:
    """Make paths relative to the tree; they may be absolute, inside it."""

    def below(path: str, line: int) -> str:
        inside = next((path.removeprefix(root) for root in tree.roots if path.startswith(root)), path)
        try:
            return relative(inside)
        except ShardError:
            raise ShardError(f"line {line} names {path}, which is not in {tree}: give paths inside --data") from None

    return pd.Series(list(map(below, column, column.index)), column.index, dtype=object)
