"""`cxrfast app`: loads a model in its own process and serves the page on this machine until Ctrl-C."""

import asyncio
import errno
import logging
import secrets
import socket
import webbrowser
from collections.abc import Callable
from contextlib import suppress

from cxrfast.errors import RunError

try:
    import uvicorn

    from cxrfast.app.process import ModelProcess
    from cxrfast.app.site import create_site
except ImportError as missing:
    raise RunError("cxrfast app needs Starlette and uvicorn: pip install 'cxrfast[app]'") from missing

LOGGER = logging.getLogger(__name__)

HOST = "127.0.0.1"
"""Nobody on another machine can connect."""

CONNECTIONS = 64
"""At once; more are answered with 503."""
LARGEST_HEADERS = 2**14
"""Bytes of a request's first line and headers."""


def serve(model: ModelProcess, port: int, opens_browser: bool, say: Callable[[str], object]) -> None:
    """Serve a model until Ctrl-C. `port` 0: a free one.

    `say` gets the address once the model is loaded. Raises RunError if the port is in use or the model cannot be loaded.
    """
    with _listen(port) as listener, suppress(KeyboardInterrupt):
        asyncio.run(_serve(listener, model, opens_browser, say))
    say("stopped")


def _listen(port: int) -> socket.socket:
    """A socket on the loopback interface. It listens at once: who opens the address early waits instead of being refused."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((HOST, port))
        listener.listen()
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise RunError(f"port {port} is in use: stop the other program, or use --port 0 for a free one") from error
        raise RunError(f"port {port} cannot be used ({error.strerror}): use --port 0 for a free one") from error
    return listener


async def _serve(
    listener: socket.socket, model: ModelProcess, opens_browser: bool, say: Callable[[str], object]
) -> None:
    port = listener.getsockname()[1]
    secret = secrets.token_urlsafe(16)
    hosts = {f"{name}:{port}" for name in (HOST, "localhost")}
    if port == 80:
        hosts |= {HOST, "localhost"}
    say(f"loading the model in {model.folder} …")
    try:
        await model.start()
        for warning in model.about["warnings"]:
            LOGGER.warning(warning)
        address = f"http://{HOST}:{port}/{secret}/"
        say(f"open {address} (Ctrl-C stops)")
        if opens_browser:
            webbrowser.open(address)
        await _server(create_site(model, secret, hosts)).serve(sockets=[listener])
    finally:
        await model.stop()


def _server(site: object) -> uvicorn.Server:
    return uvicorn.Server(
        uvicorn.Config(
            site,  # type: ignore[arg-type]
            http="h11",
            ws="none",
            lifespan="on",
            log_config=None,
            log_level="critical",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            limit_concurrency=CONNECTIONS,
            timeout_keep_alive=5,
            timeout_graceful_shutdown=1,
            h11_max_incomplete_event_size=LARGEST_HEADERS,
        )
    )
