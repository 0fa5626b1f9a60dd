"""The source for any other dataset: a table with one line per image.

Options name its columns; the path and patient columns need no option if they have a usual name.
"""

import posixpath
from collections.abc import Sequence

import pandas as pd

from cxrfast.errors import ShardError
from cxrfast.shards.sources.ids import normal_ids
from cxrfast.shards.sources.image_files import SUFFIX, as_in_tree
from cxrfast.shards.sources.parts import read_parts
from cxrfast.shards.sources.source import Source
from cxrfast.shards.sources.table_files import columns_of, read_table
from cxrfast.shards.sources.tables.text_columns import filled, lines, notes_on_words, pixels, raw_labels
from cxrfast.shards.storage import URL, Tree, relative
from cxrfast.text import masked


def table(
    tree: Tree,
    *,
    table: str,
    label: Sequence[str],
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

    `table`: path in the tree, absolute path or URL; `label`: the label columns. Without `image_column` an image's id is its
    path without suffix; without `study_column` each image is its own study. `split_column` holds train, validate and test, or
    folds, 0 to 4.
    """
    labels = (label,) if isinstance(label, str) else tuple(label)
    place, file = tree, table
    if is_outside(table):
        folder, _, file = table.rpartition("/")
        place, table = Tree(folder or "/"), masked(table)  # as messages name it
    header = columns_of(place, file)
    path_column = path_column or _usual(header, "path", ("path", "file", "filename"), table)
    patient_column = patient_column or _usual(header, "patient", ("patient_id", "subject_id", "patient"), table)
    ids = [c for c in (path_column, patient_column, image_column, study_column) if c]
    other = [c for c in (view_column, split_column, height_column, width_column) if c]
    rows = read_table(place, file, list(dict.fromkeys((*ids, *other, *labels))), ids=ids)
    path = as_in_tree(tree, _below(tree, filled(rows[path_column], table)))
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
            "view": rows[view_column] if view_column else None,
            "split": None,
            **parts,
            "height": pixels(rows[height_column], table) if height_column else None,
            "width": pixels(rows[width_column], table) if width_column else None,
        }
    )
    left_out = (
        {f"images in no part ({split_column} is blank)": int(parts["split"].isna().sum())} if "split" in parts else {}
    )
    return Source(images=frame, labels=labels, counts=left_out, notes=notes_on_words(rows[list(dict.fromkeys(labels))]))


def is_outside(table: str) -> bool:
    """Is this the location of a table that need not be in the source tree: an absolute path or a URL?"""
    return bool(URL.match(table)) or posixpath.isabs(table)


def _usual(header: list[str], what: str, names: tuple[str, ...], table: str) -> str:
    """The only column with one of the usual names for `what`, in any case."""
    found = [c for c in header if c.lower() in names]
    if len(found) != 1:
        raise ShardError(
            f"which column of {table} holds the {what} of an image? name it with --{what}-column "
            f"(its columns: {', '.join(header)})"
        )
    return found[0]


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
