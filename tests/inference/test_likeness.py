"""Flags of films unlike the training set: what they say, and how often they are right and wrong on real films."""

import io
import tarfile
from functools import cache

import cv2
import numpy as np
import pytest
from pictures import saved
from PIL import Image
from sets import REAL

from cxrfast.inference.film import Film, prepared
from cxrfast.inference.likeness import colour_reason, reasons
from cxrfast.runs.reference import Reference, Spread, reference_of, sampled
from cxrfast.shards.format.recipe import ImageRecipe
from cxrfast.shards.images.decode import decode

ANY = Spread(mean=(0.0,) * 16, precision=((0.0,) * 16,) * 16, limit=1.0)
"""Of which nothing is far."""


def usual(**fields) -> Reference:
    known = {"films": 50, "layout": ANY, "upright": 10.0, "aspect": (0.75, 1.0), "shorter": 500}
    grey = Spread(mean=(0.0,) * 7, precision=((0.0,) * 7,) * 7, limit=1.0)
    return Reference(**{**known, "grey": grey, **fields})


IMAGE = np.zeros((64, 64), np.uint8)


def test_a_film_like_the_training_set_has_no_reason():
    assert reasons(usual(), IMAGE, 1000, 800, 512) == []


@pytest.mark.parametrize(
    ("height", "width", "said"),
    [
        (1000, 1000, None),
        (1000, 1049, None),
        (1000, 1060, "width / height 1.06, in the training set 0.75 to 1.00"),
        (1000, 700, "width / height 0.70, in the training set 0.75 to 1.00"),
        (512, 512, None),
        (400, 400, "400 × 400 px is below the largest scale, 512 px"),
    ],
)
def test_aspect_and_size_are_named_with_what_is_usual(height, width, said):
    assert reasons(usual(), IMAGE, height, width, 512) == ([said] if said else [])


def test_a_small_film_is_like_a_training_set_of_small_films():
    assert reasons(usual(shorter=224), IMAGE, 224, 224, 512) == []
    assert len(reasons(usual(shorter=224), IMAGE, 200, 200, 512)) == 1


def coloured(share: float) -> np.ndarray:
    image = np.full((400, 400, 3), 128, np.uint8)
    image[: round(400 * share)] = (200, 60, 60)
    return image


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_colour_is_told_from_grey_in_three_channels(kind):
    assert colour_reason(saved(Image.fromarray(coloured(0.4)), kind)) == ["colour in 40% of its pixels"]
    assert colour_reason(saved(Image.fromarray(coloured(0.0)), kind)) == []
    assert colour_reason(saved(Image.fromarray(coloured(0.01)), kind)) == [], "a coloured label is no reason"
    assert colour_reason(saved(Image.fromarray(coloured(0.4)).convert("L"), kind)) == []


def test_colours_of_a_palette_count():
    assert colour_reason(saved(Image.fromarray(coloured(0.4)).convert("P"), "PNG")) != []


# On real films


needs_real = pytest.mark.skipif(not (REAL / "kermany224.tar").exists(), reason="the real radiographs are not here")


@cache
def kermany(n: int = 400) -> list[bytes]:
    """Every thirteenth film."""
    with tarfile.open(REAL / "kermany224.tar") as tar:
        members = [member for member in tar.getmembers() if member.isfile()]
        return [tar.extractfile(member).read() for member in members[:: len(members) // n][:n]]


@cache
def reference() -> Reference:
    """Reference of half of them, at 64 px."""
    films = [prepared(data, [64], ImageRecipe()) for data in kermany()[::2]]
    sizes = np.array([[film.height, film.width] for film in films])
    return reference_of(sampled(np.stack([film.images[64] for film in films])), sizes)


def seen(data: bytes) -> Film:
    return prepared(data, [64, 128], ImageRecipe(), reference())


def rate(change=lambda image: image, n: int = 100) -> float:
    """Fraction of films of the other half that are flagged when their pixels are changed."""
    films = [decode(data, "none") for data in kermany()[1::2][:n]]
    changed = (np.ascontiguousarray(change(film)) for film in films)
    return float(np.mean([bool(prepared(film, [64, 128], ImageRecipe(), reference()).unlike) for film in changed]))


@needs_real
def test_about_one_real_film_in_a_hundred_is_flagged_wrongly():
    assert np.mean([bool(seen(data).unlike) for data in kermany()[1::2]]) <= 0.03


@needs_real
@pytest.mark.parametrize(
    ("change", "least"),
    [
        (lambda image: 255 - image, 0.98),
        (np.rot90, 0.98),
        (lambda image: np.rot90(image, -1), 0.98),
        (lambda image: image[::-1], 0.9),
        (lambda image: np.rot90(image, 2), 0.9),
        (lambda image: image[: 2 * len(image) // 3, : 2 * len(image) // 3], 0.8),
        (lambda image: image // 16, 0.98),
        (lambda image: cv2.resize(image, (300, 200)), 1.0),
    ],
    ids=["inverted", "left", "right", "upside down", "turned", "cropped", "12 of 16 bits", "another aspect"],
)
def test_real_films_that_were_spoilt_are_flagged(change, least):
    assert rate(change) >= least


@needs_real
def test_reasons_are_in_words_and_numbers():
    film = decode(kermany()[1], "none")
    (reason,) = prepared(np.ascontiguousarray(film[::-1]), [64, 128], ImageRecipe(), reference()).unlike
    assert reason.startswith("upside down: turned, it is nearer to the usual layout by ")
    found = prepared(film // 16, [64, 128], ImageRecipe(), reference()).unlike
    assert any(r.startswith("grey levels: distance ") and "validation films are below" in r for r in found)


def test_a_photograph_is_flagged_for_its_colour():
    y, x = np.mgrid[0:200, 0:300]
    photo = np.stack([x * 255 // 300, y * 255 // 200, 255 - x * 255 // 300], axis=2).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(photo).save(file, "JPEG")
    film = prepared(file.getvalue(), [64], ImageRecipe(), usual(shorter=10))
    assert film.unlike is not None
    assert any(reason.startswith("colour in ") for reason in film.unlike)
