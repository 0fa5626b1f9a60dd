"""Errors and tables on the terminal, the same for every command."""

import os
import sys
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from rich.table import Table


def fail(message: str) -> None:
    rank = os.environ.get("RANK")
    click.echo(f"cxrfast: {f'rank {rank}: ' if rank else ''}{message}", err=True)
    sys.exit(2)


def show(*tables: "Table") -> None:
    """Print tables on stdout, as wide as the terminal; 120 columns if stdout is not a terminal."""
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 120)
    for table in tables:
        console.print(table)
