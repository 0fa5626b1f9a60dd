"""Loaders that need no other library: torch's DataLoader over files and over our kernels, and a mapped array of pixels."""

from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import simplejpeg
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import InterpolationMode, v2

from cxrfast.bench.loading.job import Job, Supply, endless, files, pixels, shuffled
from cxrfast.pipelines.host import WARP, warp_matrix
from cxrfast.pipelines.order import Augment
from cxrfast.pipelines.reader import Reader

AHEAD = 2
"""Batches each worker of ours prepares ahead; 4 and 8 were not faster."""

TURN = v2.Compose([v2.RandomHorizontalFlip(), v2.RandomRotation(15, InterpolationMode.BILINEAR)])
"""Applied to Pillow images, as in most scripts. Pillow rotates grey images faster than torchvision rotates tensors."""

TO_TENSOR = v2.PILToTensor()


def transform(job: Job) -> Callable[[Image.Image], torch.Tensor]:
    """From a Pillow image to uint8 (1, H, W), turned where the job says so."""
    return turned if job.turn else grey


def grey(image: Image.Image) -> torch.Tensor:
    return TO_TENSOR(image.convert("L"))


def turned(image: Image.Image) -> torch.Tensor:
    return TO_TENSOR(TURN(image.convert("L")))


def turn_array(image: np.ndarray) -> torch.Tensor:
    return turned(Image.fromarray(image))


# DataLoader over files


class Files(Dataset[torch.Tensor]):
    def __init__(self, paths: list[Path], transform: Callable[[Image.Image], torch.Tensor]) -> None:
        self.paths, self.transform = paths, transform

    def __getitem__(self, index: int) -> torch.Tensor:
        with Image.open(self.paths[index]) as image:
            return self.transform(image)


def over_files(job: Job) -> Supply:
    dataset, batches = Files(files(job), transform(job)), shuffled(job)
    return endless(DataLoader(dataset, batch_sampler=batches, num_workers=job.workers))


# DataLoader over our kernels


class Kernels(Dataset[torch.Tensor]):
    """Whole batches in memory that processes share, so that none is copied."""

    def __init__(self, job: Job) -> None:
        self.reader, self.rows, self.turn = Reader(job.shards, job.scale), job.rows, job.turn
        self.jpeg, self.image = bytearray(self.reader.largest), np.empty((job.scale, job.scale, 1), np.uint8)

    def __getitems__(self, items: list[int]) -> torch.Tensor:
        scale = self.reader.scale
        memory = torch.UntypedStorage._new_shared(len(items) * scale**2, device="cpu")
        batch = torch.empty(0, dtype=torch.uint8).set_(memory).view(len(items), scale, scale)
        self.fill(items, batch)
        return batch

    def fill(self, items: list[int], batch: torch.Tensor) -> None:
        rows = self.rows[items]
        draws = _draws(rows) if self.turn else [None] * len(rows)
        for row, draw, out in zip(rows.tolist(), draws, batch.numpy(), strict=True):
            image = self.image if draw else out[..., None]
            simplejpeg.decode_jpeg(self.reader.read(row, self.jpeg), "GRAY", buffer=image)
            if draw:
                _turn(image[..., 0], draw, out)


class Ring(Dataset[int]):
    """Like `Kernels`, but in buffers that are reused, so that only their numbers travel."""

    def __init__(self, job: Job, buffers: int) -> None:
        shape = (buffers, min(job.batch, len(job.rows)), job.scale, job.scale)
        self.kernels, self.ring = Kernels(job), torch.empty(shape, dtype=torch.uint8).share_memory_()

    def __getitems__(self, items: list[int]) -> int:
        """`items`: number of the buffer, then numbers of the images."""
        self.kernels.fill(items[1:], self.ring[items[0]])
        return items[0]


def _draws(rows: np.ndarray) -> list[tuple[float, bool]]:
    """Angle in degrees and flip of each row."""
    angles, flips = Augment().draw(int(np.random.default_rng().integers(2**31)), 0, rows)
    return list(zip(angles.tolist(), flips.tolist(), strict=True))


def _turn(image: np.ndarray, draw: tuple[float, bool], out: np.ndarray) -> None:
    side = len(image)
    cv2.warpAffine(image, warp_matrix(side, *draw), (side, side), out, WARP, borderValue=0)


def _same(batch: Any) -> Any:
    return batch


def over_kernels(job: Job) -> Supply:
    return endless(_kernels_loader(Kernels(job), shuffled(job), job))


def over_ring(job: Job) -> Supply:
    buffers = AHEAD * job.workers + 2  # those under way, the one in use, and a spare one
    dataset = Ring(job, buffers)
    batches = ([n % buffers, *batch] for n, batch in enumerate(shuffled(job)))
    return endless(_kernels_loader(dataset, batches, job), lambda buffer: dataset.ring[buffer])


def _kernels_loader(dataset: Dataset[Any], batches: Any, job: Job) -> DataLoader[Any]:
    cv2.setNumThreads(1)  # before the fork: a worker that ends threads which only its parent has would hang
    return DataLoader(dataset, batch_sampler=batches, num_workers=job.workers, prefetch_factor=AHEAD, collate_fn=_same)


# A mapped array


def write_array(job: Job) -> None:
    shape = (len(job.rows), job.scale, job.scale)
    array = np.lib.format.open_memmap(job.folder / "pixels.npy", "w+", np.uint8, shape)
    for out, image in zip(array, pixels(job), strict=True):
        out[...] = image
    array.flush()


def over_array(job: Job) -> Supply:
    array, batches = np.load(job.folder / "pixels.npy", mmap_mode="r"), shuffled(job)
    return closing(_turned_in_threads(array, batches, job.workers) if job.turn else (array[rows] for rows in batches))


def _turned_in_threads(array: np.ndarray, batches: Iterator[list[int]], workers: int) -> Generator[np.ndarray]:
    def turned(rows: list[int]) -> np.ndarray:
        out = np.empty((len(rows), *array.shape[1:]), np.uint8)
        for row, draw, image in zip(rows, _draws(np.array(rows)), out, strict=True):
            _turn(array[row], draw, image)
        return out

    cv2.setNumThreads(1)
    with ThreadPoolExecutor(workers) as pool:
        under_way: deque[Future[np.ndarray]] = deque()
        for rows in batches:
            under_way.append(pool.submit(turned, rows))
            if len(under_way) > AHEAD * workers:
                yield under_way.popleft().result()
