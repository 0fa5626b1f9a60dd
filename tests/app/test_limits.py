"""Limits on films that are sent: slow, broken off, too many."""

import asyncio

import pytest
from starlette.requests import Request

from cxrfast.app.limits import BINARY, Limits, Places, Refusal, read_film

LIMITS = Limits(film_bytes=100, upload_seconds=0.5, pause_seconds=0.1, films=2)


def read(*pieces: tuple[float, bytes], more: bool = False) -> bytes:
    """The film whose pieces come after these pauses, in seconds; with `more`, the connection ends before its end."""
    left = list(pieces)

    async def receive():
        if not left:
            return {"type": "http.disconnect"} if more else {"type": "http.request", "body": b"", "more_body": False}
        pause, body = left.pop(0)
        await asyncio.sleep(pause)
        return {"type": "http.request", "body": body, "more_body": True}

    scope = {"type": "http", "headers": [(b"content-type", BINARY.encode())]}
    return asyncio.run(read_film(Request(scope, receive), LIMITS))


def refused(*pieces: tuple[float, bytes], more: bool = False) -> tuple[int, str]:
    with pytest.raises(Refusal) as caught:
        read(*pieces, more=more)
    return caught.value.status, str(caught.value)


def test_pieces_are_put_together():
    assert read((0, b"ab"), (0, b""), (0.01, b"cd")) == b"abcd"
    assert read((0, bytes(100))) == bytes(100)


def test_pieces_that_stay_away_are_not_waited_for():
    assert refused((0, b"a"), (0.3, b"b")) == (408, "this file came too slowly: send it again")


def test_many_pieces_in_time_do_not_take_for_ever():
    assert refused(*[(0.05, b"a")] * 50)[0] == 408


def test_empty_pieces_do_not_take_for_ever():
    assert refused(*[(0.05, b"")] * 50)[0] == 408


def test_the_first_piece_too_many_ends_it():
    assert refused(*[(0, bytes(51))] * 2)[0] == 413


def test_a_connection_that_breaks_off_is_no_film():
    assert refused((0, b"abc"), more=True)[0] == 400


def test_there_are_as_many_places_as_the_limits_say():
    places = Places(LIMITS)
    with places.place(), places.place():
        with pytest.raises(Refusal, match="2 films are being read already") as caught, places.place():
            pass
        assert caught.value.status == 503
    with pytest.raises(ZeroDivisionError), places.place():
        raise ZeroDivisionError
    assert places.taken == 0
