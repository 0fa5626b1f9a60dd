"""Check and complete what a source lists. Any row that passes can be written to rows.parquet."""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from cxrfast.errors import ShardError
from cxrfast.shards.format.rows import KEPT, REFERENCE, RESERVED, reference_names
from cxrfast.shards.sources.ids import check_distinct, normal_ids
from cxrfast.shards.sources.kept import check_kept, checked_kept, note_on_kept
from cxrfast.shards.sources.parts import SPLITS, checked_folds, shared_in_words
from cxrfast.shards.sources.tables.text_columns import lines
from cxrfast.shards.storage import Tree
from cxrfast.text import are_plain, find_fault, label_fault, name_fault, path_fault

IDS = ("image_id", "study_id", "patient_id", "path")

NOT_RELATIVE = r"^/|(?:^|/)\.{1,2}(?:/|$)|//|/$|^[A-Za-z][A-Za-z0-9+.-]*://"


@dataclass(frozen=True, kw_only=True)
class Source:
    """Images and labels that a source tree lists."""

    images: pd.DataFrame
    """One line per image: image_id, study_id, patient_id and path (relative to the tree, POSIX) as text; one float column
    per label with 1, 0, -1 or NaN; and, where known, view, height, width (px), split (train, validate, test), fold (0 to 4
    for every image; else the set deals its own) and reference labels, `radiologist/<label>`. Other columns are dropped. The
    index is the line of each image in its table, for messages."""
    labels: tuple[str, ...]
    """Columns of labels; () where nobody has labelled the images yet."""
    counts: dict[str, int]
    """Numbers to report about the tables, such as how many studies have no labels."""
    notes: tuple[str, ...] = ()
    """Sentences to report about the tables, such as how words were read as labels."""
    kept: tuple[str, ...] = ()
    """Further columns of `images` to carry along, numbers or text, such as age and sex; `rows.parquet` names them
    `kept/<column>`."""
    label_like: tuple[str, ...] = ()
    """Columns of the tables that look like labels, where no label was named."""
    shared: str = ""
    """Patients in two parts of the split, or in two folds, in words; `checked` finds them."""


def checked(source: Source, tree: Tree) -> Source:
    """Return the source with all columns, ordered and typed, and ids in their normal form (`sources.ids`).

    Raises ShardError for the first thing wrong; the frame's index gives the lines that it names.
    """
    where = f"the tables in {tree}"
    labels = _label_names(source, where)
    images = source.images
    check_kept(source.kept, labels, RESERVED, where)
    if absent := [c for c in (*IDS, *labels, *source.kept) if c not in images.columns]:
        raise ShardError(f"{where} were listed without the columns {', '.join(absent)}: the source must give them")
    if not len(images):
        raise ShardError(f"{where} list no images")
    columns = {name: _ids(images[name], where) for name in IDS}
    for name, what in (("image_id", "image"), ("path", "the file")):
        if (twice := columns[name].duplicated()).any():
            first = columns[name][twice].iloc[0]
            index = images.index[columns[name] == first]
            at = f", in {lines(index)}" if images.index[0] != 0 else ""  # an index that counts from 0 holds no lines
            raise ShardError(f"{where} list {what} {first} twice{at}: keep one line per image")
    for name in ("patient_id", "study_id"):
        check_distinct(columns[name], where)
    pairs = pd.DataFrame(columns)[["study_id", "patient_id"]].drop_duplicates()
    if (twice := pairs["study_id"].duplicated()).any():
        study = pairs["study_id"][twice].iloc[0]
        patients = pairs["patient_id"][pairs["study_id"] == study].iloc[:2]
        raise ShardError(
            f"{where} give study {study} to the patients {' and '.join(patients)}: a study belongs to one patient"
        )
    if (bad := columns["path"].str.contains(NOT_RELATIVE, regex=True)).any():
        raise ShardError(
            f"{where} list {columns['path'][bad].iloc[0]!r}: paths must be relative to the tree, without .."
        )
    nothing = pd.Series(None, images.index, dtype=object)
    columns["view"] = _text(images.get("view", nothing), where)
    if fault := find_fault(columns["view"].dropna().unique(), name_fault):
        raise ShardError(f"{where} hold the view {fault}: rename it")
    columns |= {side: _size(images.get(side, nothing), where) for side in ("height", "width")}
    columns["split"] = _text(images.get("split", nothing), where)
    if (bad := columns["split"].notna() & ~columns["split"].isin(SPLITS)).any():
        raise ShardError(f"{where} hold the split {columns['split'][bad].iloc[0]!r}: use {', '.join(SPLITS)} or null")
    if "fold" in images:
        columns["fold"] = checked_folds(images["fold"], where)
    columns |= {name: _values(images[name], where) for name in (*labels, *reference_names(images))}
    kept = checked_kept(images, source.kept, where)
    frame = pd.DataFrame(columns | {KEPT + name: values for name, values in kept.items()})
    return Source(
        images=frame.reset_index(drop=True),
        labels=labels,
        counts=dict(source.counts),
        notes=(*source.notes, *note_on_kept(kept)),
        kept=tuple(kept),
        label_like=tuple(source.label_like),
        shared=shared_in_words(frame),
    )


def _label_names(source: Source, where: str) -> tuple[str, ...]:
    labels = tuple(source.labels)
    if not all(isinstance(name, str) and name.strip() for name in labels):
        raise ShardError(f"{where} were listed with the labels {labels!r}: name their columns")
    if twice := [name for name in labels if labels.count(name) > 1]:
        raise ShardError(f"label {twice[0]!r} is named twice: name it once")
    if taken := [name for name in labels if name in RESERVED or name.startswith((REFERENCE, KEPT))]:
        raise ShardError(f"a label cannot be called {taken[0]!r}, as a column of rows.parquet is: rename it")
    if fault := find_fault((*labels, *reference_names(source.images)), label_fault):
        raise ShardError(f"the label {fault}: rename its column")
    return labels


def _ids(column: pd.Series, where: str) -> pd.Series:
    if (empty := _text(column, where).isna()).any():
        raise ShardError(f"{where} list {int(empty.sum()):,} images without {column.name}: give every image one")
    is_path = column.name == "path"
    found = column if is_path else normal_ids(column, where)
    names = found.tolist()
    if not are_plain(names) and (fault := find_fault(names, path_fault if is_path else name_fault)):
        raise ShardError(f"{where} list the {column.name} {fault}: rename it")
    return found


def _text(column: pd.Series, where: str) -> pd.Series:
    """Return the column with null for blanks. Raises ShardError unless it is text."""
    kind = pd.api.types.infer_dtype(column, skipna=True)
    if kind == "empty" or column.isna().all():
        return pd.Series(None, column.index, dtype=object)
    if kind != "string":
        raise ShardError(
            f"{where} were listed with {kind} for {column.name}: it must be text, exactly as it is written there"
        )
    text = column.astype(object)  # also that of pandas' own types of text, whose null cannot be compared
    return text.where(text.notna() & text.str.strip().ne(""), None)


def _size(column: pd.Series, where: str) -> pd.Series:
    """float64 px, NaN where unknown."""
    try:
        values = column.astype(np.float64)
    except (TypeError, ValueError) as error:
        raise ShardError(f"{where} hold a {column.name} that is not a number ({error})") from error
    if (bad := values.notna() & ~((values >= 0) & (values % 1 == 0) & (values < 2**31))).any():
        raise ShardError(f"{where} hold the {column.name} {values[bad].iloc[0]:g}: it must be whole pixels, or null")
    return values


def _values(column: pd.Series, where: str) -> pd.Series:
    """float32 1, 0, -1 or NaN."""
    known = column.isna() | column.isin((1.0, 0.0, -1.0))
    if not known.all():
        value = column[~known].iloc[0]
        shown = repr(value) if isinstance(value, str) else value
        raise ShardError(f"{where} hold {shown} for {column.name}: only 1, 0, -1 and blank are known")
    return column.astype(np.float32)
