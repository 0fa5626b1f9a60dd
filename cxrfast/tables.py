"""Tables: one class for a terminal, Markdown, HTML and LaTeX. Touches no files."""

import html
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
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
            table.add_column(Text(name), justify="left" if is_text else "right", overflow="fold")
        for number, row in enumerate(self._cells(), 1):
            last_of_many = self.total and number == len(self.rows) - 1
            table.add_row(*(Text(text, style) for text, style in row), end_section=last_of_many)
        return Group(
            *([Text(self.title, "bold")] if self.title else []), table, *([Text(self.note)] if self.note else [])
        )

    def markdown(self) -> str:
        """A heading, the table, the note."""

        def line(entries: Sequence[str]) -> str:
            return "| " + " | ".join(" ".join(entry.split()).replace("|", "\\|") for entry in entries) + " |\n"

        rule = ["---" if is_text else "---:" for is_text in self._text_columns()]
        rows = [[f"**{text}**" if style == "bold" else text for text, style in row] for row in self._cells()]
        heading = f"## {self.title}\n\n" if self.title else ""
        notes = "".join(f"\n{note}\n" for note in self.note.splitlines())
        return heading + "".join(map(line, (self.head, rule, *rows))) + notes

    def html(self) -> str:
        """A `table` element and paragraphs. Classes: `number`, the cells' styles, and `total` of a last row that sums up."""

        def line(tag: str, cells: Sequence[Cell]) -> str:
            found = []
            for (text, style), is_text in zip(cells, self._text_columns(), strict=True):
                names = f"{'' if is_text else 'number'} {style}".strip()
                content = html.escape(text).replace("\n", "<br>")
                found.append(f'<{tag} class="{names}">{content}</{tag}>' if names else f"<{tag}>{content}</{tag}>")
            return f"<tr>{''.join(found)}</tr>\n"

        caption = f"<caption>{html.escape(self.title)}</caption>\n" if self.title else ""
        rows = [line("td", row) for row in self._cells()]
        if self.total and rows:
            rows[-1] = rows[-1].replace("<tr>", '<tr class="total">', 1)
        head = f"<thead>{line('th', [Cell(name) for name in self.head])}</thead>\n"
        notes = "".join(f'<p class="note">{html.escape(note)}</p>\n' for note in self.note.splitlines())
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
            *(rf"\par\footnotesize {_latex(note)}" for note in self.note.splitlines()),
            r"\end{table}",
        ]
        return "\n".join(lines) + "\n"

    def _text_columns(self) -> list[bool]:
        return [n == 0 or name in self.text for n, name in enumerate(self.head)]

    def _cells(self) -> list[list[Cell]]:
        return [[Cell(entry) if isinstance(entry, str) else entry for entry in row] for row in self.rows]


def _latex(text: str) -> str:
    return "".join(LATEX.get(character, character) for character in " ".join(text.split()))
