"""The host engine: a thread pool that decodes and warps on the CPU, without the GIL, into batches in order.

It is the oracle for the DALI engine: the same augmentation and geometry, pixels within about one grey level.
"""

import math
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import torch

from cxrfast.pipelines.cache import PixelCache
from cxrfast.pipelines.decoder import Pixels
from cxrfast.pipelines.order import Work
from cxrfast.pipelines.read_ahead import read_ahead
from cxrfast.pipelines.reader import Reader

PREFETCH_BYTES = 256 * 2**20
"""Most bytes of pixels decoded ahead of the consumer; two batches are always allowed."""

TASK_BYTES = 4 * 2**20
"""Smallest task of a thread, in pixels, or a whole batch: 64 images of 256 px. Tasks of 16 cost 5 % of the rate."""

KEPT = 4
"""Batches whose memory is kept for reuse besides those in progress: about as many as a consumer holds at a time."""

WARP = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP


def warp_matrix(size: int, angle: float, flip: bool) -> np.ndarray:
    """2 × 3 float64: output pixel → source pixel, for a flip followed by a counter-clockwise rotation by `angle` degrees.

    Pixel centres are whole numbers, so the centre of rotation is ((size - 1) / 2, (size - 1) / 2).
    """
    c = (size - 1) / 2
    cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    x = [cos, -sin, c - c * cos + c * sin]  # undoes the rotation; y points down
    y = [sin, cos, c - c * sin - c * cos]
    if flip:
        x = [-x[0], -x[1], size - 1 - x[2]]
    return np.array([x, y])


class Memory:
    """Arrays for batches, reused once they and all views of them are unreferenced.

    Fresh memory costs a page fault and zeroing, a tenth of the time at 256 and at 2048 px.
    """

    def __init__(self, kept: int) -> None:
        self._arrays: deque[np.ndarray] = deque(maxlen=kept)  # if all are in use, the oldest is left to its holder
        self._lock = threading.Lock()

    def take(self, shape: tuple[int, ...]) -> np.ndarray:
        """uint8 of this shape, with arbitrary content."""
        with self._lock:
            for i in range(len(self._arrays)):
                # two referrers: the deque, and the call itself
                if sys.getrefcount(self._arrays[i]) == 2 and self._arrays[i].shape == shape:
                    return self._arrays[i]
            self._arrays.append(np.empty(shape, np.uint8))  # numpy asks for huge pages
            return self._arrays[-1]

    def clear(self) -> None:
        self._arrays.clear()


class CopyStream:
    """Copies from pinned memory to a GPU, on a stream of their own: they overlap with the consumer's kernels."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device)

    def move(self, batch: torch.Tensor) -> torch.Tensor:
        """The batch on the GPU. Kernels of the current stream wait for it; torch keeps the pinned memory until then."""
        with torch.cuda.stream(self._stream):
            moved = batch.to(self.device, non_blocking=True)
        consumer = torch.cuda.current_stream(self.device)
        consumer.wait_stream(self._stream)
        moved.record_stream(consumer)
        return moved


class HostEngine:
    """Decode, resize if the size differs from the stored one, flip and rotate, on `threads` threads.

    `cache`: a folder for decoded pixels, which are then not decoded again; see `pipelines.cache`.
    """

    def __init__(
        self, reader: Reader, size: int, device: torch.device, threads: int, cache: Path | str | None = None
    ) -> None:
        cv2.setNumThreads(1)  # our threads work on whole images; OpenCV's own would only compete with them
        self.size, self.device, self.threads = size, device, threads
        self.cache = PixelCache(cache, reader, size) if cache else None
        self.pixels = Pixels(reader, size, self.cache)
        self._copies: CopyStream | None = None
        """Copies batches to a GPU, made with the first batch; None on a CPU."""
        self._memory = Memory(threads + KEPT)

    def batches(self, work: Iterable[Work]) -> Iterator[torch.Tensor]:
        """uint8 (N, 1, size, size) with channels-last strides on the device, one per Work, in order.

        Raises LoadError naming the row that cannot be decoded.
        """
        if self.device.type == "cuda" and self._copies is None:
            self._copies = CopyStream(self.device)
        pending: deque[tuple[torch.Tensor | np.ndarray, list[Future[None]]]] = deque()
        held = 0
        pool = ThreadPoolExecutor(self.threads, thread_name_prefix="cxrfast-host")
        upcoming = read_ahead(self.pixels, work)
        try:
            for item in upcoming:
                pending.append(self._submit(pool, item))
                held += pending[-1][0].nbytes
                if len(pending) > 1 and (held > PREFETCH_BYTES or len(pending) > self.threads):
                    held -= pending[0][0].nbytes
                    yield self._finish(*pending.popleft())
            while pending:
                yield self._finish(*pending.popleft())
        finally:
            upcoming.close()
            pool.shutdown(wait=True, cancel_futures=True)

    def close(self) -> None:
        self._memory.clear()
        if self.cache:
            self.cache.close()

    def _submit(self, pool: ThreadPoolExecutor, work: Work) -> tuple[torch.Tensor | np.ndarray, list[Future[None]]]:
        n = len(work.rows)
        shape = (n, self.size, self.size)
        batch: torch.Tensor | np.ndarray
        if self._copies:
            batch = torch.empty(shape, dtype=torch.uint8, pin_memory=True)
            pixels = batch.numpy()
        else:
            batch = pixels = self._memory.take(shape)
        if work.angles is None and self.cache and self.cache.has(work.rows).all():
            step = max(1, n)  # copies only: 250 µs for 64 images of 256 px
        else:
            step = max(1, n // (2 * self.threads), TASK_BYTES // self.size**2)
        return batch, [pool.submit(self._fill, pixels, work, slice(i, min(i + step, n))) for i in range(0, n, step)]

    def _finish(self, batch: torch.Tensor | np.ndarray, futures: list[Future[None]]) -> torch.Tensor:
        for future in futures:
            future.result()
        if isinstance(batch, np.ndarray):
            # numpy sets the strides: each operation of torch would release the GIL and wait to get it back
            return torch.from_numpy(batch[..., None].transpose(0, 3, 1, 2))
        assert self._copies
        return self._copies.move(batch)[..., None].permute(0, 3, 1, 2)

    def _fill(self, pixels: np.ndarray, work: Work, items: slice) -> None:
        """Write the `items` of a batch into `pixels`, uint8 (N, size, size)."""
        rows, out = work.rows[items], pixels[items]
        if work.angles is None or work.flips is None:
            self.pixels.put_all(rows, out)
            return
        draws = zip(rows.tolist(), work.angles[items].tolist(), work.flips[items].tolist(), out, strict=True)
        for row, angle, flip, image in draws:
            matrix = warp_matrix(self.size, angle, flip)
            cv2.warpAffine(self.pixels.get(row), matrix, (self.size, self.size), dst=image, flags=WARP, borderValue=0)
