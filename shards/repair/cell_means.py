"""Add grids to the manifests of sets built before manifests had them, from the decoded images of the tars.

SHA256SUMS is written after each manifest, so a killed run leaves at most one unsigned manifest; the next repair restores
that one and continues.
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
from cxrfast.shards.format.checksums import sums_bytes
from cxrfast.shards.format.codec import decode_member
from cxrfast.shards.format.names import shard_name
from cxrfast.shards.format.tar import read_index
from cxrfast.shards.images.bad_image import BadImage
from cxrfast.shards.images.cell_means import SIDE, grid, pack
from cxrfast.shards.repair.state import RepairState
from cxrfast.shards.shard_set import ShardSet
from cxrfast.shards.upkeep.problem import Problem


def add_grids(state: RepairState) -> None:
    """Add grids to the manifests of a whole set that lack them."""
    folder, shards = state.folder, ShardSet(state.folder)
    without = [(m.scale, m.shard, len(m.rows)) for m in shards.manifests() if m.lacks_grids]
    added: dict[int, int] = {}
    with progress("taking grids", sum(rows for *_, rows in without)) as advance:
        for scale, shard, _ in without:
            name, m = shard_name(scale, shard, "json"), shards.manifest(scale, shard)
            assert m is not None  # it was there a moment ago
            try:
                places = read_index(folder, scale, shard)
                grids = take_grids(shards.path(scale, shard), places, shards.info.codec, state.workers, advance)
            except ShardError as error:
                state.failed[name] = str(error)
                continue
            replace(m, grids=pack(grids)).write(folder)
            state.sums[name] = sha256(folder / name)
            write_bytes(folder / "SHA256SUMS", sums_bytes(state.sums))
            added[scale] = added.get(scale, 0) + 1
    state.done += [Problem(f"{scale}/", f"grids added to {n:,} manifests") for scale, n in added.items()]


def take_grids(
    tar: Path,
    places: list[tuple[int, int, int]],
    codec: str,
    workers: int,
    advance: Callable[[], None] = lambda: None,
) -> np.ndarray:
    """Grids of the decoded images at these (row, offset, bytes) of a tar, int16 (n, 4, 4).

    Uses threads, since decoding releases the GIL. Raises ShardError that names a row that cannot be decoded.
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
