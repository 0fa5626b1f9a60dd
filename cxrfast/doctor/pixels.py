"""Checks of loading: the engines return the stored pixels, however late they are read.

A reader and a device come in; each check returns what it measured, in words, or raises LoadError.
"""

from collections import deque
from contextlib import closing
from typing import Any

import cv2
import numpy as np
import torch

from cxrfast.errors import LoadError
from cxrfast.pipelines.loader import Batch, Loader
from cxrfast.pipelines.order import Augment, EvalOrder
from cxrfast.pipelines.proof import cell_means
from cxrfast.pipelines.reader import Reader
from cxrfast.shards.format.codec import decode_member
from cxrfast.shards.images.cell_means import SIDE

CPU = torch.device("cpu")

PIXELS = 96 * 256**2
"""Approximate number of pixels to compare; at least 16 images."""

NEAR, SHARE, FAR = 1, 0.999, 4
"""Two engines agree if this fraction of pixels is within NEAR grey levels and all are within FAR."""

HOST_TURNS_EXACTLY = int(cv2.__version__.split(".")[0]) >= 5
"""OpenCV 4 rounds positions to a 32nd of a pixel, which is several grey levels off at edges."""

PASSES, BATCHES = 4, 50
"""Passes of the slow reader through its rows, and batches in each."""

LATE = 10_000_000
"""GPU cycles, about 6 ms, that a batch waits before it is read."""

HELD = 12
"""Batches that the slow reader on a CPU holds before it reads the first."""

OFF = 0.5
"""Tolerated error of the mean of a part of an image, grey levels; another image is off by far more."""


def host_pixels(reader: Reader, device: torch.device) -> str:
    """The host engine on the device gives bitwise the same as one CPU thread, and as the stored pixels."""
    rows = _rows(reader)
    for what, augment in (("decoded", None), ("rotated", Augment())):
        here = _images(reader, rows, device, "host", augment)
        alone = _images(reader, rows, CPU, "host", augment, threads=1, micro_batch=5)
        _refuse_differences(here, alone, rows, f"{what} on {device} and on one CPU thread")
        if augment is None:
            _refuse_differences(here, _stored(reader, rows), rows, f"{what} and stored")
    return f"{len(rows)} images, decoded and rotated: bitwise the same as on one CPU thread"


def dali_pixels(reader: Reader, device: torch.device, hw_decoder_load: float = 1.0) -> str:
    """DALI's pixels agree with the host's: decoded images everywhere, rotated ones inside a circle.

    The circle holds the pixels that no rotation moves out of the image. `hw_decoder_load`: fraction of the images that
    a GPU's JPEG engines decode. If OpenCV is too old to rotate images exactly, rotated pixels are compared with DALI's
    CPU engine instead.
    """
    rows = _rows(reader)
    decoded, turned = (
        _images(reader, rows, device, "dali", augment, hw_decoder_load=hw_decoder_load) for augment in (None, Augment())
    )
    words = (
        f"{len(rows)} images, decoded {agreement(decoded, _images(reader, rows, CPU, 'host', None), 'host')}; rotated "
    )
    inexact = f"OpenCV {cv2.__version__} rotates inexactly"
    if not HOST_TURNS_EXACTLY and device.type == "cpu":
        return f"{words}not compared: {inexact}"
    oracle, name = ("host", "host") if HOST_TURNS_EXACTLY else ("dali", f"DALI's CPU engine ({inexact})")
    offset = torch.arange(reader.scale) - (reader.scale - 1) / 2
    inside = torch.hypot(offset[:, None], offset) < reader.scale / 2 - 2
    return words + agreement(turned[..., inside], _images(reader, rows, CPU, oracle, Augment())[..., inside], name)


def agreement(mine: torch.Tensor, oracle: torch.Tensor, name: str) -> str:
    """How close two uint8 tensors of one shape are, in words. Raises LoadError if they do not agree; see SHARE."""
    apart = (mine.int() - oracle.int()).abs()
    share, worst = (apart <= NEAR).double().mean().item(), int(apart.max())
    words = f"{100 * share:.3f} % of pixels within {NEAR} grey level of {name}, all within {worst}"
    if share < SHARE or worst > FAR:
        raise LoadError(f"{words} (wanted: {100 * SHARE:g} %, all within {FAR}): use --engine host")
    return words


def proven_pixels(reader: Reader, device: torch.device) -> str:
    """What DALI decodes on the device has the means that the set's manifests hold; see `pipelines.proof`."""
    rows = _rows(reader)
    order = EvalOrder(rows=rows, micro_batch=8)
    with closing(Loader(reader, order, device=device, engine="dali", prove=True)) as loader:
        for _ in loader:  # raises at its end if an image differs
            pass
        assert loader.proof is not None
        compared, largest, allowed = loader.proof.compared, loader.proof.largest, loader.proof.tolerance
    if not compared:
        raise LoadError(f"{reader.folder} holds no means to compare with: `cxrfast verify --repair` adds them")
    return f"{compared} of {len(rows)} images: means of {SIDE} × {SIDE} parts within {largest:.3f} grey levels, {allowed:.2f} allowed"


def slow_reader(reader: Reader, device: torch.device, engine: str) -> str:
    """Batches that are read late still hold what was stored: no buffer was reused, no stream overtook another.

    On a GPU each batch is released before the kernel that reads it has begun; on a CPU several are held.
    """
    rows = _rows(reader)
    table = torch.zeros(len(reader.crc32), SIDE**2, device=device)
    table[torch.from_numpy(rows).to(device)] = cell_means(_stored(reader, rows)).to(device)
    size = max(2, min(16, 2**20 // reader.scale**2))
    order = EvalOrder(
        rows=np.random.default_rng(0).permutation(np.resize(rows, BATCHES * size)), micro_batch=size, seed=0
    )
    read: list[tuple[torch.Tensor, torch.Tensor]] = []
    held: deque[Batch] = deque()

    def look(batch: Batch) -> None:
        read.append((batch.row, (cell_means(batch.image) - table[batch.row]).abs().amax(1)))

    with closing(Loader(reader, order, device=device, engine=engine)) as loader:
        for epoch in range(PASSES):
            for batch in loader.epoch(epoch):
                if device.type == "cuda":
                    torch.cuda._sleep(LATE)
                    look(batch)
                else:
                    held.append(batch)
                    if len(held) > HELD:
                        look(held.popleft())
                del batch  # before the loader makes the next one
        for batch in held:
            look(batch)
    row, off = (torch.cat(tensors).cpu() for tensors in zip(*read, strict=True))
    if not np.array_equal(row.numpy(), np.tile(order.rows, PASSES)):
        raise LoadError(f"{engine} returns rows in the wrong order: use another --engine")
    if off.max() > OFF:
        first = int((off > OFF).nonzero()[0])
        raise LoadError(
            f"{engine}: {int((off > OFF).sum())} of {len(off)} images that were read late differ from the stored ones, "
            f"first row {int(row[first])} in batch {first // size + 1}, by up to {off.max():.1f} grey levels in the "
            "mean of a part: a buffer is reused too early, or images are exchanged; use another --engine"
        )
    return f"{PASSES * BATCHES} batches of {size} read late: means of {SIDE} × {SIDE} parts within {off.max():.3f} grey levels"


def _rows(reader: Reader) -> np.ndarray:
    """Rows to check, spread over the scale: int64, ascending. Raises LoadError if the scale is empty."""
    rows = reader.rows
    if not len(rows):
        raise LoadError(f"{reader.folder} holds no image at {reader.scale} px: give another --shards or --scale")
    n = min(len(rows), max(16, PIXELS // reader.scale**2), 96)
    return rows[np.linspace(0, len(rows) - 1, n).astype(np.int64)]


def _images(
    reader: Reader,
    rows: np.ndarray,
    device: torch.device,
    engine: str,
    augment: Augment | None,
    micro_batch: int = 8,
    **options: Any,
) -> torch.Tensor:
    """Images of the rows by an engine, in their order: uint8 (N, 1, H, W) on the CPU.

    In two batches or more, since the host takes over a single batch that DALI fails on.
    """
    order = EvalOrder(rows=rows, micro_batch=max(1, min(micro_batch, len(rows) // 2)))
    with closing(Loader(reader, order, augment=augment, device=device, engine=engine, **options)) as loader:
        return torch.cat([batch.image.cpu() for batch in loader])


def _stored(reader: Reader, rows: np.ndarray) -> torch.Tensor:
    """Images of the rows decoded one by one, without an engine: uint8 (N, 1, H, W)."""
    images = [decode_member(bytes(reader.read(row)), reader.info.codec) for row in rows.tolist()]
    return torch.from_numpy(np.stack(images))[:, None]


def _refuse_differences(one: torch.Tensor, other: torch.Tensor, rows: np.ndarray, what: str) -> None:
    apart = (one.int() - other.int()).abs().amax((1, 2, 3))
    if apart.any():
        differ = rows[apart.numpy() > 0]
        raise LoadError(
            f"{len(differ)} of {len(rows)} images differ, {what}: first row {differ[0]}, by up to {apart.max()} grey levels"
        )
