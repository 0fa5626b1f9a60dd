"""What the app takes: how many bytes, for how long, and how many films at once. A film is refused before it is all read."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from starlette.requests import ClientDisconnect, Request

from cxrfast.shards.images.bad_image import MAX_PIXELS
from cxrfast.units import size

BINARY = "application/octet-stream"
"""The only content type of a film: pages of other origins cannot send it without asking first."""


class Refusal(Exception):
    """A request that is answered with an HTTP status and one sentence."""

    def __init__(self, status: int, words: str) -> None:
        super().__init__(words)
        self.status = status


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits of one app."""

    film_bytes: int = 2 * MAX_PIXELS + 2**20
    """The largest film that the decoders accept, uncompressed at 16 bits, and a header."""
    upload_seconds: float = 60
    """For all bytes of a film."""
    pause_seconds: float = 10
    """Between two pieces of it."""
    films: int = 4
    """Being sent, waiting or computed at once. Each may take `film_bytes`."""


class Places:
    """Counts the films that the app holds at this moment."""

    def __init__(self, limits: Limits) -> None:
        self.limits, self.taken = limits, 0

    @contextmanager
    def place(self) -> Iterator[None]:
        """One place for a film inside the block. Raises Refusal if all are taken."""
        if self.taken >= self.limits.films:
            raise Refusal(503, f"{self.limits.films} films are being read already: try again in a moment")
        self.taken += 1
        try:
            yield
        finally:
            self.taken -= 1


async def read_film(request: Request, limits: Limits) -> bytes:
    """The request's body: a film. Raises Refusal if it is another type, too large, empty, or comes too slowly."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != BINARY:
        raise Refusal(415, f"a film is sent as {BINARY}")
    too_large = Refusal(413, f"this file is too large: films have at most {size(limits.film_bytes)}")
    if _stated_length(request) > limits.film_bytes:
        raise too_large
    film, pieces = bytearray(), request.stream()
    try:
        async with asyncio.timeout(limits.upload_seconds):
            while piece := await _next(pieces, limits.pause_seconds):
                if len(film) + len(piece) > limits.film_bytes:
                    raise too_large
                film += piece
    except TimeoutError:
        raise Refusal(408, "this file came too slowly: send it again") from None
    except ClientDisconnect:
        raise Refusal(400, "the connection ended before the whole file was sent") from None
    if not film:
        raise Refusal(422, "this file is empty")
    return bytes(film)


async def _next(pieces: object, seconds: float) -> bytes:
    """The next piece that is not empty; b"" at the end."""
    while True:
        async with asyncio.timeout(seconds):
            piece = await anext(pieces, None)  # type: ignore[call-overload]
        if piece is None:
            return b""
        if piece:
            return piece


def _stated_length(request: Request) -> int:
    """Content-Length; 0 where there is none, as with a chunked body."""
    text = request.headers.get("content-length", "0")
    return int(text) if text.isascii() and text.isdigit() and len(text) < 19 else 0
