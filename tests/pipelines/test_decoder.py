import io
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from batches import ENGINES, assert_agree, cut, decoded, disc, engine, equal, oracle, plain, turned
from damage import copy_set, flip_bit, image_bytes, replace_image, where
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from sets import REAL

from cxrfast.errors import LoadError
from cxrfast.phantoms.dataset import synth
from cxrfast.pipelines.cache import PixelCache
from cxrfast.pipelines.decoder import Pixels, reduction
from cxrfast.pipelines.order import Work
from cxrfast.pipelines.reader import Reader
from cxrfast.shards.build import build
from cxrfast.shards.format.codec import encode_member
from cxrfast.shards.format.names import shard_path
from cxrfast.shards.images.decode import encode
from cxrfast.shards.images.resize import resize

ROWS = np.arange(150)


def by_pillow(folder: Path, scale: int, row: int) -> np.ndarray:
    """uint8 (H, W): the member of the tar, JPEG or PGM, as another library decodes it."""
    image = Image.open(io.BytesIO(image_bytes(folder, scale, row)))
    assert image.mode == "L"
    return np.asarray(image)


# What the pixels are


@pytest.mark.parametrize("scale", [32, 64])
@pytest.mark.parametrize("name", ENGINES)
def test_without_draws_batches_are_what_pillow_decodes_in_the_order_asked_for(either_set, name, scale):
    rows = np.random.default_rng(0).permutation(150)
    with Reader(either_set, scale) as reader:
        batches = list(engine(name, reader).batches(plain(rows, 16)))
    for part, batch in zip(cut(rows, 16), batches, strict=True):
        assert batch.dtype == torch.uint8
        assert batch.shape == (len(part), 1, scale, scale)
        assert batch.is_contiguous(memory_format=torch.channels_last)
        np.testing.assert_array_equal(batch[:, 0], [by_pillow(either_set, scale, row) for row in part])


@pytest.mark.parametrize("name", ENGINES)
def test_a_batch_that_was_handed_out_is_not_written_to_again(reader, name):
    held = [(batch, batch.clone()) for batch in engine(name, reader).batches(turned(ROWS, 5))]
    assert all(torch.equal(batch, copy) for batch, copy in held)


@pytest.mark.parametrize("size", [64, 32, 16, 8, 48, 100])
def test_one_by_one_together_or_from_many_threads_that_fill_a_cache_the_pixels_are_the_resized_ones(
    either_set, either_reader, tmp_path, size
):
    pixels = Pixels(either_reader, size)
    rows = np.random.default_rng(0).permutation(150)
    together, one = np.zeros((150, size, size), np.uint8), np.zeros((size, size), np.uint8)
    pixels.put_all(rows, together)
    by_row = dict(zip(rows.tolist(), together, strict=True))
    for row, image in by_row.items():
        pixels.put(row, one)
        np.testing.assert_array_equal(one, image)
        expected = resize(by_pillow(either_set, 64, row), size, size).astype(int)
        # a JPEG may have been decoded at a reduced size
        assert abs(image - expected).max() <= (0 if either_reader.is_raw or size in (64, 48, 100) else 4)
    many = np.random.default_rng(0).integers(150, size=1500).tolist()
    for used in (pixels, Pixels(either_reader, size, PixelCache(tmp_path, either_reader, size))):
        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(lambda row, used=used: np.array_equal(used.get(row), by_row[row]), many))


@given(st.integers(8, 4096), st.integers(1, 4096))
def test_a_reduced_size_is_a_multiple_of_the_one_asked_for(stored, size):
    factor = reduction(stored, size)
    assert factor in (1, 2, 4, 8)
    assert factor == 1 or stored // factor % size == 0
    assert factor == 8 or stored % (2 * factor * size) > 0


# What is refused


@pytest.mark.parametrize(("row", "cached"), [(-1, False), (150, True), (10**6, False), (-1, True)])
@pytest.mark.parametrize("name", ENGINES)
def test_a_row_that_does_not_exist_is_named(either_reader, tmp_path, name, row, cached):
    used = engine(name, either_reader, cache=tmp_path if cached else None)
    for rows in (np.array([row]), np.array([3, row, 5])):
        with pytest.raises(LoadError, match=f"row {row} does not exist: .* has rows 0 to 149"):
            list(used.batches([Work(rows)]))


@pytest.mark.parametrize(
    ("size", "height", "width"),
    [(64, 8, 8), (64, 65, 65), (64, 256, 256), (64, 64, 8), (32, 128, 128), (16, 32, 32), (48, 65, 65), (48, 32, 64)],
)
@pytest.mark.parametrize("name", ENGINES)
def test_a_jpeg_of_another_size_than_the_set_names_its_row_at_every_size_asked_for(folder, name, size, height, width):
    """Decoded at a reduced size, 128 px would pass for 64."""
    replace_image(folder, 64, 70, encode(np.zeros((height, width), np.uint8), 5))
    with Reader(folder, 64) as reader, pytest.raises(LoadError, match=rf"row 70 of .* has {width} × {height} px"):
        list(engine(name, reader, size).batches(plain(ROWS, 50)))


@pytest.mark.parametrize("name", ENGINES)
def test_any_flipped_bit_of_a_raw_image_names_row_and_tar(raw_set, tmp_path, name):
    folder = copy_set(raw_set, tmp_path / "set")
    shard, offset, size = where(folder, 64, 70)
    tar = shard_path(folder, 64, shard, "tar")
    with Reader(folder, 64) as reader:
        for at in (0, 3, 12, 13, size // 2, size - 1):  # the header has 13 bytes
            flip_bit(tar, offset + at)
            with pytest.raises(LoadError, match=rf"{tar}, row 70: the image's bytes have changed"):
                list(engine(name, reader).batches(plain(ROWS, 50)))
            flip_bit(tar, offset + at)
        assert len(list(engine(name, reader).batches(plain(ROWS, 50)))) == 3


@pytest.mark.parametrize(
    "data",
    [
        *(header + bytes(64 * 64) for header in (b"P5\n32 128\n255\n", b"P5\n64 64\n127\n", b"P5 64 64 255\n\n")),
        b"P6\n64 64\n255\n" + bytes(64 * 64),
        *(encode_member(np.zeros((side, side), np.uint8), "raw", None, None) for side in (16, 63)),
    ],
)
@pytest.mark.parametrize("name", ENGINES)
def test_a_raw_image_of_another_header_or_size_names_row_and_tar(raw_set, tmp_path, name, data):
    """Index and checksum agree with it."""
    folder = copy_set(raw_set, tmp_path / "set")
    shard, offset, size = where(folder, 64, 70)
    data = data[:size]
    index = shard_path(folder, 64, shard, "idx")
    assert f" {offset} {size} " in index.read_text()
    index.write_text(index.read_text().replace(f" {offset} {size} ", f" {offset} {len(data)} "))
    replace_image(folder, 64, 70, data)
    with Reader(folder, 64) as reader:
        assert bytes(reader.read(70)) == data
        with pytest.raises(LoadError, match=r"000001.tar, row 70 is not a raw image of 64 px"):
            list(engine(name, reader).batches(plain(ROWS, 50)))


# Both engines and the libraries they stand in for, at the sizes of a study


@pytest.fixture(scope="module")
def large_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """8 radiographs, real where they are at hand, at 2048 px. Not to be written to."""
    tree = tmp_path_factory.mktemp("large") / "mimic"
    if (REAL / "make_mimic.py").exists():
        command = [sys.executable, REAL / "make_mimic.py", tree, "--set", "hires", "--limit", "8"]
        subprocess.run(command, check=True, capture_output=True)
    else:
        synth(tree, images=8, size=2048, workers=1)
    build(tree, tree.parent / "set", [2048], workers=1)
    return tree.parent / "set"


TURNS = ((15.0, False), (-15.0, True), (0.4, True), (-7.3, False))


@pytest.mark.parametrize(
    ("fixture", "scale"),
    [
        ("tiny_set", 64),
        *(pytest.param("real_set", scale, marks=pytest.mark.slow) for scale in (64, 256, 1024)),
        pytest.param("large_set", 2048, marks=pytest.mark.slow),
    ],
)
def test_both_engines_and_torchvision_agree_up_to_the_largest_angles_and_without_draws_are_what_pillow_decodes(
    request, fixture, scale
):
    folder = request.getfixturevalue(fixture)
    with Reader(folder, scale) as reader:
        rows = reader.rows[:: max(1, 64 * len(reader.rows) * scale // 10**6)]
        work = [Work(rows, np.full(len(rows), angle, np.float32), np.full(len(rows), flip)) for angle, flip in TURNS]
        batches = {name: list(engine(name, reader).batches(work)) for name in ("host", "dali")}
        unturned = {name: list(engine(name, reader).batches([Work(rows)])) for name in ("host", "dali")}
    images = np.array([by_pillow(folder, scale, row) for row in rows])
    for name in ("host", "dali"):
        np.testing.assert_array_equal(unturned[name][0][:, 0], images)
    for batch, (angle, flip) in zip(batches["host"], TURNS, strict=True):
        difference = abs(batch[:, 0].numpy() - oracle(images, angle, flip))
        assert (difference[:, disc(scale)] <= 1).mean() >= 0.9999
        assert difference[:, disc(scale)].max() <= 4
        assert difference.mean() < (1 if scale == 64 else 0.6), "the corners are black in both"
    assert_agree(batches["dali"], batches["host"])


@pytest.mark.slow
@pytest.mark.parametrize("size", [512, 256, 128, 64])
def test_decoding_at_a_reduced_size_gives_the_averaged_pixels(real_set, size):
    with Reader(real_set, 1024) as reader:
        rows = reader.rows[::12]
        (batch,) = engine("host", reader, size).batches([Work(rows)])
        averaged = np.array([resize(decoded(reader, int(row)), size, size) for row in rows])
    difference = abs(batch[:, 0].numpy().astype(int) - averaged)
    assert (difference <= 1).mean() >= 0.9999
    assert difference.max() <= 4


def test_a_smaller_size_of_a_raw_set_is_that_of_averaging_whatever_the_engine(raw_set):
    with Reader(raw_set, 64) as reader:
        dali, host = (list(engine(name, reader, 32).batches(plain(ROWS, 50))) for name in ("dali", "host"))
        assert equal(dali, host)
