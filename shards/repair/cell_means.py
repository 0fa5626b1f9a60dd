"""Grids for shards that were built before manifests held any: the images of the tars are decoded, and their grids taken.

The tars are only read. After each manifest SHA256SUMS is written, so that a killed run leaves one manifest at most that is
not signed; a repair gives it its old bytes back, and goes on.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np

from cxrfast.errors import ShardError
from cxrfast.files import sha256, write_bytes
from cxrfast.progress import progress
from cxrfast.shards.format.checksums import read_sums, sums_bytes
from cxrfast.shards.format.codec import decode_member
from cxrfast.shards.format.names import shard_name
from cxrfast.shards.format.tar import read_index
from cxrfast.shards.images.bad_image import BadImage
from cxrfast.shards.images.cell_means import SIDE, grid, pack
from cxrfast.shards.shard_set import ShardSet


def add_grids(shards: ShardSet, workers: int) -> tuple[dict[int, int], dict[str, str]]:
    """Give the manifests of a whole set the grids that they lack.

    Returns the number of manifests that got theirs at each scale, and {manifest's name: why it did not}.
    """
    without = [(m.scale, m.shard, len(m.rows)) for m in shards.manifests() if m.lacks_grids]
    added: dict[int, int] = {}
    failed: dict[str, str] = {}
    if not without:
        return added, failed
    folder = shards.folder
    sums = read_sums(folder)
    with progress("taking grids", sum(rows for *_, rows in without)) as advance:
        for scale, shard, _ in without:
            name, m = shard_name(scale, shard, "json"), shards.manifest(scale, shard)
            assert m is not None  # it was there a moment ago
            places = read_index(folder, scale, shard)
            try:
                grids = take_grids(shards.path(scale, shard), places, shards.info.codec, workers, advance)
            except ShardError as error:
                failed[name] = str(error)
                continue
            replace(m, grids=pack(grids)).write(folder)
            sums[name] = sha256(folder / name)
            write_bytes(folder / "SHA256SUMS", sums_bytes(sums))
            added[scale] = added.get(scale, 0) + 1
    return added, failed


def take_grids(
    tar: Path,
    places: list[tuple[int, int, int]],
    codec: str,
    workers: int,
    advance: Callable[[], None] = lambda: None,
) -> np.ndarray:
    """The grids of the decoded images of a tar at these (row, offset, bytes), int16 (n, 4, 4).

    Threads: decoding releases the GIL. Raises ShardError naming a row that cannot be decoded.
    """

    def take(place: tuple[int, int, int]) -> np.ndarray:
        row, offset, size = place
        try:
            return grid(decode_member(os.pread(file.fileno(), size, offset), codec))
        except BadImage as error:
            raise ShardError(f"row {row} in {tar} is {error.reason}: restore the tar from a copy") from error

    grids = np.empty((len(places), SIDE, SIDE), np.int16)
    with open(tar, "rb") as file, ThreadPoolExecutor(workers) as pool:
        for number, taken in enumerate(pool.map(take, places)):
            grids[number] = taken
            advance()
    return grids
