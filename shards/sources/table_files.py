"""Tables of a source tree: CSV, TSV (also .gz) and Parquet → columns of text; lists of names.

Text stays as written, leading zeros included. What cannot be read is reported with its line, never guessed.
"""

import io
import logging
import posixpath
import zlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from cxrfast.errors import ShardError, did_you_mean
from cxrfast.shards.sources.tables.delimited import DELIMITERS, find_layout, read_columns
from cxrfast.shards.sources.tables.encoding import decoded, unpacked
from cxrfast.shards.sources.tables.text_columns import lines
from cxrfast.shards.storage import Tree
from cxrfast.text import masked, trimmed

SEPARATORS = {".csv": ",", ".tsv": "\t"}
PARQUET = (".parquet", ".pq")
PACKED = ".gz"

log = logging.getLogger(__name__)

LOST = "\ufffd"
"""Written by programs in place of characters that they could not convert."""


def find_table(tree: Tree, names: Iterable[str], folder: str = "") -> str | None:
    """Path of the first of `names` found in a folder, uncompressed before .gz; None if there is none."""
    there = set(tree.files(folder))
    found = (name + suffix for name in names for suffix in ("", PACKED) if name + suffix in there)
    first = next(found, None)
    return None if first is None else posixpath.join(folder, first)


def tables_in(tree: Tree, folder: str = "") -> str:
    """Tables in a folder, for a message."""
    found = [name for name in tree.files(folder) if _kind(name) is not None]
    return ", ".join(found[:20]) + (f", … {len(found) - 20} more" if len(found) > 20 else "") or "none"


def columns_of(tree: Tree, path: str) -> list[str]:
    """Column names of a table, without blanks around them. Raises ShardError for a file that cannot be read."""
    where = masked(posixpath.join(str(tree), path))
    with _reading(tree, path) as (data, kind):
        if kind in PARQUET:
            return [trimmed(name) for name in pq.ParquetFile(io.BytesIO(data)).schema_arrow.names]
        return [trimmed(name) for name in find_layout(decoded(data, where), SEPARATORS[kind]).header]


def read_table(
    tree: Tree,
    path: str,
    columns: Collection[str],
    what: str = "",
    *,
    optional: Collection[str] = (),
    ids: Collection[str] = (),
) -> pd.DataFrame:
    """Read `columns` of a table, and those `optional` ones that it has, as text, NaN where blank.

    The index is the line in the file where the record starts, the header being line 1 (in Parquet, the row, from 1); it skips
    blank lines and further lines of a record. Column names are compared without blanks around them. `what` describes the
    table in messages; `ids` are columns that must not be floating-point. Raises ShardError for a file that cannot be read,
    lacks a column or has no rows. `cxrfast.shards.sources.tables.delimited` says how text is read.
    """
    where = masked(posixpath.join(str(tree), path))
    with _reading(tree, path) as (data, kind):
        if kind in PARQUET:
            table = _read_parquet(data, columns, optional, ids, where, what)
        else:
            table = _read_text(data, SEPARATORS[kind], columns, optional, where, what)
    if table.empty:
        raise ShardError(f"{where} holds no lines below its header: give a table with rows")
    return table


def read_list(tree: Tree, path: str) -> pd.Series:
    """Names in a text file, separated by line ends or blanks, indexed by line. Raises ShardError if it cannot be read."""
    where = masked(posixpath.join(str(tree), path))
    try:
        text = decoded(unpacked(tree.read(path), where, packed=False, parquet=False), where)
    except OSError as error:
        raise ShardError(f"{where} cannot be read ({error}): download it again") from error
    names = [(line, trimmed(name)) for line, row in enumerate(text.split("\n"), 1) for name in row.split()]
    return pd.Series([name for _, name in names], [line for line, _ in names], dtype=object)


def _kind(path: str) -> str | None:
    """Suffix of a table, in lower case and without .gz; None for other files."""
    kind = posixpath.splitext(path.lower().removesuffix(PACKED))[1]
    return kind if kind in (*SEPARATORS, *PARQUET) else None


@contextmanager
def _reading(tree: Tree, path: str) -> Iterator[tuple[bytes, str]]:
    """Yield a table's uncompressed bytes and suffix; errors of the block that reads them become ShardError."""
    name = path if tree.is_local else path.partition("?")[0]  # a URL may have parameters
    kind = _kind(name)
    if kind is None:
        raise ShardError(f"{masked(name)} is not a table: give a .csv or .tsv file (may be .gz), or .parquet")
    where = masked(posixpath.join(str(tree), path))
    try:
        packed = name.lower().endswith(PACKED)
        yield unpacked(tree.read(path), where, packed=packed, parquet=kind in PARQUET), kind
    except FileNotFoundError:
        raise ShardError(f"no {masked(path)} in {tree} (its tables: {tables_in(tree)})") from None
    except (OSError, EOFError, ValueError, zlib.error, pa.ArrowException) as error:
        form = "Parquet" if kind in PARQUET else kind[1:].upper()
        raise ShardError(
            f"{where} cannot be read as a {form} table ({masked(str(error))}): fix it or download it again"
        ) from error


def _read_text(
    data: bytes, expected: str, columns: Collection[str], optional: Collection[str], where: str, what: str
) -> pd.DataFrame:
    text = decoded(data, where)
    layout = find_layout(text, expected)
    wanted = _wanted(layout.header, columns, optional, where, what)
    if layout.delimiter != expected:
        used = DELIMITERS.get(layout.delimiter, repr(layout.delimiter))
        log.warning(f"{where}: columns are separated by {used}, not {DELIMITERS[expected]}")
    starts, read = read_columns(layout, list(wanted.values()))
    index = pd.Index(starts, dtype="int64")
    table = pd.DataFrame({name: column.to_pandas() for name, column in zip(wanted, read, strict=True)}).set_axis(index)
    if LOST in text:
        _check_lost(table, where)
    return table


def _check_lost(table: pd.DataFrame, where: str) -> None:
    """Raises ShardError where an earlier conversion lost characters: two ids may have become one."""
    for name in table.columns:
        if (lost := table[name].str.contains(LOST, regex=False).eq(True)).any():
            raise ShardError(
                f"{where} lost characters of {name} in {lines(table.index[lost])}, where it holds U+FFFD: export it as UTF-8"
            )


def _read_parquet(
    data: bytes, columns: Collection[str], optional: Collection[str], ids: Collection[str], where: str, what: str
) -> pd.DataFrame:
    file = pq.ParquetFile(io.BytesIO(data))
    names = file.schema_arrow.names
    wanted = _wanted(names, columns, optional, where, what)
    read = file.read([names[at] for at in wanted.values()])
    text = {name: _as_text(name, read[names[at]], where, name in ids) for name, at in wanted.items()}
    return pd.DataFrame(text).set_axis(pd.RangeIndex(1, read.num_rows + 1))


def _as_text(name: str, column: pa.ChunkedArray, where: str, is_id: bool) -> pd.Series:
    """Text, numbers and truth values of a Parquet column as text, None where null, empty or NaN."""
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    is_bytes = pa.types.is_binary(kind) or pa.types.is_large_binary(kind)  # some programs write text without saying so
    is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind) or is_bytes
    is_number = pa.types.is_integer(kind) or pa.types.is_boolean(kind) or pa.types.is_floating(kind)
    if not (is_text or is_number) or (is_id and pa.types.is_floating(kind)):
        raise ShardError(f"{where} holds {kind} in column {name}: store it as text{'' if is_id else ' or numbers'}")
    if is_bytes or pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return pd.Series(_utf8(name, column, where), dtype=object)
    return pd.Series([None if v is None or v != v else str(v) for v in column.to_pylist()], dtype=object)


def _utf8(name: str, column: pa.ChunkedArray, where: str) -> list[str | None]:
    """Text of a column of text or bytes. Raises ShardError with the row where it is not UTF-8."""
    raw = column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column
    values = raw.cast(pa.large_binary()).to_pylist()
    try:
        return [value.decode() if value else None for value in values]
    except UnicodeDecodeError:
        row = next(row for row, value in enumerate(values, 1) if value and "\ufffd" in value.decode(errors="replace"))
        raise ShardError(
            f"{where} holds bytes that are not UTF-8 in column {name}, row {row}: store it as text"
        ) from None


def _wanted(
    header: Sequence[str], columns: Collection[str], optional: Collection[str], where: str, what: str
) -> dict[str, int]:
    """Columns to read and their indices. Raises ShardError unless all of `columns` are in the header, once."""
    names = [trimmed(name) for name in header]
    if absent := [c for c in columns if trimmed(c) not in names]:
        hint = f"is it {what}?" if what else f"its columns: {', '.join(map(_shown, names))}"
        raise ShardError(
            f"{where} lacks the columns {', '.join(absent)}: {did_you_mean(absent, map(_shown, names))}{hint}"
        )
    wanted = [*columns, *(c for c in optional if trimmed(c) in names)]
    if twice := [c for c in wanted if names.count(trimmed(c)) > 1]:
        raise ShardError(f"{where} has the columns {', '.join(twice)} twice: rename one of them")
    return {name: names.index(trimmed(name)) for name in wanted}


def _shown(name: str) -> str:
    """A name on one line; a stray quote may make one of half a table."""
    plain = " ".join(name.split())
    return plain if len(plain) <= 60 else plain[:60] + "…"
