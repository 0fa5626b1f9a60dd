"""The command that serves a page on this machine."""

from pathlib import Path

import click

from cxrfast.cli import options as option
from cxrfast.cli.terminal import say


@click.command()
@click.argument("model", type=option.FOLDER, metavar="OUT")
@click.option("--port", type=click.IntRange(0, 65535), default=8765, help="Port on this machine; 0: a free one.")
@option.flag("--open", "Open the page in a browser.", "opens_browser")
@click.option("--timeout", type=click.FloatRange(1, 3600), default=120, help="Seconds for one film, at most.")
@option.MOVED_SHARDS
@option.DEVICE
@option.TRUST_ARCH
def app(model: Path, port: int, opens_browser: bool, timeout: float, shards: Path | None, device: str) -> None:
    """Show what a model says about films, in a page on this machine.

    OUT: what `cxrfast export` wrote, or a folder of runs. Films stay on this machine, and nothing is stored.
    """
    from cxrfast.app.server import ModelProcess, serve

    serve(ModelProcess(model, device, timeout, shards), port, opens_browser, say)
