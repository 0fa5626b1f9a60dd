"""The DALI engine: one graph for CPU and GPU, fed with the reader's bytes; draws and geometry as in `host`.

`device_id` is None for a CPU pipeline, which then runs without a driver. Nothing here imports DALI before it is asked for.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import torch

from cxrfast.errors import LoadError, is_out_of_memory
from cxrfast.pipelines.host import HostEngine
from cxrfast.pipelines.order import Work
from cxrfast.pipelines.proof import Proof
from cxrfast.pipelines.read_ahead import read_ahead
from cxrfast.pipelines.reader import Reader

DEPTH = 2
"""Batches decoded ahead of the consumer, and again as many read ahead of the decoder."""

OLDEST = (2, 1)
"""Before this version of DALI, giving back a buffer waits for the device, which is an error while a stream is captured."""

Fed = tuple[Any, ...]
"""Of a batch: encoded images or pixels, then angles and flips if there are any."""


def available() -> bool:
    return find_spec("nvidia") is not None and find_spec("nvidia.dali") is not None


def check_version() -> None:
    """Raises LoadError where DALI is not installed, or too old."""
    if not available():
        raise LoadError("NVIDIA DALI is not installed: `pip install nvidia-dali-cuda120`, or use --engine host")
    from nvidia.dali import __version__

    if tuple(map(int, __version__.split(".")[:2])) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise LoadError(
            f"NVIDIA DALI {__version__} is installed, {oldest} or newer is needed: `pip install -U nvidia-dali-cuda120`, "
            "or use --engine host"
        )


class DaliEngine:
    """Decode grey (on a GPU: its JPEG engines, `mixed`), resize where the size differs, flip and rotate.

    Raw images, and whatever comes from or goes into a `cache`, are made by the CPU and only flipped and rotated here.
    `hw_decoder_load`: share of the images that a GPU's JPEG engines get; None is DALI's own default. `proof` is shown every
    image at the stored scale, as it was decoded. Raises LoadError where DALI is not installed, or too old.
    """

    def __init__(
        self,
        reader: Reader,
        size: int,
        device: torch.device,
        threads: int,
        cache: Path | str | None = None,
        hw_decoder_load: float | None = None,
        proof: Proof | None = None,
    ) -> None:
        check_version()
        self.reader, self.size, self.device, self.threads = reader, size, device, threads
        self.hw_decoder_load = hw_decoder_load
        self._host = HostEngine(reader, size, device, threads, cache)
        self._decodes = not (reader.is_raw or cache)
        self.proof = proof if self._decodes or size == reader.scale else None
        self._lent = _Lent(device) if device.type == "cuda" else None
        self._pipe: tuple[tuple[int, bool], _Feed, Any] | None = None
        """With its largest batch, whether it turns images and its feed; None where there is none that can go on."""

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
                if is_out_of_memory(error):
                    raise LoadError(
                        f"memory ran out while DALI decoded batches of {len(items[done].rows)} images of {self.size} px: "
                        f"use a smaller --micro-batch, or --engine host. DALI says: {' '.join(str(error).split())[:300]}"
                    ) from error
                yield from self._host.batches(items[done : done + 1])
                done, refused = done + 1, refused + isinstance(error, RuntimeError)
                if refused == 2:  # host found nothing wrong with the images, twice in a row
                    raise LoadError(
                        f"DALI fails on images that are whole: use --engine host. It says: {error}"
                    ) from error

    def close(self) -> None:
        if self._lent:
            self._lent.give_back()
        self._pipe = None
        self._host.close()

    def _run(self, items: list[Work]) -> Iterator[torch.Tensor]:
        with (
            ThreadPoolExecutor(min(self.threads, 4), thread_name_prefix="cxrfast-dali-read") as pool,
            closing(read_ahead(self._host.pixels, items)) as upcoming,
        ):
            key = max(len(item.rows) for item in items), items[0].angles is not None
            # one that was left in the middle of an epoch holds batches of it: it is not used again
            built, self._pipe = self._pipe, None
            if built and built[0] == key:
                _, feed, pipe = built
            else:
                feed = _Feed()
                pipe = self._pipeline(*key, feed)
            expected: deque[Future[np.ndarray]] = deque()
            noted = self._note_expected(pool, upcoming, expected)
            feed.batches = self._encoded(pool, noted) if self._decodes else self._made(pool, noted)
            for item in items:
                outputs = pipe.run(torch.cuda.current_stream(self.device)) if self._lent else pipe.run()
                # the default executor leaves tensors alone that were handed out and are still held
                images = [torch.from_dlpack(output.as_tensor()).permute(0, 3, 1, 2) for output in outputs]
                if self.proof:
                    self.proof.compare(images[-1], item.rows, expected.popleft().result())
                yield self._lent.copy(images) if self._lent else images[0]
            pipe.reset()
            self._pipe = key, feed, pipe

    def _note_expected(
        self, pool: ThreadPoolExecutor, items: Iterable[Work], expected: deque[Future[np.ndarray]]
    ) -> Iterator[Work]:
        """`items`, while the means that their images should have are put into `expected`, in order."""
        for item in items:
            if self.proof:
                expected.append(pool.submit(self.proof.expected, item.rows))
            yield item

    def _encoded(self, pool: ThreadPoolExecutor, items: Iterable[Work]) -> Iterator[Fed]:
        """Encoded images and draws, batch by batch; reading runs ahead in `pool`."""

        def read(row: int) -> np.ndarray:
            data = np.frombuffer(self.reader.read(row), np.uint8)
            try:
                shape = simplejpeg.decode_jpeg_header(data)[:2]
            except ValueError as error:
                # DALI 2.4 may crash on it: what one thread fails to parse frees what the others still read
                raise LoadError(f"row {row} is no JPEG") from error  # host says more
            if shape != (self.reader.scale, self.reader.scale):
                raise LoadError(f"row {row} has another size")
            return data

        def begin(item: Work) -> list[Future[np.ndarray]]:
            return [pool.submit(read, row) for row in item.rows.tolist()]

        for item, futures in _ahead(items, begin):
            yield [future.result() for future in futures], *_draws(item)

    def _made(self, pool: ThreadPoolExecutor, items: Iterable[Work]) -> Iterator[Fed]:
        """Pixels, uint8 (N, size, size, 1), and draws, batch by batch; made ahead in `pool`."""

        def make(rows: np.ndarray) -> np.ndarray:
            out = np.empty((len(rows), self.size, self.size), np.uint8)
            self._host.pixels.put_all(rows, out)
            return out[..., None]

        for item, future in _ahead(items, lambda item: pool.submit(make, item.rows)):
            yield future.result(), *_draws(item)

    def _pipeline(self, batch: int, augmented: bool, feed: "_Feed") -> Any:
        from nvidia.dali import fn, pipeline_def, types

        gpu = self.device.type == "cuda"

        @pipeline_def(
            batch_size=batch,
            num_threads=self.threads,
            prefetch_queue_depth=DEPTH,
            device_id=self.device.index if gpu else None,
        )
        def graph() -> Any:
            sources = fn.external_source(
                source=feed.next,
                num_outputs=3 if augmented else 1,
                batch=True,
                no_copy=True,
                dtype=[types.UINT8, types.FLOAT, types.INT32][: 3 if augmented else 1],
            )
            decoded = image = self._decoded(sources[0])
            if self._decodes and self.size != self.reader.scale:
                side = (self.size, self.size)
                image = fn.resize(image, size=side, interp_type=types.INTERP_LINEAR, antialias=True)
            if augmented:
                image = fn.flip(image, horizontal=sources[2])
                image = fn.rotate(
                    image, angle=sources[1], keep_size=True, fill_value=0, interp_type=types.INTERP_LINEAR
                )
            return (image, decoded) if self.proof and image is not decoded else image

        pipe = graph()
        pipe.build()
        return pipe

    def _decoded(self, source: Any) -> Any:
        """Node of the graph: what the feed gives → pixels on the pipeline's device; those of JPEGs are of the stored size."""
        from nvidia.dali import fn, types

        gpu, stored = self.device.type == "cuda", self.reader.scale
        if not self._decodes:
            return source.gpu() if gpu else source
        options: dict[str, Any] = {}
        if gpu:
            options = {"preallocate_width_hint": stored, "preallocate_height_hint": stored}
            if self.hw_decoder_load is not None:
                options["hw_decoder_load"] = self.hw_decoder_load
        return fn.decoders.image(source, device="mixed" if gpu else "cpu", output_type=types.GRAY, **options)


class _Feed:
    """Where a pipeline takes its batches from: each has its own, so that two epochs at a time are not mixed."""

    def __init__(self) -> None:
        self.batches: Iterator[Fed] = iter(())

    def next(self) -> Fed:
        return next(self.batches)


class _Lent:
    """DALI's memory of batches on a GPU, held until torch's stream has come past the kernels that read it.

    DALI takes back what nobody refers to in the order of its own stream, which knows nothing of torch's kernels, and writes
    the next images there. So batches are copied into torch's memory, which moves 0.02 % of the bytes of a training step.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._held: deque[tuple[torch.cuda.Event, list[torch.Tensor]]] = deque()

    def copy(self, images: list[torch.Tensor]) -> torch.Tensor:
        """The first of `images`, in memory of its own; all of them may be read by kernels that are queued already."""
        copied = images[0].clone()
        read = torch.cuda.Event()
        read.record(torch.cuda.current_stream(self.device))
        self._held.append((read, images))
        while self._held and (self._held[0][0].query() or len(self._held) > 2 * DEPTH):
            event, _ = self._held.popleft()
            event.synchronize()  # waits only for a host that runs far ahead
        return copied

    def give_back(self) -> None:
        """Wait for the kernels, then hold nothing."""
        for event, _ in self._held:
            event.synchronize()
        self._held.clear()


def _ahead(items: Iterable[Work], begin: Any) -> Iterator[tuple[Work, Any]]:
    """Each item with what `begin` gave for it, up to `DEPTH` items earlier."""
    begun: deque[tuple[Work, Any]] = deque()
    for item in items:
        begun.append((item, begin(item)))
        if len(begun) == DEPTH:
            yield begun.popleft()
    yield from begun


def _draws(item: Work) -> Fed:
    if item.angles is None or item.flips is None:
        return ()
    return list(item.angles), list(item.flips.astype(np.int32))
