"""Work for the engines and comparisons of their pixels, shared by the tests of loading."""

import threading
from collections.abc import Iterable

import numpy as np
import pytest
import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import rotate

from cxrfast.pipelines import dali
from cxrfast.pipelines.dali import DaliEngine
from cxrfast.pipelines.host import HostEngine
from cxrfast.pipelines.loader import Batch
from cxrfast.pipelines.order import Augment, Work
from cxrfast.pipelines.reader import Reader
from cxrfast.shards.format.codec import decode_member

CPU = torch.device("cpu")
ENGINES = [
    pytest.param("dali", marks=pytest.mark.skipif(not dali.available(), reason="DALI is not installed")),
    "host",
]


def engine(name: str, reader: Reader, size: int | None = None, threads: int = 2, **options) -> DaliEngine | HostEngine:
    made = DaliEngine if name == "dali" else HostEngine
    return made(reader, size or reader.scale, CPU, threads, **options)


def cut(rows: np.ndarray, n: int) -> list[np.ndarray]:
    return [rows[i : i + n] for i in range(0, len(rows), n)]


def plain(rows: np.ndarray, n: int) -> list[Work]:
    return [Work(part) for part in cut(rows, n)]


def turned(rows: np.ndarray, n: int, seed: int = 0) -> list[Work]:
    return [Work(part, *Augment().draw(seed, 0, part)) for part in cut(rows, n)]


def decoded(reader: Reader, row: int) -> np.ndarray:
    """uint8 (H, W): the pixels of the image as it is stored."""
    return decode_member(bytes(reader.read(int(row))), reader.info.codec)


def oracle(images: np.ndarray, angle: float, flip: bool) -> np.ndarray:
    """float32 (N, H, W): the images as torchvision rotates and flips them."""
    tensor = torch.tensor(images)[:, None].float()
    tensor = tensor.flip(3) if flip else tensor
    return rotate(tensor, float(angle), InterpolationMode.BILINEAR, fill=[0.0])[:, 0].numpy()


def disc(size: int) -> np.ndarray:
    """bool (size, size): pixels that stay within the image at any rotation."""
    offset = np.arange(size) - (size - 1) / 2
    return np.hypot(offset[:, None], offset) < size / 2 - 2


def assert_agree(one: Iterable[torch.Tensor], two: Iterable[torch.Tensor]) -> None:
    """Batches (N, 1, H, W) agree within the bounds of DESIGN.md, where both engines see the image."""
    apart = []
    for a, b in zip(one, two, strict=True):
        assert a.shape == b.shape
        apart.append((a.float() - b.float()).abs()[:, 0, torch.from_numpy(disc(a.shape[-1]))].ravel())
    difference = torch.cat(apart)
    assert (difference <= 1).float().mean() >= 0.9999
    assert difference.max() <= 4


def equal(one: Iterable[torch.Tensor], two: Iterable[torch.Tensor]) -> bool:
    """True if the batches are the same, pixel by pixel."""
    return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def by_row(batches: Iterable[Batch]) -> dict[int, torch.Tensor]:
    return {int(row): image for batch in batches for row, image in zip(batch.row, batch.image, strict=True)}


def threads_of_ours() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("cxrfast-")]
