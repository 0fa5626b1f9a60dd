"""Text columns of source tables → labels and sizes as numbers. Errors name the lines."""

import numpy as np
import pandas as pd

from cxrfast.errors import ShardError

BLANK = ("", "na", "nan", "n/a", "null", "none")
"""Text that means no value in a column of numbers, in any case; a column of text is blank only where it is empty."""


def is_blank(column: pd.Series) -> pd.Series:
    """Bool: where a text column is empty or holds only spaces."""
    return column.isna() | column.str.strip().eq("")


def filled(column: pd.Series, where: str) -> pd.Series:
    """Return the column. Raises ShardError that names the lines where it is blank."""
    if (empty := is_blank(column)).any():
        raise ShardError(f"{where}: {column.name} is blank in {lines(column.index[empty])}: give every image one")
    return column


def lines(index: pd.Index) -> str:
    """`line 7`, or `lines 7, 9, 12, 15, 16, … (40)`."""
    first = ", ".join(map(str, index[:5]))
    return (
        f"line {first}" if len(index) == 1 else f"lines {first}" + (f", … ({len(index):,})" if len(index) > 5 else "")
    )


def raw_labels(column: pd.Series, where: str) -> pd.Series:
    """Text → float32 1, 0, -1 or NaN; true and false are 1 and 0. Raises ShardError for anything else, with its line."""
    return _numbers(column, where, {"true": 1.0, "false": 0.0}, (1.0, 0.0, -1.0), "1, 0, -1 and blank").astype(
        np.float32
    )


def pixels(column: pd.Series, where: str) -> pd.Series:
    """Text → float64 height or width in px, NaN where blank. Raises ShardError for anything else, with its line."""
    return _numbers(column, where, {}, None, "whole numbers of pixels and blank")


def _numbers(
    column: pd.Series, where: str, words: dict[str, float], known: tuple[float, ...] | None, what: str
) -> pd.Series:
    """Parse each distinct text once: a column of a million lines costs one lookup each."""
    codes, texts = pd.factorize(column)
    values = np.full(len(texts) + 1, np.nan)  # the last is for code -1: blank
    for code, text in enumerate(texts):
        plain = text.strip().lower()
        try:
            number = np.nan if plain in BLANK else words[plain] if plain in words else float(plain)
        except ValueError:
            number = np.inf
        is_known = number in known if known else number >= 0 and number % 1 == 0 and number < 2**31
        if not (is_known or np.isnan(number)):
            at = lines(column.index[codes == code])
            raise ShardError(f"{where} holds {text!r} for {column.name} in {at}: only {what} are known")
        values[code] = number
    return pd.Series(values[codes], column.index, name=column.name)
