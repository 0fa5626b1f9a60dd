import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cxrfast.errors import ShardError
from cxrfast.shards.format.info import read_info, read_set
from cxrfast.shards.format.rows import (
    COLUMNS,
    REFERENCE,
    kept_names,
    label_names,
    read_rows,
    reference_names,
    write_rows,
)


def table(n: int = 5) -> pd.DataFrame:
    numbers = np.arange(n)
    return pd.DataFrame(
        {
            "row": numbers,
            "image_id": [f"i{i}" for i in numbers],
            "study_id": "s",
            "patient_id": "0010",
            "path": "files/ä.jpg",
            "bytes": np.where(numbers == 2, -1, 10**10),
            "view": ["AP", None, "PA", None, "AP"][:n],
            "height": 3056,
            "width": 2500,
            "split": ["train", None, "test", "validate", None][:n],
            "fold": numbers % 5,
            "block": numbers % 10,
            "Zebra": [1.0, 0.0, -1.0, np.nan, np.nan][:n],
            "Apple": np.nan,
        }
    )


def test_the_same_rows_give_the_same_bytes_whatever_the_frame_s_index_and_column_order(tmp_path):
    write_rows(tmp_path / "one", table())
    other = table().set_index(np.arange(5) + 7)
    write_rows(tmp_path / "two", other[[*reversed(COLUMNS), "Zebra", "Apple"]])
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def with_references() -> pd.DataFrame:
    """The table with a reference standard whose columns stand in the way."""
    rows = table()
    rows.insert(3, REFERENCE + "Zebra", [1.0, -1.0, 0.0, np.nan, np.nan])
    rows.insert(13, REFERENCE + "Apple", np.nan)
    return rows


def test_labels_follow_the_fixed_columns_and_references_follow_the_labels():
    assert label_names(table()) == ("Zebra", "Apple")
    rows = with_references()
    assert label_names(rows) == ("Zebra", "Apple")
    assert reference_names(rows) == ("radiologist/Zebra", "radiologist/Apple")
    assert reference_names(table()) == ()


@pytest.mark.parametrize("rows", [table(), with_references()], ids=["labels", "references, too"])
def test_a_table_comes_back_as_it_was_written_with_the_types_that_other_tools_will_find(tmp_path, rows):
    path = tmp_path / "rows.parquet"
    write_rows(path, rows)
    back, schema = read_rows(path), pq.read_schema(path)
    measured = ["Zebra", "Apple", *reference_names(rows)]
    assert list(back.columns) == [*COLUMNS, *measured]
    pd.testing.assert_frame_equal(back, rows[list(back.columns)], check_dtype=False)
    assert back["row"].dtype == back["bytes"].dtype == np.int64
    assert back["patient_id"].tolist() == ["0010"] * 5, "ids are text: leading zeros stay"
    assert {name: schema.field(name).type for name in COLUMNS} == COLUMNS
    assert {str(schema.field(name).type) for name in measured} == {"float"}
    assert {str(back[name].dtype) for name in measured} == {"float32"}
    assert all(pq.read_table(path)[name].null_count == 2 for name in measured if name.endswith("Zebra"))
    write_rows(tmp_path / "again.parquet", back)
    assert (tmp_path / "again.parquet").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("keep", [0, 4, 0.5, 0.99])
def test_a_table_missing_or_cut_short_is_an_error(tmp_path, keep):
    path = tmp_path / "rows.parquet"
    with pytest.raises(ShardError, match=r"rows.parquet is missing.*run `cxrfast shard` again"):
        read_rows(path)
    write_rows(path, table())
    data = path.read_bytes()
    path.write_bytes(data[: keep if isinstance(keep, int) else int(keep * len(data))])
    with pytest.raises(ShardError, match="cannot be read"):
        read_rows(path)


def test_a_parquet_file_of_something_else_is_refused_and_what_it_lacks_is_named(tmp_path):
    table().drop(columns=["fold", "path"]).to_parquet(tmp_path / "rows.parquet")
    with pytest.raises(ShardError, match="lacks the columns path, fold"):
        read_rows(tmp_path / "rows.parquet")


@pytest.mark.parametrize("read", [read_rows, read_info])
def test_a_changed_byte_in_the_footer_is_a_shard_error_or_harmless(tmp_path, tiny_set, read):
    path = tmp_path / "rows.parquet"
    write_rows(path, table(), read_set(tiny_set))
    data, kind = path.read_bytes(), type(read(path))
    refused = 0
    for position in range(len(data) - 8 - int.from_bytes(data[-8:-4], "little"), len(data), 7):
        path.write_bytes(data[:position] + b"\xfd" + data[position + 1 :])
        try:
            assert type(read(path)) is kind
        except ShardError:
            refused += 1
    assert refused


def with_kept() -> pd.DataFrame:
    return table().assign(
        **{"kept/Age": [61.0, np.nan, 5.7, 0.0, 7.0], "kept/Sex": ["F", None, "M", "M", "F"], "kept/Blank": None}
    )


def test_kept_columns_are_no_labels_and_come_back_with_their_types_and_the_same_bytes(tmp_path):
    path = tmp_path / "rows.parquet"
    rows = with_kept()
    write_rows(path, rows)
    back = read_rows(path)
    assert label_names(rows) == label_names(back) == ("Zebra", "Apple")
    assert kept_names(back) == ("kept/Age", "kept/Sex", "kept/Blank")
    np.testing.assert_array_equal(back["kept/Age"], rows["kept/Age"])
    assert back["kept/Sex"].fillna("?").tolist() == ["F", "?", "M", "M", "F"]
    assert back["kept/Blank"].isna().all()
    types = pq.read_schema(path)
    assert [str(types.field(name).type) for name in kept_names(back)] == ["double", "string", "string"]
    write_rows(tmp_path / "again.parquet", back)
    assert (tmp_path / "again.parquet").read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (pd.Series([1, 2, 3, 4, 5]), "'kept/x' holds int64, not string or double"),
        (pd.Series([1.0, np.inf, 3, 4, 5]), "'kept/x' holds a number that is not finite"),
        (pd.Series(["a", "b", "=1+1", "d", "e"]), r"'kept/x': '=1\+1' would be run as a formula"),
        (pd.Series(["a", "b", "c\u202e", "d", "e"]), r"'kept/x': .* holds the character U\+202E"),
        (pd.Series(["a", "b", "c" * 201, "d", "e"]), "'kept/x': .* has 201 characters"),
    ],
)
def test_kept_values_that_no_build_writes_are_damage(tmp_path, column, message):
    path = tmp_path / "rows.parquet"
    write_rows(path, table())
    back = pq.read_table(path)
    pq.write_table(back.append_column("kept/x", pa.array(column.tolist())), path)
    with pytest.raises(ShardError, match=message):
        read_rows(path)
