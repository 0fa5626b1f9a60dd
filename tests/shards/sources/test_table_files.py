import gzip
import io
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cxrfast.errors import ShardError
from cxrfast.shards.sources.table_files import columns_of, find_table, read_list, read_table, tables_in
from cxrfast.shards.sources.tables.text_columns import raw_labels
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
    (folder / name).write_bytes(gzip.compress(data, mtime=0) if name.endswith(".gz") else data)
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
        (b"id,Edema\na,1,2\nb,0,1\n", "lines 2, 3 have 3 fields instead of the 2 of its header, as all lines do"),
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


TEXT = "path,patient,label\ni0.jpg,Müller,0\ni1.jpg,Möller,1\n"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("name", ["t.csv", "T.CSV.GZ"])
def test_text_with_or_without_a_byte_order_mark_is_read_and_the_mark_is_never_data(tmp_path, encoding, name):
    marked = TEXT.replace("i1", "\ufeffi1").replace("path", '"path"')  # as where two files were joined
    for text in (TEXT, marked):
        data = text.encode(encoding)
        (tmp_path / name).write_bytes(gzip.compress(data, mtime=0) if "GZ" in name else data)
        assert read_table(Tree(tmp_path), name, ["path", "patient"]).to_numpy().tolist() == [
            ["i0.jpg", "Müller"],
            ["i1.jpg", "Möller"],
        ]
        assert columns_of(Tree(tmp_path), name) == ["path", "patient", "label"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (TEXT.encode("latin-1"), r"is not UTF-8: line 2 holds the byte 0xFC. Convert it, .*iconv -f LATIN1 -t UTF-8"),
        (TEXT.replace("\n", "\r\n").replace("ü", "u").encode("cp1252"), "is not UTF-8: line 3 holds the byte 0xF6"),
        (TEXT.replace("\n", "\r").replace("ü", "u").encode("cp1252"), "is not UTF-8: line 3 holds the byte 0xF6"),
        (TEXT.encode()[: TEXT.encode().index("ö".encode()) + 1], "ends within a character, in line 3: it was cut off"),
        (TEXT.encode("utf-16-le"), "is UTF-16 without a byte order mark: .* -f UTF-16LE"),
        (TEXT.encode("utf-16-be"), "is UTF-16 without a byte order mark: .* -f UTF-16BE"),
        (TEXT.encode("utf-16")[:-1], "starts with a byte order mark of UTF-16 but is not, in line 3"),
        (TEXT.encode() + b"\0" * 9, "holds NUL bytes, first in line 4"),
        (TEXT.replace("ö", "\ufffd").encode(), r"lost characters of patient in line 3"),
    ],
)
def test_what_is_not_text_is_named_with_its_line_and_what_to_do(tmp_path, data, message):
    (tmp_path / "t.csv").write_bytes(data)
    with pytest.raises(ShardError, match=rf"t\.csv {message}"):
        read_table(Tree(tmp_path), "t.csv", ["path", "patient"])


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("t.csv", b"PK\x03\x04", "is an Excel workbook"),
        ("t.csv", b"\xd0\xcf\x11\xe0", "is an old Excel workbook"),
        ("t.csv", b"\n <!DOCTYPE html><html>", "is a web page or XML"),
        ("t.csv", "\ufeff<html>".encode(), "is a web page or XML"),
        ("t.tsv", b"<?xml version='1.0'?><Error><Code>AccessDenied</Code>", "is a web page or XML"),
        (
            "t.csv",
            b"version https://git-lfs.github.com/spec/v1\n",
            "is a Git LFS pointer, not the table: run `git lfs pull`",
        ),
        ("t.parquet", b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
        ("t.csv.gz", b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
        ("t.csv.gz", gzip.compress(b"<html>", mtime=0), "is a web page or XML"),
        ("t.csv", b"PAR1", "is a Parquet table: rename it to end in .parquet"),
        ("t.csv", gzip.compress(TEXT.encode(), mtime=0), "is compressed with gzip: rename it to end in .gz"),
        (
            "t.csv.gz",
            gzip.compress(gzip.compress(TEXT.encode(), mtime=0), mtime=0),
            "is compressed with gzip twice: decompress it once",
        ),
        ("t.csv.gz", TEXT.encode(), "is not compressed with gzip: rename it without .gz"),
        ("t.csv.gz", gzip.compress(TEXT.encode(), mtime=0) + b"more", "cannot be read as a CSV table"),
        ("t.csv", b"\xef\xbb\xbf", "it is empty"),
        ("t.csv", b"path,patient\n\n", "holds no lines below its header"),
    ],
)
def test_a_file_that_is_no_table_is_named_for_what_it_is(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ShardError, match=rf"{name} .*{message}") as error:
        read_table(Tree(tmp_path), name, ["path", "patient"])
    assert "\n" not in str(error.value)


def test_gzip_of_several_members_is_read_whole(tmp_path):
    first, second = TEXT.encode()[:30], TEXT.encode()[30:]
    (tmp_path / "t.csv.gz").write_bytes(gzip.compress(first, mtime=0) + gzip.compress(second))
    assert len(read_table(Tree(tmp_path), "t.csv.gz", ["path"])) == 2


def test_blanks_and_invisible_characters_around_column_names_do_not_count(tmp_path):
    (tmp_path / "t.csv").write_text("\u200bpath\u00a0, Lung Opacity ,label\ufeff,label \na,b,0,1\n")
    tree = Tree(tmp_path)
    assert columns_of(tree, "t.csv") == ["path", "Lung Opacity", "label", "label"]
    assert read_table(tree, "t.csv", ["path", "Lung Opacity"]).to_numpy().tolist() == [["a", "b"]]
    assert list(read_table(tree, "t.csv", [" Lung Opacity"])) == [" Lung Opacity"], "named as it was asked for"
    with pytest.raises(ShardError, match="has the columns label twice"):
        read_table(tree, "t.csv", ["path", "label"])
    with pytest.raises(ShardError, match=r"lacks the columns Lung opacty: did you mean 'Lung Opacity'\? its columns"):
        read_table(tree, "t.csv", ["Lung opacty"])


def parquet(folder: Path, table: pa.Table) -> Tree:
    out = io.BytesIO()
    pq.write_table(table, out)
    (folder / "t.parquet").write_bytes(out.getvalue())
    return Tree(folder)


def test_text_of_parquet_tables_may_be_stored_as_bytes_and_row_numbers_are_named(tmp_path):
    values = ["ä", None, "", "0012"]
    raw = pa.array([None if v is None else v.encode() for v in values])
    for column in (raw, raw.cast(pa.large_binary()), raw.dictionary_encode(), pa.array(values, pa.large_string())):
        read = read_table(parquet(tmp_path, pa.table({" id\u00a0": column})), "t.parquet", ["id"])["id"]
        assert read.fillna("").tolist() == ["ä", "", "", "0012"]
        assert read.index.tolist() == [1, 2, 3, 4]
    with pytest.raises(ShardError, match="bytes that are not UTF-8 in column id, row 2"):
        read_table(parquet(tmp_path, pa.table({"id": [b"a", b"\xff"]})), "t.parquet", ["id"])
    twice = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], ["id", "id "])
    with pytest.raises(ShardError, match="has the columns id twice"):
        read_table(parquet(tmp_path, twice), "t.parquet", ["id"])
    with pytest.raises(ShardError, match=r"holds struct.* in column id"):
        read_table(parquet(tmp_path, pa.table({"id": [{"a": 1}]})), "t.parquet", ["id"])
    with pytest.raises(ShardError, match="holds no lines"):
        read_table(parquet(tmp_path, pa.table({"id": pa.array([], pa.string())})), "t.parquet", ["id"])
    numbers = read_table(parquet(tmp_path, pa.table({"x": [float("nan"), 1.0]})), "t.parquet", ["x"])["x"]
    assert numbers.isna().tolist() == [True, False]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_lists_are_read_without_byte_order_marks_and_blank_lines(tmp_path, encoding):
    (tmp_path / "l.txt").write_bytes("a.png\r\n\r\n  b.png \r\n\ufeffc.png\u200b d.png".encode(encoding))
    assert read_list(Tree(tmp_path), "l.txt").to_dict() == {1: "a.png", 3: "b.png", 4: "d.png"}
    assert read_list(Tree(tmp_path), "l.txt").tolist() == ["a.png", "b.png", "c.png", "d.png"]
    for data, message in ((b"a.png\nb\xe9.png", "is not UTF-8: line 2"), (b"<html>", "is a web page")):
        (tmp_path / "l.txt").write_bytes(data)
        with pytest.raises(ShardError, match=rf"l\.txt {message}"):
            read_list(Tree(tmp_path), "l.txt")
