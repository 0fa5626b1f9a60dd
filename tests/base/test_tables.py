"""One table in four forms: what stands in a cell is text in each of them, never markup."""

import re
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from runs import shown

from cxrfast.tables import Cell, Table

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


@given(st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1))
def test_any_text_stays_one_cell(text: str) -> None:
    one = Table("", ["a", "b"], [[text, "1"]])
    root = ElementTree.fromstring(f"<div>{one.html()}</div>")
    assert [cell.text for cell in root.findall(".//td")] == [text, "1"]
    assert one.latex().count(" & ") == 2
    assert len(one.markdown().splitlines()) == 3
