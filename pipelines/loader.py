"""The Loader: an order and a reader in, uint8 grey batches on the device out, whichever engine decodes them.

reader = Reader("data/shards", scale=1024)
order = TrainOrder(rows=reader.rows, global_batch=96, micro_batch=8, seed=0)
loader = Loader(reader, order, scale=1024, augment=Augment(), device="cuda")
for epoch in range(10):
    for batch in loader.epoch(epoch):
        logits = model(batch.image)            # uint8 (N, 1, 1024, 1024)
        target = labels[batch.row]             # row: int64 (N,)
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from cxrfast.errors import LoadError
from cxrfast.machine import usable_cores
from cxrfast.pipelines import dali
from cxrfast.pipelines.host import HostEngine, Work
from cxrfast.pipelines.order import Augment, Order
from cxrfast.pipelines.reader import Reader

ENGINES = ("auto", "dali", "host")


@dataclass(frozen=True)
class Batch:
    image: torch.Tensor
    """uint8 (N, 1, H, W), channels-last strides, on the device."""
    row: torch.Tensor
    """int64 (N,), on the device."""


class Engine(Protocol):
    def batches(self, work: Iterator[Work]) -> Iterator[torch.Tensor]: ...


class Loader:
    """Iterate the micro-batches that `order` gives this rank.

    `scale`: side of the images handed out, px; need not be the reader's. `augment`: None for evaluation.
    `engine`: `auto` is DALI on a GPU where it is installed, else host threads, which beat DALI's CPU engine by far.
    `threads`: default: the usable cores, divided by `local_ranks`.
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
    ) -> None:
        self.reader, self.order, self.augment = reader, order, augment
        self.device = torch.device(device)
        if engine not in ENGINES:
            raise LoadError(f"engine {engine!r} is unknown: use one of {', '.join(ENGINES)}")
        if engine == "auto":
            engine = "dali" if self.device.type == "cuda" and dali.available() else "host"
        self.engine = engine
        threads = threads or max(1, usable_cores() // local_ranks)
        kind = dali.DaliEngine if engine == "dali" else HostEngine
        self._engine: Engine = kind(reader, scale or reader.scale, self.device, threads)

    def epoch(self, epoch: int = 0, consumed: int = 0) -> Iterator[Batch]:
        """The batches of an epoch; `consumed` samples of it (over all ranks) are already behind."""
        micro_batches = self.order.micro_batches(epoch, consumed)
        work = (Work(rows, *self._draw(epoch, rows)) for rows in micro_batches)
        for rows, image in zip(micro_batches, self._engine.batches(work), strict=True):
            yield Batch(image, torch.tensor(rows, device=self.device))

    def _draw(self, epoch: int, rows: np.ndarray) -> tuple[np.ndarray | None, np.ndarray | None]:
        return self.augment.draw(self.order.seed, epoch, rows) if self.augment else (None, None)

    def __iter__(self) -> Iterator[Batch]:
        return self.epoch()
