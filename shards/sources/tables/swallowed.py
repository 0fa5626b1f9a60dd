"""Lines that a quote opened by mistake has swallowed: they look like records of the table."""

import re
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache

from cxrfast.shards.sources.tables.records import Quoted, QuoteError, record_at

SHAPES = 2000
"""Records whose fields show what the columns look like."""


NUMBER = re.compile(r"[+-]?\d+(?:[.,]\d*)?")
RUN = re.compile(r"[^\W_]+")


def find_swallowed(
    lines: Sequence[str], delimiter: str, columns: int, starts: Sequence[int], spans: Sequence[Quoted]
) -> tuple[Quoted, int] | None:
    """The first of the fields `spans` that seems to hold records, and the line, from 0, that looks like one.

    `starts`: numbers of the lines where records start; `columns`: of the table. A line looks like a record if at least half
    of the columns, one with a digit among them, have text of a shape known from the column.
    """
    shapes = None
    for span in spans:
        for at in (*range(span.first + 1, span.last + 1), span.first):
            line = lines[at] if at < span.last else lines[at][: span.end]
            if columns > 1 and delimiter not in line:
                continue
            shapes = _shapes(lines, delimiter, columns, starts, spans) if shapes is None else shapes
            found = _ends(span, lines, delimiter) if at == span.first else enumerate(line.split(delimiter))
            if _looks_like_a_record(found, shapes):
                return span, at
    return None


def _ends(span: Quoted, lines: Sequence[str], delimiter: str) -> list[tuple[int, str]]:
    """(column, text) of what seems to be the rest of the record whose field opens, and the start of the one that closes it."""
    if span.column is None:
        return []
    rest = lines[span.first][span.begin :].split(delimiter)[1:]
    start = lines[span.last][: span.end].split(delimiter)[:-1]
    return [*enumerate(rest, span.column + 1), *enumerate(start[: span.column])]


def _looks_like_a_record(fields: Iterable[tuple[int, str]], shapes: Sequence[set[str]]) -> bool:
    known = [shape for at, text in fields if at < len(shapes) and (shape := _shape(text.strip('"'))) in shapes[at]]
    return 2 * len(known) >= len(shapes) and any("0" in shape or "m" in shape for shape in known)


def _shapes(
    lines: Sequence[str], delimiter: str, columns: int, starts: Sequence[int], spans: Sequence[Quoted]
) -> list[set[str]]:
    """Shapes of the fields of each column, in a sample of the records and in the text before each span."""
    shapes: list[set[str]] = [set() for _ in range(columns)]
    chosen = [start - 1 for start in starts[:: max(1, len(starts) // SHAPES)]]
    for fields in _fields_of(lines, delimiter, [*chosen, *(span.first for span in spans[:SHAPES])]):
        for seen, text in zip(shapes, fields, strict=False):
            if "\n" not in text:
                seen.add(_shape(text))
    return shapes


def _fields_of(lines: Sequence[str], delimiter: str, at: Sequence[int]) -> Iterator[list[str]]:
    for line in at:
        text = lines[line]
        if '"' not in text:
            yield text.split(delimiter)
            continue
        try:
            yield record_at(lines, line, delimiter).fields
        except QuoteError:  # keep what stands before the quote
            yield text[: text.index('"')].split(delimiter)[:-1]


@lru_cache(maxsize=100_000)
def _shape(text: str) -> str:
    """`p1/00000001_000.png` → `0_0.a`, `p12` → `m`, `-1.0` → `0`: a number, or the last part of a path, with its runs of
    letters, of digits and of both as one character each."""
    if NUMBER.fullmatch(text):
        return "0"
    name = text.rpartition("/")[2]
    return RUN.sub(lambda run: "a" if run[0].isalpha() else "0" if run[0].isdigit() else "m", name)
