"""The app's pages and answers. Nothing is kept between two requests: the page sends a film again for each question.

Every request is checked first: the host it names, the origin of a POST, the secret in its path. Every answer forbids the
browser to load anything from elsewhere, to store it and to show it inside another page.
"""

import hmac
import logging
from collections.abc import AsyncIterator, Container
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import Any

import anyio
from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cxrfast.app.limits import Limits, Places, Refusal, read_film
from cxrfast.app.process import ModelProcess

LOGGER = logging.getLogger(__name__)

POLICY = "; ".join(
    (
        "default-src 'none'",
        *(f"{kind}-src 'self'" for kind in ("script", "style", "img", "connect")),
        *(f"{kind} 'none'" for kind in ("base-uri", "form-action", "frame-ancestors")),
    )
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
}
"""Of every answer."""

ASSETS = {
    "": ("page.html", "text/html"),
    "style.css": ("style.css", "text/css"),
    "page.js": ("page.js", "text/javascript"),
    "films.js": ("films.js", "text/javascript"),
    "viewer.js": ("viewer.js", "text/javascript"),
    "findings.js": ("findings.js", "text/javascript"),
    "icon.svg": ("icon.svg", "image/svg+xml"),
}
"""Path below the secret → file in `page/` and its type."""

LINGER_BYTES, LINGER_SECONDS = 2**28, 5.0
"""How much of a refused body is read and dropped, so that the sender is there to read the answer."""


def create_site(model: ModelProcess, secret: str, hosts: Container[str], limits: Limits | None = None) -> ASGIApp:
    """The ASGI app. `secret`: first part of every path. `hosts`: what the Host header may say, with the port."""
    limits = limits or Limits()
    places = Places(limits)

    async def describe(request: Request) -> Response:
        return JSONResponse({**model.about, "film_bytes": limits.film_bytes})

    async def answer(request: Request) -> Response:
        task = _task(request, model.about)
        with places.place():
            film = await read_film(request, limits)

            async def is_wanted() -> bool:
                return not await request.is_disconnected()

            found = await model.ask(task, film, is_wanted)
        return JSONResponse(found)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        await model.start()
        try:
            yield
        finally:
            await model.stop()

    routes = [
        *(Route(f"/{path}", _asset(*asset)) for path, asset in ASSETS.items()),
        Route("/api/model", describe),
        Route("/api/{question:str}", answer, methods=["POST"]),
    ]
    handlers: dict[Any, Any] = {HTTPException: _http_error, Refusal: _refused}
    return Guard(Starlette(routes=routes, exception_handlers=handlers, lifespan=lifespan), secret, hosts)


def _asset(name: str, kind: str) -> Any:
    content = (files("cxrfast.app") / "page" / name).read_bytes()

    async def send(request: Request) -> Response:
        return Response(content, media_type=kind)

    return send


def _task(request: Request, about: dict[str, Any]) -> dict[str, Any]:
    """The question that a path and its query ask. Raises Refusal for one that the model cannot have."""
    question = request.path_params["question"]
    if question in ("scores", "pictures"):
        return {"question": question}
    if question != "map":
        raise Refusal(404, "there is nothing here")
    scale, finding = (_number(request.query_params.get(name, "")) for name in ("scale", "finding"))
    if scale not in about["scales"] or finding not in range(len(about["labels"])):
        raise Refusal(404, "the model has no such scale or finding")
    return {"question": question, "scale": scale, "finding": finding}


def _number(text: str) -> int:
    return int(text) if text.isascii() and text.isdigit() and len(text) < 9 else -1


# Errors


def _error(status: int, words: str) -> Response:
    headers = {"retry-after": "2"} if status == 503 else None
    return JSONResponse({"error": words}, status, headers)


async def _refused(request: Request, refusal: Refusal) -> Response:
    return _error(refusal.status, str(refusal))


async def _http_error(request: Request, error: HTTPException) -> Response:
    return _error(error.status_code, "there is nothing here" if error.status_code == 404 else error.detail.lower())


# What every request must pass


class Guard:
    """Checks each request before the app sees it, and adds `HEADERS` to each answer."""

    def __init__(self, app: ASGIApp, secret: str, hosts: Container[str]) -> None:
        self.app, self.secret, self.hosts = app, secret, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            await self._answer(scope, Body(scope, receive), send)

    async def _answer(self, scope: Scope, body: "Body", send: Send) -> None:
        has_started = False

        async def safely(message: Message) -> None:
            nonlocal has_started
            if message["type"] == "http.response.start":
                has_started = True
                MutableHeaders(scope=message).update(HEADERS)
                if message["status"] >= 400:
                    await body.drop()
            await send(message)

        try:
            await self.app(self._checked(scope), body, safely)
        except Refusal as refusal:
            await _error(refusal.status, str(refusal))(scope, body, safely)
        except Exception as error:  # its message might hold data of a film
            LOGGER.error("the app failed (%s): this is a fault of cxrfast", type(error).__name__)
            if not has_started:
                await _error(500, "the app failed: this is a fault of cxrfast")(scope, body, safely)

    def _checked(self, scope: Scope) -> Scope:
        """The scope with the path below the secret. Raises Refusal."""
        headers = Headers(scope=scope)
        host = headers.getlist("host")
        if len(host) != 1 or host[0].lower() not in self.hosts:
            raise Refusal(403, "this host name is not the app's: use the address that it printed")
        secret, slash, path = scope["path"].removeprefix("/").partition("/")
        if not slash or not hmac.compare_digest(secret.encode(errors="replace"), self.secret.encode()):
            raise Refusal(404, "there is nothing here: use the whole address that the app printed")
        if scope["method"] == "POST" and headers.getlist("origin") != [f"http://{host[0]}"]:
            raise Refusal(403, "films are accepted from the app's own page only")
        return {**scope, "path": f"/{path}", "raw_path": f"/{path}".encode(errors="replace")}


class Body:
    """The body of a request, piece by piece (an ASGI `receive`), and whether some of it is still to come."""

    def __init__(self, scope: Scope, receive: Receive) -> None:
        headers = Headers(scope=scope)
        has_body = headers.get("content-length", "0") != "0" or "transfer-encoding" in headers
        self.is_open = has_body and "expect" not in headers  # a client that asks first has sent nothing yet
        self._receive = receive

    async def __call__(self) -> Message:
        message = await self._receive()
        self.is_open = bool(message.get("more_body"))
        return message

    async def drop(self) -> None:
        """Read what is left and forget it: a sender that is cut off may never see the answer."""
        read = 0
        with anyio.move_on_after(LINGER_SECONDS):
            while self.is_open and read < LINGER_BYTES:
                read += len((await self()).get("body", b""))
