"""Sections of a benchmark's report, as tables for the terminal and as Markdown."""

from typing import NamedTuple

from rich.table import Table

from cxrfast.tables import markdown_table


class Section(NamedTuple):
    title: str
    head: list[str]
    lines: list[list[str]]
    note: str


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
