"""What maps of a run need: batches that a backward pass can afford, and the run's store of maps."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cxrfast.errors import RunError
from cxrfast.pipelines.order import EvalOrder
from cxrfast.progress import progress
from cxrfast.runs.run import Run

if TYPE_CHECKING:
    import torch

    from cxrfast.pipelines.loader import Batch

BATCH_PIXELS = 2**18
"""Most pixels in a batch of several images: a backward pass through DenseNet121 holds 3 kB per pixel."""


def batches(
    run: Run, rows: np.ndarray, shards: Path | None, device: "torch.device | str" = "cpu", title: str = ""
) -> "Iterator[Batch]":
    """`rows` of the run's shard set in their order, in batches that a backward pass can afford; progress under `title`."""
    from cxrfast.pipelines.loader import Loader  # torch, which figures do without

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
    if attributes["config_hash"] != run.hash:
        raise RunError(f"the {what} in {run.maps_path} belongs to another run: measure again with `{command}`")
    return group, attributes
