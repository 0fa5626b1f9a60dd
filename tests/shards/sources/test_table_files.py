import gzip
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from cxrfast.errors import ShardError
from cxrfast.shards.sources.table_files import columns_of, find_table, read_table, tables_in
from cxrfast.shards.sources.text_columns import raw_labels
from cxrfast.shards.storage import Tree

FRAME = pd.DataFrame(
    {
        "id": ["0012", "NA", "null", " 7 ", 'with "quotes", and commas'],
        "blank": ["x", None, None, "None", ""],
        "Edema": ["1.0", "0", "-1", None, "True"],
    }
)


def write(folder: Path, name: str, frame: pd.DataFrame = FRAME) -> Tree:
    if name.endswith((".parquet", ".pq")):
        frame.to_parquet(folder / name)
        return Tree(folder)
    data = frame.to_csv(index=False, sep="\t" if ".tsv" in name else ",").encode()
    (folder / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return Tree(folder)


@pytest.mark.parametrize("name", ["t.csv", "t.csv.gz", "t.tsv", "t.tsv.gz", "t.parquet", "t.pq"])
def test_text_comes_back_as_it_is_written_from_every_kind_of_table(tmp_path, name):
    tree = write(tmp_path, name)
    table = read_table(tree, name, ["blank", "id"], optional=["Edema", "absent"], ids=["id"])
    assert list(table.columns) == ["blank", "id", "Edema"]
    assert table["id"].tolist() == FRAME["id"].tolist(), "leading zeros, spaces and NA stay: they may be ids"
    assert table["blank"].isna().tolist() == [False, True, True, False, True]
    assert table.index[0] == (1 if "p" in name.partition(".")[2] else 2), "lines are counted as an editor counts them"
    assert columns_of(tree, name) == ["id", "blank", "Edema"]
    np.testing.assert_array_equal(raw_labels(table["Edema"], name), np.float32([1, 0, -1, np.nan, 1]))


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", [True, False])
def test_line_ends_and_byte_order_marks_of_other_programs_do_not_matter(tmp_path, newline, bom, end):
    text = newline.join(["id,Edema", "ä,1", "b,0"]) + newline * end
    (tmp_path / "t.csv").write_bytes(bom + text.encode())
    table = read_table(Tree(tmp_path), "t.csv", ["id", "Edema"])
    assert table["id"].tolist() == ["ä", "b"]
    assert table["Edema"].tolist() == ["1", "0"]


def test_the_types_of_a_parquet_table_become_text_without_loss(tmp_path):
    frame = pd.DataFrame(
        {
            "number": pd.array([7, None, 2**62], "Int64"),
            "flag": pd.array([True, None, False], "boolean"),
            "kind": pd.Categorical(["b", None, "a"]),
            "label": [1.0, np.nan, -1.0],
            "nothing": [None, None, None],
            "list": [[1], [2], [3]],
        }
    )
    tree = write(tmp_path, "t.parquet", frame)
    table = read_table(tree, "t.parquet", ["number", "flag", "kind", "label", "nothing"], ids=["number", "kind"])
    assert table["number"].dropna().tolist() == ["7", str(2**62)]
    assert table["kind"].dropna().tolist() == ["b", "a"]
    np.testing.assert_array_equal(raw_labels(table["flag"], "t"), np.float32([1, np.nan, 0]))
    np.testing.assert_array_equal(raw_labels(table["label"], "t"), np.float32([1, np.nan, -1]))
    assert table["nothing"].isna().all()
    with pytest.raises(ShardError, match="holds double in column label: store it as text"):
        read_table(tree, "t.parquet", ["label"], ids=["label"])
    with pytest.raises(ShardError, match=r"holds list.* in column list: store it as text or numbers"):
        read_table(tree, "t.parquet", ["list"])


def test_what_a_table_lacks_is_named_with_what_it_has(tmp_path):
    tree = write(tmp_path, "t.csv")
    with pytest.raises(ShardError, match=r"t.csv lacks the columns path, Mass: its columns: id, blank, Edema"):
        read_table(tree, "t.csv", ["id", "path", "Mass"])
    with pytest.raises(ShardError, match=r"t.csv lacks the columns path: is it the table of X\?"):
        read_table(tree, "t.csv", ["path"], "the table of X")
    with pytest.raises(ShardError, match=r"no u.csv in .* \(its tables: t.csv\)"):
        read_table(tree, "u.csv", ["id"])
    (tmp_path / "v.xlsx").write_bytes(b"PK")
    with pytest.raises(ShardError, match=r"v.xlsx is not a table: give a .csv"):
        read_table(tree, "v.xlsx", ["id"])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "it is empty"),
        (b"\n\n", "it is empty"),
        (b"id,Edema\na,1\nb,c,0\n", "line 3"),
        (b"id,Edema\na,1,2\nb,0,1\n", "all lines have 3 fields but its header, line 1, has 2"),
        (b"id,Edema\na,1\nb", "line 3 has 1 field instead of the 2 of its header"),
        (b'id,Edema\na,1\n"b,0\n', "the quote that opens in line 3 is never closed"),
        (b"id,Edema\n\xe4,1\n", "is not UTF-8: line 2 holds the byte 0xE4"),
        (b"id,Edema,id\na,1,b\n", "has the columns id twice"),
    ],
)
def test_a_damaged_table_is_named_and_never_read_askew(tmp_path, data, message):
    (tmp_path / "t.csv").write_bytes(data)
    with pytest.raises(ShardError, match=rf"t\.csv.*{message}"):
        read_table(Tree(tmp_path), "t.csv", ["id"])


@pytest.mark.parametrize("name", ["t.csv.gz", "t.parquet"])
@pytest.mark.parametrize("keep", [0, 3, 0.5, 0.95])
def test_a_packed_table_cut_short_is_named(tmp_path, name, keep):
    tree = write(tmp_path, name)
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(data[: keep if isinstance(keep, int) else int(keep * len(data))])
    with pytest.raises(ShardError, match=rf"{name} cannot be read as a (CSV|Parquet) table"):
        read_table(tree, name, ["id"])


def test_an_unpacked_table_comes_before_a_packed_one_and_a_first_name_before_a_second(tmp_path):
    tree = Tree(tmp_path)
    assert find_table(tree, ["a.csv"]) is None
    assert find_table(tree, ["a.csv"], "absent") is None
    assert tables_in(tree) == "none"
    for name, found in [("b.csv.gz", "b.csv.gz"), ("b.csv", "b.csv"), ("a.csv.gz", "a.csv.gz"), ("a.csv", "a.csv")]:
        write(tmp_path, name)
        assert find_table(tree, ["a.csv", "b.csv"]) == found
    (tmp_path / "below").mkdir()
    write(tmp_path / "below", "a.csv")
    assert find_table(tree, ["a.csv"], "below") == "below/a.csv"
    assert tables_in(tree) == "a.csv, a.csv.gz, b.csv, b.csv.gz"
