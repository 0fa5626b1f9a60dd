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

from cxrfast.bench.loading.job import Job, Shuffled, Supply, endless, files, pixels
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
    batches: Any = Shuffled(len(job.rows), job.batch)
    return endless(DataLoader(Files(files(job), transform(job)), batch_sampler=batches, num_workers=job.workers))


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
        rows, out = self.rows[items], batch.numpy()
        if self.turn:
            self._turned(rows, out)
        else:
            for row, image in zip(rows.tolist(), out[..., None], strict=True):
                simplejpeg.decode_jpeg(self.reader.read(row, self.jpeg), "GRAY", buffer=image)

    def _turned(self, rows: np.ndarray, out: np.ndarray) -> None:
        scale, image = self.reader.scale, self.image[..., 0]
        angles, flips = _draws(rows)
        for row, angle, flip, turned in zip(rows.tolist(), angles, flips, out, strict=True):
            simplejpeg.decode_jpeg(self.reader.read(row, self.jpeg), "GRAY", buffer=self.image)
            cv2.warpAffine(image, warp_matrix(scale, angle, flip), (scale, scale), turned, WARP, borderValue=0)


class Ring(Dataset[int]):
    """Like `Kernels`, but in buffers that are reused, so that only their numbers travel."""

    def __init__(self, job: Job, buffers: int) -> None:
        shape = (buffers, min(job.batch, len(job.rows)), job.scale, job.scale)
        self.kernels, self.ring = Kernels(job), torch.empty(shape, dtype=torch.uint8).share_memory_()

    def __getitems__(self, items: list[int]) -> int:
        """`items`: number of the buffer, then numbers of the images."""
        self.kernels.fill(items[1:], self.ring[items[0]])
        return items[0]


class Numbered:
    """Batches of `Shuffled`, each preceded by the number of its buffer; buffers take turns."""

    def __init__(self, batches: Shuffled, buffers: int) -> None:
        self.batches, self.buffers = batches, buffers

    def __iter__(self) -> Iterator[list[int]]:
        for n, batch in enumerate(self.batches):
            yield [n % self.buffers, *batch]


def _draws(rows: np.ndarray) -> tuple[list[float], list[bool]]:
    """Angles in degrees, and flips."""
    angles, flips = Augment().draw(int(np.random.default_rng().integers(2**31)), 0, rows)
    return angles.tolist(), flips.tolist()


def _same(batch: Any) -> Any:
    return batch


def over_kernels(job: Job) -> Supply:
    return endless(_kernels_loader(Kernels(job), Shuffled(len(job.rows), job.batch), job))


def over_ring(job: Job) -> Supply:
    buffers = AHEAD * job.workers + 2  # those under way, the one in use, and a spare one
    dataset = Ring(job, buffers)
    batches = Numbered(Shuffled(len(job.rows), job.batch), buffers)
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
    array, batches = np.load(job.folder / "pixels.npy", mmap_mode="r"), Shuffled(len(job.rows), job.batch)
    if job.turn:
        return closing(_turned_in_threads(job, array))
    return closing(array[rows] for rows in batches)


def _turned_in_threads(job: Job, array: np.ndarray) -> Generator[np.ndarray]:
    side = (job.scale, job.scale)

    def turn(out: np.ndarray, rows: list[int]) -> None:
        angles, flips = _draws(np.array(rows))
        for row, angle, flip, image in zip(rows, angles, flips, out, strict=True):
            cv2.warpAffine(array[row], warp_matrix(job.scale, angle, flip), side, image, WARP, borderValue=0)

    def begin(rows: list[int]) -> tuple[np.ndarray, list[Future[None]]]:
        out = np.empty((len(rows), *side), np.uint8)
        step = -(-len(rows) // job.workers)
        return out, [pool.submit(turn, out[i : i + step], rows[i : i + step]) for i in range(0, len(rows), step)]

    cv2.setNumThreads(1)
    with ThreadPoolExecutor(job.workers) as pool:
        under_way: deque[tuple[np.ndarray, list[Future[None]]]] = deque()
        for rows in Shuffled(len(job.rows), job.batch):
            under_way.append(begin(rows))
            if len(under_way) > AHEAD:
                out, futures = under_way.popleft()
                for future in futures:
                    future.result()
                yield out
