"""Loaders of other libraries, each used as its documentation shows, on the same JPEGs. They are imported when used."""

from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager, redirect_stderr, suppress
from functools import lru_cache
from io import StringIO
from itertools import count
from pathlib import Path
from queue import Empty
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.io import ImageReadMode, decode_jpeg

from cxrfast.bench.loading.job import Job, Supply, endless, files, jpegs, pixels, shuffled
from cxrfast.bench.loading.torch_loaders import transform, turn_array, turned
from cxrfast.shards.format.tar import TarWriter

LONG = 50_000
"""Images per epoch, at least, where a library makes epochs: small sets are repeated, so that their ends do not count."""


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
