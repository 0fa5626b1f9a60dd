"""Input of benchmarks: phantoms where no set is given, trees and sets of given radiographs, and long orders.

Trees and sets are written into the folder that the caller names and removes.
"""

import os
from collections.abc import Generator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from cxrfast.errors import ShardError
from cxrfast.labels import MIMIC
from cxrfast.log import quiet
from cxrfast.phantoms.dataset import synth
from cxrfast.pipelines.loader import Batch, Loader
from cxrfast.pipelines.reader import Reader
from cxrfast.shards.build import build
from cxrfast.shards.building.layout import ROW_ORDER, rows_per_shard
from cxrfast.shards.format.info import SetInfo, versions
from cxrfast.shards.format.manifest import ShardManifest
from cxrfast.shards.format.recipe import ImageRecipe
from cxrfast.shards.format.tar import TarWriter
from cxrfast.shards.images.bad_image import BadImage
from cxrfast.shards.images.cell_means import grid, pack
from cxrfast.shards.images.decode import encode
from cxrfast.shards.images.jpeg import decode_grey
from cxrfast.shards.sources.read import read_source
from cxrfast.shards.storage import Tree
from cxrfast.shuffle import permutation

PHANTOMS = 200

MIMIC_IMAGES = 377_110
"""Number of images of MIMIC-CXR-JPG."""

LONG = 250_000
"""Images per epoch of a LongOrder, at least."""


def make_phantoms(folder: Path, scales: list[int]) -> Path:
    """Make a shard set of phantom radiographs as large as the largest scale; return its folder."""
    synth(folder / "source", images=PHANTOMS, size=min(2048, max(256, max(scales))))
    build(folder / "source", folder / "shards", scales)
    return folder / "shards"


@dataclass(frozen=True, kw_only=True)
class LongOrder:
    """Permutations of `rows`, one after the other, cut into full micro-batches, as one epoch of at least `LONG` images.

    A pipeline starts once per epoch; in a long epoch no start falls into a measurement, however few the rows are. Rows
    repeat within a micro-batch that is larger than their number.
    """

    rows: np.ndarray
    """int64 (N,)"""
    micro_batch: int
    seed: int = 0

    def __len__(self) -> int:
        """Micro-batches of an epoch."""
        return -(-max(LONG, self.micro_batch) // len(self.rows)) * len(self.rows) // self.micro_batch

    def micro_batches(self, epoch: int = 0, consumed: int = 0) -> list[np.ndarray]:
        images = max(LONG, self.micro_batch)
        shape = (-(-images // len(self.rows)), len(self.rows))
        words = np.random.Philox(key=np.array([self.seed, epoch], np.uint64)).random_raw(shape[0] * shape[1])
        rows = self.rows[np.argsort(words.reshape(shape), axis=1)].ravel()
        steps = len(rows) // self.micro_batch
        return list(rows[: steps * self.micro_batch].reshape(steps, self.micro_batch))[consumed // self.micro_batch :]


def endless(loader: Loader) -> Generator[Batch]:
    """The batches of one epoch after the other."""
    return (batch for epoch in count() for batch in loader.epoch(epoch))


# Trees and sets


SOURCE: dict[str, Any] = {"source": "table", "source_options": {"table": "images.csv", "label": list(MIMIC)}}
"""Options with which `build` reads the trees made here."""

FULL_SIZE = 16
"""In a mixed tree, one row in 16 is a radiograph of full size."""


def sample(tree: Tree, folder: Path, images: int) -> list[Path]:
    """Copy `images` sound JPEGs, picked at random from a MIMIC-CXR-JPG tree, into `folder`, or all if there are fewer.

    Raises ShardError if there is none.
    """
    paths = read_source("mimic", tree).images["path"]
    found: list[Path] = []
    for index in permutation(len(paths), 0):
        try:
            data = tree.read(paths[index])
            decode_grey(data)
        except (BadImage, OSError):
            continue
        found.append(folder / f"{len(found):06d}.jpg")
        found[-1].write_bytes(data)
        if len(found) == images:
            break
    if not found:
        raise ShardError(f"none of the {len(paths):,} images that {tree} lists is a sound JPEG: give another --data")
    return found


def crowd(images: list[Path], folder: Path, rows: int, mixed: bool = False) -> Path:
    """Make a tree of `rows` hard links to `images`, with its table; return its folder.

    `mixed`: only one row in `FULL_SIZE`, spread evenly over the shards, is one of `images`; the others are 16 px square.
    """
    folder.mkdir()
    small = folder.with_suffix(".jpg")
    small.write_bytes(encode(np.full((16, 16), 128, np.uint8), 95))
    names = [f"{n:06d}" for n in range(rows)]
    # row r is the image at permutation[r] of those sorted by name
    order = permutation(rows, ImageRecipe().seed, ROW_ORDER) if mixed else range(rows)
    for row, index in enumerate(order):
        turn, is_small = divmod(row, FULL_SIZE if mixed else 1)
        os.link(small if is_small else images[turn % len(images)], folder / f"{names[index]}.jpg")
    _write_table(folder, names)
    return folder


def _write_table(folder: Path, names: list[str]) -> None:
    table = pd.DataFrame({"path": [f"{name}.jpg" for name in names], "patient_id": names, **dict.fromkeys(MIMIC, "")})
    table.to_csv(folder / "images.csv", index=False)


def tiny_images(folder: Path, images: int, scale: int) -> Path:
    """Make a shard set of noise images, a few different ones in turn, to measure what depends only on the number of rows."""
    info = SetInfo(
        id=f"{images:032x}",
        source="table",
        source_options={},
        labels=[],
        seed=0,
        images=images,
        studies=images,
        patients=images,
        rows_per_shard=rows_per_shard(images),
        codec="jpeg",
        quality=95,
        dct="accurate",
        resize="squash",
        grey="none",
        versions=versions(),
    )
    (folder / str(scale)).mkdir(parents=True)
    info.write(folder)
    noise = np.random.Philox(0).random_raw(64 * scale * scale).astype(np.uint8).reshape(64, scale, scale)
    jpegs, grids = [encode(image, 95) for image in noise], np.stack([grid(image) for image in noise])
    for shard in range(info.shards):
        writer, rows = TarWriter(folder, scale, shard, info.codec), list(info.rows_of(shard))
        for row in rows:
            writer.add(row, jpegs[row % 64], b"{}")
        digest, length = writer.close()
        ShardManifest(
            set=info.id,
            scale=scale,
            shard=shard,
            sha256=digest,
            bytes=length,
            rows=rows,
            crc32=writer.crc32,
            sizes=[[scale, scale]] * len(rows),
            quarantined={},
            grids=pack(grids[np.array(rows) % 64]),
        ).write(folder)
    return folder


def uncompressed(shards: Path, scale: int, rows: np.ndarray, folder: Path) -> Path:
    """Make a raw set at `folder`/raw of the images of `rows` of a JPEG set; their row numbers change."""
    tree = folder / "jpegs"
    tree.mkdir(parents=True)
    with Reader(shards, scale) as reader:
        for row in rows.tolist():
            (tree / f"{row:09d}.jpg").write_bytes(reader.read(row))
    names = [f"{row:09d}" for row in rows.tolist()]
    _write_table(tree, names)
    with quiet():
        build(tree, folder / "raw", [scale], recipe=ImageRecipe(codec="raw"), **SOURCE)
    return folder / "raw"
