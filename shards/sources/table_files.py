"""Tables of a source tree: CSV, TSV (also .gz) and Parquet → columns of text.

Text stays as written, leading zeros included. What cannot be read is reported with its line, never guessed.
"""

import csv
import gzip
import io
import posixpath
import warnings
import zlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from cxrfast.errors import ShardError
from cxrfast.shards.storage import Tree

SEPARATORS = {".csv": ",", ".tsv": "\t"}
PARQUET = (".parquet", ".pq")
PACKED = ".gz"


def find_table(tree: Tree, names: Iterable[str], folder: str = "") -> str | None:
    """Path of the first of `names` found in a folder, uncompressed before .gz; None if there is none."""
    there = set(tree.files(folder))
    found = (name + suffix for name in names for suffix in ("", PACKED) if name + suffix in there)
    first = next(found, None)
    return None if first is None else posixpath.join(folder, first)


def tables_in(tree: Tree, folder: str = "") -> str:
    """Tables in a folder, for a message."""
    kinds = (*SEPARATORS, *(kind + PACKED for kind in SEPARATORS), *PARQUET)
    found = [name for name in tree.files(folder) if name.endswith(kinds)]
    return ", ".join(found[:20]) + (f", … {len(found) - 20} more" if len(found) > 20 else "") or "none"


def columns_of(tree: Tree, path: str) -> list[str]:
    """Column names of a table. Raises ShardError for a file that cannot be read."""
    with _reading(tree, path) as (data, kind):
        return (
            pq.ParquetFile(io.BytesIO(data)).schema_arrow.names if kind in PARQUET else _header(data, SEPARATORS[kind])
        )


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

    The index is the line in the file, the header being line 1 (in Parquet, the row, from 1). `what` describes the table in
    messages; `ids` are columns that must not be floating-point. Raises ShardError for a file that cannot be read or lacks
    a column.
    """
    where = posixpath.join(str(tree), path)
    with _reading(tree, path) as (data, kind):
        if kind not in PARQUET:
            header = _header(data, SEPARATORS[kind])
            wanted = _wanted(header, columns, optional, where, what)
            return _read_text(data, SEPARATORS[kind], len(header))[wanted]
        file = pq.ParquetFile(io.BytesIO(data))
        wanted = _wanted(file.schema_arrow.names, columns, optional, where, what)
        read = file.read(wanted)
        text = {name: _as_text(name, read[name], where, name in ids) for name in wanted}
        return pd.DataFrame(text).set_axis(pd.RangeIndex(1, read.num_rows + 1))


@contextmanager
def _reading(tree: Tree, path: str) -> Iterator[tuple[bytes, str]]:
    """Yield a table's uncompressed bytes and suffix; errors of the block that reads them become ShardError."""
    kind = posixpath.splitext(path.removesuffix(PACKED))[1].lower()
    if kind not in (*SEPARATORS, *PARQUET):
        raise ShardError(f"{path} is not a table: give a .csv or .tsv file (may be .gz), or .parquet")
    try:
        data = tree.read(path)
        yield gzip.decompress(data) if path.endswith(PACKED) else data, kind
    except FileNotFoundError:
        raise ShardError(f"no {path} in {tree} (its tables: {tables_in(tree)})") from None
    except (OSError, EOFError, ValueError, csv.Error, zlib.error, pd.errors.ParserWarning, pa.ArrowException) as error:
        form = "Parquet" if kind in PARQUET else kind[1:].upper()
        raise ShardError(
            f"{posixpath.join(str(tree), path)} cannot be read as a {form} table ({error}): fix it or download it again"
        ) from error


def _header(data: bytes, separator: str) -> list[str]:
    if not data.strip():
        raise ValueError("it is empty")
    return _fields(data[: data.find(b"\n") + 1] or data, separator)


def _fields(line: bytes, separator: str) -> list[str]:
    return next(csv.reader([line.decode("utf-8-sig").rstrip("\r\n")], delimiter=separator))


def _read_text(data: bytes, separator: str, columns: int) -> pd.DataFrame:
    if not data.endswith(b"\n") and len(_fields(data[data.rfind(b"\n") + 1 :], separator)) < columns:
        raise ValueError("its last line is cut short")
    with warnings.catch_warnings():
        warnings.simplefilter("error", pd.errors.ParserWarning)  # raised for lines with more fields than the header
        # read all columns: with `usecols`, an extra comma would shift them unnoticed
        frame = pd.read_csv(
            io.BytesIO(data),
            sep=separator,
            dtype=str,
            index_col=False,
            keep_default_na=False,
            na_values=[""],
            encoding="utf-8-sig",
        )
    return frame.set_axis(pd.RangeIndex(2, len(frame) + 2))


def _as_text(name: str, column: pa.ChunkedArray, where: str, is_id: bool) -> pd.Series:
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind)
    is_number = pa.types.is_integer(kind) or pa.types.is_boolean(kind) or pa.types.is_floating(kind)
    if not (is_text or is_number) or (is_id and pa.types.is_floating(kind)):
        raise ShardError(f"{where} holds {kind} in column {name}: store it as text{'' if is_id else ' or numbers'}")
    return pd.Series([None if v is None or v == "" else str(v) for v in column.to_pylist()], dtype=object)


def _wanted(
    header: Sequence[str], columns: Collection[str], optional: Collection[str], where: str, what: str
) -> list[str]:
    """Columns to read. Raises ShardError unless all of `columns` are in the header, once."""
    if absent := [c for c in columns if c not in header]:
        hint = f"is it {what}?" if what else f"its columns: {', '.join(header)}"
        raise ShardError(f"{where} lacks the columns {', '.join(absent)}: {hint}")
    wanted = [*columns, *(c for c in optional if c in header)]
    if twice := [c for c in wanted if header.count(c) > 1]:
        raise ShardError(f"{where} has the columns {', '.join(twice)} twice: rename one of them")
    return wanted
