"""All ways of loading: ours and those of other libraries, which of them run here, and how each is opened for a job."""

import re
from collections.abc import Collection
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from cxrfast.bench.harness import EXTRA, Measurement, missing_library
from cxrfast.bench.loading import libraries
from cxrfast.bench.loading.job import Job, Peer, files
from cxrfast.bench.loading.measure import Batches, limit, measurement, ours
from cxrfast.errors import LoadError
from cxrfast.machine import installed
from cxrfast.pipelines import dali
from cxrfast.pipelines.reader import Reader

HOST, CACHE, LIMIT = "host", "host, cache", "limit"
ONE_THREAD, RAW, UNPROVEN = "host, 1 thread", "host, raw", "dali, unproven"

PIXEL_SCALE = 512
"""Largest scale at which uncompressed pixels are measured, px."""

OURS = {
    HOST: "Loader(engine='host')",
    "dali": "Loader(engine='dali', prove=True), the default on a GPU",
    UNPROVEN: "Loader(engine='dali', prove=False), the default on a CPU",
    ONE_THREAD: "Loader(engine='host', threads=1)",
    CACHE: "Loader(engine='host', cache=…), filled before",
    RAW: "Loader(engine='host') of a set made with --codec raw",
    LIMIT: "the same decoder, and warpAffine, in bare threads: bytes in memory, no loader",
}

THEIRS = {
    "DataLoader, our kernels": "torch's DataLoader over our reader, decoder and warp: whole batches, made in memory that its "
    "processes share",
    "DataLoader, our kernels, ring": "the same, but batches use a ring of buffers that are made once; each is overwritten soon "
    "after the next one",
    "DataLoader, Pillow": 'torch\'s DataLoader over files: Pillow open, convert("L"), torchvision RandomHorizontalFlip and '
    "RandomRotation",
    "memmap": "one np.memmap of all images, indexed by batches of a permutation; rotated by our warp in threads",
    "webdataset": "WebDataset(tars, resampled=True).shuffle(1000).decode(…, grey).map(…).batched(…) in a WebLoader; rotated as "
    '"Pillow"',
    "DALI's tar reader": "fn.readers.webdataset(random_shuffle=True), decoders.image(GRAY), flip, rotate: on the CPU",
    "LitData": "StreamingDataset of JPEG bytes, torchvision decode_jpeg(GRAY), StreamingDataLoader; rotated as Pillow",
    "LitData, raw": "StreamingDataset of arrays, StreamingDataLoader; rotated as Pillow",
    "Streaming": "MDS shards of JPEGs (they come as Pillow images), torch's DataLoader; rotated as Pillow",
    "SPDL": "PipelineBuilder: files, torchvision decode_jpeg(GRAY), batches in a pool of threads; rotated as Pillow",
    "FFCV": "Loader of a beton of JPEGs, os_cache, RANDOM; decodes to colour, inexactly (up to 11 grey levels off), and cannot "
    "rotate",
    "FFCV, raw": "Loader of a beton of grey arrays, os_cache, RANDOM; cannot rotate",
}

WHAT = OURS | THEIRS

litdata_raw = partial(libraries.litdata, raw=True)
write_litdata_raw = partial(libraries.write_litdata, raw=True)
ffcv_raw = partial(libraries.ffcv, raw=True)
write_beton_raw = partial(libraries.write_beton, raw=True)

PEERS = {
    "DataLoader, our kernels": Peer(libraries.over_kernels),
    "DataLoader, our kernels, ring": Peer(libraries.over_ring),
    "DataLoader, Pillow": Peer(libraries.over_files, files),
    "memmap": Peer(libraries.over_array, libraries.write_array, pixels=True),
    "webdataset": Peer(libraries.webdataset, libraries.write_tars, "webdataset"),
    "DALI's tar reader": Peer(libraries.dali_tars, libraries.write_tars, "nvidia.dali"),
    "LitData": Peer(libraries.litdata, libraries.write_litdata, "litdata"),
    "LitData, raw": Peer(litdata_raw, write_litdata_raw, "litdata", pixels=True),
    "Streaming": Peer(libraries.streaming, libraries.write_mds, "streaming"),
    "SPDL": Peer(libraries.spdl, files, "spdl.pipeline"),
    "FFCV": Peer(libraries.ffcv, libraries.write_beton, "ffcv", turns=False),
    "FFCV, raw": Peer(ffcv_raw, write_beton_raw, "ffcv", turns=False, pixels=True),
}

ADVICE = {
    "nvidia.dali": "pip install nvidia-dali-cuda120",
    "ffcv": "apt install g++ pkg-config libopencv-dev libturbojpeg0-dev, then pip install --no-deps ffcv numba",
}
"""How to install a library outside the `bench` extra. FFCV must be compiled, and would bring a second OpenCV."""

PACKAGES = ("webdataset", "litdata", "mosaicml-streaming", "spdl-core", "ffcv", "pillow", "simplejpeg")


def typed(way: str) -> str:
    """A way's name as it is typed after --only: `DataLoader, Pillow` → `dataloader-pillow`."""
    return re.sub("[^a-z0-9]+", "-", way.lower().replace("'", ""))


def reads_pixels(way: str) -> bool:
    """Whether a way reads uncompressed pixels."""
    return way in (CACHE, RAW) or (way in PEERS and PEERS[way].pixels)


def pick_ways(only: list[str], with_peers: bool, workers: int) -> tuple[list[str], dict[str, str]]:
    """The ways to measure, and those that do not run here, with the reason.

    `host` is always measured, and `host, cache` if other ways read pixels: ratios are to them.
    Raises LoadError for a way that does not exist.
    """
    known = {typed(way): way for way in (WHAT if with_peers or only else OURS)}
    for name in only:
        if typed(name) not in known:
            raise LoadError(f"--only {name}: no such way of loading, use one of {', '.join(known)}")
    picked = {known[typed(name)] for name in only} or set(known.values())
    left_out = missing(picked)
    picked -= left_out.keys()
    if any(map(reads_pixels, picked)):
        picked.add(CACHE)
    if workers == 1:
        picked.discard(ONE_THREAD)
    return [way for way in known.values() if way in picked | {HOST}], left_out


def missing(names: Collection[str]) -> dict[str, str]:
    """Those of `names` whose library is not installed, with the reason."""
    found: dict[str, str] = {}
    for name in (name for name in WHAT if name in names):
        needs = PEERS[name].needs if name in PEERS else None
        if name in ("dali", UNPROVEN) and not dali.available():
            found[name] = f"NVIDIA DALI is not installed: {ADVICE['nvidia.dali']}"
        elif needs and (reason := missing_library(needs, ADVICE.get(needs, EXTRA))):
            found[name] = reason
    return found


def usable(job: Job, ways: list[str]) -> list[str]:
    """Those of `ways` that the job can be given to."""
    return [
        way
        for way in ways
        if (job.scale <= PIXEL_SCALE or not reads_pixels(way))
        and not (job.turn and way in PEERS and not PEERS[way].turns)
    ]


def open_ways(job: Job, device: torch.device, ways: list[str]) -> dict[str, Measurement]:
    """A measurement of each of the usable `ways`."""
    return {
        way: limit(job) if way == LIMIT else measurement(_batches(job, device, way), device)
        for way in usable(job, ways)
    }


def _batches(job: Job, device: torch.device, way: str) -> Batches:
    if way in PEERS:
        return partial(PEERS[way].batches, job)
    if way == RAW:
        raw = job.folder / "raw"
        with Reader(raw, job.scale) as reader:
            job = replace(job, shards=raw, rows=reader.rows)
    options: dict[str, dict[str, Any]] = {
        "dali": {"prove": True},
        UNPROVEN: {"prove": False},
        ONE_THREAD: {"threads": 1},
        CACHE: {"cache": job.folder / "cache"},
    }
    return ours(job, way.split(",")[0], device, **options.get(way, {}))


def peer_versions() -> dict[str, str | None]:
    return {package: installed(package, package) for package in PACKAGES}
