"""Hostile requests to a served app: each gets one plain sentence, the app lives on, and its memory stays bounded."""

import http.client
import io
import json
import socket
import struct
import subprocess
import threading
import time
import zipfile
import zlib
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import psutil
import pytest
from dicoms import radiograph, written
from pictures import noise, saved
from PIL import Image

from cxrfast.app.limits import Limits

BINARY = {"Content-Type": "application/octet-stream"}
MB = 2**20


class Client:
    """Requests to an app."""

    def __init__(self, address: str, process: "subprocess.Popen[str]") -> None:
        self.parts, self.process = urlsplit(address), psutil.Process(process.pid)
        self.host = self.parts.netloc

    def ask(
        self, path: str = "api/scores", body: Any = b"", method: str = "POST", **headers: str
    ) -> tuple[int, dict[str, Any]]:
        """Status and JSON. `headers`: with _ for -, replacing the usual ones."""
        given = {"Origin": f"http://{self.host}", **BINARY, **{k.replace("_", "-"): v for k, v in headers.items()}}
        connection = http.client.HTTPConnection(self.host, timeout=60)
        try:
            connection.request(method, self.parts.path + path, body, given)
            answer = connection.getresponse()
            text = answer.read()
        finally:
            connection.close()
        assert b"Traceback" not in text
        return answer.status, json.loads(text) if text else {}

    def raw(self, *pieces: bytes, pause: float = 0) -> bytes:
        """What comes back for bytes sent as they are."""
        with socket.create_connection((self.parts.hostname, self.parts.port), timeout=30) as connection:
            for piece in pieces:
                try:
                    connection.sendall(piece)
                except OSError:
                    break  # the app has answered and hung up
                time.sleep(pause)
            found = b""
            try:
                while piece := connection.recv(2**16):
                    found += piece
            except ConnectionError:
                pass
            return found

    def start(self, *headers: str) -> bytes:
        """Request line and headers of a film."""
        lines = [f"POST {self.parts.path}api/scores HTTP/1.1", f"Host: {self.host}", f"Origin: http://{self.host}"]
        return "\r\n".join([*lines, "Content-Type: application/octet-stream", *headers, "", ""]).encode()

    def resident(self) -> int:
        """Bytes of the app and of the process with its model."""
        return sum(process.memory_info().rss for process in (self.process, *self.process.children(recursive=True)))


@pytest.fixture(scope="module")
def client(app) -> Client:
    return Client(*app)


@pytest.fixture(autouse=True)
def lives_on(client: Client, film: bytes) -> Iterator[None]:
    """After each request the same processes answer, as before, and hold no more memory."""
    children, before = client.process.children(), client.resident()
    yield
    for _ in range(50):
        status, found = client.ask(body=film)
        if status != 503:  # films that were broken off may have their places still
            break
        time.sleep(0.1)
    assert (status, len(found["findings"])) == (200, 14)
    assert client.process.children() == children
    assert client.resident() < before + 200 * MB


def jpeg_of_size(height: int, width: int) -> bytes:
    """A small JPEG whose header says otherwise."""
    data = bytearray(saved(Image.fromarray(noise(16, 16))))
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def png_of_size(height: int, width: int, pixels: bytes = b"") -> bytes:
    """A grey PNG with this header, and compressed `pixels`."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(pixels)), (b"IEND", b""))
    chunks = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def zipped() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("../../film.png", bytes(20 * MB))
    return file.getvalue()


def scans(n: int) -> bytes:
    """A progressive JPEG with a scan repeated n times."""
    data = saved(Image.fromarray(noise(16, 16)), progressive=True)
    at = data.rindex(b"\xff\xda")
    return data[:at] + data[at:-2] * n + data[-2:]


PIXELS = np.arange(64 * 64, dtype=np.uint16).reshape(64, 64)
JPEG = saved(Image.fromarray(noise(64, 64)))

FILMS = {
    "text": (b"a report about a film\n", "not an image"),
    "HTML": (b"<!doctype html><script>alert(1)</script>", "not an image"),
    "SVG": (b'<svg xmlns="http://www.w3.org/2000/svg" onload="alert(1)"/>', "not an image"),
    "JSON": (b'{"finding": NaN}', "not an image"),
    "pickle": (b"\x80\x04\x95cos\nsystem\n(S'true'\ntR.", "not an image"),
    "zip": (zipped(), "not an image"),
    "zeros": (bytes(5 * MB), "not an image"),
    "random bytes": (np.random.default_rng(0).bytes(MB), "not an image"),
    "GIF": (saved(Image.fromarray(noise(8, 8)), "GIF"), "GIF"),
    "TIFF": (saved(Image.fromarray(noise(8, 8)), "TIFF"), "TIFF"),
    "BMP": (saved(Image.fromarray(noise(8, 8)), "BMP"), "BMP"),
    "WebP": (saved(Image.fromarray(noise(8, 8)), "WEBP"), "WebP"),
    "half a JPEG": (JPEG[: len(JPEG) // 2], "truncated"),
    "a JPEG's first bytes": (b"\xff\xd8\xff", "truncated"),
    "a JPEG of 60000 × 60000": (jpeg_of_size(60000, 60000), "too large: 60,000 × 60,000 px"),
    "a JPEG of 0 × 0": (jpeg_of_size(16, 0), "corrupt"),
    "a JPEG of 5000 scans": (scans(5000), "too large"),
    "half a PNG": (saved(Image.fromarray(noise(64, 64)), "PNG")[:2000], "truncated"),
    "a PNG of 60000 × 60000": (png_of_size(60000, 60000), "too large: 60,000 × 60,000 px"),
    "a PNG of 2³¹ × 2³¹": (png_of_size(2**31 - 1, 2**31 - 1), "too large"),
    "a PNG that inflates to 200 MB": (png_of_size(64, 64, bytes(200 * MB)), "more rows than its header says"),
    "half a DICOM file": (written(radiograph(PIXELS))[:4000], "truncated"),
    "a DICOM file of 60000 × 60000": (written(radiograph(PIXELS, Rows=60000, Columns=60000)), "too large"),
    "a DICOM file of 4000 frames": (written(radiograph(PIXELS, NumberOfFrames=4000)), "more than one frame"),
    "a DICOM file without pixels": (written(radiograph(PIXELS, PixelData=None)), "truncated"),
    "a CT slice": (written(radiograph(PIXELS, Modality="CT")), "not a radiograph"),
}


@pytest.mark.parametrize("name", FILMS)
def test_a_film_that_is_none_is_refused_in_plain_words(client, name):
    film, words = FILMS[name]
    for question in ("api/scores", "api/map?scale=64&finding=0"):
        status, found = client.ask(question, film)
        assert status == 422
        assert list(found) == ["error"]
        assert found["error"].startswith("this film cannot be used: ")
        assert words in found["error"]


def test_an_empty_film_is_refused(client):
    assert client.ask() == (422, {"error": "this file is empty"})


def test_a_body_of_200_mb_is_refused_and_not_kept(client):
    status, found = client.ask(body=bytes(200 * MB))
    assert (status, found) == (413, {"error": "this file is too large: films have at most 135 MB"})


def test_a_client_that_asks_first_need_not_send_200_mb(client):
    answer = client.raw(client.start("Content-Length: 200000000", "Expect: 100-continue"))
    assert answer.startswith(b"HTTP/1.1 413")


def test_a_body_without_end_is_refused_and_not_kept(client):
    piece = b"100000\r\n" + bytes(MB) + b"\r\n"
    answer = client.raw(client.start("Transfer-Encoding: chunked"), *[piece] * 300, b"0\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 413")


@pytest.mark.slow
def test_a_body_that_stops_is_not_waited_for(client, film):
    before = time.monotonic()
    answer = client.raw(client.start("Content-Length: 1000", "Connection: close") + b"abc")
    assert answer.startswith(b"HTTP/1.1 408")
    assert time.monotonic() - before < Limits().pause_seconds + 10


def test_a_connection_that_breaks_off_does_no_harm(client, film):
    for _ in range(20):
        with socket.create_connection((client.parts.hostname, client.parts.port)) as connection:
            connection.sendall(client.start("Content-Length: 1000000") + bytes(1000))
    answers = (client.ask("api/scores", film)[0] for _ in range(100))
    assert next(status for status in answers if status != 503) == 200, "their places are free again"


def test_films_beyond_those_that_fit_are_told_to_wait(client, film):
    found: list[tuple[int, dict[str, Any]]] = []
    threads = [threading.Thread(target=lambda: found.append(client.ask("api/scores", film))) for _ in range(30)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {status for status, _ in found} == {200, 503}
    assert {answer["error"] for status, answer in found if status == 503} == {
        "4 films are being read already: try again in a moment"
    }


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "evil.example"}, 403),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Content_Type": "text/plain"}, 415),
        ({"Content_Type": "multipart/form-data; boundary=../../x"}, 415),
        ({"Content_Type": "<script>"}, 415),
        ({"X_Large": "x" * 10**6}, 400),
        ({"Cookie": "a=" + "x" * 10**4}, 200),
        ({"X_Forwarded_Host": "evil.example", "X_Forwarded_For": "1.2.3.4"}, 200),
        ({"Content_Encoding": "gzip"}, 200),
        ({"Range": "bytes=0-"}, 200),
        ({"X_HTTP_Method_Override": "DELETE"}, 200),
    ],
    ids=lambda value: str(value)[:60],
)
def test_hostile_headers(client, film, headers, status):
    if status == 400:
        names = (f"{name.replace('_', '-')}: {value}" for name, value in headers.items())
        assert client.raw(client.start(*names, "Content-Length: 0")).startswith(b"HTTP/1.1 400")
    else:
        assert client.ask("api/pictures", film, **headers)[0] == status


@pytest.mark.parametrize(
    "request_text",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(50),
        b"GET / HTTP/9.9\r\n\r\n",
        b"NONSENSE\r\n\r\n",
        b"GET /" + b"a" * 70000 + b" HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 20000 + b"\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: -5\r\n\r\n",
    ],
    ids=lambda text: repr(text[:40]),
)
def test_what_is_not_http_is_answered_or_dropped(client, request_text):
    answer = client.raw(request_text)
    assert answer == b"" or answer.startswith((b"HTTP/1.1 4", b"HTTP/1.0 4"))


def test_two_lengths_do_not_smuggle_a_second_request(client):
    inner = client.start("Content-Length: 0")
    answer = client.raw(
        client.start("Content-Length: 5", "Transfer-Encoding: chunked", "Connection: close") + b"0\r\n\r\n" + inner
    )
    assert answer.count(b"HTTP/1.1") == 1


def test_many_open_connections_leave_room(client):
    held = [socket.create_connection((client.parts.hostname, client.parts.port)) for _ in range(40)]
    try:
        assert client.ask("api/model", method="GET")[0] == 200
    finally:
        for connection in held:
            connection.close()


def test_neither_process_has_a_file_open(client, film):
    for process in (client.process, *client.process.children(recursive=True)):
        assert [file.path for file in process.open_files() if not file.path.startswith("/dev/")] == []
