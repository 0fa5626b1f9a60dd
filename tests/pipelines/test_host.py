import numpy as np
import pytest
import torch
from batches import CPU, decoded, disc, oracle, plain

from cxrfast.pipelines import host
from cxrfast.pipelines.host import HostEngine
from cxrfast.pipelines.order import Augment, Work
from cxrfast.pipelines.reader import Reader
from cxrfast.shards.images.resize import resize

ROWS = np.arange(150)


def run(reader: Reader, work: list[Work], size: int | None = None) -> list[torch.Tensor]:
    return list(HostEngine(reader, size or reader.scale, CPU, 2).batches(work))


@pytest.mark.parametrize("part", [lambda batch: batch[2:3, :, 8:], lambda batch: batch.numpy()[1], torch.Tensor.detach])
def test_a_part_of_a_batch_keeps_all_of_it(reader, part):
    held, copies = [], []
    for batch in HostEngine(reader, 64, CPU, 2).batches(plain(ROWS, 5)):
        held.append(part(batch))
        copies.append(np.asarray(part(batch)).copy())
        del batch
    assert all(np.array_equal(kept, copy) for kept, copy in zip(held, copies, strict=True))


def test_memory_of_batches_that_are_no_longer_held_is_used_again(reader):
    engine = HostEngine(reader, 64, CPU, 2)
    places = {batch.data_ptr() for _ in range(3) for batch in engine.batches(plain(ROWS, 5))}
    assert len(places) <= 2 + host.KEPT


def test_every_row_is_turned_by_its_own_draw(reader):
    angles, flips = Augment().draw(1, 2, ROWS)
    work = [Work(item.rows, angles[item.rows], flips[item.rows]) for item in plain(ROWS, 13)]
    pixels = torch.cat(run(reader, work))[:, 0].numpy()
    for row in range(150):
        (expected,) = oracle(decoded(reader, row)[None], angles[row], flips[row])
        assert abs(pixels[row] - expected)[disc(64)].max() <= 2


def test_a_flip_alone_is_exact_and_a_quarter_turn_is_counter_clockwise_about_the_centre(reader):
    angles, flips = np.array([0, 0, 90, 90], np.float32), np.array([False, True, False, True])
    (batch,) = run(reader, [Work(np.arange(4), angles, flips)])
    images = [decoded(reader, row) for row in range(4)]
    np.testing.assert_array_equal(batch[0, 0], images[0])
    np.testing.assert_array_equal(batch[1, 0], images[1][:, ::-1])
    assert abs(batch[2, 0].numpy().astype(int) - np.rot90(images[2])).max() <= 1
    assert abs(batch[3, 0].numpy().astype(int) - np.rot90(images[3][:, ::-1])).max() <= 1


@pytest.mark.parametrize("size", [24, 48, 100])
def test_another_size_than_the_stored_one_is_resized_before_it_is_turned(reader, size):
    angles, flips = np.array([0, 0, 9], np.float32), np.array([False, True, True])
    (unturned,) = run(reader, [Work(np.arange(3))], size)
    (turned,) = run(reader, [Work(np.arange(3), angles, flips)], size)
    assert unturned.shape == turned.shape == (3, 1, size, size)
    for row in range(3):
        small = resize(decoded(reader, row), size, size)
        np.testing.assert_array_equal(unturned[row, 0], small)
        (expected,) = oracle(small[None], angles[row], flips[row])
        assert abs(turned[row, 0].numpy() - expected)[disc(size)].max() <= 2


def test_no_more_is_decoded_ahead_than_the_memory_set_aside_for_it(reader, monkeypatch):
    monkeypatch.setattr(host, "PREFETCH_BYTES", 20 * 64 * 64)

    class Counted(HostEngine):
        begun = 0

        def _submit(self, pool, work):
            self.begun += 1
            return super()._submit(pool, work)

    engine = Counted(reader, 64, CPU, 16)
    for done, _ in enumerate(engine.batches(iter(plain(ROWS, 5))), 1):
        assert engine.begun - done <= 4
    assert engine.begun == done == 30
