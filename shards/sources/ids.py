"""Ids of patients, studies and images: normalised by stated rules, or refused, so that one patient is never two.

A spreadsheet, a file system or a join with pandas changes ids: blanks appear at their ends, numbers become floats, letters are
stored in another Unicode form. An id's normal form has no blanks or invisible characters at its ends, is in Unicode's form
NFC, and is `1001` where the table says `1001.0` or `1001,0`. Nothing else is changed: leading zeros and case count.
"""

import re
import unicodedata
from typing import NoReturn

import numpy as np
import pandas as pd

from cxrfast.errors import ShardError
from cxrfast.shards.sources.tables.text_columns import BLANK, lines
from cxrfast.text import trimmed

NO_ID = {*BLANK, "<na>", "#n/a", "nat"}
"""What programs write for a missing value, in any case: not an id, or all patients without one would be one patient."""

WHOLE_FLOAT = re.compile(r"(\d+)(?:\.0+|,0)")
"""`1001.0` or, with a decimal comma, `1001,0`."""

SCIENTIFIC = re.compile(r"[+-]?(?:\d(?:[.,]\d+)?[eE][+-]\d+|\d{1,3}[.,]\d+[eE]\d+)")
"""`8.39860488694292E+35` or `1e+05`: a spreadsheet's number, of which digits are lost."""

NUMBER = re.compile(f"{WHOLE_FLOAT.pattern}|{SCIENTIFIC.pattern}")

EXACT_DIGITS = 15
"""Digits that a float64 holds; a longer id that went through one may be another id."""


ZEROS = re.compile(r"(?:^|\D)0+\d+$", re.M)
"""An id whose last number has leading zeros."""


def normal_ids(column: pd.Series, where: str, without: str = "$^") -> pd.Series:
    """Return the ids of a text column in their normal form, and without what matches the pattern `without`.

    Raises ShardError that names the lines of blank ids, of words for a missing value, and of numbers that a spreadsheet has
    rounded.
    """
    codes, unique = pd.factorize(column)
    texts, removed = unique.tolist(), re.compile(without)
    if len(texts) and codes.min() >= 0 and _are_normal(texts) and not any(map(removed.search, texts)):
        return column
    normal = [normal_id(text) for text in texts]
    for states, what in (
        ([text.lower() in NO_ID for text in normal], "is blank"),
        ([SCIENTIFIC.fullmatch(text) is not None for text in normal], "was rounded by a spreadsheet"),
        ([_lost_digits(text) for text in texts], "is a floating-point number, which cannot hold all its digits,"),
    ):
        bad = np.array([*states, what == "is blank"], bool)[codes]  # the last is for code -1: no value
        if bad.any():
            _refuse(column, bad, what, where)
    normal = [removed.sub("", text) for text in normal]
    return pd.Series(np.array([*normal, ""], object)[codes], column.index, dtype=column.dtype, name=column.name)


def _are_normal(texts: list[str]) -> bool:
    """Whether all ids are in their normal form for certain; much faster than to normalise each."""
    joined = "".join(texts)
    is_bare = joined.isascii() and joined.isprintable() and " " not in joined
    return is_bare and NO_ID.isdisjoint(map(str.lower, texts)) and not any(map(NUMBER.fullmatch, texts))


def normal_id(text: str) -> str:
    """The normal form of one id."""
    text = trimmed(unicodedata.normalize("NFC", text))
    whole = WHOLE_FLOAT.fullmatch(text)
    return whole[1] if whole else text


def _lost_digits(text: str) -> bool:
    whole = WHOLE_FLOAT.fullmatch(trimmed(text))
    return whole is not None and len(whole[1].lstrip("0")) > EXACT_DIGITS


def _refuse(column: pd.Series, bad: np.ndarray, what: str, where: str) -> NoReturn:
    first, at = column[bad].iloc[0], lines(column.index[bad])
    shown = "" if pd.isna(first) or not first.strip() else f" ({first.strip()!r})"
    advice = "give every image one" if what == "is blank" else "export the table with ids as text"
    raise ShardError(f"{where}: {column.name} {what} in {at}{shown}: {advice}")


def check_distinct(ids: pd.Series, where: str) -> None:
    """Raises ShardError for two ids that only leading zeros, blanks inside or a Unicode form distinguish, with their lines.

    `1` and `00001` may be one patient or two: only the author of the table knows.
    """
    unique = pd.Series(ids.unique(), dtype=object)
    joined = "\n".join(unique.tolist())
    if joined.isascii() and " " not in joined and (unique.str.len().nunique() == 1 or not ZEROS.search(joined)):
        return
    keys = unique.map(_likeness)
    if (twice := keys.duplicated(keep=False)).any():
        alike = unique[keys == keys[twice].iloc[0]].tolist()
        at = "; ".join(f"{one!r} in {lines(ids.index[ids == one])}" for one in alike[:3])
        more = keys[twice].nunique() - 1
        raise ShardError(
            f"{where}: {ids.name} holds ids that may be the same: {at}"
            + (f", and {more:,} more such pairs" if more else "")
            + ": write each id in one way throughout"
        )


def _likeness(text: str) -> str:
    plain = " ".join(unicodedata.normalize("NFKC", text).split())
    return re.sub(r"^(.*\D)?0+(?=\d+$)", r"\1", plain)


def check_join(
    wanted: pd.Series | pd.Index,
    found: pd.Series,
    *,
    images: str,
    table: str,
    what: str,
    allowed: bool,
    advice: str = "",
) -> None:
    """Raises ShardError if more than 1 % of either side finds nothing on the other, unless that is `allowed`.

    `wanted`: ids of the images; `found`: ids of the table that is joined to them; `images` and `table` name both, `what` the
    ids, in the plural. One id may always be alone.
    """
    mine, theirs = (dict.fromkeys(side.tolist()) for side in (wanted, found))
    sides = ((mine, theirs, images, table), (theirs, mine, table, images))
    lacking = [(len(side), [x for x in side if x not in other], here, there) for side, other, here, there in sides]
    if allowed or not any(is_too_few(of - len(alone), of) for of, alone, *_ in lacking):
        return
    parts = [
        f"{len(alone):,} of the {of:,} {what} in {here} are not in {there} (such as {', '.join(alone[:3])})"
        for of, alone, here, there in lacking
        if alone
    ]
    raise ShardError(
        f"{', and '.join(parts)}: give tables of the same release, or accept this with --allow-unmatched{advice}"
    )


def is_too_few(found: int, of: int) -> bool:
    """Is that less than 99 %? One may be missing from small tables."""
    return of > 0 and (found == 0 or of - found > max(1, of // 100))
