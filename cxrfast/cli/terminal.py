"""How every command shows an error and a table."""

import os
import sys
from typing import NoReturn

import click

from cxrfast.cli.streams import degraded
from cxrfast.tables import Table
from cxrfast.text import masked, printable


def fail(message: str) -> NoReturn:
    rank = os.environ.get("RANK")
    say(f"cxrfast: {safe(f'rank {rank}: ' if rank else '')}{safe(message)}", err=True)
    sys.exit(2)


def say(text: object, err: bool = False) -> None:
    """Print a line on stdout or stderr, in the encoding that the stream has, not in the one that click prefers to ASCII."""
    click.echo(text, file=sys.stderr if err else sys.stdout)


def safe(text: str) -> str:
    """Text from outside for a terminal: without escape sequences and credentials."""
    return printable(masked(text))


def show(*tables: Table) -> None:
    """Print tables on stdout, as wide as the terminal; 120 columns if stdout is not one."""
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 120)
    for number, table in enumerate(tables):
        shown = table.mapped(lambda text: degraded(text, console.encoding))  # before columns are laid out
        console.print(*([""] if number else []), shown.rich(), sep="\n")
