"""Films from files: decoded once for all scales by a thread pool, as batches in their order, with bounded memory.

What a film is and how it is prepared is the caller's business: a function that runs in the threads turns one item into its
pixels at every scale. A film that cannot be used leaves its place empty and takes no other with it.
"""

import os
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import cv2
import numpy as np
import torch

from cxrfast.files import open_file
from cxrfast.pipelines.host import PREFETCH_BYTES, CopyStream
from cxrfast.shards.images.bad_image import BadImage

F = TypeVar("F")

READERS = 4
"""Threads that ask the system to read files ahead: a disk or a file server answers several requests at a time."""

BATCH_BYTES = 64 * 2**20
"""Most bytes of pixels of a batch, one film at least."""


@dataclass(frozen=True)
class FilmBatch(Generic[F]):
    """Films that follow each other in the list."""

    first: int
    """Place of the first of them in the list."""
    images: dict[int, torch.Tensor]
    """By scale: uint8 (n, 1, scale, scale) on the device, of those that could be used."""
    used: np.ndarray
    """int64 (n,), ascending: their places in the batch."""
    facts: list[F | BadImage]
    """What was learned about each film of the batch, or why it cannot be used."""


def batch_size(scales: Sequence[int], most: int) -> int:
    """Films per batch: a power of two, at most `most`, whose pixels at all scales fit BATCH_BYTES; 1 at least."""
    fitting = max(1, min(most, BATCH_BYTES // sum(scale**2 for scale in scales)))
    return 1 << (fitting.bit_length() - 1)


def film_batches(
    paths: Sequence[Path],
    prepare: Callable[[int], tuple[dict[int, np.ndarray], F]],
    scales: Sequence[int],
    *,
    batch: int,
    device: torch.device,
    threads: int,
) -> Generator[FilmBatch[F]]:
    """Batches of `batch` films, in order; the last may be smaller.

    prepare: called in a thread with a film's place in `paths`; returns its pixels, {scale: uint8 (scale, scale)}, and what
    else is to be known. Its BadImage makes an empty place; any other error ends the stream.
    paths: where the files are, to read ahead.
    """
    cv2.setNumThreads(1)  # our threads work on whole films; OpenCV's own would only compete with them
    copies = CopyStream(device) if device.type == "cuda" else None
    size = sum(scale**2 for scale in scales) * batch
    pool = ThreadPoolExecutor(threads, thread_name_prefix="cxrfast-films")
    readers = ThreadPoolExecutor(READERS, thread_name_prefix="cxrfast-readahead")
    pending: deque[tuple[int, dict[int, Any], list[Future[F]]]] = deque()

    def submit(first: int) -> None:
        places = range(first, min(first + batch, len(paths)))
        arrays = {scale: _empty((len(places), scale, scale), copies) for scale in scales}

        def work(place: int) -> F:
            images, fact = prepare(place)
            for scale, array in arrays.items():
                _pixels(array)[place - first] = images[scale]
            return fact

        pending.append((first, arrays, [pool.submit(work, place) for place in places]))

    try:
        for first in range(0, len(paths), batch):
            for path in paths[first : first + batch]:
                readers.submit(_advise, path)
            submit(first)
            if len(pending) > 1 and (len(pending) * size > PREFETCH_BYTES or len(pending) > threads + 1):
                yield _finish(*pending.popleft(), copies)
        while pending:
            yield _finish(*pending.popleft(), copies)
    finally:
        readers.shutdown(wait=True, cancel_futures=True)
        pool.shutdown(wait=True, cancel_futures=True)


def _empty(shape: tuple[int, ...], copies: CopyStream | None) -> Any:
    """uint8 of this shape, with arbitrary content: pinned if it is copied to a GPU."""
    return torch.empty(shape, dtype=torch.uint8, pin_memory=True) if copies else np.empty(shape, np.uint8)


def _pixels(array: Any) -> np.ndarray:
    return array if isinstance(array, np.ndarray) else array.numpy()


def _finish(first: int, arrays: dict[int, Any], futures: list[Future[F]], copies: CopyStream | None) -> FilmBatch[F]:
    facts: list[F | BadImage] = []
    for future in futures:
        try:
            facts.append(future.result())
        except BadImage as error:
            facts.append(error)
    used = np.array([i for i, fact in enumerate(facts) if not isinstance(fact, BadImage)], np.int64)
    images = {}
    for scale, array in arrays.items():
        kept = array if len(used) == len(facts) else array[used]
        moved = copies.move(kept) if copies else torch.from_numpy(kept)
        images[scale] = moved[..., None].permute(0, 3, 1, 2)
    return FilmBatch(first, images, used, facts)


def _advise(path: Path) -> None:
    """Ask the system to read a file ahead."""
    with suppress(OSError):
        descriptor = open_file(path)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_WILLNEED)
        finally:
            os.close(descriptor)
