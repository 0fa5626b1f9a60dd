"""Loaders that ours is compared with, on the same JPEGs, each used as its documentation shows.

First those that need no other library: torch's DataLoader over files and over our kernels, and a mapped array of pixels.
Other libraries are imported when used.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager, redirect_stderr, suppress
from functools import lru_cache
from io import StringIO
from itertools import count
from pathlib import Path
from queue import Empty
from typing import Any

import cv2
import numpy as np
import simplejpeg
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms import InterpolationMode, v2

from cxrfast.bench.loading.job import Job, Supply, endless, files, jpegs, pixels, shuffled
from cxrfast.pipelines.host import WARP, warp_matrix
from cxrfast.pipelines.order import Augment
from cxrfast.pipelines.reader import Reader
from cxrfast.shards.format.tar import TarWriter

AHEAD = 2
"""Batches each worker of ours prepares ahead; 4 and 8 were not faster."""

LONG = 50_000
"""Images per epoch, at least, where a library makes epochs: small sets are repeated, so that their ends do not count."""

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


# Other libraries


def decode_grey(jpeg: bytes) -> torch.Tensor:
    """uint8 (1, H, W), decoded by torchvision in half of Pillow's time."""
    return decode_jpeg(torch.frombuffer(bytearray(jpeg), dtype=torch.uint8), mode=ImageReadMode.GRAY)


def decode_and_turn(jpeg: bytes) -> torch.Tensor:
    return turn_array(decode_grey(jpeg)[0].numpy())


# webdataset, and DALI's reader of the same tars


def write_tars(job: Job) -> None:
    """Write tars like ours with their indexes, four per worker, so that every worker has some."""
    folder = job.folder / "tars"
    if folder.exists():
        return
    (folder / str(job.scale)).mkdir(parents=True)
    tars = [TarWriter(folder, job.scale, n, "jpeg") for n in range(min(4 * job.workers, len(job.rows)))]
    for n, data in enumerate(jpegs(job)):
        tars[n % len(tars)].add(n, data, b"{}")
    for tar in tars:
        tar.close()


def _tars(job: Job, suffix: str) -> list[str]:
    return sorted(map(str, (job.folder / "tars" / str(job.scale)).glob(f"*.{suffix}")))


def webdataset(job: Job) -> Supply:
    import webdataset as wds

    dataset = wds.WebDataset(_tars(job, "tar"), resampled=True, shardshuffle=False).shuffle(1000)
    if job.turn:
        dataset = dataset.decode("pill").to_tuple("jpg").map_tuple(turned)
    else:
        dataset = dataset.decode("torchl8").to_tuple("jpg")
    loader = wds.WebLoader(dataset.batched(job.batch), batch_size=None, num_workers=job.workers)
    return endless(loader, lambda batch: batch[0])


def dali_tars(job: Job) -> Supply:
    from nvidia.dali import fn, pipeline_def, types

    @pipeline_def(batch_size=min(job.batch, len(job.rows)), num_threads=job.workers, device_id=None)
    def graph() -> Any:
        jpeg = fn.readers.webdataset(
            paths=_tars(job, "tar"), index_paths=_tars(job, "idx"), ext=["jpg"], random_shuffle=True
        )
        image = fn.decoders.image(jpeg, device="cpu", output_type=types.GRAY)
        if job.turn:
            image = fn.flip(image, horizontal=fn.random.coin_flip())
            angle = fn.random.uniform(range=[-15.0, 15.0])
            image = fn.rotate(image, angle=angle, keep_size=True, fill_value=0, interp_type=types.INTERP_LINEAR)
        return image

    pipe = graph()
    pipe.build()
    return closing(torch.from_dlpack(pipe.run()[0].as_tensor()) for _ in count())


# LitData


def write_litdata(job: Job, raw: bool = False) -> None:
    """Write what `litdata.optimize` writes, without the processes that it starts."""
    from litdata.streaming.writer import BinaryWriter

    writer = BinaryWriter(str(job.folder / f"litdata-{raw}"), chunk_bytes="64MB")
    for n, sample in enumerate(pixels(job) if raw else jpegs(job)):
        writer.add_item(n, sample)
    writer.done()
    writer.merge()


def litdata(job: Job, raw: bool = False) -> Supply:
    from litdata import StreamingDataLoader, StreamingDataset

    plain, turning = (torch.from_numpy, turn_array) if raw else (decode_grey, decode_and_turn)
    dataset = StreamingDataset(
        str(job.folder / f"litdata-{raw}"),
        shuffle=True,
        drop_last=True,
        transform=turning if job.turn else plain,
        subsample=float(-(-LONG // len(job.rows))),
    )
    return endless(StreamingDataLoader(dataset, batch_size=job.batch, num_workers=job.workers))


# Streaming


def write_mds(job: Job) -> None:
    from streaming import MDSWriter

    with MDSWriter(out=str(job.folder / "mds"), columns={"image": "jpeg"}) as out:
        for path in files(job):
            with Image.open(path) as image:  # the writer copies the file
                out.write({"image": image})


def streaming(job: Job) -> Supply:
    from streaming import StreamingDataset

    to_tensor = transform(job)

    class Images(StreamingDataset):
        def __getitem__(self, at: Any) -> Any:
            return to_tensor(super().__getitem__(at)["image"])

    dataset = Images(local=str(job.folder / "mds"), shuffle=True, batch_size=job.batch, epoch_size=LONG)
    return endless(DataLoader(dataset, batch_size=job.batch, num_workers=job.workers))


# SPDL


@contextmanager
def spdl(job: Job) -> Iterator[Iterator[torch.Tensor]]:
    from spdl.pipeline import PipelineBuilder

    paths, decode = files(job), decode_and_turn if job.turn else decode_grey

    def load(numbers: list[int]) -> torch.Tensor:
        return torch.stack([decode(paths[n].read_bytes()) for n in numbers])

    builder = PipelineBuilder().add_source(shuffled(job)).pipe(load, concurrency=job.workers)
    pipeline = builder.add_sink(4).build(num_threads=job.workers)
    with pipeline.auto_stop():
        yield iter(pipeline)


# FFCV


def write_beton(job: Job, raw: bool = False) -> None:
    from ffcv.fields import NDArrayField, RGBImageField
    from ffcv.writer import DatasetWriter

    class Encoded(RGBImageField):
        """Stores a JPEG as it is, where theirs would encode it again."""

        def encode(self, destination: Any, field: bytes, malloc: Any) -> None:
            destination["mode"], destination["height"], destination["width"] = 0, job.scale, job.scale
            destination["data_ptr"], storage = malloc(len(field))
            storage[:] = np.frombuffer(field, np.uint8)

    field = NDArrayField(np.dtype("uint8"), (job.scale, job.scale, 1)) if raw else Encoded()
    samples: Iterator[Any] = (image[..., None] for image in pixels(job)) if raw else jpegs(job)
    writer = DatasetWriter(str(job.folder / f"{raw}.beton"), {"image": field}, num_workers=1)
    with redirect_stderr(StringIO()):  # its progress bar
        writer.from_indexed_dataset([(sample,) for sample in samples])


def ffcv(job: Job, raw: bool = False) -> Supply:
    loader = _ffcv_loader(job.folder / f"{raw}.beton", min(job.batch, len(job.rows)), job.workers, raw)

    def batches() -> Generator[torch.Tensor]:
        while True:
            iterator = iter(loader)
            try:
                for (images,) in iterator:
                    yield images[..., :1]  # the channels of a grey image are equal
            finally:
                _end(iterator)

    return closing(batches())


def _end(iterator: Any) -> None:
    """End an iterator's thread first: its `close` does not wait for the thread, and unmaps what it may still read."""
    iterator.terminate_event.set()
    while iterator.is_alive():
        with suppress(Empty):
            iterator.output_queue.get(timeout=0.05)
    iterator.close()


@lru_cache(maxsize=2)
def _ffcv_loader(path: Path, batch: int, workers: int, raw: bool) -> Any:
    """Made once, since it is compiled for seconds; it holds no thread between epochs."""
    from ffcv.fields import RGBImageField
    from ffcv.fields.decoders import NDArrayDecoder, SimpleRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import ToTensor

    custom = {} if raw else {"image": RGBImageField}
    options = {"order": OrderOption.RANDOM, "os_cache": True, "drop_last": True, "custom_fields": custom}
    images = int(Loader(str(path), batch, workers, **options).reader.num_samples)
    indices = np.tile(np.arange(images), -(-LONG // images))
    pipelines = {"image": [NDArrayDecoder() if raw else SimpleRGBImageDecoder(), ToTensor()]}
    return Loader(str(path), batch, workers, indices=indices, pipelines=pipelines, **options)
