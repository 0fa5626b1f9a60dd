"""Read and write the rows table, rows.parquet: one line per image; `row` = 0…N-1 is its permanent number at every scale."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pandas.api.types import is_numeric_dtype

from cxrfast.errors import ShardError
from cxrfast.files import open_file, read_file, replacing
from cxrfast.shards.format.info import COPY, MOST_IMAGES, SetInfo, parse_set, read_info, read_set_json
from cxrfast.splits import BLOCKS, FOLDS
from cxrfast.text import BIDI, LONGEST_PATH, find_fault, name_fault, path_fault, shown

COLUMNS: dict[str, pa.DataType] = {
    "row": pa.int64(),
    "image_id": pa.string(),
    "study_id": pa.string(),
    "patient_id": pa.string(),
    "path": pa.string(),  # relative to the source tree
    "bytes": pa.int64(),  # of the source file when the set was laid out; -1 where it was missing
    "view": pa.string(),  # null where unknown
    "height": pa.int32(),  # px, as the source's tables say; 0 where they do not
    "width": pa.int32(),
    "split": pa.string(),  # the official train, validate or test; null where there is none
    "fold": pa.int8(),
    "block": pa.int8(),
}
"""The fixed columns; after them one float32 column per label with the raw value 1, 0, -1 or null, then the references, then
the kept columns, which hold text or float64."""

RESERVED = {*COLUMNS, "part"}
"""Names that no label may have; a run's own table of rows has a column `part`."""

ROOM, LARGEST_ROW = 2**26, 2**16
"""Bytes that a table and one row of it may claim to have, uncompressed."""

RANGES = {
    "row": (0, MOST_IMAGES),
    "bytes": (-3, 2**62),
    "height": (0, 2**31 - 1),
    "width": (0, 2**31 - 1),
    "fold": (0, FOLDS - 1),
    "block": (0, BLOCKS - 1),
}

HIDDEN = rf"[\p{{Cc}}\p{{Zl}}\p{{Zp}}{BIDI}]"
"""Characters that break a line or change the order of others; earlier versions let others into ids."""

REFERENCE = "radiologist/"
"""Prefix of columns that hold a reference standard: raw labels that are carried along and never trained on."""

KEPT = "kept/"
"""Prefix of columns that `--keep` carries along, such as `kept/Age`: text or numbers, never labels."""


def label_names(rows: pd.DataFrame) -> tuple[str, ...]:
    """Columns that are labels; none in an unlabelled set."""
    return tuple(c for c in rows.columns if c not in COLUMNS and not c.startswith((REFERENCE, KEPT)))


def reference_names(rows: pd.DataFrame) -> tuple[str, ...]:
    """Columns of the reference standard, `radiologist/<label>`; most sets have none."""
    return tuple(c for c in rows.columns if c.startswith(REFERENCE))


def kept_names(rows: pd.DataFrame) -> tuple[str, ...]:
    """Columns that were carried along from the source's tables, `kept/<column>`; most sets have none."""
    return tuple(c for c in rows.columns if c.startswith(KEPT))


def write_rows(path: Path, rows: pd.DataFrame, info: SetInfo | None = None) -> None:
    """Write the table with the description of its set (`info`) inside. The same rows and pyarrow give the same bytes."""
    with replacing(path) as file:
        _write(file, rows, info.to_bytes() if info else None)


def _write(file: IO[bytes], rows: pd.DataFrame, info: bytes | None) -> None:
    raw = (*label_names(rows), *reference_names(rows))
    kept = ((name, pa.float64() if is_numeric_dtype(rows[name]) else pa.string()) for name in kept_names(rows))
    schema = pa.schema([*COLUMNS.items(), *((name, pa.float32()) for name in raw), *kept])
    table = pa.Table.from_pandas(rows[schema.names], schema=schema, preserve_index=False)
    table = table.replace_schema_metadata({COPY: info} if info else None)
    pq.write_table(table, file, compression="zstd", write_page_checksum=True)


def is_as_written(path: Path) -> bool:
    """Are these the bytes that `write_rows` wrote? Without a hash: page checksums hold, and rewriting it changes nothing."""
    try:
        with open(open_file(path), "rb") as file:
            table = pq.ParquetFile(file, page_checksum_verification=True).read()
        again = io.BytesIO()
        _write(again, table.to_pandas(), table.schema.metadata[COPY])
        return again.getvalue() == read_file(path)
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError):
        return False


def is_relabelled(folder: Path) -> bool:
    """Is the rows table undamaged, with the description in set.json? If its hash differs from SHA256SUMS, it was written by a
    `relabel` that was killed before it wrote the rest."""
    path = folder / "rows.parquet"
    try:
        return is_as_written(path) and read_info(path) == read_set_json(folder)
    except ShardError:
        return False


def _words(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _check_columns(file: pq.ParquetFile) -> None:
    """Raises ValueError if columns are missing or of another type, or claim more than a rows table can hold."""
    schema, claimed = file.schema_arrow, file.metadata
    if absent := [c for c in COLUMNS if c not in schema.names]:
        raise ValueError(f"it lacks the columns {', '.join(absent)}")
    if len(set(schema.names)) < len(schema.names):
        raise ValueError("a column is there twice")
    for name, kind in zip(schema.names, schema.types, strict=True):
        if name.startswith(KEPT):
            if kind not in (pa.string(), pa.float64()):
                raise ValueError(f"column {shown(name)} holds {kind}, not string or double")
        elif kind != (wanted := COLUMNS.get(name, pa.float32())):
            raise ValueError(f"column {shown(name)} holds {kind}, not {wanted}")
    groups = [claimed.row_group(n) for n in range(claimed.num_row_groups)]
    if claimed.num_rows > MOST_IMAGES or sum(g.total_byte_size for g in groups) > ROOM + claimed.num_rows * LARGEST_ROW:
        raise ValueError(f"it claims {claimed.num_rows:,} rows of {sum(g.total_byte_size for g in groups):,} bytes")


def _check_values(table: pa.Table) -> None:
    """Raises ValueError for values that `write_rows` never writes, in whatever columns there are; `row` is one."""
    there = table.column_names
    for name, (low, high) in RANGES.items():
        if name not in there:
            continue
        column = table[name]
        if column.null_count or (len(column) and not low <= pc.min(column).as_py() <= pc.max(column).as_py() <= high):
            raise ValueError(f"{name} is blank or not between {low} and {high}")
    if not np.array_equal(table["row"].to_numpy(), np.arange(len(table))):
        raise ValueError("its rows are not numbered from 0 on")
    for name in ("image_id", "study_id", "patient_id", "path", "view", "split"):
        if name not in there:
            continue
        if table[name].null_count and name not in ("view", "split"):
            raise ValueError(f"{name} is blank")
        longest = pc.max(pc.binary_length(table[name])).as_py() or 0
        if longest > LONGEST_PATH or pc.any(pc.match_substring_regex(table[name], HIDDEN)).as_py():
            raise ValueError(f"{name} {find_fault(table[name].drop_null().to_pylist(), path_fault)}")
    for name in (name for name in there if name.startswith(KEPT)):
        _check_kept(table[name], name)
    for name in (name for name in there if name not in COLUMNS and not name.startswith(KEPT)):
        if not np.isin(table[name].drop_null().to_numpy(), (1, 0, -1)).all():
            raise ValueError(f"the label {shown(name)} holds more than 1, 0, -1 and blank")


def _check_kept(column: pa.ChunkedArray, name: str) -> None:
    """Raises ValueError for a kept value that `write_rows` never writes."""
    if column.type == pa.float64():
        if not np.isfinite(column.drop_null().to_numpy()).all():
            raise ValueError(f"{shown(name)} holds a number that is not finite")
    elif fault := find_fault(column.unique().drop_null().to_pylist(), name_fault):
        raise ValueError(f"{shown(name)}: {fault}")


def read_rows(path: Path, info: SetInfo | None = None, columns: Sequence[str] | None = None) -> pd.DataFrame:
    """The table in the order of its rows; `columns`: those to read, `row` among them.

    Raises ShardError if it is missing or damaged or lacks a column, or if the description inside is not `info`: its labels
    were replaced since.
    """
    try:
        with open(open_file(path), "rb") as file:  # opened once: it may be replaced at any time
            stored = pq.ParquetFile(file, page_checksum_verification=True)
            _check_columns(stored)
            table = stored.read(columns=None if columns is None else list(columns))
        _check_values(table)
        rows = table.to_pandas(ignore_metadata=True)
    except FileNotFoundError:
        raise ShardError(f"{path} is missing: run `cxrfast shard` again") from None
    except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
        raise ShardError(
            f"{path} cannot be read ({_words(error)}); `cxrfast verify` lists what else is damaged"
        ) from error
    if info and len(rows) != info.images:
        raise ShardError(f"{path} holds {len(rows):,} rows, and its set {info.images:,}: it is damaged")
    inside = (table.schema.metadata or {}).get(COPY)
    described = parse_set(inside, path) if inside else info
    if info and described != info:
        raise ShardError(f"the labels in {path} were replaced since the set was opened: run this command again")
    return rows
