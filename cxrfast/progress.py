"""Progress of a long step: a bar with rate and time left on a terminal, a plain line now and then elsewhere."""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from cxrfast.units import duration


class Advance(Protocol):
    def __call__(self, n: int = 1, note: str = "") -> None:
        """`n` more units are done; `note` replaces the text behind the bar."""


def megabytes(advance: Advance) -> Callable[[int], None]:
    """Bytes go in, from any thread; whole megabytes reach the progress bar."""
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
def progress(
    label: str, total: int, unit: str = "images", every: float = 10.0, quiet: bool = False
) -> Iterator[Advance]:
    """Show `label` moving from 0 to `total`, on stderr.

    `every`: seconds between plain lines where stderr is no terminal; a step shorter than that prints one line at its end.
    `quiet`: show nothing (ranks other than 0, library use).
    """
    if quiet:
        yield lambda n=1, note="": None
    elif sys.stderr.isatty():
        yield from _bar(label, total, unit)
    else:
        yield from _lines(label, total, unit, every)


def _bar(label: str, total: int, unit: str) -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        Task,
        TextColumn,
        TimeRemainingColumn,
    )
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(f"{task.speed or 0:,.1f} {unit}/s")

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        Rate(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(label, total=total, note="")

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
        print(
            f"{label}: {done:,}/{total:,} {unit}, {done / elapsed:,.1f}/s, {duration(elapsed)}{left}{note}",
            file=sys.stderr,
            flush=True,
        )

    def advance(n: int = 1, note: str = "") -> None:
        nonlocal done, text, last
        done, text = done + n, note or text
        if time.monotonic() - last >= every and done < total:
            last = time.monotonic()
            line()

    yield advance
    line()
