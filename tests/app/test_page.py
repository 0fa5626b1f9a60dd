"""The page in headless Chromium: films dropped and chosen, the slider, the heat map, errors; no request leaves."""

import shutil
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from apps import served
from dicoms import radiograph, written
from pictures import saved, smooth
from PIL import Image
from sets import REAL

CHROMIUM = shutil.which("chromium")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")]
playwright = pytest.importorskip("playwright.sync_api")

SECONDS = 60
EVIL = "<img src=x onerror=alert(1)>.png"


class Page:
    """A page in a browser, what it requested and what it complained about."""

    def __init__(self, page: Any, address: str) -> None:
        self.page, self.requests, self.complaints = page, [], []
        page.on("request", lambda request: self.requests.append(request.url))
        page.on("console", lambda message: self.complaints.append(message.text))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.goto(address)
        self.until("document.getElementById('model').textContent.includes('px')")

    def until(self, condition: str) -> None:
        """Wait until a JavaScript expression is true. Evaluated from outside: the page itself must not use eval."""
        deadline = time.monotonic() + SECONDS
        while not self.page.evaluate(condition):
            assert time.monotonic() < deadline, condition
            time.sleep(0.02)

    def choose(self, *films: dict[str, Any] | Path) -> None:
        self.page.set_input_files("#files", list(films))

    def until_done(self) -> None:
        """Wait for all films, and for the heat map of the one that is shown."""
        self.until("/^\\d+ films?$/.test(document.getElementById('progress').textContent)")
        self.until("!/Computing/.test(document.getElementById('says').textContent)")

    def text(self, selector: str) -> str:
        return self.page.inner_text(selector)

    def pixels(self, canvas: str) -> str:
        """What a canvas shows, as a PNG in a URL."""
        return self.page.evaluate(f"document.getElementById('{canvas}').toDataURL()")

    def slide_to(self, index: int) -> None:
        self.page.locator("#scale").fill(str(index))

    def states(self) -> list[str]:
        return [item.inner_text() for item in self.page.locator("#list .state").all()]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        found = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield found
        found.close()


@pytest.fixture
def page(browser, app) -> Iterator[Page]:
    with browser.new_context(viewport={"width": 1400, "height": 900}) as context:
        found = Page(context.new_page(), app.address)
        yield found
        origin = app.address[: app.address.index("/", 8)]
        assert {url for url in found.requests if not url.startswith((origin, "blob:"))} == set(), "no request leaves"
        refusals = (
            "Failed to load resource: the server responded with a status of 4",
        )  # Chromium's word on a refused film
        assert [text for text in found.complaints if not text.startswith(refusals)] == []
        assert context.cookies() == []
        assert found.page.evaluate("Object.keys(localStorage).length + Object.keys(sessionStorage).length") == 0


def named(name: str, data: bytes, kind: str = "") -> dict[str, Any]:
    return {"name": name, "mimeType": kind, "buffer": data}


@pytest.fixture
def phantom(film) -> dict[str, Any]:
    return named("phantom.jpg", film)


def test_the_table_holds_the_models_probabilities(page, phantom, model, film):
    page.choose(phantom)
    page.until_done()
    line = model.predict(film).iloc[0]
    rows = page.page.locator("tbody tr").all()
    assert [row.locator(".name").inner_text() for row in rows] == list(model.labels)
    for row, label in zip(rows, model.labels, strict=True):
        shown = [float(cell.inner_text().strip("<>")) for cell in row.locator("td .p").all()]
        names = [f"{label}: probability {scale} px" for scale in model.scales] + [f"{label}: probability"]
        assert shown == pytest.approx([line[name] for name in names], abs=0.0051)
        verdict = row.locator(".verdict").inner_text()
        assert verdict.lstrip("▲▽ ") == (line[f"{label}: verdict"] or "no threshold")


def test_the_slider_changes_the_film_and_the_heat_map(page, phantom, model):
    page.choose(phantom)
    page.until_done()
    seen = []
    for index, scale in enumerate(model.scales):
        page.slide_to(index)
        page.until_done()
        page.until(f"document.getElementById('film').width === {scale}")
        assert page.text("#scale-text") == f"{scale} × {scale} px"
        assert page.page.get_attribute("#scale", "aria-valuetext") == f"{scale} pixels"
        seen.append((page.pixels("film"), page.pixels("heat")))
    assert seen[0][0] != seen[1][0]
    assert seen[0][1] != seen[1][1]
    page.page.uncheck("#coarse")
    page.slide_to(0)
    page.until(f"document.getElementById('film').width === {model.scales[-1]}")


def test_another_finding_has_another_heat_map(page, phantom, model):
    page.choose(phantom)
    page.until_done()
    maps = set()
    for index in (0, 5, 9):
        page.page.click(f"[data-finding='{index}']")
        page.until_done()
        assert page.text("#says").startswith(f"{model.labels[index]} at {model.scales[-1]} px: ")
        maps.add(page.pixels("heat"))
    assert len(maps) == 3


def test_the_heat_map_can_be_faded_and_left_out(page, phantom):
    page.choose(phantom)
    page.until_done()
    page.page.locator("#opacity").fill("30")
    assert page.page.evaluate("document.getElementById('heat').style.opacity") == "0.3"
    page.page.locator("#opacity").fill("0")
    assert page.text("#opacity-text") == "off"
    assert page.page.locator("#heat").is_hidden()


def test_every_part_is_reached_by_keys(page, phantom):
    page.choose(phantom, {**phantom, "name": "other.jpg"})
    page.until_done()
    reached = set()
    page.page.focus("#files")
    for _ in range(40):
        reached.add(page.page.evaluate("document.activeElement.id || document.activeElement.className"))
        page.page.keyboard.press("Tab")
    assert {
        "files",
        "open",
        "off",
        "clear",
        "stage",
        "scale",
        "opacity",
        "coarse",
        "invert",
        "larger",
        "finding",
    } <= reached
    page.page.focus("#scale")
    page.page.keyboard.press("ArrowLeft")
    assert page.text("#scale-text") == "32 × 32 px"
    page.page.locator(".finding").nth(3).focus()
    page.page.keyboard.press("Enter")
    assert page.page.evaluate("document.activeElement.dataset.finding") == "3", "the focus stays"


def test_dropped_films_are_read(page, film):
    page.page.evaluate(
        """(bytes) => {
            const data = new DataTransfer();
            data.items.add(new File([new Uint8Array(bytes)], 'dropped.jpg'));
            dispatchEvent(new DragEvent('drop', {dataTransfer: data, bubbles: true, cancelable: true}));
        }""",
        list(film),
    )
    page.until_done()
    assert page.text("#view-title") == "dropped.jpg"


def test_each_bad_film_gets_its_own_error_and_good_ones_are_read(page, phantom, film):
    page.choose(
        named("report.txt", b"hello", "text/plain"),
        phantom,
        named("empty.dcm", b""),
        named("page.jpg", b"<html><script>alert(1)</script>", "text/html"),
        named("half.jpg", film[: len(film) // 2]),
        named("../../etc/passwd", b"root"),
        named(EVIL, film),
        named("two.dcm", written(radiograph(smooth(80, 80), PatientName="Doe^Jane"))),
    )
    page.until_done()
    states = page.states()
    assert states[0] == states[3] == states[5] == "This film cannot be used: not an image."
    assert states[2] == "This file is empty."
    assert states[4] == "This film cannot be used: truncated."
    assert all("positive" in state for state in (states[1], states[6], states[7]))
    assert page.text("#notice") == states[0]
    assert page.page.locator("#list .title").nth(6).inner_text() == EVIL
    assert page.page.locator("img").count() == 0, "a name is text"
    page.page.locator("#list .open").nth(7).click()
    page.until_done()
    assert "Doe" not in page.page.content()


def test_a_film_that_is_removed_is_gone(page, phantom):
    page.choose(phantom, {**phantom, "name": "other.jpg"})
    page.until_done()
    page.page.click("[aria-label='Remove phantom.jpg']")
    page.until("document.getElementById('view-title').textContent === 'other.jpg'")
    page.page.click("[aria-label='Remove other.jpg']")
    assert page.text("#view-title") == "No film yet"
    assert page.page.locator("#list li").count() == 0
    assert page.page.locator("#sheet").is_hidden()


def test_remarks_and_likeness_are_shown(page):
    page.choose(named("uniform.png", saved(Image.fromarray(smooth(90, 60) // 255), "PNG")))
    page.until_done()
    assert "one grey value" in page.text(".remarks") or "less than a quarter" in page.text(".remarks")
    assert "training set" in page.text("#remarks")


@pytest.mark.parametrize("width", [400, 700, 1000, 1400])
def test_nothing_is_cut_off_at_any_width(page, phantom, width):
    page.page.set_viewport_size({"width": width, "height": 800})
    page.choose(phantom)
    page.until_done()
    assert page.page.evaluate("document.documentElement.scrollWidth") <= width
    for selector in ("#table", ".view", ".films"):
        over = page.page.evaluate(f"(e => e.scrollWidth - e.clientWidth)(document.querySelector('{selector}'))")
        assert over <= 0, selector
    assert page.page.locator(".bar").is_visible()


def test_the_bar_stays_in_sight(page, phantom):
    page.page.set_viewport_size({"width": 400, "height": 500})
    page.choose(phantom)
    page.until_done()
    page.page.evaluate("scrollTo(0, 10000)")
    assert "Not a medical device" in page.text(".bar")
    assert page.page.locator(".bar").bounding_box()["y"] == 0


def test_the_page_says_so_when_the_app_has_gone(browser, runs, film, tmp_path):
    with browser.new_context() as context:
        with served(runs, folder=tmp_path) as app:
            page = Page(context.new_page(), app.address)
        page.choose(named("late.jpg", film))
        page.until("document.getElementById('notice').textContent !== ''")
        assert page.text("#notice") == "The app does not answer. Is it still running in its terminal?"


@pytest.mark.skipif(not REAL.exists(), reason="the real radiographs are not here")
def test_ten_real_films_are_read(page, tmp_path):
    films = [*(REAL / "single").iterdir(), *(REAL / "dicom").iterdir()]
    for archive, count in (("hires.tar", 2), ("odd.tar", 4)):
        with tarfile.open(REAL / archive) as tar:
            members = [member for member in tar.getmembers() if member.isfile()][:count]
            tar.extractall(tmp_path, members, filter="data")
            films += [tmp_path / member.name for member in members]
    films = [film for film in films if film.suffix != ".md"][:11]
    assert len(films) >= 10
    page.choose(*films)
    page.until_done()
    assert [state for state in page.states() if "positive" not in state] == []
    for index in range(len(films)):
        page.page.locator("#list .open").nth(index).click()
        page.until("!document.getElementById('sheet').hidden")
        page.until_done()
        assert page.page.evaluate("document.getElementById('film').width") == 64
