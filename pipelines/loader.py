"""The Loader: an order and a reader in, uint8 grey batches on the device out, with either decoding engine.

train = ShardSet("data/shards").part("train", fold=0, scale=1024)
reader = Reader("data/shards", scale=1024)
order = TrainOrder(rows=train.rows, global_batch=96, micro_batch=8, seed=0)
loader = Loader(reader, order, scale=1024, augment=Augment(), device="cuda")
for epoch in range(10):
    for batch in loader.epoch(epoch):
        logits = model(batch.image)            # uint8 (N, 1, 1024, 1024)
        target = labels[batch.row]             # row: int64 (N,)
"""

import math
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from cxrfast.errors import LoadError
from cxrfast.machine import usable_cores
from cxrfast.pipelines import dali
from cxrfast.pipelines.dali import DaliEngine
from cxrfast.pipelines.host import HostEngine
from cxrfast.pipelines.order import Augment, Order, Work
from cxrfast.pipelines.proof import Proof
from cxrfast.pipelines.reader import Reader

ENGINES = ("auto", "dali", "host")


@dataclass(frozen=True)
class Batch:
    image: torch.Tensor
    """uint8 (N, 1, H, W), channels-last strides, on the device."""
    row: torch.Tensor
    """int64 (N,), on the device."""


class Loader:
    """Iterates over this rank's micro-batches of `order`, which may be replaced between epochs; `len` counts them.

    `scale`: side of the images, px; default: the reader's. `augment`: None for evaluation.
    `device`: `cuda` is the current GPU, as in torch. `engine`: `auto` leaves it to `choose`, whose reason is `why`.
    `threads`: default: the usable cores, divided by `local_ranks`.
    `cache`: a folder on a local disk for decoded pixels, see `pipelines.cache`; it may be shared and deleted.
    `hw_decoder_load`: see `DaliEngine`.
    `prove`: compare all that DALI decodes with the means in the set's manifests (see `proof`); default: on a GPU. `check`
    raises if pixels are wrong, and so does the end of each epoch. The host engine is the oracle and is not checked.
    Raises LoadError for an unknown engine and, while iterating, for rows that cannot be read or decoded.
    """

    def __init__(
        self,
        reader: Reader,
        order: Order,
        *,
        scale: int | None = None,
        augment: Augment | None = None,
        device: torch.device | str = "cpu",
        engine: str = "auto",
        threads: int | None = None,
        local_ranks: int = 1,
        cache: Path | str | None = None,
        hw_decoder_load: float = 1.0,
        prove: bool | None = None,
    ) -> None:
        self.reader, self.order, self.augment = reader, order, augment
        self.device = torch.device(device)
        is_gpu = self.device.type == "cuda"
        if is_gpu and self.device.index is None:  # else every rank would decode on GPU 0
            self.device = torch.device("cuda", torch.cuda.current_device())
        if engine not in ENGINES:
            raise LoadError(f"engine {engine!r} is unknown: use one of {', '.join(ENGINES)}")
        self.threads = threads or max(1, usable_cores() // local_ranks)
        self.engine, self.why = engine, "as requested"
        if engine == "auto":
            gpu = torch.cuda.get_device_name(self.device) if is_gpu else None
            self.engine, self.why = choose(gpu, dali.available(), scale or reader.scale, self.threads)
        proves = is_gpu if prove is None else prove
        self.proof = Proof(reader, self.device) if proves and self.engine == "dali" else None
        self.cache, self.hw_decoder_load = cache, hw_decoder_load
        self._engine = self._make(scale or reader.scale)

    def _make(self, size: int) -> HostEngine | DaliEngine:
        given = (self.reader, size, self.device, self.threads, self.cache)
        if self.engine == "host":
            return HostEngine(*given)
        return DaliEngine(*given, hw_decoder_load=self.hw_decoder_load, proof=self.proof)

    def epoch(self, epoch: int = 0, consumed: int = 0, scale: int | None = None) -> Generator[Batch]:
        """The batches of an epoch after its first `consumed` samples (over all ranks).

        `scale`: side of the images from this epoch on, px (progressive resizing).
        """
        if scale and scale != self._engine.size:
            self._engine.close()
            self._engine = self._make(scale)
        micro_batches = self.order.micro_batches(epoch, consumed)
        for rows, image in zip(micro_batches, self._engine.batches(self._work(epoch, micro_batches)), strict=True):
            yield Batch(image, self._on_device(rows))
        self.check()

    def problem(self) -> str | None:
        """Description of what is wrong with the images DALI decoded so far, naming a row, or None. Waits for the device."""
        return self.proof.problem() if self.proof else None

    def check(self) -> None:
        """Raise LoadError if there is a `problem`."""
        if problem := self.problem():
            raise LoadError(problem)

    def _work(self, epoch: int, micro_batches: list[np.ndarray]) -> Iterator[Work]:
        if not self.augment or not micro_batches:
            return map(Work, micro_batches)
        cuts = np.cumsum([len(rows) for rows in micro_batches])[:-1]
        draws = self.augment.draw(self.order.seed, epoch, np.concatenate(micro_batches))
        return map(Work, micro_batches, *(np.split(drawn, cuts) for drawn in draws))

    def _on_device(self, rows: np.ndarray) -> torch.Tensor:
        row = torch.from_numpy(rows.copy())
        return row if self.device.type == "cpu" else row.pin_memory().to(self.device, non_blocking=True)

    def __len__(self) -> int:
        """Number of batches of a whole epoch on this rank."""
        return len(self.order)

    def __iter__(self) -> Generator[Batch]:
        return self.epoch()

    def close(self) -> None:
        """Release the engine's memory and files; the reader stays open. Tensors that were handed out stay valid."""
        self._engine.close()


HEADROOM = 1.2
"""Host threads are chosen if they are at least this many times as fast as the training step, since rates vary."""


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Images/s with one model of GPU at one scale."""

    scale: int
    """Side of the images, px."""
    host: float
    """Decoded and rotated by one core of the CPU."""
    dali: float
    """Decoded and rotated by an otherwise idle GPU."""
    step: float
    """Training step of densenet121 on a cached batch, in the fastest measured configuration."""


MEASURED: Mapping[str, Sequence[Rates]] = {
    "NVIDIA H200": (
        Rates(scale=256, host=818.0, dali=10615.2, step=575.0),
        Rates(scale=2048, host=27.4, dali=2374.8, step=34.2),
    ),
}
"""Rates by torch's name of the GPU, as `bench/gpu_trial.sh` measures them."""


def choose(
    gpu: str | None,
    has_dali: bool,
    scale: int,
    threads: int,
    measured: Mapping[str, Sequence[Rates]] = MEASURED,
) -> tuple[str, str]:
    """`host` or `dali`, and the reason as a text.

    `gpu`: its name, None on a CPU. `threads`: of the host engine, one core each. If both keep up with the training step,
    host is better: it leaves the GPU's memory bandwidth, which limits the step, to the step.
    """
    if gpu is None:
        return "host", "on a CPU its threads are several times as fast as DALI's"
    if not has_dali:
        return "host", "NVIDIA DALI is not installed"
    if not measured.get(gpu):
        return "dali", f"{gpu} has not been measured; with many cores per GPU, try --engine host"
    rates = min(measured[gpu], key=lambda rates: abs(math.log(rates.scale / scale)))
    host, step = threads * rates.host, rates.step
    engine = "host" if host >= HEADROOM * step or host >= rates.dali else "dali"
    compared = f"{threads} host threads give {host:,.0f} images/s, DALI {rates.dali:,.0f}, the step takes {step:,.0f}"
    return engine, f"at {rates.scale} px {compared}"
