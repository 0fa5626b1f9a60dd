r"""Delimited text (CSV, TSV) → records, read strictly: each has the header's number of fields, or an error names its line.

Quoting is that of RFC 4180. A field that opens with a quote may hold delimiters, doubled quotes and line breaks; after the
closing quote comes a delimiter or the end of the line. A quote in the middle of an unquoted field is text. Blank lines are
skipped, and so are lines of delimiters alone. Lines are counted as an editor counts them: a record of two lines counts as two,
and has the number of its first.

A quote that is opened by mistake swallows records up to the next quote. It never does so unnoticed:

- Text after a closing quote is refused, and so is a quote that is never closed.
- Lines inside a quoted field are refused if they look like records: with at least half of the header's columns, a digit
  among them, holding text of the shape (`ab12.jpg` → `m.a`) that the column has elsewhere. So a comment of several lines
  is read, but one that repeats lines of the table is not.
- A quote that closes a field nothing opened is refused, in all columns of a table that quotes fields elsewhere and in all
  the columns that are read. In text whose quotes are correct, one quote too many or too few leaves an odd number: the last
  of them then stands in one of these places.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import itemgetter

import pyarrow as pa
import pyarrow.csv as pacsv

from cxrfast.shards.sources.tables.records import Quoted, QuoteError, Record, record_at
from cxrfast.shards.sources.tables.swallowed import find_swallowed
from cxrfast.shards.sources.tables.text_columns import lines as at_lines
from cxrfast.text import trimmed

DELIMITERS = {",": "','", ";": "';'", "\t": "tabs", "|": "'|'"}
"""Delimiters that are recognised, as a message calls them."""

SAMPLE = 20
"""Records that are looked at to find out the delimiter."""

BARE = " \t" + "".join(DELIMITERS)
"""What a line without any value consists of."""

BLOCK = 10_000
"""Lines that are split at once, if none holds a quote."""

CUE = re.compile(r'"?sep=([!-/:-@[-~\t])"?', re.ASCII)
"""First line that Excel understands and some programs write."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Lines, delimiter and header of a text table."""

    lines: Sequence[str]
    """Lines of the file, without line ends."""
    delimiter: str
    header: list[str]
    """Column names, as written."""
    below: int
    """Index, from 0, of the first line below the header."""


@dataclass
class _Findings:
    """What is remarkable about the records of a table, by line number."""

    spans: list[Quoted] = field(default_factory=list)
    strays: list[tuple[int, int, str]] = field(default_factory=list)
    quotes: bool = False
    wrong: list[tuple[int, int, list[Quoted]]] = field(default_factory=list)
    """(line, number of fields, its fields over several lines) of records of another length."""
    repeated: list[int] = field(default_factory=list)
    broken: QuoteError | None = None


def find_layout(text: str, expected: str) -> Layout:
    """Find header and delimiter: the `expected` one, unless another splits header and records into the same columns.

    Raises ValueError if there is no header.
    """
    lines = text.split("\n")
    if lines and not lines[-1]:
        lines.pop()
    top = next((i for i, line in enumerate(lines) if line.strip()), None)
    if top is None:
        raise ValueError("it is empty")
    if (cue := CUE.fullmatch(lines[top].strip(" "))) and top + 1 < len(lines):
        delimiter, top = cue[1], top + 1
    else:
        delimiter = max((expected, *DELIMITERS), key=lambda d: (*_fit(lines, top, d), d == expected))
    try:
        header = record_at(lines, top, delimiter)
    except QuoteError as error:
        raise ValueError(_quote_message(error)) from None
    if header.strays:
        raise ValueError(f"its header, line {top + 1}, has a quote inside a name")
    return Layout(lines=lines, delimiter=delimiter, header=header.fields, below=header.end)


def _fit(lines: Sequence[str], top: int, delimiter: str) -> tuple[int, int]:
    """How well a delimiter fits: how many of the first records have the header's number of fields, if more than one."""
    try:
        header = record_at(lines, top, delimiter)
    except QuoteError:
        return 0, 0
    count, at, fitting = len(header.fields), header.end, 0
    if count == 1 or header.strays:
        return 0, count
    for _ in range(SAMPLE):
        if at >= len(lines):
            break
        try:
            record = record_at(lines, at, delimiter)
        except QuoteError:
            at += 1
        else:
            fitting += len(record.fields) == count
            at = record.end
    return fitting, count


def read_columns(layout: Layout, wanted: Sequence[int]) -> tuple[list[int], list[pa.ChunkedArray]]:
    """Line numbers, and the text of the columns at the indices `wanted`, null where empty, by record.

    Line breaks in text are `\\n`. Raises ValueError for the first thing wrong with the table.
    """
    starts: list[int] = []
    parts: list[list[pa.Array]] = [[] for _ in wanted]
    found = _Findings()
    at = layout.below
    while at < len(layout.lines) and not found.broken:
        block = layout.lines[at : at + BLOCK]
        plain = _read_plain(layout, block, wanted)
        if plain is None:
            read, at = _read_records(layout, at, wanted, starts, found)
        else:
            starts.extend(range(at + 1, at + 1 + len(block)))
            read, at = plain, at + len(block)
        for column, part in zip(parts, read, strict=True):
            column.append(part)
    if problem := _first_problem(layout, starts, found):
        raise ValueError(problem)
    return starts, [pa.chunked_array(column, pa.string()) for column in parts]


def _read_plain(layout: Layout, block: Sequence[str], wanted: Sequence[int]) -> list[pa.Array] | None:
    """Columns of lines, if each line is a record without quotes; else None. Much faster than record by record."""
    text = "\n".join(block)
    if (
        '"' in text
        or not all(line.strip(BARE) for line in block)
        or len(layout.header) == 1
        or layout.delimiter.join(layout.header) in block
    ):
        return None
    data = text.encode()
    try:
        table = pacsv.read_csv(
            pa.BufferReader(data),
            pacsv.ReadOptions(
                use_threads=False, block_size=len(data) + 1, column_names=[str(i) for i in range(len(layout.header))]
            ),
            pacsv.ParseOptions(delimiter=layout.delimiter, quote_char=False, ignore_empty_lines=False),
            pacsv.ConvertOptions(
                include_columns=[str(i) for i in wanted],
                column_types={str(i): pa.string() for i in wanted},
                null_values=[""],
                strings_can_be_null=True,
            ),
        )
    except pa.ArrowInvalid:  # a line has more or fewer fields
        return None
    return [column.combine_chunks() for column in table.columns] if table.num_rows == len(block) else None


def _read_records(
    layout: Layout, at: int, wanted: Sequence[int], starts: list[int], found: _Findings
) -> tuple[list[pa.Array], int]:
    """Columns of the records from line `at` on, at least a block of lines, and the line after them; add to the last two."""
    columns: list[list[str | None]] = [[] for _ in wanted]
    end = min(at + BLOCK, len(layout.lines))
    while at < end:
        line = layout.lines[at]
        if not line or (line.isspace() and layout.delimiter not in line):
            at += 1
            continue
        try:
            record = record_at(layout.lines, at, layout.delimiter)
        except QuoteError as error:
            found.broken = error
            break
        if record.strays or record.quoted:
            _note(found, record, len(layout.header), wanted)
        if len(record.fields) != len(layout.header):
            found.wrong.append((at + 1, len(record.fields), record.spans))
        elif record.fields == layout.header:
            found.repeated.append(at + 1)
        elif not any(map(str.strip, record.fields)) and len(layout.header) > 1:
            pass  # spreadsheets write such lines below a table
        else:
            starts.append(at + 1)
            for column, index in zip(columns, wanted, strict=True):
                column.append(record.fields[index] or None)
        at = record.end
    return [pa.array(column, pa.string()) for column in columns], at


def _note(found: _Findings, record: Record, columns: int, wanted: Sequence[int]) -> None:
    """Add what is remarkable about the quotes of a record."""
    found.quotes |= record.quoted
    found.spans += record.spans
    for column, line in record.strays:
        text = record.fields[column]
        is_odd, is_last = text.count('"') % 2 == 1, text.endswith('"')
        if len(record.fields) == columns and column in wanted and (is_odd or is_last):
            found.strays.append((line + 1, column, "read"))
        elif is_odd and is_last:
            found.strays.append((line + 1, column, "not read"))


def _first_problem(layout: Layout, starts: list[int], found: _Findings) -> str | None:
    """The message about what is wrong first, by line; None if nothing is."""
    problems: list[tuple[int, str]] = []
    spans = found.spans
    if error := found.broken:
        last = len(layout.lines) - 1 if error.last is None else error.last
        is_closed = error.last is not None
        spans = [
            *spans,
            *error.before,
            Quoted(first=error.first, last=last, end=None, column=None, begin=0, is_closed=is_closed),
        ]
    columns = len(layout.header)
    if spans and (swallowed := find_swallowed(layout.lines, layout.delimiter, columns, starts, spans)):
        problems.append((swallowed[0].first + 1, _swallowed_message(*swallowed)))
    if error:
        problems.append((error.first + 1, _quote_message(error)))
    for line, column, kind in found.strays:
        if kind == "read" or found.quotes:
            name = trimmed(layout.header[column]) if column < len(layout.header) else f"field {column + 1}"
            problems.append(
                (
                    line,
                    f"line {line} has a quote in an unquoted field ({name}): quote the whole field and double the quotes inside it",
                )
            )
            break
    if found.wrong:
        problems.append((found.wrong[0][0], _count_message(layout, not starts, found.wrong)))
    if found.repeated:
        at = at_lines(found.repeated)
        problems.append(
            (found.repeated[0], f"{at} {_verb(found.repeated, 'repeat')} the header, as in tables that were joined")
        )
    if not problems:
        return None
    return min(problems, key=itemgetter(0))[1]


def _verb(lines: Sequence[int], verb: str) -> str:
    return verb + "s" * (len(lines) == 1)


def _swallowed_message(span: Quoted, at: int) -> str:
    opened, like = (
        f"a quote opens in line {span.first + 1}",
        f"what it quotes looks like lines of the table (line {at + 1})",
    )
    if not span.is_closed:
        return f"{opened} and is never closed, and {like}"
    return f"{opened} and closes in line {span.last + 1}, and {like}; if that is right, put the quoted text on one line"


def _quote_message(error: QuoteError) -> str:
    if error.last is None:
        return f"the quote that opens in line {error.first + 1} is never closed"
    opened, closed = error.first + 1, error.last + 1
    where = (
        f"opens and closes in line {opened}"
        if opened == closed
        else f"opens in line {opened} and closes in line {closed}"
    )
    return f"a quoted field {where}, where more text follows: quotes inside a quoted field must be doubled"


def _count_message(layout: Layout, is_all: bool, wrong: list[tuple[int, int, list[Quoted]]]) -> str:
    columns, counts = len(layout.header), sorted({count for _, count, _ in wrong})
    at = [line for line, _, _ in wrong]
    has = f"{at_lines(at)} {'has' if len(at) == 1 else 'have'} {_range(counts)} instead of the {columns} of its header"
    spans = [f"a quote opens in line {s.first + 1} and closes in line {s.last + 1}" for s in wrong[0][2]]
    if is_all and len(at) > 1 and counts == [columns + 1]:
        has += ", as all lines do: name the column that lacks a name, or remove the delimiter at the end of each line"
    return has + (f"; {', '.join(spans)}" if spans else "")


def _range(counts: list[int]) -> str:
    if counts == [1]:
        return "1 field"
    return f"{counts[0]} fields" if len(counts) == 1 else f"{counts[0]} to {counts[-1]} fields"
