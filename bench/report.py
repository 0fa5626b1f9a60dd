"""Results of benchmarks as files and tables: a dataclass comes in; JSON, Markdown, a plot and a terminal's tables go out."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cxrfast.files import replacing, write_bytes, write_json
from cxrfast.tables import Table

ABSENT = "-"
"""Cell of a figure that was not, or could not be, measured."""


class Result(Protocol):
    """What a benchmark found, and where: a dataclass whose fields are the keys of its JSON."""

    @property
    def provenance(self) -> dict[str, Any]: ...

    def tables(self) -> list[Table]: ...

    def plot(self) -> Figure | None:
        """None if nothing can be plotted."""


def write_results(out: Path, name: str, result: Result) -> None:
    """Write NAME.json, NAME.md (the tables, then where it ran) and NAME.png into `out`."""
    write_json(out / f"{name}.json", asdict(result))  # type: ignore[call-overload]
    notes = "\n".join(f"- {what}: {value}" for what, value in result.provenance.items() if value is not None)
    write_bytes(out / f"{name}.md", f"{markdown(result.tables())}\n{notes}\n".encode())
    if plot := result.plot():
        with replacing(out / f"{name}.png") as file:
            plot.savefig(file, format="png", dpi=120)


def markdown(tables: Iterable[Table]) -> str:
    return "\n".join(table.markdown() for table in tables)


class Column(NamedTuple):
    """A column of a table with one line per object or dict."""

    attribute: str
    """Attribute of the object, or key of the dict. A list fills one cell."""
    form: str = ""
    """A format specification, such as `,.1f`."""
    unit: float = 1
    """The value is divided by it."""
    note: str = ""

    def value(self, line: Any) -> Any:
        return line[self.attribute] if isinstance(line, dict) else getattr(line, self.attribute)

    def cell(self, line: Any) -> str:
        value = self.value(line)
        if value is None:
            return ABSENT
        values = value if isinstance(value, list) else [value]
        return " ".join(format(v if self.unit == 1 else v / self.unit, self.form) for v in values)


def table(title: str, columns: Mapping[str, Column], lines: Iterable[object], note: str = "") -> Table:
    """One row per object or dict. A column without any figure is left out, and so is its note; `note` follows the columns'."""
    lines = list(lines)
    cells = {name: [column.cell(line) for line in lines] for name, column in columns.items()}
    cells = {name: column for name, column in cells.items() if set(column) != {ABSENT}}
    notes = [f"{name}: {columns[name].note}." for name in cells if columns[name].note]
    text = [name for name in cells if any(isinstance(columns[name].value(line), str) for line in lines)]
    rows = list(zip(*cells.values(), strict=True))
    return Table(title, list(cells), rows, "\n".join(notes + [note] * bool(note)), text)


def left_out_notes(left_out: Mapping[str, str]) -> list[str]:
    return [f"Left out: {what} ({why})." for what, why in left_out.items()]


def where(provenance: dict[str, Any]) -> str:
    """The GPU, or the processor and its cores."""
    return provenance["gpu"] or f"{provenance['processor']}, {provenance['cores']} cores"


def side_axis(axes: Axes, scales: Iterable[int], labels: Iterable[str] | None = None) -> None:
    """Make x the side of the images, on a log scale with a tick per scale."""
    scales = list(scales)
    axes.set(xscale="log", xlabel="side, px")
    axes.set_xticks(scales, list(labels or map(str, scales)))
    axes.minorticks_off()
