"""Text columns of source tables → labels and sizes as numbers. Errors name the lines."""

import re
from collections.abc import Sequence

import numpy as np
import pandas as pd

from cxrfast.errors import ShardError

BLANK = ("", "na", "nan", "n/a", "null", "none")
"""Text that means no value in a column of numbers, in any case; a column of text is blank only where it is empty."""

WHOLE_COMMA = re.compile(r"^([+-]?\d+),0{1,2}$")
"""A whole number with a decimal comma, `1,0`. Three zeros may be those of a thousand."""

WORDS = (
    {"true": 1.0, "false": 0.0},
    {"yes": 1.0, "no": 0.0},
    {"y": 1.0, "n": 0.0},
    {"t": 1.0, "f": 0.0},
    {"positive": 1.0, "negative": 0.0},
    {"pos": 1.0, "neg": 0.0},
    {"present": 1.0, "absent": 0.0},
)
"""Words for labels, in any case. A column of labels may hold the words of one pair, and blanks."""


def is_blank(column: pd.Series) -> pd.Series:
    """Bool: where a text column is empty or holds only spaces."""
    return column.isna() | column.str.strip().eq("")


def filled(column: pd.Series, where: str) -> pd.Series:
    """Return the column. Raises ShardError that names the lines where it is blank."""
    if (empty := is_blank(column)).any():
        raise ShardError(f"{where}: {column.name} is blank in {lines(column.index[empty])}: give every image one")
    return column


def lines(index: pd.Index | Sequence[int]) -> str:
    """`line 7`, or `lines 7, 9, 12, 15, 16, … (40)`."""
    first = ", ".join(map(str, index[:5]))
    return (
        f"line {first}" if len(index) == 1 else f"lines {first}" + (f", … ({len(index):,})" if len(index) > 5 else "")
    )


def raw_labels(column: pd.Series, where: str) -> pd.Series:
    """Text → float32 1, 0, -1 or NaN. Raises ShardError for anything else, with its line.

    True and false are 1 and 0; so are the words of any pair in `WORDS`, if the column holds nothing else.
    """
    known = WORDS[0] | _pair_of(column)
    return _numbers(column, where, known, (1.0, 0.0, -1.0), "1, 0, -1 and blank").astype(np.float32)


def notes_on_words(columns: pd.DataFrame) -> tuple[str, ...]:
    """A sentence for the user if columns of labels hold words instead of numbers."""
    worded = [str(name) for name in columns if _pair_of(columns[name])]
    texts = {text.strip() for name in worded for text in columns[name].dropna().unique()}
    values = {word: value for pair in WORDS for word, value in pair.items()}
    read = sorted(f"{text} as {values[text.lower()]:g}" for text in texts if text.lower() in values)
    return (f"labels read from words, {', '.join(read)}: {', '.join(worded)}",) if worded else ()


def _pair_of(column: pd.Series) -> dict[str, float]:
    """The pair of `WORDS` that a column consists of, apart from blanks; {} if there is none."""
    found = {text.strip().lower() for text in column.dropna().unique()} - set(BLANK)
    return next((pair for pair in WORDS if found and found <= pair.keys()), {})


def looks_like_labels(column: pd.Series) -> bool:
    """Whether a text column holds only what `raw_labels` reads, and something: 1, 0, -1, words of one pair, blanks."""
    try:
        return bool(raw_labels(column, "").notna().any())
    except ShardError:
        return False


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
            number = (
                np.nan if plain in BLANK else words[plain] if plain in words else float(WHOLE_COMMA.sub(r"\1", plain))
            )
        except ValueError:
            number = np.inf
        is_known = number in known if known else number >= 0 and number % 1 == 0 and number < 2**31
        if not (is_known or np.isnan(number)):
            at = lines(column.index[codes == code])
            raise ShardError(f"{where} holds {text!r} for {column.name} in {at}: only {what} are known")
        values[code] = number
    return pd.Series(values[codes], column.index, name=column.name)
