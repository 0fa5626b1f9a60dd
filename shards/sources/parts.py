"""The part of each image, from a source's table: train, validate or test; or the source's own folds, 0 to 4."""

import re

import numpy as np
import pandas as pd

from cxrfast.errors import ShardError
from cxrfast.shards.sources.tables.text_columns import is_blank, lines
from cxrfast.splits import FOLDS, shared_patients

SPLITS = ("train", "validate", "test")

WORDS = {"train": "train", "training": "train", "test": "test", "testing": "test"}
WORDS |= dict.fromkeys(("valid", "val", "validate", "validation", "dev"), "validate")

FOLD = re.compile(r"(?:fold[ _-]?)?(\d+)(?:\.0)?", re.IGNORECASE)
"""A fold's number: `3`, `fold3`, `Fold_3`, or `3.0`, as programs write a column of numbers with blanks."""


def read_parts(column: pd.Series, where: str) -> dict[str, pd.Series]:
    """`split` from a text column of the usual words for the parts, null where blank; or `fold` if it holds numbers only.

    Raises ShardError for other words, with their lines, and for folds that are not 0 to 4 in every line.
    """
    blank = is_blank(column)
    text = column.str.strip().where(~blank)
    if blank.all():
        raise ShardError(f"{where}: {column.name} is blank in every line: name another column for the split, or none")
    number = text.map({value: int(found[1]) for value in text.dropna().unique() if (found := FOLD.fullmatch(value))})
    if number.notna().sum() == (~blank).sum():
        if blank.any():
            at = lines(column.index[blank])
            raise ShardError(f"{where}: {column.name} holds folds and is blank in {at}: give every image one")
        return {"fold": checked_folds(number, f"{where} ({column.name})")}
    known = text.str.lower().map(WORDS).astype(object)
    if (wrong := known.isna() & ~blank).any():
        at = lines(column.index[wrong])
        raise ShardError(
            f"{where} holds {column[wrong].iloc[0]!r} for {column.name} in {at}: use {', '.join(SPLITS)} or blank; or, in "
            f"every line, one of your own folds, 0 to {FOLDS - 1}"
        )
    return {"split": known}


def checked_folds(column: pd.Series, where: str) -> pd.Series:
    """int8 folds, 0 to 4. Raises ShardError unless every image has one and all five have images."""
    values = pd.to_numeric(column, errors="coerce")
    found = sorted(values.dropna().unique().tolist())
    if values.isna().any() or found != list(range(FOLDS)):
        shown = ", ".join(f"{value:g}" for value in found[:10]) + (", …" if len(found) > 10 else "")
        empty = f", and none for {int(values.isna().sum()):,} images" if values.isna().any() else ""
        raise ShardError(
            f"{where} holds the folds {shown or 'none'}{empty}: number them 0 to {FOLDS - 1}, each with images of its own "
            "patients, and give every image one"
        )
    return values.astype(np.int8)


def shared_in_words(images: pd.DataFrame) -> str:
    """The patients in two parts of a source's split, or in two of its folds, in words; "" if there are none.

    The index of `images` is the line of each in its table, unless it only counts from 0.
    """
    is_own = "fold" in images
    parts = [f"fold {fold}" for fold in images["fold"]] if is_own else images["split"].tolist()
    found = shared_patients(images["patient_id"].tolist(), parts)
    if found is None:
        return ""
    index, image, patient = images.index, images["image_id"].tolist(), images["patient_id"].tolist()
    has_lines = index[0] != 0
    return found.in_words(
        lambda at: (f"line {index[at]}" if has_lines else f"image {image[at]}") + f" (patient {patient[at]})"
    )
