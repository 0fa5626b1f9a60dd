"""Columns that `--keep` carries along, such as age, sex or scanner: text stays text, numbers become float64.

They are for subgroup tables. They are never labels, and the set id does not depend on them.
"""

import re
from collections.abc import Collection, Iterable, Sequence

import numpy as np
import pandas as pd

from cxrfast.errors import ShardError
from cxrfast.shards.sources.tables.text_columns import BLANK, lines
from cxrfast.text import find_fault, label_fault, name_fault, trimmed

NUMBER = re.compile(r"[+-]?(?:0|[1-9]\d{0,14})(?:[.,]\d{1,15})?")
"""A number as people write it. `007` and numbers of more than 15 digits are text: a float64 would change them."""

THOUSANDS = re.compile(r"[+-]?[1-9]\d{0,2}(?:,\d{3})+")
"""`1,234`, which may be 1.234 or 1234."""

WHOLE = 2**53
"""Largest whole number that a float64 and all smaller ones hold exactly."""


def kept_columns(table: pd.DataFrame, keep: Sequence[str]) -> dict[str, pd.Series]:
    """The text columns `keep` of a table, typed: {name: float64, or text, null where blank}.

    A column is one of numbers if all its values are, apart from words for a missing value; a decimal comma counts as a point
    unless it may separate thousands. All others stay text.
    """
    return {name: _typed(table[name]) for name in dict.fromkeys(keep)}


def _typed(column: pd.Series) -> pd.Series:
    codes, texts = pd.factorize(column)
    plain = [trimmed(text) for text in texts]
    filled = [text for text in plain if text.lower() not in BLANK]
    if not filled or not _are_numbers(filled):
        return pd.Series(np.array([*(text or None for text in plain), None], object)[codes], column.index, dtype=object)
    values = [np.nan if text.lower() in BLANK else float(text.replace(",", ".")) for text in plain]
    return pd.Series(np.array([*values, np.nan])[codes], column.index)


def _are_numbers(texts: Sequence[str]) -> bool:
    if not all(map(NUMBER.fullmatch, texts)):
        return False
    commas = [text for text in texts if "," in text]
    return not commas or not (any("." in text for text in texts) or all(map(THOUSANDS.fullmatch, commas)))


def check_kept(keep: Collection[str], labels: Collection[str], known: Collection[str], where: str) -> None:
    """Raises ShardError for a name of a kept column that is used for something else, or that no label may have.

    `known`: the columns that rows.parquet has for every image.
    """
    if wrong := [name for name in keep if not isinstance(name, str) or not name.strip()]:
        raise ShardError(f"{where} were listed with the kept column {wrong[0]!r}: name a column")
    if twice := [name for name in keep if list(keep).count(name) > 1]:
        raise ShardError(f"--keep {twice[0]} is given twice: give it once")
    if both := [name for name in keep if name in labels]:
        raise ShardError(f"--keep {both[0]}: this column is a label already; a column is one or the other")
    if taken := [name for name in keep if name in known]:
        raise ShardError(
            f"--keep {taken[0]}: rows.parquet has a column {taken[0]!r} of its own; rename the column in the table"
        )
    if fault := find_fault(keep, label_fault):
        raise ShardError(f"the kept column {fault}: rename it")


def checked_kept(images: pd.DataFrame, keep: Iterable[str], where: str) -> dict[str, pd.Series]:
    """The columns `keep` of a source's images as rows.parquet holds them: {name: float64, or text, null where blank}.

    Raises ShardError with the lines of values that are neither numbers nor text that a set may hold.
    """
    return {name: _checked(images[name], where) for name in keep}


def _checked(column: pd.Series, where: str) -> pd.Series:
    kind = pd.api.types.infer_dtype(column, skipna=True)
    if kind == "categorical":
        return _checked(column.astype(object), where)
    if kind == "empty" or column.isna().all():
        return pd.Series(None, column.index, dtype=object)
    if kind in ("integer", "floating", "mixed-integer-float", "decimal", "boolean"):
        return _finite(column.astype(object).where(column.notna(), np.nan).astype(np.float64), where)
    if kind != "string":
        raise ShardError(f"{where} were listed with {kind} for the kept column {column.name}: give numbers or text")
    text = column.astype(object)
    text = text.where(text.notna() & text.str.strip().ne(""), None)
    if fault := find_fault(text.dropna().unique(), name_fault):
        at = text.index[text.map(lambda value: isinstance(value, str) and name_fault(value) is not None)]
        raise ShardError(
            f"{where}: the kept column {column.name} holds text that cannot be kept in {lines(at)}: {fault}; correct it, or "
            "leave this column out"
        )
    return text


def _finite(values: pd.Series, where: str) -> pd.Series:
    bad = np.isinf(values) | ((values % 1 == 0) & (values.abs() > WHOLE))
    if bad.any():
        raise ShardError(
            f"{where} hold {values[bad].iloc[0]:g} for the kept column {values.name} in {lines(values.index[bad])}: numbers "
            "must be finite, and whole ones below 2**53; give others as text"
        )
    return values


def notes_on_commas(table: pd.DataFrame, kept: dict[str, pd.Series]) -> tuple[str, ...]:
    """A sentence if decimal commas were read as points, and one if commas may separate thousands; `table`: the text."""
    with_commas = [name for name in kept if table[name].str.contains(",", regex=False).eq(True).any()]
    numbers = [name for name in with_commas if kept[name].dtype == np.float64]
    doubtful = [name for name in with_commas if name not in numbers and kept[name].dropna().map(_is_number).all()]
    return (
        *((f"decimal commas read as points: {', '.join(numbers)}",) if numbers else ()),
        *(
            (f"kept as text, since commas there may be decimal or separate thousands: {', '.join(doubtful)}",)
            if doubtful
            else ()
        ),
    )


def _is_number(text: str) -> bool:
    return NUMBER.fullmatch(text) is not None or text.lower() in BLANK


def note_on_kept(kept: dict[str, pd.Series]) -> tuple[str, ...]:
    """A sentence on how kept columns were read; it names no value, which may identify a patient."""
    described = [
        f"{name} as {'numbers' if values.dtype == np.float64 else 'text'}"
        + (f" (blank for {blank:,} image{'s' * (blank > 1)})" if (blank := int(values.isna().sum())) else "")
        for name, values in kept.items()
    ]
    return (f"kept: {', '.join(described)}",) if described else ()
