"""Tables as Markdown: head and lines of text in, text out. Touches no files."""

from collections.abc import Iterable, Sequence


def markdown_table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """The first column is set left, the others right."""

    def line(entries: Iterable[str]) -> str:
        return "| " + " | ".join(entry.replace("|", "\\|") for entry in entries) + " |\n"

    rule = ["---", *["---:"] * (len(head) - 1)]
    return "".join(line(entries) for entries in (head, rule, *lines))
