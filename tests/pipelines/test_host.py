import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from batches import CPU, cut, decoded, disc, oracle
from damage import copy_set, flip_bit, replace_image, where
from hypothesis import given, settings
from hypothesis import strategies as st

from cxrfast.errors import LoadError
from cxrfast.pipelines import host
from cxrfast.pipelines.decoder import reduction
from cxrfast.pipelines.host import HostEngine, warp_matrix
from cxrfast.pipelines.order import Augment, Work
from cxrfast.pipelines.reader import Reader
from cxrfast.shards.format.names import shard_path
from cxrfast.shards.images.decode import encode
from cxrfast.shards.images.resize import resize


def run(reader: Reader, work: list[Work], size: int | None = None, threads: int = 2) -> list[torch.Tensor]:
    return list(HostEngine(reader, size or reader.scale, CPU, threads).batches(work))


@pytest.fixture
def tiny(tiny_set: Path):
    with Reader(tiny_set, 64) as reader:
        yield reader


@pytest.mark.parametrize("threads", [1, 3])
def test_without_draws_batches_are_plain_decodes_in_the_order_asked_for(tiny, threads):
    rows = np.random.default_rng(0).permutation(150)
    batches = run(tiny, [Work(part) for part in cut(rows, 16)], threads=threads)
    assert [len(batch) for batch in batches] == [16] * 9 + [6]
    for part, batch in zip(cut(rows, 16), batches, strict=True):
        assert batch.dtype == torch.uint8
        assert batch.shape == (len(part), 1, 64, 64)
        assert batch.is_contiguous(memory_format=torch.channels_last)
        np.testing.assert_array_equal(batch[:, 0].numpy(), [decoded(tiny, row) for row in part])


def test_a_batch_that_was_handed_out_is_not_written_to_again(tiny):
    engine = HostEngine(tiny, 64, CPU, 2)
    held, copies = [], []
    for batch in engine.batches([Work(part) for part in cut(np.arange(150), 5)]):
        held.append(batch)
        copies.append(batch.clone())
    assert all(torch.equal(batch, copy) for batch, copy in zip(held, copies, strict=True))


@pytest.mark.parametrize("part", [lambda batch: batch[2:3, :, 8:], lambda batch: batch.numpy()[1], torch.Tensor.detach])
def test_a_part_of_a_batch_keeps_all_of_it(tiny, part):
    held, copies = [], []
    for batch in HostEngine(tiny, 64, CPU, 2).batches([Work(rows) for rows in cut(np.arange(150), 5)]):
        held.append(part(batch))
        copies.append(np.asarray(part(batch)).copy())
        del batch
    assert all(np.array_equal(kept, copy) for kept, copy in zip(held, copies, strict=True))


def test_memory_of_batches_that_nobody_holds_is_used_again(tiny):
    work = [Work(rows) for rows in cut(np.arange(150), 5)]
    engine = HostEngine(tiny, 64, CPU, 2)
    places = {batch.data_ptr() for _ in range(3) for batch in engine.batches(work)}
    assert len(places) <= 2 + host.KEPT


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("angle", [15.0, -15.0, 0.4, -7.3])
def test_real_radiographs_are_turned_as_torchvision_turns_them(real_set, angle, flip):
    with Reader(real_set, 256) as reader:
        rows = reader.rows[::12]
        (batch,) = run(reader, [Work(rows, np.full(len(rows), angle, np.float32), np.full(len(rows), flip))])
        images = np.array([decoded(reader, int(row)) for row in rows])
    difference = abs(batch[:, 0].numpy() - oracle(images, angle, flip))
    assert (difference[:, disc(256)] <= 1).mean() >= 0.9999
    assert difference[:, disc(256)].max() <= 4
    assert difference.mean() < 0.6, "the corners are black in both"


def test_every_row_is_turned_by_its_own_draw(tiny):
    rows = np.arange(150)
    angles, flips = Augment().draw(1, 2, rows)
    batches = run(tiny, [Work(part, angles[part], flips[part]) for part in cut(rows, 13)])
    pixels = torch.cat(batches)[:, 0].numpy()
    inside = disc(64)
    for row in range(150):
        (expected,) = oracle(decoded(tiny, row)[None], angles[row], flips[row])
        assert abs(pixels[row] - expected)[inside].max() <= 2


def test_a_flip_alone_is_exact(tiny):
    rows = np.arange(8)
    (batch,) = run(tiny, [Work(rows, np.zeros(8, np.float32), rows % 2 == 1)])
    for row in range(8):
        image = decoded(tiny, row)
        np.testing.assert_array_equal(batch[row, 0], image[:, ::-1] if row % 2 else image)


def test_a_quarter_turn_is_counter_clockwise_about_the_centre(tiny):
    (batch,) = run(tiny, [Work(np.arange(2), np.full(2, 90, np.float32), np.array([False, True]))])
    image, other = decoded(tiny, 0), decoded(tiny, 1)
    assert abs(batch[0, 0].numpy().astype(int) - np.rot90(image)).max() <= 1
    assert abs(batch[1, 0].numpy().astype(int) - np.rot90(other[:, ::-1])).max() <= 1


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 4096), st.floats(-180, 180), st.booleans())
def test_the_warp_keeps_the_centre_and_all_distances_and_mirrors_only_when_asked(size, angle, flip):
    matrix = warp_matrix(size, angle, flip)
    centre = (size - 1) / 2
    np.testing.assert_allclose(matrix @ [centre, centre, 1], [centre, centre], atol=1e-7 * size)
    np.testing.assert_allclose(matrix[:, :2] @ matrix[:, :2].T, np.eye(2), atol=1e-12)
    assert np.linalg.det(matrix[:, :2]) == pytest.approx(-1 if flip else 1)


@pytest.mark.parametrize("size", [24, 48, 100])
def test_another_size_than_the_stored_one_is_resized_before_it_is_turned(tiny, size):
    angles, flips = np.array([0, 0, 9], np.float32), np.array([False, True, True])
    (plain,) = run(tiny, [Work(np.arange(3))], size)
    (turned,) = run(tiny, [Work(np.arange(3), angles, flips)], size)
    assert plain.shape == turned.shape == (3, 1, size, size)
    for row in range(3):
        small = resize(decoded(tiny, row), size, size)
        np.testing.assert_array_equal(plain[row, 0], small)
        (expected,) = oracle(small[None], angles[row], flips[row])
        assert abs(turned[row, 0].numpy() - expected)[disc(size)].max() <= 2


@pytest.mark.parametrize("size", [512, 256, 128, 64])
def test_decoding_at_a_reduced_size_gives_the_averaged_pixels(real_set, size):
    with Reader(real_set, 1024) as reader:
        rows = reader.rows[::12]
        (batch,) = run(reader, [Work(rows)], size)
        averaged = np.array([resize(decoded(reader, int(row)), size, size) for row in rows])
    difference = abs(batch[:, 0].numpy().astype(int) - averaged)
    assert (difference <= 1).mean() >= 0.9999
    assert difference.max() <= 4


@given(st.integers(8, 4096), st.integers(1, 4096))
def test_a_reduced_size_is_a_multiple_of_the_one_asked_for(stored, size):
    factor = reduction(stored, size)
    assert factor in (1, 2, 4, 8)
    assert factor == 1 or stored // factor % size == 0
    assert factor == 8 or stored % (2 * factor * size) > 0


def test_a_damaged_image_names_its_row_and_batches_before_it_are_whole(tiny_set, tmp_path, tiny):
    folder = copy_set(tiny_set, tmp_path / "set")
    replace_image(folder, 64, 70, b"no picture")
    with Reader(folder, 64) as reader:
        engine, got = HostEngine(reader, 64, CPU, 2), []
        with pytest.raises(LoadError, match=rf"row 70 of {folder} at 64 px does not decode"):
            for batch in engine.batches([Work(part) for part in cut(np.arange(150), 10)]):
                got.append(batch)
        assert torch.equal(torch.cat(got), torch.cat(run(tiny, [Work(np.arange(70))])))
        with pytest.raises(LoadError, match="row 70"):  # also when turned
            run(reader, [Work(np.arange(65, 75), np.full(10, 5, np.float32), np.zeros(10, bool))])
        others = np.array([row for row in range(150) if row != 70])
        rest = torch.cat(list(engine.batches([Work(part) for part in cut(others, 10)])))
    assert torch.equal(rest, torch.cat(run(tiny, [Work(others)])))


def test_an_image_of_another_size_names_its_row(tiny_set, tmp_path):
    folder = copy_set(tiny_set, tmp_path / "set")
    for shape in ((16, 16), (64, 8), (65, 65)):
        replace_image(folder, 64, 70, encode(np.zeros(shape, np.uint8), 50))
        with Reader(folder, 64) as reader, pytest.raises(LoadError, match="row 70 of"):
            run(reader, [Work(np.arange(65, 75))])


def test_changed_bytes_name_row_and_tar(tiny_set, tmp_path):
    folder = copy_set(tiny_set, tmp_path / "set")
    shard, offset, size = where(folder, 64, 70)
    flip_bit(shard_path(folder, 64, shard, "tar"), offset + size // 2)
    with (
        Reader(folder, 64) as reader,
        pytest.raises(LoadError, match=r"000001.tar, row 70: the image's bytes have changed"),
    ):
        run(reader, [Work(np.arange(60, 80))])


def test_stopping_early_or_failing_leaves_no_thread(tiny_set, tmp_path, tiny):
    folder = copy_set(tiny_set, tmp_path / "set")
    replace_image(folder, 64, 70, b"no picture")
    before = threading.enumerate()
    for batch in HostEngine(tiny, 64, CPU, 3).batches(Work(part) for part in cut(np.arange(150), 5)):
        assert len(threading.enumerate()) > len(before)
        assert len(batch) == 5
        break
    assert threading.enumerate() == before
    with Reader(folder, 64) as reader, pytest.raises(LoadError):
        run(reader, [Work(np.arange(150))])
    assert threading.enumerate() == before


def test_no_more_is_decoded_ahead_than_the_memory_set_aside_for_it(tiny, monkeypatch):
    monkeypatch.setattr(host, "PREFETCH_BYTES", 20 * 64 * 64)

    class Counted(HostEngine):
        begun = 0

        def _submit(self, pool, work):
            self.begun += 1
            return super()._submit(pool, work)

    engine = Counted(tiny, 64, CPU, 16)
    for done, _ in enumerate(engine.batches(Work(part) for part in cut(np.arange(150), 5)), 1):
        assert engine.begun - done <= 4
    assert engine.begun == done == 30
