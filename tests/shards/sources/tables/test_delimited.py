"""Text tables, record by record: what is read, and which line an error names."""

import csv
import gzip
import io
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cxrfast.errors import ShardError
from cxrfast.shards.sources.table_files import columns_of, read_table
from cxrfast.shards.sources.tables.delimited import find_layout, read_columns
from cxrfast.shards.storage import Tree

HEADER = "path,patient,label,comment"


def read(folder: Path, text: str | bytes, name: str = "t.csv", columns: str = HEADER) -> dict[int, list[str]]:
    """{line: fields} of a table, empty text for blanks."""
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    table = read_table(Tree(folder), name, columns.split(","))
    return {line: ["" if v != v or v is None else v for v in fields] for line, *fields in table.itertuples(name=None)}


def rows(*comments: str) -> str:
    return f"{HEADER}\n" + "".join(f"i{k:02d}.jpg,p{k},{k % 2},{comment}\n" for k, comment in enumerate(comments))


def refusal(folder: Path, text: str | bytes, name: str = "t.csv") -> str:
    """The message with which a table is refused: one line."""
    with pytest.raises(ShardError) as error:
        read(folder, text, name)
    assert str(error.value).count("\n") == 0
    assert len(str(error.value)) < 600
    return str(error.value)


def test_a_quote_that_swallows_rows_is_named_where_it_opens_and_where_it_closes(tmp_path):
    clear = ["clear"] * 12
    both = [*clear[:2], '"left base opacity', *clear[3:8], '"left base opacity', *clear[9:]]
    assert re.search(
        r"quote opens in line 4 and closes in line 10, .*looks like lines .*\(line 5\)", refusal(tmp_path, rows(*both))
    )
    # the second quote closes the first as RFC 4180 wants it, in the same line or at the end of a later one
    for last in ('left base"', 'left, base"'):
        assert re.search(
            r"quote opens in line 4 and closes in line 10",
            refusal(tmp_path, rows(*clear[:2], '"left base', *clear[3:8], last, *clear[9:])),
        )
    assert re.search(
        "quote opens in line 4 and closes in line 5", refusal(tmp_path, rows(*clear[:2], '"left', 'base"', *clear))
    )
    assert re.search(
        r"quote opens in line 4 and is never closed, and what it quotes",
        refusal(tmp_path, rows(*clear[:2], '"left base', *clear)),
    )
    # the only evidence stands before and after the quotes
    text = rows(*clear).replace("i03.jpg", '"i03.jpg').replace("i04.jpg", 'i04.jpg"')
    assert re.search("quote opens in line 5 and closes in line 6", refusal(tmp_path, text))
    assert re.search("the quote that opens in line 2 is never closed", refusal(tmp_path, rows('"left base')))
    assert re.search(
        "opens and closes in line 2, where more text follows", refusal(tmp_path, rows('"left" base', "clear"))
    )
    assert re.search(
        "opens and closes in line 2, where more text follows", refusal(tmp_path, rows('"left "big" base"', "clear"))
    )


def test_a_quote_in_any_column_does_not_swallow_rows(tmp_path):
    good = rows(*["clear"] * 9).splitlines()
    for column in range(4):
        fields = good[3].split(",")
        fields[column] = '"' + fields[column]
        for end in ('"', '",x', '"",y'):
            text = [*good[:3], ",".join(fields), *good[4:7], good[7] + end, *good[8:], ""]
            assert re.search(r"opens in line 4", refusal(tmp_path, "\n".join(text)))


def test_a_comment_of_several_lines_is_read_and_lines_are_counted_as_an_editor_does(tmp_path):
    comments = ["a\nb", "", 'the "left", base;\n\n1, 2, 3\n', "hr 80, bp 120, t 37, x\ny, z, 0, 1", "\n", '"', ",\n,"]
    for ends in ("\n", "\r\n", "\r"):
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(HEADER.split(","))
        writer.writerows([f"i{k:02d}.jpg", f"p{k}", str(k % 2), text] for k, text in enumerate(comments))
        found = read(tmp_path, out.getvalue().replace("\n", ends).encode())
        assert [fields[3] for fields in found.values()] == comments
        lines = out.getvalue().split("\n")
        assert [lines[line - 1].split(",")[0] for line in found] == [f"i{k:02d}.jpg" for k in range(len(comments))]
    # also with the comment in the first column
    text = 'comment,path,patient,label\n"left\nbase",i0.jpg,p0,1\n\n"a, b\nc",i1.jpg,p1,0\n'
    assert read(tmp_path, text) == {2: ["i0.jpg", "p0", "1", "left\nbase"], 5: ["i1.jpg", "p1", "0", "a, b\nc"]}


@pytest.mark.parametrize("name", ["t.csv", "t.tsv", "t.csv.gz"])
def test_short_and_long_lines_are_named_with_their_numbers_of_fields(tmp_path, name):
    def said(text: str) -> str:
        data = text.replace(",", "\t" if "tsv" in name else ",").encode()
        return refusal(tmp_path, gzip.compress(data) if "gz" in name else data, name)

    good = rows(*["clear"] * 8).splitlines(keepends=True)
    short = [line.replace(",clear", "") for line in good]
    assert re.search(
        r"\(lines 5, 6 have 3 fields instead of the 4 of its header\)",
        said("".join([*good[:4], *short[4:6], *good[6:]])),
    )
    assert re.search("line 5 has 3 fields", said("".join([*good[:4], short[4]])))
    assert re.search("line 7 has 1 field instead of the 4", said("".join([*good[:4], "\n \n", "i09.jpg"])))
    assert re.search("line 5 has 5 fields", said("".join([*good[:4], good[4].rstrip() + ",\n", *good[5:]])))
    assert re.search(
        "have 5 fields instead of the 4 of its header, as all lines do: name the column",
        said("".join([good[0], *(line.rstrip() + ",\n" for line in good[1:])])),
    )
    assert re.search("line 5 has 7 fields", said("".join([*good[:4], good[4].rstrip(), *good[5:]])))
    assert re.search("lines 5, 6 have 3 to 5 fields", said("".join([*good[:4], short[4], "x,x,x,x,x\n"])))
    assert re.search("line 4 repeats the header", said("".join([*good[:3], *good])))
    assert re.search("holds no lines below its header", said(good[0]))


def test_lines_after_records_of_two_lines_and_blank_lines_keep_their_number(tmp_path):
    text = (
        f"\n{HEADER}\n" + "".join(f'i{k}.jpg,p{k},0,"a\nb"\n' for k in range(3)) + "\n\ni3.jpg,p3,7,c\n \ni4.jpg,p4,0\n"
    )
    assert re.search("line 13 has 3 fields", refusal(tmp_path, text))
    assert list(read(tmp_path, text.replace("p4,0\n", "p4,0,c"))) == [3, 5, 7, 11, 13]


def test_a_quote_inside_an_unquoted_field_is_text_unless_it_closes_what_nothing_opened(tmp_path):
    assert read(tmp_path, rows('the "left" base', '3" tube'), columns="path,label") == {
        2: ["i00.jpg", "0"],
        3: ["i01.jpg", "1"],
    }
    assert read(tmp_path, rows('tube 3"'), columns="path") == {2: ["i00.jpg"]}, "no field is quoted in this table"
    assert read(tmp_path, rows('the "left" base'))[2][3] == 'the "left" base'
    assert re.search(r"line 2 has a quote in an unquoted field \(comment\)", refusal(tmp_path, rows('tube 3"')))
    assert re.search(r"line 2 has a quote in an unquoted field \(comment\)", refusal(tmp_path, rows('3" tube')))
    assert re.search(
        r"line 3 has a quote in an unquoted field \(comment\)", refusal(tmp_path, rows("clear", ' "left"'))
    )
    text = rows("clear", 'left"', '"clear"')
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(ShardError, match=r"line 3 has a quote in an unquoted field \(comment\)"):
        read_table(Tree(tmp_path), "t.csv", ["path"])
    assert re.search("its header, line 1, has a quote inside a name", refusal(tmp_path, 'path,"patient"x,label\n'))
    assert re.search("its header, line 1, has a quote inside a name", refusal(tmp_path, 'path, "patient",label\n'))


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("name", ["t.csv", "t.tsv"])
def test_the_delimiter_is_found_out_and_said(tmp_path, caplog, delimiter, name):
    out = io.StringIO()
    writer = csv.writer(out, delimiter=delimiter, lineterminator="\n")
    written = [["i0.jpg", "p0", "0,5", "a;b|c\td"], ["i1.jpg", "p1", "1", "x, y"]]
    writer.writerows([HEADER.split(","), *written])
    assert list(read(tmp_path, out.getvalue(), name).values()) == written
    assert columns_of(Tree(tmp_path), name) == HEADER.split(",")
    expected = "\t" if name == "t.tsv" else ","
    assert len(caplog.messages) == (delimiter != expected)
    if delimiter != expected:
        used = "tabs" if delimiter == "\t" else f"'{delimiter}'"
        assert f"{name}: columns are separated by {used}, not " in caplog.text


def test_delimiters_inside_names_and_mixed_delimiters_do_not_mislead(tmp_path):
    nih = "Image;Sizes[Width,Height];Spacing[x,y]\na.png;2;0,1\nb.png;3;0\n"
    assert read(tmp_path, nih, columns="Image") == {2: ["a.png"], 3: ["b.png"]}
    assert read(tmp_path, "sep=;\npath;x,y\na;1\n", columns="path") == {3: ["a"]}
    assert read(tmp_path, "path\n0001\n\n0002", columns="path") == {2: ["0001"], 4: ["0002"]}
    lines = rows(*["clear"] * 5).splitlines()
    lines[3] = lines[3].replace(",", ";")
    assert re.search("line 4 has 1 field instead of the 4", refusal(tmp_path, "\n".join(lines)))
    lines[3] = lines[3].replace(";", ",", 2)
    assert re.search("line 4 has 3 fields instead of the 4", refusal(tmp_path, "\n".join(lines)))


fields = st.text(st.sampled_from('ab,;"\n 0\t|'), max_size=8)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.lists(fields, min_size=3, max_size=3), min_size=1, max_size=8),
    st.sampled_from([",", ";", "\t", "|"]),
    st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
)
def test_what_python_writes_is_read_back_on_the_right_lines_or_refused_as_ambiguous(records, delimiter, quoting):
    out = io.StringIO()
    writer = csv.writer(out, delimiter=delimiter, quoting=quoting, lineterminator="\n")
    writer.writerow(["id", "x", "y"])
    starts = []
    for record in records:
        starts.append(out.getvalue().count("\n") + 1)
        writer.writerow(["r1.png", *record[1:]])
    layout, problem = find_layout(out.getvalue(), delimiter), ""
    try:
        lines, columns = read_columns(layout, [0, 1, 2])
    except ValueError as error:
        problem = str(error)
    if problem:
        assert "looks like lines of the table" in problem
        return
    assert lines == starts
    assert [[v or "" for v in column.to_pylist()] for column in columns[1:]] == [
        list(c) for c in zip(*records, strict=True)
    ][1:]
