"""One record of delimited text, as RFC 4180 has it, and what is remarkable about its quotes."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Quoted:
    """A quoted field over several lines."""

    first: int
    """Index, from 0, of the line where it opens."""
    last: int
    """Index of the line where it closes."""
    end: int | None
    """Length of the text before the closing quote in its last line; None for all of the line."""
    column: int | None
    """Index of the field in its record, if that is whole."""
    begin: int
    """Length of the line up to the opening quote, which it includes."""
    is_closed: bool = True


class QuoteError(Exception):
    """A quote opens in line `first` and text follows it where it closes in line `last`, or it does not close (None)."""

    def __init__(self, first: int, last: int | None, before: list[Quoted]) -> None:
        super().__init__()
        self.first, self.last = first, last
        self.before = before
        """Fields over several lines that come before it in the same record."""


@dataclass
class Record:
    """Fields, and where they are."""

    fields: list[str]
    end: int
    """Index of the line after it."""
    spans: list[Quoted]
    strays: list[tuple[int, int]]
    """(column, line) of unquoted fields that hold quotes."""
    quoted: bool


def record_at(lines: Sequence[str], at: int, delimiter: str) -> Record:
    """The record that starts in line `at`. Raises QuoteError."""
    if (fields := _simple_fields(lines[at], delimiter)) is not None:
        return Record(fields, at + 1, [], [], '"' in lines[at])
    record = Record([], at + 1, [], [], False)
    line, pos, now = lines[at], 0, at
    while True:
        if not line.startswith('"', pos):
            end = line.find(delimiter, pos)
            text = line[pos:] if end < 0 else line[pos:end]
            if '"' in text:
                record.strays.append((len(record.fields), now))
            record.fields.append(text)
            if end < 0:
                break
            pos = end + 1
            continue
        record.quoted, first, begin, parts, pos = True, now, pos + 1, [], pos + 1
        while (end := line.find('"', pos)) < 0 or line.startswith('"', end + 1):
            if end >= 0:
                parts.append(line[pos : end + 1])
                pos = end + 2
                continue
            parts += (line[pos:], "\n")
            now += 1
            if now == len(lines):
                raise QuoteError(first, None, record.spans)
            line, pos = lines[now], 0
        parts.append(line[pos:end])
        pos = end + 1
        if pos < len(line) and not line.startswith(delimiter, pos):
            raise QuoteError(first, now, record.spans)
        if now > first:
            record.spans.append(Quoted(first=first, last=now, end=end, column=len(record.fields), begin=begin))
        record.fields.append("".join(parts))
        if pos == len(line):
            break
        pos += 1
    record.end = now + 1
    return record


def _simple_fields(line: str, delimiter: str) -> list[str] | None:
    """Fields of a record of one line, if its only quotes are those around fields; else None."""
    if '"' not in line:
        return line.split(delimiter)
    try:
        fields = next(csv.reader((line,), delimiter=delimiter, strict=True))
    except csv.Error:
        return None
    return None if any('"' in text for text in fields) else fields
