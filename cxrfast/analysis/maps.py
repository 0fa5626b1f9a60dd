"""What maps of a model need: a model left unchanged, batches that fit, and the run's store of maps."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from cxrfast.errors import RunError
from cxrfast.pipelines.loader import Batch, Loader
from cxrfast.pipelines.order import EvalOrder
from cxrfast.progress import progress
from cxrfast.runs.run import Run

BATCH_PIXELS = 2**18
"""Most pixels in a batch of several images: a backward pass through DenseNet121 holds 3 kB per pixel."""


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients of the weights, which saves memory; afterwards everything is restored."""
    modes = [(module, module.training) for module in model.modules()]
    wanted = [(p, p.requires_grad) for p in model.parameters()]
    model.eval().requires_grad_(False)
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for p, grad in wanted:
            p.requires_grad_(grad)


def batches(
    run: Run, rows: np.ndarray, shards: Path | None, device: torch.device | str = "cpu", title: str = ""
) -> Iterator[Batch]:
    """`rows` of the run's shard set in their order, in batches that a backward pass can afford; progress under `title`."""
    size = max(1, BATCH_PIXELS // run.config.scale**2)
    with run.reader(shards) as reader, progress(title, len(rows) if title else 0) as advance:
        for batch in Loader(reader, EvalOrder(rows=rows, micro_batch=size), device=device):
            yield batch
            advance(len(batch.row))


def stored(run: Run, name: str, what: str, command: str) -> tuple[Any, dict[str, Any]]:
    """The zarr group of a run's maps, and the attributes of those called `name`.

    Raises RunError with the command that makes them if they are absent, or another configuration's.
    """
    group = run.open_maps()
    if group is None or name not in group:
        raise RunError(f"{run.name} has no {what} yet: `{command}`")
    attributes = group.attrs[name]
    if attributes["config_hash"] != run.config.hash:
        raise RunError(f"the {what} in {run.maps_path} belongs to another run: measure again with `{command}`")
    return group, attributes
