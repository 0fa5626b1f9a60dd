"""Read and write the rows table, rows.parquet: one line per image; `row` = 0…N-1 is its permanent number at every scale."""

import io
from pathlib import Path
from typing import IO

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from cxrfast.errors import ShardError
from cxrfast.files import replacing
from cxrfast.shards.format.info import COPY, SetInfo, parse_set, read_info, read_set_json

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
"""The fixed columns; after them one float32 column per label with the raw value 1, 0, -1 or null, then the references."""

REFERENCE = "radiologist/"
"""Prefix of columns that hold a reference standard: raw labels that are carried along and never trained on."""


def label_names(rows: pd.DataFrame) -> tuple[str, ...]:
    return tuple(c for c in rows.columns if c not in COLUMNS and not c.startswith(REFERENCE))


def reference_names(rows: pd.DataFrame) -> tuple[str, ...]:
    """Columns of the reference standard, `radiologist/<label>`; most sets have none."""
    return tuple(c for c in rows.columns if c.startswith(REFERENCE))


def write_rows(path: Path, rows: pd.DataFrame, info: SetInfo | None = None) -> None:
    """Write the table with the description of its set (`info`) inside. The same rows and pyarrow give the same bytes."""
    with replacing(path) as file:
        _write(file, rows, info.to_bytes() if info else None)


def _write(file: IO[bytes], rows: pd.DataFrame, info: bytes | None) -> None:
    raw = (*label_names(rows), *reference_names(rows))
    schema = pa.schema([*COLUMNS.items(), *((name, pa.float32()) for name in raw)])
    table = pa.Table.from_pandas(rows[schema.names], schema=schema, preserve_index=False)
    table = table.replace_schema_metadata({COPY: info} if info else None)
    pq.write_table(table, file, compression="zstd", write_page_checksum=True)


def is_as_written(path: Path) -> bool:
    """Are these the bytes that `write_rows` wrote? Without a hash: page checksums hold, and rewriting it changes nothing."""
    try:
        table = pq.read_table(path, page_checksum_verification=True)
        again = io.BytesIO()
        _write(again, table.to_pandas(), table.schema.metadata[COPY])
        return again.getvalue() == path.read_bytes()
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


def read_rows(path: Path, info: SetInfo | None = None) -> pd.DataFrame:
    """The table in the order of its rows. Raises ShardError if it is missing or damaged or lacks a column, or if the
    description inside is not `info`: its labels were replaced since."""
    try:
        with pa.OSFile(str(path)) as file:  # opened once: it may be replaced at any time
            table = pq.read_table(file, page_checksum_verification=True)
        rows = table.to_pandas()
    except FileNotFoundError:
        raise ShardError(f"{path} is missing: run `cxrfast shard` again") from None
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ShardError(f"{path} cannot be read ({error}); `cxrfast verify` lists what else is damaged") from error
    if absent := [c for c in COLUMNS if c not in table.column_names]:
        raise ShardError(f"{path} lacks the columns {', '.join(absent)}: it is not a cxrfast rows table")
    inside = (table.schema.metadata or {}).get(COPY)
    if info and inside and parse_set(inside, path) != info:
        raise ShardError(f"the labels in {path} were replaced since the set was opened: run this command again")
    return rows
