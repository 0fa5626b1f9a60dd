"""The rows table: one line an image, `row` = 0…N-1 its number at every scale for ever. Parquet in, pandas out."""

from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from cxrfast.errors import ShardError
from cxrfast.files import replacing

COLUMNS: dict[str, pa.DataType] = {
    "row": pa.int64(),
    "image_id": pa.string(),
    "study_id": pa.string(),
    "patient_id": pa.string(),
    "path": pa.string(),  # relative to the source tree
    "bytes": pa.int64(),  # of the source file when planned; -1 where it was missing
    "view": pa.string(),  # null where unknown
    "height": pa.int32(),  # px, as the source's tables say; 0 where they do not
    "width": pa.int32(),
    "split": pa.string(),  # the official train, validate or test; null where there is none
    "fold": pa.int8(),
    "block": pa.int8(),
}
"""The fixed columns; behind them one float32 column a label with the raw value 1, 0, -1 or null."""


def label_names(rows: pd.DataFrame) -> tuple[str, ...]:
    return tuple(c for c in rows.columns if c not in COLUMNS)


def write_rows(path: Path, rows: pd.DataFrame) -> None:
    """Write the table; the same rows and the same pyarrow give the same bytes."""
    labels = label_names(rows)
    schema = pa.schema([*COLUMNS.items(), *((name, pa.float32()) for name in labels)])
    table = pa.Table.from_pandas(rows[schema.names], schema=schema, preserve_index=False).replace_schema_metadata()
    with replacing(path) as file:
        pq.write_table(table, file, compression="zstd")


def read_rows(path: Path) -> pd.DataFrame:
    """The table as a data frame, in the order of the rows. Raises ShardError if it is missing, damaged or lacks a column."""
    try:
        rows = pq.read_table(path).to_pandas()
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
