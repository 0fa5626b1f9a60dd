"""The DALI engine: one graph for CPU and GPU, fed with the reader's bytes; draws and geometry as in `host`.

`device_id` is None for a CPU pipeline, which then runs without a driver. Nothing here imports DALI before it is asked for.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.util import find_spec
from typing import Any

import numpy as np
import simplejpeg
import torch

from cxrfast.errors import LoadError
from cxrfast.pipelines.host import HostEngine, Work
from cxrfast.pipelines.reader import Reader

DEPTH = 2
"""Batches decoded ahead of the consumer, and again as many read ahead of the decoder."""


def available() -> bool:
    return find_spec("nvidia") is not None and find_spec("nvidia.dali") is not None


class DaliEngine:
    """Decode grey (on a GPU: its JPEG engines, `mixed`), resize where the size differs, flip and rotate."""

    def __init__(self, reader: Reader, size: int, device: torch.device, threads: int) -> None:
        if not available():
            raise LoadError("NVIDIA DALI is not installed: `pip install nvidia-dali-cuda120`, or use --engine host")
        self.reader, self.size, self.device, self.threads = reader, size, device, threads
        self._host = HostEngine(reader, size, device, threads)

    def batches(self, work: Iterable[Work]) -> Iterator[torch.Tensor]:
        """As `HostEngine.batches`. A batch that DALI refuses is decoded by the host engine, which names the bad row."""
        items = list(work)
        done, refused = 0, 0
        while done < len(items):
            try:
                for batch in self._run(items[done:]):
                    done, refused = done + 1, 0
                    yield batch
                return
            except (RuntimeError, LoadError) as error:  # DALI's pipeline is dead now: host decodes, a new one is built
                yield from self._host.batches(items[done : done + 1])
                done, refused = done + 1, refused + isinstance(error, RuntimeError)
                if refused == 2:  # host found nothing wrong with the images, twice in a row
                    raise LoadError(
                        f"DALI fails on images that are whole: use --engine host. It says: {error}"
                    ) from error

    def _run(self, items: list[Work]) -> Iterator[torch.Tensor]:
        with ThreadPoolExecutor(min(self.threads, 4), thread_name_prefix="cxrfast-dali-read") as pool:
            augmented = items[0].angles is not None
            pipe = self._pipeline(max(len(item.rows) for item in items), augmented, self._feed(pool, items))
            for _ in items:
                if self.device.type == "cuda":
                    outputs = pipe.run(torch.cuda.current_stream(self.device).cuda_stream)
                else:
                    outputs = pipe.run()
                # the default executor leaves tensors alone that were handed out: no copy
                batch = torch.from_dlpack(outputs[0].as_tensor()).permute(0, 3, 1, 2)
                if batch.shape[2:] != (self.size, self.size):
                    raise LoadError(
                        f"{self.reader.folder} holds images of {tuple(batch.shape[2:])} px"
                    )  # host names the row
                yield batch

    def _feed(self, pool: ThreadPoolExecutor, items: list[Work]) -> Iterator[tuple[list[np.ndarray], ...]]:
        """Encoded images and draws, batch by batch; reading runs ahead in `pool`."""

        def read(row: int) -> np.ndarray:
            data = np.frombuffer(self.reader.read(row), np.uint8)
            try:
                simplejpeg.decode_jpeg_header(data)
            except ValueError as error:
                # DALI 2.4 may crash on it: what one thread fails to parse frees what the others still read
                raise LoadError(f"row {row} is no JPEG") from error
            return data

        ahead: deque[tuple[Work, list[Future[np.ndarray]]]] = deque()
        upcoming = iter(items)
        while True:
            while len(ahead) < DEPTH and (item := next(upcoming, None)) is not None:
                ahead.append((item, [pool.submit(read, int(row)) for row in item.rows]))
            if not ahead:
                return
            item, futures = ahead.popleft()
            images = [future.result() for future in futures]
            if item.angles is None or item.flips is None:
                yield (images,)
            else:
                yield images, list(item.angles), list(item.flips.astype(np.int32))

    def _pipeline(self, batch: int, augmented: bool, feed: Iterator[Any]) -> Any:
        from nvidia.dali import fn, pipeline_def, types

        gpu = self.device.type == "cuda"
        stored, size = self.reader.scale, self.size

        @pipeline_def(
            batch_size=batch,
            num_threads=self.threads,
            prefetch_queue_depth=DEPTH,
            device_id=(self.device.index or 0) if gpu else None,
        )
        def graph() -> Any:
            sources = fn.external_source(
                source=feed,
                num_outputs=3 if augmented else 1,
                batch=True,
                no_copy=True,
                dtype=[types.UINT8, types.FLOAT, types.INT32][: 3 if augmented else 1],
            )
            hints: Any = {"preallocate_width_hint": stored, "preallocate_height_hint": stored} if gpu else {}
            image = fn.decoders.image(sources[0], device="mixed" if gpu else "cpu", output_type=types.GRAY, **hints)
            if size != stored:
                image = fn.resize(image, size=(size, size), interp_type=types.INTERP_LINEAR, antialias=True)
            if augmented:
                image = fn.flip(image, horizontal=sources[2])
                image = fn.rotate(
                    image, angle=sources[1], keep_size=True, fill_value=0, interp_type=types.INTERP_LINEAR
                )
            return image

        pipe = graph()
        pipe.build()
        return pipe
