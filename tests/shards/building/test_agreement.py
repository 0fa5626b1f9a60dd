"""A scale that is added later comes from the same source images, or is refused."""

import hashlib
import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from damage import change, contents, copy_set, requantise, sign, without_grids, without_hashes
from sets import build

from cxrfast.errors import ShardError
from cxrfast.shards.building.agreement import Earlier, allowed, earlier
from cxrfast.shards.format.info import read_set
from cxrfast.shards.format.manifest import read_manifest, source_hashes
from cxrfast.shards.format.names import shard_path
from cxrfast.shards.format.rows import read_rows
from cxrfast.shards.images.cell_means import STEPS, grid, pack, unpack
from cxrfast.shards.images.decode import decode, encode
from cxrfast.shards.images.resize import at_scales
from cxrfast.shards.upkeep.verify import verify


def paths(folder: Path) -> list[str]:
    return read_rows(folder / "rows.parquet")["path"].tolist()


def invert(path: Path) -> None:
    """Replace a JPEG by its negative, in as many bytes."""
    size = path.stat().st_size
    negative = 255 - decode(path.read_bytes(), "none")
    data = next(data for quality in range(95, 1, -1) if len(data := encode(negative, quality)) <= size)
    path.write_bytes(data.ljust(size, b"\0"))


def test_a_manifest_holds_the_hash_of_each_source_image_at_every_scale(phantoms, tiny_set):
    for scale in (32, 64):
        manifests = [read_manifest(tiny_set, scale, n) for n in range(3)]
        hashes = {row: digest for m in manifests for row, digest in source_hashes(m).items()}
        assert hashes == {
            row: hashlib.sha256((phantoms / path).read_bytes()).digest()[:16]
            for row, path in enumerate(paths(tiny_set))
        }


@pytest.mark.parametrize(("version", "how"), [("hashes", invert), ("hashes", requantise), ("grids", invert)])
def test_one_changed_image_of_the_same_size_stops_its_shard_and_is_named(tree, either_set, tmp_path, version, how):
    """Grids find no smaller change than the decoders of two machines make."""
    out = copy_set(either_set, tmp_path / "set")
    if version == "grids":
        without_hashes(out)
    path = paths(out)[70]
    how(tree / path)
    before = contents(out / "64")
    message = rf"1 shards could not be built, all others are kept:\s+shard 1: {path} \(row 70\) "
    message += (
        r"is not the file that its image at 32 px was made from" if version == "hashes" else "now gives other pixels"
    )
    with pytest.raises(ShardError, match=message):
        build(tree, out, [16], recipe=read_set(out).recipe)
    assert [n for n in range(3) if read_manifest(out, 16, n)] == [0, 2]
    assert contents(out / "64") == before


@pytest.mark.parametrize("version", ["hashes", "grids"])
def test_a_tree_of_other_images_is_refused_before_anything_is_written(tree, folder, version):
    if version == "grids":
        without_hashes(folder)
    for path in paths(folder):
        invert(tree / path)
    before = contents(folder)
    for options in ({}, {"dry_run": True}, {"part": (1, 2)}):
        with pytest.raises(
            ShardError, match=r"12 of 12 sampled images are not those that the set was built from.*--data"
        ):
            build(tree, folder, [16], **options)
        assert contents(folder) == before


def test_an_archive_whose_files_changed_is_refused_too(tree, tiny_set, tmp_path):
    out = copy_set(tiny_set, tmp_path / "set")
    for path in paths(out):
        invert(tree / path)
    archive = shutil.make_archive(str(tmp_path / "mimic"), "zip", tree)
    with pytest.raises(ShardError, match="12 of 12 sampled images are not those"):
        build(f"zip://::{archive}", out, [16])


def test_the_same_pixels_in_other_bytes_are_refused(tree, folder):
    path = tree / paths(folder)[5]
    path.write_bytes(path.read_bytes()[:-2] + b"\xff\xd9")  # as it is
    assert build(tree, folder, [8]).complete
    data = path.read_bytes()
    marker = data.index(b"\xff\xe0")  # JFIF: its density does not change the pixels
    path.write_bytes(data[: marker + 12] + bytes([data[marker + 12] ^ 1]) + data[marker + 13 :])
    with pytest.raises(ShardError, match="not the file that its image at 8 px was made from"):
        build(tree, folder, [16])


def test_a_retry_refuses_images_that_changed_and_keeps_the_shard(corrupt_set, corrupt, tmp_path):
    out = copy_set(corrupt_set[0], tmp_path / "set")
    tree = copy_set(corrupt, tmp_path / "mimic")
    row = next(row for row in range(64) if row not in corrupt_set[1].quarantined)
    invert(tree / paths(out)[row])
    before = contents(out / "32")
    with pytest.raises(ShardError, match=rf"\(row {row}\) is not the file"):
        build(tree, out, [32], retry_quarantined=True)
    assert {name: data for name, data in contents(out / "32").items() if name in before} == before


def test_pixels_that_this_version_decodes_differently_are_refused_although_the_file_is_the_same(phantoms, folder):
    for scale in (32, 64):
        path = shard_path(folder, scale, 0, "json")
        grids = unpack(json.loads(path.read_bytes())["grids"], 64).astype(np.int32)
        grids[9] = 255 * STEPS - grids[9]
        change(path, grids=pack(grids))
    sign(folder)
    with pytest.raises(
        ShardError, match=r"\(row 9\) now gives other pixels than its image at 64 px.*decodes it differently"
    ):
        build(phantoms, folder, [16])


def test_a_set_without_hashes_and_grids_asks_for_grids_first(phantoms, folder):
    without_grids(without_hashes(folder))
    with pytest.raises(ShardError, match=r"does not say which images .* were made from: run `cxrfast verify --repair"):
        build(phantoms, folder, [16])


def test_a_scale_added_to_a_set_of_an_earlier_version_is_compared_by_its_grids_and_has_hashes(
    phantoms, folder, tmp_path
):
    without_hashes(folder)
    assert build(phantoms, folder, [16]).complete
    build(phantoms, tmp_path / "new", [16])
    assert contents(folder / "16") == contents(tmp_path / "new" / "16")
    assert verify(folder, deep=True).problems == []


def test_hashes_are_taken_from_any_scale_and_grids_from_the_smallest_of_64_px_or_more(tiny_set, folder):
    assert earlier([]) == Earlier()
    manifests = [read_manifest(tiny_set, scale, 0) for scale in (64, 32)]
    assert earlier(manifests).scale == 64
    assert earlier(manifests[1:]).scale == 32
    without_hashes(folder, [(32, 0)])
    found = earlier([read_manifest(folder, scale, 0) for scale in (32, 64)])
    assert (found.hashed_at, len(found.hashes)) == (64, 64)


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
