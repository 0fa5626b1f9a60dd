"""The host engine: a thread pool that decodes and warps on the CPU, without the GIL, into batches in order.

It is the oracle for the DALI engine: the same draws, the same geometry, pixels within a grey level or so.
"""

import math
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import cv2
import numpy as np
import simplejpeg
import torch

from cxrfast.errors import LoadError
from cxrfast.pipelines.reader import Reader
from cxrfast.shards.images import resize

PREFETCH_BYTES = 256 * 2**20
"""Decoded pixels held ahead of the consumer, at most; two batches are always allowed."""


@dataclass(frozen=True)
class Work:
    """One micro-batch to be made."""

    rows: np.ndarray
    """int64 (N,)"""
    angles: np.ndarray | None = None
    """float32 (N,), degrees, counter-clockwise; None where nothing is drawn."""
    flips: np.ndarray | None = None
    """bool (N,), horizontal, before the rotation."""


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


class HostEngine:
    """Decode, resize where the size differs from the stored one, flip and rotate, on `threads` threads."""

    def __init__(self, reader: Reader, size: int, device: torch.device, threads: int) -> None:
        cv2.setNumThreads(1)  # our threads work on whole images; OpenCV's own would only get in their way
        self.reader, self.size, self.device, self.threads = reader, size, device, threads
        self._local = threading.local()

    def batches(self, work: Iterable[Work]) -> Iterator[torch.Tensor]:
        """uint8 (N, 1, size, size) with channels-last strides on the device, one for each Work, in order.

        Raises LoadError naming the row that cannot be decoded.
        """
        pending: deque[tuple[torch.Tensor, list[Future[None]]]] = deque()
        held = 0
        pool = ThreadPoolExecutor(self.threads, thread_name_prefix="cxrfast-host")
        try:
            for item in work:
                pending.append(self._submit(pool, item))
                held += pending[-1][0].numel()
                if len(pending) > 1 and (held > PREFETCH_BYTES or len(pending) > 2 * self.threads):
                    held -= pending[0][0].numel()
                    yield self._finish(*pending.popleft())
            while pending:
                yield self._finish(*pending.popleft())
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _submit(self, pool: ThreadPoolExecutor, work: Work) -> tuple[torch.Tensor, list[Future[None]]]:
        n = len(work.rows)
        batch = torch.empty((n, self.size, self.size, 1), dtype=torch.uint8, pin_memory=self.device.type == "cuda")
        pixels = batch.numpy()[..., 0]
        step = max(1, min(8, n // (2 * self.threads)))  # a few images a task: handing one over costs 30 µs
        return batch, [pool.submit(self._fill, pixels, work, range(i, min(i + step, n))) for i in range(0, n, step)]

    def _finish(self, batch: torch.Tensor, futures: list[Future[None]]) -> torch.Tensor:
        for future in futures:
            future.result()
        # torch's pinned memory is not reused before the copy has ended
        return batch.permute(0, 3, 1, 2).to(self.device, non_blocking=True)

    def _fill(self, pixels: np.ndarray, work: Work, items: range) -> None:
        for i in items:
            angle = 0.0 if work.angles is None else float(work.angles[i])
            flip = work.flips is not None and bool(work.flips[i])
            self._image(int(work.rows[i]), angle, flip, pixels[i])

    def _image(self, row: int, angle: float, flip: bool, out: np.ndarray) -> None:
        """Write the pixels of one row into `out`, uint8 (size, size)."""
        stored = self.reader.scale
        local = self._local
        if not hasattr(local, "jpeg"):
            local.jpeg, local.image = bytearray(self.reader.largest), np.empty((stored, stored, 1), np.uint8)
        straight = self.size == stored and angle == 0.0 and not flip
        target = out[..., None] if straight else local.image
        try:
            data = self.reader.read(row, local.jpeg)
            image = simplejpeg.decode_jpeg(data, "GRAY", buffer=target)[..., 0]
        except ValueError as error:
            raise LoadError(f"row {row} of {self.reader.folder} at {stored} px does not decode: {error}") from error
        if image.shape != (stored, stored):
            raise LoadError(
                f"row {row} of {self.reader.folder} has {image.shape[1]} × {image.shape[0]} px instead of {stored}"
            )
        if straight:
            return
        image = resize(image, self.size, self.size)
        if angle == 0.0 and not flip:
            out[...] = image
        else:
            cv2.warpAffine(
                image,
                warp_matrix(self.size, angle, flip),
                (self.size, self.size),
                dst=out,
                flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
                borderValue=0,
            )
