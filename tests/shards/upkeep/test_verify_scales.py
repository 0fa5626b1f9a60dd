"""`verify --deep` finds rows that come from other images at one scale than at another."""

import itertools
import json

import cv2
import numpy as np
import pytest
from damage import change, copy_set, sign, without_hashes
from sets import build

from cxrfast.shards.format.info import read_set
from cxrfast.shards.format.names import shard_path
from cxrfast.shards.format.recipe import ImageRecipe
from cxrfast.shards.images.cell_means import STEPS, grid, pack, unpack
from cxrfast.shards.images.resize import at_scales
from cxrfast.shards.upkeep.verify import verify
from cxrfast.shards.upkeep.verify_scales import allowed


def problems(folder):
    return [f"{p.path}: {p.what}" for p in verify(folder, deep=True).problems if "source images" in p.what]


def merge(one, other, scale, to):
    """The set `one` with a scale of `other`, as a version that compared nothing built it."""
    out = copy_set(one, to)
    for path in (out / str(scale)).iterdir():
        path.write_bytes((other / str(scale) / path.name).read_bytes())
    sign(out)
    return out


@pytest.fixture(scope="module", params=[ImageRecipe(), ImageRecipe(codec="raw", resize="pad")], ids=["jpeg", "raw"])
def two(request, tmp_path_factory, phantoms):
    """Sets of the phantoms and of their negatives, at 16, 32 and 48 px, with equal ids."""
    folder = tmp_path_factory.mktemp("two")
    negatives = copy_set(phantoms, folder / "negatives")
    for path in negatives.rglob("*.jpg"):
        cv2.imwrite(str(path), 255 - cv2.imread(str(path), cv2.IMREAD_GRAYSCALE))
    for name, tree in (("set", phantoms), ("negative", negatives)):
        build(tree, folder / name, [16, 32, 48], recipe=request.param)
    return folder


def test_negatives_at_one_scale_are_found_by_hashes_and_without_them_by_grids(two, tmp_path):
    assert problems(two / "set") == problems(two / "negative") == []
    mixed = merge(two / "set", two / "negative", 32, tmp_path / "mixed")
    assert verify(mixed).problems == [], "every hash is right"
    assert problems(mixed) == [
        f"32/00000{n}.tar: {rows} rows were made from other source images than at 16 px (first: row {64 * n})"
        for n, rows in enumerate((64, 64, 22))
    ]
    without_hashes(mixed)
    found = problems(mixed)
    assert [text.split(" rows")[0] for text in found] == [
        f"32/00000{n}.tar: {rows}" for n, rows in enumerate((64, 64, 22))
    ]
    assert "rows show other images than at 16 px (first: row 0), by up to" in found[0]
    assert all(p.is_signed for p in verify(mixed, deep=True).problems)


def test_one_row_that_differs_is_found(two, tmp_path):
    out = without_hashes(copy_set(two / "set", tmp_path / "set"))
    path = shard_path(out, 48, 1, "json")
    m = json.loads(path.read_bytes())
    grids = unpack(m["grids"], 64).copy()
    grids[6] = 255 * STEPS - grids[6]
    change(path, grids=pack(grids))
    sign(out)
    assert [text.partition(", by")[0] for text in problems(out)] == [
        "48/000001.tar: 1 rows show other images than at 16 px (first: row 70)"
    ]


@pytest.mark.parametrize("resize", ["squash", "pad"])
def test_one_image_at_two_scales_never_differs_by_more_than_is_allowed(resize, tiny_set):
    """Noise, black and white noise, and an edge, in sizes that no scale divides."""
    info = read_set(tiny_set)
    object.__setattr__(info, "resize", resize)
    rng = np.random.default_rng(0)
    scales = [8, 9, 10, 13, 16, 21, 32, 50, 64, 100, 224, 256]
    for height, width in ((64, 64), (101, 77), (37, 301), (13, 17)):
        noise = rng.integers(0, 256, (height, width)).astype(np.uint8)
        edge = np.zeros_like(noise)
        edge[:, width // 2 + 1 :] = 255
        for image in (noise, np.where(noise > 127, 255, 0).astype(np.uint8), edge):
            grids = {scale: grid(picture) / STEPS for scale, picture in at_scales(image, scales, resize).items()}
            for one, other in itertools.combinations(scales, 2):
                assert np.abs(grids[one] - grids[other]).max() <= allowed(one, other, info), (one, other)
