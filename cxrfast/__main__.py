"""`python -m cxrfast` is the `cxrfast` command."""

from cxrfast.cli import cli

cli(prog_name="cxrfast")
