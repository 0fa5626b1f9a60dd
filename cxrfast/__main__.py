"""`python -m cxrfast` is the `cxrfast` command."""

from cxrfast.cli.main import cli

cli(prog_name="cxrfast")
