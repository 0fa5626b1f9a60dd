"""Names in figures, as they are spelt: matplotlib would read `$x_1$` as a formula, and leave `_x` out of a legend."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from cxrfast.text import printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from matplotlib.legend import Legend

LONGEST = 40
"""Characters of a name in a figure; the middle of a longer one is cut out, so that it leaves room for the data."""

END = 12
"""Characters kept of the end of a name that is cut."""


def figure_text(name: str, longest: int = LONGEST) -> str:
    """A name for any text of matplotlib: no formula, one line, at most `longest` characters."""
    text = printable(" ".join(name.split()))
    if len(text) > longest:
        text = f"{text[: longest - END - 1]}…{text[-END:]}"
    return text.replace("$", r"\$")


def add_legend(figure: "Figure", handles: Sequence[Any], names: Sequence[str], **options: Any) -> "Legend":
    """A legend with a name for each handle. `options`: of `Figure.legend`."""
    legend = figure.legend(handles, [" "] * len(names), frameon=False, **options)
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set_text(figure_text(name))
    return legend
