"""Films stream in order, each prepared once, and a film that cannot be used costs no other."""

import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from batches import threads_of_ours

from cxrfast.pipelines.films import BATCH_BYTES, batch_size, film_batches
from cxrfast.shards.images.bad_image import BadImage, Reason

CPU = torch.device("cpu")
SCALES = (4, 8)


def stream(n: int, prepare, batch: int = 4, threads: int = 3):
    return film_batches([Path(f"{i}") for i in range(n)], prepare, SCALES, batch=batch, device=CPU, threads=threads)


def pixels(place: int) -> dict[int, np.ndarray]:
    return {scale: np.full((scale, scale), place % 251, np.uint8) for scale in SCALES}


@pytest.mark.parametrize("n", [0, 1, 3, 4, 5, 41])
def test_every_film_comes_once_in_order_at_every_scale(n):
    def prepare(place):
        time.sleep(0.002 * (place % 3))  # they do not end in order
        return pixels(place), place

    found = list(stream(n, prepare))
    assert [fact for batch in found for fact in batch.facts] == list(range(n))
    for batch in found:
        places = batch.first + batch.used
        for scale in SCALES:
            images = batch.images[scale]
            assert images.shape == (len(places), 1, scale, scale)
            assert torch.equal(images[:, 0, 0, 0].int(), torch.from_numpy(places % 251).int())
            assert (images == images[..., :1, :1]).all()


def test_a_film_that_cannot_be_used_leaves_its_place_empty():
    def prepare(place):
        if place in (1, 4, 5, 6, 7):
            raise BadImage(Reason.TRUNCATED)
        return pixels(place), place

    first, second, third = stream(9, prepare)
    assert first.used.tolist() == [0, 2, 3]
    assert first.images[8][:, 0, 0, 0].tolist() == [0, 2, 3]
    assert isinstance(first.facts[1], BadImage)
    assert second.used.tolist() == []
    assert second.images[4].shape == (0, 1, 4, 4)
    assert third.facts == [8]


def test_another_error_ends_the_stream_and_no_thread_is_left():
    def prepare(place):
        if place == 6:
            raise ValueError("no decoder")
        return pixels(place), place

    with pytest.raises(ValueError, match="no decoder"):
        list(stream(100, prepare))
    assert threads_of_ours() == []


def test_memory_is_bounded_however_slow_the_consumer_is():
    begun, lock = [], threading.Lock()

    def prepare(place):
        with lock:
            begun.append(place)
        return pixels(place), place

    films = stream(1000, prepare, batch=4, threads=2)
    next(films)
    time.sleep(0.2)
    assert len(begun) <= 4 * (2 + 2)
    films.close()
    assert threads_of_ours() == []


def test_batches_of_large_films_are_small():
    assert batch_size((64, 128), 48) == 32
    assert batch_size((256, 512, 1024, 2048), 32) == 8
    assert batch_size((256, 512, 1024, 2048), 32) * (256**2 + 512**2 + 1024**2 + 2048**2) <= BATCH_BYTES
    assert batch_size((16384,), 32) == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_batches_on_a_gpu_hold_the_same_pixels():
    def prepare(place):
        return pixels(place), place

    paths = [Path(f"{i}") for i in range(41)]
    found = film_batches(paths, prepare, SCALES, batch=4, device=torch.device("cuda", 0), threads=3)
    places = [batch.images[8][:, 0, 0, 0].cpu() for batch in found]
    assert torch.cat(places).tolist() == list(range(41))
