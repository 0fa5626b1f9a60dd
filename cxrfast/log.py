"""What cxrfast says while it works: messages and progress on stderr, through the logger `cxrfast`.

A program that uses cxrfast as a library gets only warnings. `show` makes messages and progress visible, as the command
line does; so does `logging.getLogger("cxrfast").setLevel("INFO")` where the program has its own handlers.
"""

import functools
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from cxrfast.text import masked, printable

if TYPE_CHECKING:
    from rich.console import Console

LOGGER = logging.getLogger("cxrfast")


@functools.cache
def console() -> "Console":
    """Console on stderr. Messages printed on it appear above a progress bar, not inside it."""
    from rich.console import Console

    return Console(stderr=True)


class _Handler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        try:
            console().print(
                printable(masked(self.format(record))), soft_wrap=True, markup=False, highlight=False, emoji=False
            )
        except Exception:
            self.handleError(record)


_HANDLER = _Handler()


def show(rank: int | None = None) -> None:
    """Show messages and progress on stderr; for a `rank` above 0, only warnings, which name the rank.

    `rank`: default $RANK, which torchrun sets.
    """
    if rank is None:
        given = os.environ.get("RANK", "")
        rank = int(given) if given.isdecimal() and given.isascii() else 0  # `distributed.world` refuses others
    LOGGER.addHandler(_HANDLER)
    _HANDLER.setFormatter(logging.Formatter(f"rank {rank}: %(message)s" if rank else "%(message)s"))
    LOGGER.setLevel(logging.WARNING if rank else logging.INFO)


def is_shown() -> bool:
    """Whether messages and progress are visible."""
    return LOGGER.isEnabledFor(logging.INFO)


@contextmanager
def quiet() -> Iterator[None]:
    """Show only warnings inside it: for parts of a larger step that has its own progress."""
    level = LOGGER.level
    LOGGER.setLevel(logging.WARNING)
    try:
        yield
    finally:
        LOGGER.setLevel(level)
