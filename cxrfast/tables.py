"""Tables: one class for a terminal, Markdown, HTML and LaTeX, and data frames as CSV. Touches no files.

Text may come from outside, such as the name of a label. Each form shows it as it is spelt, and nothing in it is markup.
"""

import html
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from cxrfast.text import FORMULA, printable

if TYPE_CHECKING:
    import pandas as pd
    from rich.console import Group

LATEX = {c: f"\\{c}" for c in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "[": "{[}",  # at the start of a row it would be an argument of the line break before
    "*": "{*}",
    "−": "$-$",
    "→": r"$\rightarrow$",
}
"""What LaTeX reads as a command, and what its default fonts lack."""

LIGATURE = re.compile(r"[-'`,?!](?=[-'`,])")
"""Start of what LaTeX joins into one character, such as -- and ``."""

LONG = 60
"""Characters above which a cell of an HTML table should be wrapped."""

MARKDOWN = re.compile(r"[\\`*\[\]{}<>|!~^$&#@]|(?<![^\W_])_|_(?![^\W_])|:(?=//)|(?<=\bwww)\.", re.IGNORECASE)
"""What Markdown, as GitHub and pandoc read it, takes for markup or for an address; `_` only at the edge of a word."""


class Cell(NamedTuple):
    """A cell that stands out: "bold" for the best value, "dim" for an undefined one, or another of rich's styles."""

    text: str
    style: str = ""


@dataclass(frozen=True)
class Table:
    """Rows of text under a head; the note follows below. A line break in the head is a space outside a terminal."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str | Cell]]
    note: str = ""
    """Each line is a paragraph."""
    text: Collection[str] = ()
    """Heads of the columns of text, next to the first; the others hold numbers, which are right-aligned."""
    total: bool = False
    """The last row sums up the others and is separated from them."""

    def mapped(self, change: Callable[[str], str]) -> "Table":
        """The same table with every text changed."""
        return Table(
            title=change(self.title),
            head=[change(name) for name in self.head],
            rows=[[Cell(change(text), style) for text, style in row] for row in self._cells()],
            note=change(self.note),
            text=[change(name) for name in self.text],
            total=self.total,
        )

    def rich(self) -> "Group":
        """For a terminal. Long cells are folded, never cut."""
        from rich import box
        from rich.console import Group
        from rich.table import Table as RichTable
        from rich.text import Text

        table = RichTable(box=box.HORIZONTALS, padding=(0, 1, 0, 0), pad_edge=False)
        for name, is_text in zip(self.head, self._text_columns(), strict=True):
            table.add_column(Text(printable(name)), justify="left" if is_text else "right", overflow="fold")
        for number, row in enumerate(self._cells(), 1):
            last_of_many = self.total and number == len(self.rows) - 1
            table.add_row(*(Text(printable(text), style) for text, style in row), end_section=last_of_many)
        title, note = printable(self.title), printable(self.note)
        return Group(*([Text(title, "bold")] if title else []), table, *([Text(note)] if note else []))

    def markdown(self) -> str:
        """A heading, the table, the note."""

        def line(entries: Sequence[str]) -> str:
            return "| " + " | ".join(entries) + " |\n"

        rule = ["---" if is_text else "---:" for is_text in self._text_columns()]
        rows = [
            [f"**{markdown_text(text)}**" if style == "bold" else markdown_text(text) for text, style in row]
            for row in self._cells()
        ]
        heading = f"## {markdown_text(self.title)}\n\n" if self.title else ""
        notes = "".join(f"\n{markdown_text(note)}\n" for note in self._notes())
        return heading + "".join(map(line, (list(map(markdown_text, self.head)), rule, *rows))) + notes

    def html(self) -> str:
        """A `table` element and paragraphs.

        Classes: `number`, `long` (more than LONG characters), the cells' styles, and `total` of a last row that sums up.
        """

        def line(tag: str, cells: Sequence[Cell]) -> str:
            found = []
            for (text, style), is_text in zip(cells, self._text_columns(), strict=True):
                classes = ("" if is_text else "number", "long" if len(text) > LONG else "", style)
                names = " ".join(filter(None, classes))
                content = _html(text).replace("\n", "<br>")
                found.append(f'<{tag} class="{names}">{content}</{tag}>' if names else f"<{tag}>{content}</{tag}>")
            return f"<tr>{''.join(found)}</tr>\n"

        caption = f"<caption>{_html(self.title)}</caption>\n" if self.title else ""
        rows = [line("td", row) for row in self._cells()]
        if self.total and rows:
            rows[-1] = rows[-1].replace("<tr>", '<tr class="total">', 1)
        head = f"<thead>{line('th', [Cell(name) for name in self.head])}</thead>\n"
        notes = "".join(f'<p class="note">{_html(note)}</p>\n' for note in self._notes())
        return f"<table>\n{caption}{head}<tbody>{''.join(rows)}</tbody>\n</table>\n{notes}"

    def latex(self) -> str:
        """A `table` environment for the package booktabs."""

        def line(cells: Sequence[Cell]) -> str:
            found = [f"\\textbf{{{_latex(text)}}}" if style == "bold" else _latex(text) for text, style in cells]
            return " & ".join(found) + r" \\"

        rows = [line(row) for row in self._cells()]
        if self.total and len(rows) > 1:
            rows.insert(-1, r"\midrule")
        columns = "".join("l" if is_text else "r" for is_text in self._text_columns())
        lines = [
            r"\begin{table}",
            rf"\caption{{{_latex(self.title)}}}",
            rf"\begin{{tabular}}{{{columns}}}",
            *(r"\toprule", line([Cell(name) for name in self.head]), r"\midrule", *rows, r"\bottomrule"),
            r"\end{tabular}",
            *(rf"\par\footnotesize {_latex(note)}" for note in self._notes()),
            r"\end{table}",
        ]
        return "\n".join(lines) + "\n"

    def _notes(self) -> list[str]:
        return [note for note in self.note.split("\n") if note.strip()]

    def _text_columns(self) -> list[bool]:
        return [n == 0 or name in self.text for n, name in enumerate(self.head)]

    def _cells(self) -> list[list[Cell]]:
        return [[Cell(entry) if isinstance(entry, str) else entry for entry in row] for row in self.rows]


def _html(text: str) -> str:
    return html.escape(printable(text))


def _latex(text: str) -> str:
    apart = LIGATURE.sub("\\g<0>\0", " ".join(printable(text).split()))  # printable text holds no \0
    return "".join(LATEX.get(character, character) for character in apart).replace("\0", "{}")


def markdown_text(text: str) -> str:
    """One line of text in which nothing is markup."""
    return MARKDOWN.sub(r"\\\g<0>", " ".join(printable(text).split()))


def csv_text(frame: "pd.DataFrame") -> str:
    """A data frame as CSV, without its index. A text that a spreadsheet would run as a formula follows an apostrophe."""
    plain = frame.copy()
    for name, column in frame.items():
        if any(isinstance(value, str) for value in column):
            plain[name] = column.map(no_formula)
    return plain.to_csv(index=False, lineterminator="\n")


def no_formula(value: object) -> object:
    """A text as a CSV file may hold it; other values are unchanged."""
    if not isinstance(value, str):
        return value
    text = printable(value)
    return f"'{text}" if FORMULA.match(text) else text
