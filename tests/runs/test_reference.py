"""What a run's validation films look like: which others are told apart, and what is stored."""

import json
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from runs import make_run

from cxrfast.errors import RunError
from cxrfast.runs.reference import (
    LEAST_FILMS,
    Reference,
    features,
    merged,
    read_reference,
    reference_of,
    sampled,
    write_reference,
)
from cxrfast.shards.format.recipe import ImageRecipe

SIZES = np.array([[100, 80], [120, 100], [200, 150]] * 20)


def chests(n: int, seed: int = 0) -> np.ndarray:
    """uint8 (n, 64, 64): dark left and right, bright in the middle and below, each a little different."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:1:64j, 0:1:64j]
    lungs = sum(
        np.exp(
            -(((x - cx - rng.normal(0, 0.02, (n, 1, 1))) / 0.13) ** 2)
            - ((y - 0.4 - rng.normal(0, 0.03, (n, 1, 1))) / 0.25) ** 2
        )
        for cx in (0.28, 0.72)
    )
    grey = 150 + 40 * y - 110 * lungs + rng.normal(0, 12, (n, 1, 1)) + rng.normal(0, 6, (n, 64, 64))
    return np.clip(grey, 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def reference():
    found = reference_of(chests(200), SIZES)
    assert found is not None
    return found


def flagged(reference: Reference, images: np.ndarray) -> dict[str, float]:
    levels, layout = features(images)
    return {
        "grey": float((reference.grey.distance(levels) > reference.grey.limit).mean()),
        "layout": float((reference.layout.distance(layout) > reference.layout.limit).mean()),
        "turned": float((reference.turned(layout) > reference.upright).mean()),
    }


def test_few_films_of_the_same_kind_are_flagged(reference):
    found = flagged(reference, chests(2000, seed=1))
    assert max(found.values()) < 0.015, found


@pytest.mark.parametrize(
    ("change", "check"),
    [
        (lambda images: 255 - images, "layout"),
        (lambda images: images.transpose(0, 2, 1), "layout"),
        (lambda images: images[:, ::-1], "turned"),
        (lambda images: images[:, ::-1, ::-1], "turned"),
        (lambda images: images // 16, "grey"),
        (lambda images: images // 2 + 127, "grey"),
        (lambda images: np.random.default_rng(0).integers(0, 256, images.shape, np.uint8), "layout"),
    ],
)
def test_films_that_were_changed_are_flagged(reference, change, check):
    assert flagged(reference, change(chests(200, seed=2)))[check] > 0.95


def test_a_few_films_are_enough_and_fewer_give_none():
    few = reference_of(chests(LEAST_FILMS), SIZES)
    assert max(flagged(few, chests(500, seed=3)).values()) < 0.03
    assert flagged(few, 255 - chests(100, seed=4))["layout"] > 0.9
    assert reference_of(chests(LEAST_FILMS - 1), SIZES) is None
    assert reference_of(chests(LEAST_FILMS), np.zeros((0, 2), int)) is None


def test_aspect_and_shorter_side_are_those_of_the_sources(reference):
    assert reference.aspect == pytest.approx((0.75, 0.8333), abs=0.01)
    assert reference.shorter == 80


def test_folds_together_are_as_all_their_films(reference):
    both = merged([reference_of(chests(150, seed=5), SIZES), reference_of(chests(50, seed=6), SIZES)])
    assert both.films == 200
    np.testing.assert_allclose(both.layout.mean, reference.layout.mean, atol=0.05)
    assert max(flagged(both, chests(1000, seed=7)).values()) < 0.015
    assert flagged(both, chests(100, seed=8)[:, ::-1])["turned"] > 0.95


@given(st.integers(64, 300), st.integers(64, 300))
def test_a_sample_has_every_kth_pixel_and_64_or_more(height, width):
    image = np.arange(height * width).reshape(height, width)
    found = sampled(image)
    step = min(height, width) // 64
    assert np.array_equal(found, image[::step, ::step])
    assert min(found.shape) >= 64
    assert torch.equal(sampled(torch.from_numpy(image)), torch.from_numpy(found.copy()))


def test_small_images_are_taken_whole():
    assert sampled(np.zeros((2, 32, 32))).shape == (2, 32, 32)


def test_a_uniform_image_has_finite_features():
    for value in (0, 255):
        levels, layout = features(np.full((1, 64, 64), value, np.uint8))
        assert (levels == value).all()
        assert (layout == 0).all()


def test_what_was_written_is_read(reference, tmp_path):
    run, recipe = make_run(tmp_path, 64), ImageRecipe(grey="mimic", resize="pad")
    assert read_reference(run) is None
    write_reference(run, reference, recipe)
    assert read_reference(run) == (reference, recipe)
    write_reference(run, None, recipe)
    assert read_reference(run) == (None, recipe)


def test_a_damaged_file_and_one_of_another_run_are_refused(reference, tmp_path):
    run = make_run(tmp_path / "a", 64)
    write_reference(run, reference, ImageRecipe())
    whole = json.loads(run.reference_path.read_text())
    nan = json.dumps({**whole, "reference": {**whole["reference"], "upright": float("nan")}})
    short = json.dumps({**whole, "reference": {**whole["reference"], "layout": whole["reference"]["grey"]}})
    recipe = json.dumps({**whole, "recipe": {"codec": "gif"}})
    for text in ("", "{", "[]", "null", nan, short, recipe, "[" * 100_000):
        run.reference_path.write_text(text)
        with pytest.raises(RunError, match=r"reference\.json is damaged .* delete it, then run `cxrfast predict"):
            read_reference(run)
    other = make_run(tmp_path / "b", 128)
    run.reference_path.write_text(json.dumps(whole))
    shutil.copy(run.reference_path, other.reference_path)
    with pytest.raises(RunError, match="belongs to another run"):
        read_reference(other)
