import json
from base64 import b64decode

import numpy as np
import pytest
import simplejpeg
from damage import without_grids
from hypothesis import given
from hypothesis import strategies as st
from pictures import noise

from cxrfast.errors import ShardError
from cxrfast.pipelines.reader import Reader
from cxrfast.shards.format.codec import decode_member
from cxrfast.shards.format.manifest import read_manifest
from cxrfast.shards.format.names import shard_path
from cxrfast.shards.images.cell_means import SIDE, STEPS, dc_quantiser, edges, grid, pack, tolerance, unpack
from cxrfast.shards.images.decode import decode as decode_source
from cxrfast.shards.images.decode import encode
from cxrfast.shards.images.resize import at_scales

SIDES = st.integers(SIDE, 150)


def cell_means(image: np.ndarray) -> np.ndarray:
    """float64 (4, 4), by numpy alone."""
    rows, columns = (np.array(edges(side)) for side in image.shape)
    sums = np.add.reduceat(np.add.reduceat(image.astype(np.int64), rows[:-1], axis=0), columns[:-1], axis=1)
    return sums / np.outer(np.diff(rows), np.diff(columns))


@given(st.integers(SIDE, 5000))
def test_cells_share_an_axis_evenly_and_leave_nothing_out(side):
    borders = edges(side)
    assert (borders[0], borders[-1], len(borders)) == (0, side, SIDE + 1)
    assert set(np.diff(borders)) <= {side // SIDE, side // SIDE + 1}


@given(SIDES, SIDES, st.integers(0, 99))
def test_the_grid_is_the_mean_of_each_cell_to_the_step(height, width, seed):
    image = noise(height, width, seed)
    means = grid(image)
    assert means.dtype == np.int16
    assert (np.abs(means / STEPS - cell_means(image)) <= 0.5 / STEPS).all(), "so it is for raw images"
    assert tolerance("raw", None, 64) > 0.5 / STEPS


def test_a_part_of_a_larger_image_and_black_and_white_have_their_grids():
    image = noise(300, 200)
    assert (grid(image[10:90, 20:100]) == grid(image[10:90, 20:100].copy())).all()
    assert (grid(np.zeros((2048, 2048), np.uint8)) == 0).all()
    assert (grid(np.full((2048, 2048), 255, np.uint8)) == 255 * STEPS).all()


@given(st.lists(st.integers(0, 255 * STEPS - 15), min_size=1, max_size=6))
def test_what_is_packed_comes_back_and_means_outside_the_grey_levels_are_refused(values):
    grids = np.add.outer(np.array(values, np.int64), np.zeros((SIDE, SIDE), np.int64)).astype(np.int16)
    grids += np.arange(16, dtype=np.int16).reshape(SIDE, SIDE)
    text = pack(list(grids))
    assert isinstance(text, str)
    back = unpack(text, len(grids))
    assert back.dtype == np.int16
    assert (back == grids).all()
    for rows in (len(grids) - 1, len(grids) + 1):
        with pytest.raises(ValueError, match="reshape"):
            unpack(text, rows)
    for value in (-1, 255 * STEPS + 1):
        with pytest.raises(ValueError, match="outside the grey levels"):
            unpack(pack(np.full((2, SIDE, SIDE), value, np.int16)), 2)
    little_endian = b"\2\1" * 16
    assert b64decode(pack([np.full((SIDE, SIDE), 0x0102, np.int16)])) == little_endian


@pytest.mark.parametrize("quality", range(1, 101))
def test_the_dc_quantiser_is_the_one_that_the_encoder_writes(quality):
    jpeg = encode(noise(16, 16), quality)
    table = jpeg[jpeg.index(b"\xff\xdb") + 5 :]
    assert dc_quantiser(quality) == table[0]


@pytest.mark.slow
@pytest.mark.parametrize("scale", [64, 256, 1024])
def test_decoded_radiographs_are_well_within_the_tolerance_whatever_the_inverse_dct_and_others_are_not(real_set, scale):
    most = tolerance("jpeg", 95, scale)
    with Reader(real_set, scale) as reader:
        grids = reader.grids / STEPS
        assert (np.abs(np.roll(grids, 1, axis=0) - grids).max(axis=(1, 2)) > most).all()
        for row in reader.rows.tolist():
            data = bytes(reader.read(row))
            fast = simplejpeg.decode_jpeg(data, "GRAY", fastdct=True)[:, :, 0]
            assert np.abs(cell_means(decode_member(data, "jpeg")) - grids[row]).max() < most - 0.75
            assert np.abs(cell_means(fast) - grids[row]).max() < most


@pytest.mark.parametrize(("quality", "scale"), [(20, 16), (50, 100), (75, 50), (95, 8), (95, 224)])
def test_small_cells_and_those_that_cut_blocks_stay_within_the_tolerance(real_tree, quality, scale):
    for path in sorted(real_tree.rglob("*.jpg"))[:100]:
        picture = at_scales(decode_source(path.read_bytes(), "none"), [scale])[scale]
        decoded = decode_member(encode(picture, quality), "jpeg")
        assert np.abs(cell_means(decoded) - grid(picture) / STEPS).max() < tolerance("jpeg", quality, scale)


def test_rows_of_a_manifest_without_grids_and_rows_that_are_not_held_have_none(tiny_set, folder):
    without_grids(folder, [(64, 1)])
    assert "grids" not in json.loads(shard_path(folder, 64, 1, "json").read_bytes())
    shard_path(folder, 64, 2, "json").unlink()  # its rows are not held
    with Reader(folder, 64) as reader, Reader(tiny_set, 64) as whole:
        assert (reader.grids[64:] == -1).all()
        assert (reader.grids[:64] == whole.grids[:64]).all()
        assert reader.grids[:64].min() >= 0


@pytest.mark.parametrize(
    "change", ["AAAA", lambda text: text[:-4], lambda text: text + text[:4], lambda text: text + "!", lambda text: 3]
)
def test_grids_of_the_wrong_length_are_damage(folder, change):
    path = shard_path(folder, 64, 1, "json")
    value = json.loads(path.read_bytes())
    value["grids"] = change if isinstance(change, str) else change(value["grids"])
    path.write_text(json.dumps(value))
    with pytest.raises(ShardError, match=r"000001.json is damaged"):
        read_manifest(folder, 64, 1)
