"""How every command shows an error and a table."""

import os
import sys

import click

from cxrfast.tables import Table
from cxrfast.text import masked, printable


def fail(message: str) -> None:
    rank = os.environ.get("RANK")
    click.echo(f"cxrfast: {f'rank {rank}: ' if rank else ''}{safe(message)}", err=True)
    sys.exit(2)


def safe(text: str) -> str:
    """Text from outside for a terminal: without escape sequences and credentials."""
    return printable(masked(text))


def show(*tables: Table) -> None:
    """Print tables on stdout, as wide as the terminal; 120 columns if stdout is not one."""
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 120)
    for number, table in enumerate(tables):
        console.print(*([""] if number else []), table.rich(), sep="\n")
