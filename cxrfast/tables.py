"""Tables as text, and how numbers are written in them: Markdown or a terminal's table goes out. Touches no files."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from rich.table import Table
from rich.text import Text

from cxrfast import metrics


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


def plus_minus(mean: float, sd: float, sign: str = "") -> str:
    """`0.912 ± 0.004`; the mean alone without a deviation; `undefined` for NaN. `sign`: "+" for gains."""
    if np.isnan(mean):
        return "undefined"
    return f"{mean:{sign}.3f}" + ("" if np.isnan(sd) else f" ± {sd:.3f}")


def cells(values: np.ndarray, sign: str = "") -> list[str]:
    """The cell of each finding from float64 (K, L), with the folds it is defined in if those are not all."""
    defined = (~np.isnan(values)).sum(axis=0)
    return [
        plus_minus(mean, sd, sign) + (f" ({n} of {len(values)} folds)" if 0 < n < len(values) else "")
        for mean, sd, n in zip(*metrics.mean_sd(values), defined, strict=True)
    ]


def folds_text(folds: Sequence[int]) -> str:
    """`5 folds (0, 1, 2, 3, 4)`."""
    return f"{len(folds)} fold{'s' if len(folds) != 1 else ''} ({', '.join(map(str, folds))})"


def best_bold(entries: Sequence[str], values: np.ndarray) -> list[Text]:
    """`entries` for a terminal: that of the highest value bold if there are two, those of NaN dim."""
    known = ~np.isnan(values)
    best = values[known].max() if known.sum() > 1 else np.inf
    styles = ["bold" if value == best else "" if k else "dim" for value, k in zip(values, known, strict=True)]
    return [Text(entry, style=style) for entry, style in zip(entries, styles, strict=True)]
