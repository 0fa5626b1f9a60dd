"""`verify --deep` finds rows that come from other images at one scale than at another."""

import json

import cv2
import pytest
from damage import change, contents, copy_set, sign, without_hashes
from sets import build

from cxrfast.errors import ShardError
from cxrfast.shards.format.info import read_set
from cxrfast.shards.format.names import shard_path
from cxrfast.shards.format.recipe import ImageRecipe
from cxrfast.shards.images.cell_means import STEPS, pack, unpack
from cxrfast.shards.upkeep.verify import verify


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


def test_no_scale_is_added_to_a_set_whose_scales_contradict_each_other(two, phantoms, tmp_path):
    mixed = merge(two / "set", two / "negative", 32, tmp_path / "mixed")
    for version in (mixed, copy_set(mixed, tmp_path / "earlier")):
        if version is not mixed:
            without_hashes(version)
        before = contents(version)
        with pytest.raises(ShardError, match=r"32/000000.tar: 64 rows .* than at 16 px .* delete the shard's files"):
            build(phantoms, version, [8], recipe=read_set(version).recipe)
        assert contents(version) == before, "nothing was written"


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
