"""The rows table: one line per image, `row` = 0…N-1 its number at every scale for ever. Parquet in, pandas out."""

import io
from pathlib import Path
from typing import IO

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from cxrfast.errors import ShardError
from cxrfast.files import replacing
from cxrfast.shards.format.info import SetInfo, parse_set
from cxrfast.shards.format.names import check_labels_settled

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
"""How columns begin that hold a reference standard: raw labels too, carried alongside the labels and never trained on."""

COPY = b"set.json"
"""Key of the copy of set.json in the file's metadata."""


def label_names(rows: pd.DataFrame) -> tuple[str, ...]:
    return tuple(c for c in rows.columns if c not in COLUMNS and not c.startswith(REFERENCE))


def reference_names(rows: pd.DataFrame) -> tuple[str, ...]:
    """The columns of the reference standard, `radiologist/<label>`; none in most sets."""
    return tuple(c for c in rows.columns if c.startswith(REFERENCE))


def write_rows(path: Path, rows: pd.DataFrame, info: SetInfo | None = None) -> None:
    """Write the table, with a copy of set.json (`info`) inside, from which a damaged one is restored.

    The same rows and the same pyarrow give the same bytes.
    """
    with replacing(path) as file:
        _write(file, rows, info.to_bytes() if info else None)


def _write(file: IO[bytes], rows: pd.DataFrame, info: bytes | None) -> None:
    raw = (*label_names(rows), *reference_names(rows))
    schema = pa.schema([*COLUMNS.items(), *((name, pa.float32()) for name in raw)])
    table = pa.Table.from_pandas(rows[schema.names], schema=schema, preserve_index=False)
    table = table.replace_schema_metadata({COPY: info} if info else None)
    pq.write_table(table, file, compression="zstd", write_page_checksum=True)


def read_info(path: Path) -> SetInfo:
    """The copy of set.json inside a rows table. Raises ShardError if there is none."""
    try:
        return parse_set(pq.read_schema(path).metadata[COPY], f"the copy of set.json in {path}")
    except (pa.ArrowException, OSError, KeyError, TypeError) as error:
        raise ShardError(f"{path} holds no copy of set.json ({error}): it is damaged, or of another cxrfast") from error


def is_as_written(path: Path) -> bool:
    """Are these the bytes that `write_rows` wrote? Needs no hash: page checksums hold, and writing it again changes nothing."""
    try:
        table = pq.read_table(path, page_checksum_verification=True)
        again = io.BytesIO()
        _write(again, table.to_pandas(), table.schema.metadata[COPY])
        return again.getvalue() == path.read_bytes()
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError):
        return False


def read_rows(path: Path, relabelling: bool = False) -> pd.DataFrame:
    """The table as a data frame, in the order of the rows. Raises ShardError if it is missing, damaged or lacks a column,
    and while its labels are replaced unless `relabelling` is what the caller does."""
    if not relabelling:
        check_labels_settled(path.parent)
    try:
        rows = pq.read_table(path, page_checksum_verification=True).to_pandas()
    except FileNotFoundError:
        raise ShardError(
            f"{path} is missing: {path.parent} is not a finished plan; run `cxrfast shard` again"
        ) from None
    except (pa.ArrowException, OSError) as error:
        raise ShardError(f"{path} cannot be read ({error}); `cxrfast verify` lists what else is damaged") from error
    absent = [c for c in COLUMNS if c not in rows.columns]
    if absent:
        raise ShardError(f"{path} lacks the columns {', '.join(absent)}: it is not a cxrfast rows table")
    return rows
