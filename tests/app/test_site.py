"""The site by itself: what every request must pass, what every answer says, and the limits, here small ones."""

import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from starlette.testclient import TestClient

import cxrfast.app
from cxrfast.app.limits import BINARY, Limits
from cxrfast.app.process import ModelProcess
from cxrfast.app.site import ASSETS, HEADERS, create_site

HOST = "127.0.0.1:8765"
SECRET = "a-secret"
PAGE = Path(cxrfast.app.__file__).parent / "page"
LIMITS = Limits(film_bytes=20_000, upload_seconds=5, pause_seconds=1, films=2)


@pytest.fixture(scope="module")
def client(runs: Path) -> Iterator[TestClient]:
    site = create_site(ModelProcess(runs), SECRET, {HOST, "localhost:8765"}, LIMITS)
    with TestClient(site, base_url=f"http://{HOST}/{SECRET}/") as client:
        yield client


def post(client: TestClient, path: str, film: bytes, **headers: str) -> httpx.Response:
    return client.post(path, content=film, headers={"origin": f"http://{HOST}", "content-type": BINARY, **headers})


def error(answer: httpx.Response) -> str:
    """The sentence of an answer that holds nothing else."""
    found = answer.json()
    assert set(found) == {"error"}
    assert "Traceback" not in found["error"]
    return found["error"]


def test_the_page_and_its_files_are_served(client):
    for path, (name, kind) in ASSETS.items():
        answer = client.get(path)
        assert answer.status_code == 200
        assert answer.headers["content-type"].partition(";")[0] == kind
        assert answer.content == (PAGE / name).read_bytes()
    assert {name for name, _ in ASSETS.values()} == {path.name for path in PAGE.iterdir()}


def test_the_page_names_no_other_machine():
    for path in PAGE.iterdir():
        assert set(re.findall(r"https?://[^\"'\s]+", path.read_text())) <= {"http://www.w3.org/2000/svg"}
        assert not re.search(
            r"localStorage|sessionStorage|indexedDB|document\.cookie|innerHTML|eval\(", path.read_text()
        )


@pytest.mark.parametrize("path", ["", "page.js", "api/model", "nothing", "api/nothing"])
def test_every_answer_forbids_what_the_page_does_not_need(client, path):
    answer = client.get(path)
    assert {name: answer.headers[name] for name in HEADERS} == HEADERS
    assert "set-cookie" not in answer.headers
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert "unsafe" not in answer.headers["content-security-policy"]
    assert answer.headers["cache-control"] == "no-store"


def test_the_three_questions_are_answered(client, film):
    about = client.get("api/model").json()
    assert about["scales"] == [32, 64]
    assert about["film_bytes"] == LIMITS.film_bytes
    assert len(post(client, "api/scores", film).json()["findings"]) == len(about["labels"])
    assert len(post(client, "api/pictures", film).json()["pictures"]) == 2
    assert post(client, "api/map?scale=32&finding=13", film).json()["side"] == 32


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1", "127.0.0.1:80", f"{HOST}.evil.example", "[::1]:8765", ""]
)
def test_another_host_name_is_refused(client, host):
    answer = client.get("", headers={"host": host})
    assert (answer.status_code, error(answer)) == (
        403,
        "this host name is not the app's: use the address that it printed",
    )


def test_localhost_is_the_apps_host(client, film):
    answer = post(client, "api/pictures", film, host="localhost:8765", origin="http://localhost:8765")
    assert answer.status_code == 200


@pytest.mark.parametrize(
    "origin",
    ["http://evil.example", "null", "https://127.0.0.1:8765", "http://127.0.0.1:1", "http://localhost:8765", ""],
)
def test_a_film_from_another_origin_is_refused(client, film, origin):
    answer = post(client, "api/scores", film, origin=origin)
    assert (answer.status_code, error(answer)) == (403, "films are accepted from the app's own page only")


def test_a_film_without_an_origin_is_refused(client, film):
    assert client.post("api/scores", content=film, headers={"content-type": BINARY}).status_code == 403


@pytest.mark.parametrize(
    "path", ["/", "/api/model", "/wrong/", "/a-secre/", "/a-secret", "/a-secret2/", "//", "/%61-secrets/"]
)
def test_nothing_is_there_without_the_secret(client, path):
    answer = client.get(f"http://{HOST}{path}")
    assert answer.status_code == 404
    assert error(answer) == "there is nothing here: use the whole address that the app printed"


@pytest.mark.parametrize(
    "path",
    [
        "server.py",
        "../server.py",
        "..%2fserver.py",
        "page/page.js",
        "%2e%2e/%2e%2e/etc/passwd",
        "api/",
        "api/map",
        "x" * 5000,
    ],
)
def test_other_paths_lead_nowhere(client, path):
    answer = client.get(f"http://{HOST}/{SECRET}/{path}")
    assert answer.status_code in (404, 405)
    error(answer)


@pytest.mark.parametrize(
    "query",
    [
        *(
            "",
            "?scale=64",
            "?scale=48&finding=0",
            "?scale=64&finding=14",
            "?scale=64&finding=-1",
            "?scale=nan&finding=0",
        ),
        *(
            "?scale=64&finding=NaN",
            "?scale=1e2&finding=0",
            "?scale=64&finding=99999999999999999999",
            "?scale=٣&finding=0",
        ),
    ],
)
def test_a_map_needs_a_scale_and_a_finding_of_the_model(client, film, query):
    answer = post(client, f"api/map{query}", film)
    assert (answer.status_code, error(answer)) == (404, "the model has no such scale or finding")


@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH", "OPTIONS"])
def test_other_methods_are_refused(client, method):
    answer = client.request(method, "api/model", headers={"origin": f"http://{HOST}"})
    assert (answer.status_code, error(answer)) == (405, "method not allowed")


def test_head_answers_like_get_without_a_body(client):
    answer = client.head("")
    assert (answer.status_code, answer.content) == (200, b"")


@pytest.mark.parametrize(
    "kind",
    ["", "text/plain", "application/json", "multipart/form-data; boundary=x", "application/x-www-form-urlencoded"],
)
def test_another_content_type_is_refused(client, film, kind):
    """The last two are those that a form of another page can send."""
    answer = post(client, "api/scores", film, **{"content-type": kind})
    assert (answer.status_code, error(answer)) == (415, f"a film is sent as {BINARY}")


def test_a_film_that_is_too_large_is_refused(client):
    answer = post(client, "api/scores", bytes(LIMITS.film_bytes + 1))
    assert (answer.status_code, error(answer)) == (413, "this file is too large: films have at most 20 kB")


def test_a_body_of_unstated_length_is_refused_once_it_is_too_large(client):
    answer = post(client, "api/scores", (bytes(1000) for _ in range(1000)))
    assert answer.status_code == 413


def test_a_film_at_the_limit_is_read(client):
    answer = post(client, "api/scores", bytes(LIMITS.film_bytes))
    assert (answer.status_code, error(answer)) == (422, "this film cannot be used: not an image")


def test_an_empty_film_is_refused(client):
    answer = post(client, "api/scores", b"")
    assert (answer.status_code, error(answer)) == (422, "this file is empty")


@pytest.mark.parametrize("length", ["-1", "1e3", "abc", "9" * 30])
def test_a_length_that_is_no_number_does_no_harm(client, film, length):
    assert post(client, "api/pictures", film, **{"content-length": length}).status_code in (200, 413)
