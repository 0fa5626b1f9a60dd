"""One table in four forms: what stands in a cell is text in each of them, never markup."""

import csv
import io
import re
from xml.etree import ElementTree

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from runs import shown

from cxrfast.tables import Cell, Table, csv_text

ODD = "a|b [bold]x</td>& <i> 100 % $x_1 {~^} #\\"


@pytest.fixture
def table() -> Table:
    rows = [["Edema", Cell("0.9", "bold"), "good"], ["Mass", Cell("undefined", "dim"), ODD], ["Mean", "0.9", ""]]
    return Table(f"Scores {ODD}", ["Finding", "AUROC\n256 px", "words"], rows, "One.\nTwo†.", ["words"], total=True)


def test_markdown_is_read_back_as_it_was_written(table: Table) -> None:
    text = table.markdown()
    assert text.startswith("## Scores")
    assert "| Finding | AUROC 256 px | words |\n| --- | ---: | --- |\n| Edema | **0.9** | good |" in text
    assert "a\\|b" in text
    assert text.endswith("\nOne.\n\nTwo†.\n")
    assert MarkdownIt("commonmark").enable("table").render(text).count("<td") == 9


def test_html_is_well_formed_and_holds_the_same_text(table: Table) -> None:
    root = ElementTree.fromstring(f"<div>{table.html()}</div>".replace("<br>", "<br/>"))
    cells = root.findall(".//td")
    assert [cell.text for cell in cells] == ["Edema", "0.9", "good", "Mass", "undefined", ODD, "Mean", "0.9", None]
    assert [cell.get("class") for cell in cells[:6]] == [None, "number bold", None, None, "number dim", None]
    assert [note.text for note in root.findall("p")] == ["One.", "Two†."]
    assert root.findtext(".//caption") == f"Scores {ODD}"


def test_latex_escapes_what_latex_would_read_as_a_command(table: Table) -> None:
    text = table.latex()
    assert r"\begin{tabular}{lrl}" in text
    assert r"Edema & \textbf{0.9} & good \\" in text
    odd = r"a\textbar{}b {[}bold]x\textless{}/td\textgreater{}\& \textless{}i\textgreater{} 100 \% \$x\_1 "
    assert odd + r"\{\textasciitilde{}\textasciicircum{}\} \#\textbackslash{}" in text
    assert text.count(r"\midrule") == 2, "the last row is set apart"


def test_a_terminal_shows_everything_at_any_width(table: Table) -> None:
    assert "[bold]x</td>&" in shown(table, 120)
    assert re.search(r"\x1b\[1m *0\.9\x1b", shown(table, 120, color=True)), "bold"
    for width in (24, 120):
        assert "…" not in shown(table, width), "folded, never cut"
        assert set("".join(ODD.split())) <= set(shown(table, width))


MARKUP = st.sampled_from(
    [
        *"|`[]!<>*_~$^&#@{}()\\-.:'\"/= x1",
        "![x](http://h/p)",
        "<img src=x>",
        "&amp;",
        "http://h",
        "www.h.org",
        "__",
        "a_b",
    ]
)


@given(st.lists(st.characters(exclude_categories=["C", "Z"]) | MARKUP, min_size=1).map("".join).filter(str.strip))
def test_any_text_stays_one_cell_that_shows_it_as_it_is_spelt(text: str) -> None:
    spelt = " ".join(text.split())
    for style in ("", "bold"):
        one = Table(text, ["a", text], [[Cell(text, style), "1"]], f"Note: {text}")
        root = ElementTree.fromstring(f"<div>{one.html()}</div>")
        assert [cell.text for cell in root.findall(".//td")] == [text, "1"]
        assert one.latex().count(" & ") == 2
        rendered = MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(one.markdown())
        page = ElementTree.fromstring(f"<div>{rendered}</div>")
        found = ["".join(element.itertext()) for element in page.iter() if element.tag in ("h2", "th", "td", "p")]
        assert found == [f"{spelt}", "a", spelt, spelt, "1", f"Note: {spelt}"]
        tags = {element.tag for element in page.iter()} - {"strong"}
        assert tags <= {"div", "h2", "table", "thead", "tbody", "tr", "th", "td", "p"}, "neither links nor pictures"


def test_what_reaches_no_reader_as_it_is_spelt_is_escaped() -> None:
    """A terminal would obey it, LaTeX would stop at it, and nobody would see it."""
    odd = "a\x1b[31mb\x07\u202ec\udcffd\0"
    one = Table(odd, [odd, "b"], [[odd, "1"]], odd)
    shown_as = r"a\x1b[31mb\x07\u202ec\udcffd\x00"
    assert shown(one, 120).count(shown_as) == 4
    assert one.html().count(shown_as) == 4
    assert one.latex().count(shown_as.replace("\\", r"\textbackslash{}").replace("[", "{[}")) == 4
    assert one.markdown().count(shown_as.replace("\\", r"\\").replace("[", r"\[")) == 4


def test_addresses_are_no_links_in_markdown_that_makes_them_of_plain_text() -> None:
    text = Table("", ["a"], [["http://h.org www.h.org a@h.org shufflenet_v2_x0_5 x_ _y"]]).markdown()
    assert r"| http\://h.org www\.h.org a\@h.org shufflenet_v2_x0_5 x\_ \_y |" in text


def test_latex_joins_no_characters() -> None:
    text = Table("", ["a"], [["--allow x---y ``q'' ?` !` a-b, it's"]]).latex()
    assert "-{}-allow x-{}-{}-y `{}`q'{}' ?{}` !{}` a-b, it's" in text


def test_csv_holds_no_formula_and_its_numbers_as_they_were() -> None:
    labels = ["=1+1", "-2+cmd|'/C calc'!A0", "@SUM(A1)", "+x", "-3", "Edema", 'a,"b"', "\t=1"]
    frame = pd.DataFrame({"label": labels, "auroc": [0.1 + 0.2, -1, *[float("nan")] * 6], "n": range(8)})
    head, *lines = csv.reader(io.StringIO(csv_text(frame)))
    assert head == ["label", "auroc", "n"]
    spelt = ["'=1+1", "'-2+cmd|'/C calc'!A0", "'@SUM(A1)", "+x", "-3", "Edema", 'a,"b"', "\t=1"]
    assert [line[0] for line in lines] == spelt
    assert lines[0][1:] == ["0.30000000000000004", "0"]
    assert lines[2][1:] == ["", "2"]
