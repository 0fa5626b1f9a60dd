"""The DALI engine: one graph for CPU and GPU, fed with the reader's bytes; augmentation and geometry as in `host`.

`device_id` is None for a CPU pipeline, which then needs no driver. DALI is imported only when an engine is made.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

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
"""Batches decoded ahead of the consumer, and as many again read ahead of the decoder."""

OLDEST = (2, 1)
"""Older versions of DALI wait for the device when they free a buffer, which is an error while a stream is captured."""

T = TypeVar("T")

Inputs = tuple[Any, ...]
"""Inputs of a pipeline for one batch: encoded images or pixels, then angles and flips if it augments."""


def available() -> bool:
    return find_spec("nvidia") is not None and find_spec("nvidia.dali") is not None


def check_version() -> None:
    """Raise LoadError if DALI is not installed or too old."""
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
    """Decode grey (on a GPU with its JPEG engines, `mixed`), resize if the size differs, flip and rotate.

    Raw images, and all images if there is a `cache`, are decoded by the CPU and only flipped and rotated here.
    `hw_decoder_load`: fraction of the images that a GPU's JPEG engines decode, if it has such engines; its cores decode the
    rest, which takes them from the training step. `proof` sees every image at the stored scale as it was decoded. Raises LoadError if DALI is not installed or too old.
    """

    def __init__(
        self,
        reader: Reader,
        size: int,
        device: torch.device,
        threads: int,
        cache: Path | str | None = None,
        hw_decoder_load: float = 1.0,
        proof: Proof | None = None,
    ) -> None:
        check_version()
        self.reader, self.size, self.device, self.threads = reader, size, device, threads
        self.hw_decoder_load = hw_decoder_load
        self._host = HostEngine(reader, size, device, threads, cache)
        self._decodes = not (reader.is_raw or cache)
        self.proof = proof if self._decodes or size == reader.scale else None
        self._lent = _LentMemory(device) if device.type == "cuda" else None
        self._idle: _Pipeline | None = None
        """Pipeline that finished its epoch and can be reused; None while one runs, and after one stopped early or failed."""

    def batches(self, work: Iterable[Work]) -> Iterator[torch.Tensor]:
        """Like `HostEngine.batches`. If DALI fails on a batch, the host engine decodes it, and names the bad row."""
        items = list(work)
        done = 0
        unexplained = 0  # consecutive errors of DALI on batches that the host engine decodes
        while done < len(items):
            try:
                for batch in self._decode(items[done:]):
                    done, unexplained = done + 1, 0
                    yield batch
            except (RuntimeError, LoadError) as error:  # DALI's pipeline is dead now: the next `_decode` builds another
                refused = items[done : done + 1]
                if is_out_of_memory(error):
                    raise LoadError(
                        f"memory ran out while DALI decoded batches of {len(refused[0].rows)} images of {self.size} px: "
                        f"use a smaller --micro-batch, or --engine host. DALI says: {' '.join(str(error).split())[:300]}"
                    ) from error
                yield from self._host.batches(refused)
                done, unexplained = done + 1, unexplained + isinstance(error, RuntimeError)
                if unexplained == 2:
                    raise LoadError(f"DALI fails on undamaged images: use --engine host. DALI says: {error}") from error

    def close(self) -> None:
        if self._lent:
            self._lent.give_back()
        self._idle = None
        self._host.close()

    def _decode(self, items: list[Work]) -> Iterator[torch.Tensor]:
        """One batch per item. Raises LoadError or RuntimeError at the first that cannot be read or decoded."""
        with (
            ThreadPoolExecutor(min(self.threads, 4), thread_name_prefix="cxrfast-dali-read") as pool,
            closing(read_ahead(self._host.pixels, items)) as upcoming,
        ):
            pipeline = self._take_pipeline(max(len(item.rows) for item in items), items[0].angles is not None)
            pipeline.feed.inputs = self._inputs(pool, upcoming)
            for item, means in self._with_means(pool, items):
                images = self._run(pipeline)
                if self.proof and means:
                    self.proof.compare(images[-1], item.rows, means.result())
                yield self._lent.copy(images) if self._lent else images[0]
            pipeline.graph.reset()
            self._idle = pipeline

    def _take_pipeline(self, batch: int, augmented: bool) -> "_Pipeline":
        """The idle pipeline if it is of this kind, else a new one.

        No pipeline is idle until this epoch ends: one that stopped early still holds batches and is not reused.
        """
        idle, self._idle = self._idle, None
        if idle and (idle.batch, idle.augmented) == (batch, augmented):
            return idle
        feed = _Feed()
        return _Pipeline(batch, augmented, feed, self._graph(batch, augmented, feed))

    def _run(self, pipeline: "_Pipeline") -> list[torch.Tensor]:
        """The next batch, uint8 (N, 1, size, size); if there is a proof, also the same images as decoded at the stored scale."""
        graph = pipeline.graph
        outputs = graph.run(torch.cuda.current_stream(self.device)) if self._lent else graph.run()
        # the default executor does not overwrite tensors that are still referenced
        return [torch.from_dlpack(output.as_tensor()).permute(0, 3, 1, 2) for output in outputs]

    def _with_means(
        self, pool: ThreadPoolExecutor, items: list[Work]
    ) -> Iterator[tuple[Work, Future[np.ndarray] | None]]:
        """Each item with the means its images should have, if there is a proof: looked up while the item is read ahead."""
        proof = self.proof
        if proof is None:
            return ((item, None) for item in items)
        return _ahead(items, lambda item: pool.submit(proof.expected, item.rows), 2 * DEPTH)

    def _inputs(self, pool: ThreadPoolExecutor, items: Iterable[Work]) -> Iterator[Inputs]:
        """The pipeline's inputs, batch by batch, read or decoded ahead in `pool`."""
        if self._decodes:
            for item, reads in _ahead(items, lambda item: [pool.submit(self._read, row) for row in item.rows.tolist()]):
                yield [read.result() for read in reads], *_draws(item)
        else:
            for item, made in _ahead(items, lambda item: pool.submit(self._make, item.rows)):
                yield made.result(), *_draws(item)

    def _read(self, row: int) -> np.ndarray:
        """An encoded image, uint8 (bytes,). Raises LoadError if it is not a JPEG of the stored size."""
        data = np.frombuffer(self.reader.read(row), np.uint8)
        try:
            shape = simplejpeg.decode_jpeg_header(data)[:2]
        except ValueError as error:
            # DALI 2.4 may crash on it: a thread that fails to parse frees memory that others still read
            raise LoadError(f"row {row} is not a JPEG") from error  # the host engine says more
        if shape != (self.reader.scale, self.reader.scale):
            raise LoadError(f"row {row} has another size")
        return data

    def _make(self, rows: np.ndarray) -> np.ndarray:
        """Pixels decoded by the CPU, uint8 (N, size, size, 1)."""
        out = np.empty((len(rows), self.size, self.size), np.uint8)
        self._host.pixels.put_all(rows, out)
        return out[..., None]

    def _graph(self, batch: int, augmented: bool, feed: "_Feed") -> Any:
        """DALI's graph, built: for at most `batch` images, flipped and rotated if `augmented`."""
        from nvidia.dali import fn, pipeline_def, types

        gpu = self.device.type == "cuda"
        decoding: dict[str, Any] = {"device": "cpu"}
        if gpu:
            decoding = {
                "device": "mixed",
                "preallocate_width_hint": self.reader.scale,
                "preallocate_height_hint": self.reader.scale,
                "hw_decoder_load": self.hw_decoder_load,
            }
        dtypes = [types.UINT8, *([types.FLOAT, types.INT32] if augmented else [])]

        @pipeline_def(
            batch_size=batch,
            num_threads=self.threads,
            prefetch_queue_depth=DEPTH,
            device_id=self.device.index if gpu else None,
        )
        def graph() -> Any:
            sources = fn.external_source(
                source=feed.next,
                num_outputs=len(dtypes),
                batch=True,
                no_copy=True,
                dtype=dtypes,
            )
            decoded = sources[0]
            if self._decodes:
                decoded = fn.decoders.image(decoded, output_type=types.GRAY, **decoding)
            elif gpu:
                decoded = decoded.gpu()
            image = decoded
            if self._decodes and self.size != self.reader.scale:
                side = (self.size, self.size)
                image = fn.resize(image, size=side, interp_type=types.INTERP_LINEAR, antialias=True)
            if augmented:
                image = fn.flip(image, horizontal=sources[2])
                image = fn.rotate(
                    image, angle=sources[1], keep_size=True, fill_value=0, interp_type=types.INTERP_LINEAR
                )
            return (image, decoded) if self.proof and image is not decoded else image

        built = graph()
        built.build()
        return built


class _Feed:
    """Source of a pipeline's inputs. Each pipeline has its own, so that two epochs at a time are not mixed."""

    inputs: Iterator[Inputs]

    def next(self) -> Inputs:
        return next(self.inputs)


@dataclass(frozen=True)
class _Pipeline:
    batch: int
    """Images in its largest batch."""
    augmented: bool
    """True if it flips and rotates."""
    feed: _Feed
    graph: Any
    """DALI's own object."""


class _LentMemory:
    """DALI's memory of batches on a GPU, held until torch's stream has passed the kernels that read it.

    DALI reuses unreferenced memory in the order of its own stream, which does not wait for torch's kernels. So batches are
    copied into torch's memory, which moves 0.02 % of the bytes of a training step.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._held: deque[tuple[torch.cuda.Event, list[torch.Tensor]]] = deque()

    def copy(self, images: list[torch.Tensor]) -> torch.Tensor:
        """A copy of the first of `images`; kernels that are already queued may read all of them."""
        copied = images[0].clone()
        read = torch.cuda.Event()
        read.record(torch.cuda.current_stream(self.device))
        self._held.append((read, images))
        while self._held and (self._held[0][0].query() or len(self._held) > 2 * DEPTH):
            event, _ = self._held.popleft()
            event.synchronize()  # waits only for a host that runs far ahead
        return copied

    def give_back(self) -> None:
        """Wait for the kernels, then release the memory."""
        for event, _ in self._held:
            event.synchronize()
        self._held.clear()


def _ahead(items: Iterable[Work], begin: Callable[[Work], T], depth: int = DEPTH) -> Iterator[tuple[Work, T]]:
    """Each item with the result of `begin`, which is called `depth` - 1 items ahead."""
    begun: deque[tuple[Work, T]] = deque()
    for item in items:
        begun.append((item, begin(item)))
        if len(begun) == depth:
            yield begun.popleft()
    yield from begun


def _draws(item: Work) -> Inputs:
    """Angles and flips in DALI's form; empty without augmentation."""
    if item.angles is None or item.flips is None:
        return ()
    return list(item.angles), list(item.flips.astype(np.int32))
