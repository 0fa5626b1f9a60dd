"""Ways of loading: names of some come in, those that can be measured here go out, ours and those of other libraries."""

import re
from dataclasses import replace
from functools import partial

import torch

from cxrfast.bench.loading.job import Job, Peer
from cxrfast.bench.loading.measure import Measurement, limit, measurement, ours
from cxrfast.bench.loading.peers import peer_names, peers
from cxrfast.errors import LoadError
from cxrfast.pipelines import dali
from cxrfast.pipelines.reader import Reader

HOST, CACHE, LIMIT = "host", "host, cache", "limit"
ONE_THREAD, RAW, UNPROVEN = "host, 1 thread", "host, raw", "dali, unproven"

PIXEL_SCALE = 512
"""Largest scale at which uncompressed pixels are measured, px."""

WHAT = {
    HOST: "Loader(engine='host')",
    "dali": "Loader(engine='dali', prove=True), the default on a GPU",
    UNPROVEN: "Loader(engine='dali', prove=False), the default on a CPU",
    ONE_THREAD: "Loader(engine='host', threads=1)",
    CACHE: "Loader(engine='host', cache=…), filled before",
    RAW: "Loader(engine='host') of a set made with --codec raw",
    LIMIT: "the same decoder, and warpAffine, in bare threads: bytes in memory, no loader",
}


def typed(way: str) -> str:
    """A way's name as it is typed after --only: `DataLoader, Pillow` → `dataloader-pillow`."""
    return re.sub("[^a-z0-9]+", "-", way.lower().replace("'", ""))


def pick_ways(only: list[str], with_peers: bool, workers: int) -> tuple[list[str], dict[str, Peer], dict[str, str]]:
    """The ways to measure; the peers among them; and the ways that cannot be run here, with the reason.

    `host` is always measured, and `host, cache` where there are other ways that read pixels: ratios are to them.
    Raises LoadError for a way that does not exist.
    """
    known = {typed(way): way for way in (*WHAT, *(peer_names() if with_peers or only else ()))}
    for name in only:
        if typed(name) not in known:
            raise LoadError(f"--only {name}: no such way of loading, use one of {', '.join(known)}")
    picked = {known[typed(name)] for name in only} or set(known.values())
    found, left_out = peers(picked)
    if RAW in picked or any(peer.pixels for peer in found.values()):
        picked.add(CACHE)
    if not dali.available():
        missing = "NVIDIA DALI is not installed: pip install nvidia-dali-cuda120"
        left_out |= {way: missing for way in ("dali", UNPROVEN) if way in picked}
    if workers == 1:
        picked.discard(ONE_THREAD)
    return [way for way in known.values() if way in picked | {HOST} and way not in left_out], found, left_out


def usable(job: Job, found: dict[str, Peer]) -> dict[str, Peer]:
    return {way: peer for way, peer in found.items() if job.scale <= PIXEL_SCALE or not peer.pixels}


def open_ways(job: Job, device: torch.device, ways: list[str], found: dict[str, Peer]) -> dict[str, Measurement]:
    """Those of `ways` that the job can be given to."""
    own = {
        HOST: partial(ours, job, "host", device),
        "dali": partial(ours, job, "dali", device, prove=True),
        UNPROVEN: partial(ours, job, "dali", device, prove=False),
        ONE_THREAD: partial(ours, job, "host", device, threads=1),
        CACHE: partial(ours, job, "host", device, cache=job.folder / "cache"),
    }
    batches = {way: open_() for way, open_ in own.items() if way in ways}
    if RAW in ways:
        raw = job.folder / "raw"
        with Reader(raw, job.scale) as reader:
            batches[RAW] = ours(replace(job, shards=raw, rows=reader.rows), "host", device)
    batches |= {way: partial(peer.batches, job) for way, peer in found.items() if peer.turns or not job.turn}
    measurements = {way: measurement(supply, device) for way, supply in batches.items()}
    return measurements | ({LIMIT: limit(job)} if LIMIT in ways else {})
