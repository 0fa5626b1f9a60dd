"""Progress of a long step: a bar with rate and time left on a terminal, a plain line now and then elsewhere."""

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from cxrfast.log import console, is_shown
from cxrfast.units import duration

log = logging.getLogger(__name__)


class Advance(Protocol):
    def __call__(self, n: int = 1, note: str = "") -> None:
        """`n` more units are done; `note` replaces the text after the bar."""


def megabytes(advance: Advance) -> Callable[[int], None]:
    """Takes bytes from any thread and advances the progress bar by whole megabytes."""
    lock = threading.Lock()
    done = shown = 0

    def count(n: int) -> None:
        nonlocal done, shown
        with lock:
            done += n
            if step := round(done / 1e6) - shown:
                shown += step
                advance(step)

    return count


@contextmanager
def progress(label: str, total: int, unit: str = "images", every: float = 10.0) -> Iterator[Advance]:
    """Show progress from 0 to `total` on stderr, if `log.is_shown` and `total` is not 0.

    `every`: seconds between plain lines where stderr is not a terminal; a shorter step prints one line at its end.
    """
    if not (total and is_shown()):
        yield lambda n=1, note="": None
    elif sys.stderr.isatty():
        yield from _bar(label, total, unit)
    else:
        yield from _lines(label, total, unit, every)


def _bar(label: str, total: int, unit: str) -> Iterator[Advance]:
    """A bar that fits one line: first the bar, then label and note give way on a narrow terminal."""
    from rich.progress import BarColumn, Progress, ProgressColumn, Task, TimeRemainingColumn
    from rich.table import Column
    from rich.text import Text

    class Shortened(ProgressColumn):
        """Text that ends in an ellipsis where the line is full."""

        def __init__(self, field: str) -> None:
            super().__init__(Column(overflow="ellipsis"))
            self.field = field

        def render(self, task: Task) -> Text:
            return Text(task.fields[self.field], no_wrap=True, overflow="ellipsis")

    class Counts(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(f"{task.completed:,.0f}/{task.total:,.0f} {task.speed or 0:,.3g} {unit}/s", no_wrap=True)

    fixed = Column(no_wrap=True)
    columns = (
        Shortened("label"),
        BarColumn(20),
        Counts(fixed),
        TimeRemainingColumn(table_column=fixed),
        Shortened("note"),
    )
    with Progress(*columns, console=console()) as bar:
        task = bar.add_task("", total=total, label=label, note="")

        def advance(n: int = 1, note: str = "") -> None:
            bar.advance(task, n)
            if note:
                bar.update(task, note=note)

        yield advance


def _lines(label: str, total: int, unit: str, every: float) -> Iterator[Advance]:
    start = last = time.monotonic()
    done, text = 0, ""

    def line() -> None:
        elapsed = max(time.monotonic() - start, 1e-9)
        left = f", {duration((total - done) * elapsed / done)} left" if 0 < done < total else ""
        note = f"  {text}" if text else ""
        log.info(f"{label}: {done:,}/{total:,} {unit}, {done / elapsed:,.1f}/s, {duration(elapsed)}{left}{note}")

    def advance(n: int = 1, note: str = "") -> None:
        nonlocal done, text, last
        done, text = done + n, note or text
        if time.monotonic() - last >= every and done < total:
            last = time.monotonic()
            line()

    yield advance
    line()
