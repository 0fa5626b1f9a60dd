"""Tables as text: head and lines come in, Markdown or a terminal's table goes out. Touches no files."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from rich.table import Table


def markdown_table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """The first column is set left, the others right."""

    def line(entries: Iterable[str]) -> str:
        return "| " + " | ".join(entry.replace("|", "\\|") for entry in entries) + " |\n"

    rule = ["---", *["---:"] * (len(head) - 1)]
    return "".join(line(entries) for entries in (head, rule, *lines))


class Section(NamedTuple):
    """A table with what surrounds it, for a terminal and for Markdown."""

    title: str
    head: list[str]
    lines: list[list[str]]
    note: str = ""


def to_tables(sections: list[Section]) -> list[Table]:
    tables = []
    for section in sections:
        table = Table(title=section.title, caption=section.note, caption_justify="left")
        for n, name in enumerate(section.head):
            is_text = n == 0 or name == "what it does"
            table.add_column(name, justify="left" if is_text else "right")
        for line in section.lines:
            table.add_row(*line)
        tables.append(table)
    return tables


def to_markdown(sections: list[Section]) -> str:
    return "\n".join(
        f"## {section.title}\n\n{markdown_table(section.head, section.lines)}\n{section.note}\n" for section in sections
    )
