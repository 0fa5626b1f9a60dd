"""The measurements of `cxrfast bench shard`: radiographs on the disk come in, images/s and memory go out.

First what sharding is compared with: how radiographs are usually resized, and the codec's own limit. Each peer writes an
image at every scale, as a JPEG of quality 95 in a file of its own. Nothing is synced. Then the measurements: everything
written goes into the scratch folder.
"""

import cProfile
import pstats
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import PIL
import psutil
import simplejpeg
from PIL import Image

from cxrfast.bench.data import FULL_SIZE, SOURCE, crowd
from cxrfast.bench.harness import Measurement, missing_library, one_core
from cxrfast.bench.process import in_own_process
from cxrfast.errors import RunError, ShardError
from cxrfast.log import quiet
from cxrfast.shards.build import build
from cxrfast.shards.building.tasks import Blueprint, Task, Todo, build_shard, make_task
from cxrfast.shards.building.workers import run_here, start_pool
from cxrfast.shards.format.manifest import ShardManifest
from cxrfast.shards.format.tar import TarWriter
from cxrfast.shards.images.decode import decode_with_remarks, encode
from cxrfast.shards.images.resize import at_scales
from cxrfast.shards.shard_set import ShardSet
from cxrfast.shards.storage import Tree

QUALITY = 95

Peer = Callable[[Path, list[int], Path], None]
"""(image, scales, folder): writes folder/SCALE/NAME for each scale."""

WHAT = {
    "ours": "build_shard: read, decode, resize, encode, tar, sha256, crc32, fsync, rename",
    "pillow_rgb": 'Pillow: open, convert("RGB"), resize BILINEAR from full size to each scale, save to files',
    "pillow_grey": "Pillow: open, draft mode L, convert, resize BILINEAR to each scale, save to files",
    "libvips": "pyvips: thumbnail (shrink-on-load) and jpegsave for each scale, grey, concurrency 1, to files",
    "kernels": "our decode, resize and encode alone, bytes in memory, no files: the limit",
}


def pillow_rgb(path: Path, scales: list[int], folder: Path) -> None:
    """What most scripts do."""
    with Image.open(path) as file:
        picture = file.convert("RGB")
    _save(picture, path, scales, folder)


def pillow_grey(path: Path, scales: list[int], folder: Path) -> None:
    """What careful scripts do.

    The decoder skips colour and, where the largest scale is at most half of the shorter side, decodes at a half, a
    quarter or an eighth; a largest scale of 2048 px leaves an image of 2500 × 3056 px at full size.
    """
    with Image.open(path) as file:
        file.draft("L", (max(scales), max(scales)))
        picture = file.convert("L")
    _save(picture, path, scales, folder)


def _save(picture: Image.Image, path: Path, scales: list[int], folder: Path) -> None:
    for scale in scales:
        resized = picture.resize((scale, scale), Image.Resampling.BILINEAR)
        resized.save(folder / str(scale) / path.name, quality=QUALITY)


def libvips(path: Path, scales: list[int], folder: Path) -> None:
    """What `vipsthumbnail` does: read each scale again, decoded at the smallest sufficient size, and stream it."""
    import pyvips

    for scale in scales:
        picture = pyvips.Image.thumbnail(str(path), scale, height=scale, size="force").colourspace("b-w")
        picture.jpegsave(str(folder / str(scale) / path.name), Q=QUALITY)


def peers() -> tuple[dict[str, Peer], dict[str, str]]:
    """The peers that run here by name, each on one thread; and those that do not, with the reason."""
    found: dict[str, Peer] = {"pillow_rgb": pillow_rgb, "pillow_grey": pillow_grey}
    if reason := missing_library("pyvips"):
        return found, {"libvips": reason}
    import pyvips

    pyvips.concurrency_set(1)
    pyvips.cache_set_max(0)  # otherwise a second pass over the same files would find its results there
    return {**found, "libvips": libvips}, {}


def peer_versions() -> dict[str, str | None]:
    if missing_library("pyvips"):
        return {"pillow": PIL.__version__, "libvips": None}
    import pyvips

    return {"pillow": PIL.__version__, "libvips": ".".join(str(pyvips.version(n)) for n in range(3))}


def kernels(files: list[bytes], scales: list[int]) -> int:
    """Decode, resize and encode JPEGs in memory; return how many."""
    for data in files:
        for picture in at_scales(simplejpeg.decode_jpeg(data, "GRAY")[:, :, 0], scales).values():
            encode(picture, QUALITY)
    return len(files)


# Measurements

SMALLEST, LARGEST = 64, 1024
"""Rows per shard in sets of up to 64 shards, and in large sets; see `shards.building.layout.rows_per_shard`."""

STAGES = {
    "read": [Tree.read.__code__],
    "decode": [decode_with_remarks.__code__],
    "resize": [at_scales.__code__],
    "encode": [encode.__code__],
    "tar, hash": [f.__code__ for f in (TarWriter.add, TarWriter.close, ShardManifest.write)],
}
"""Stages of `build_shard` by the code that it calls. `sync` is taken out of the last; what is left over is `rest`."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """Input of all measurements."""

    scratch: Path
    images: list[Path]
    scales: list[int]
    workers: int
    task: Task
    """One shard of `LARGEST` rows, in which the images take turns."""
    tree: Path
    shard_rows: int
    """Rows per shard when the whole tree is built."""
    each: int
    """Shards of the tree per worker."""
    per_second: float
    """Approximate images/s per core: decides how many images fill a turn."""


Notes = dict[str, list[dict[str, float]]]
"""Observations besides the rates, by measurement, one entry per turn: of `ours` its stages, of a build what `_build` notes."""


def prepare(scratch: Path, images: list[Path], scales: list[int], seconds: float, workers: int) -> Setup:
    """Lay out a tree that keeps `workers` busy for about `seconds`, and plan it.

    It has at least 1,024 rows, which are hard links to the images: all input is in the page cache.
    """
    start = time.perf_counter()
    kernels([path.read_bytes() for path in images], scales)
    per_second = len(images) / (time.perf_counter() - start)
    each = max(1, min(round(seconds * per_second / SMALLEST), SMALLEST // workers))
    rows = max(LARGEST, each * workers * (SMALLEST if each * workers <= SMALLEST else LARGEST))
    tree = crowd(images, scratch / "tree", rows)
    planned = scratch / "planned"
    with quiet():
        build(tree, planned, scales, workers=1, limit=1, **SOURCE)
    made = ShardSet(planned)
    table = made.rows()
    todo = Todo(shard=0, scales=scales, rows=range(LARGEST), quarantined={}, held=None)
    in_turn = table.sort_values("path")["row"].head(LARGEST).tolist()
    return Setup(
        scratch=scratch,
        images=images,
        scales=scales,
        workers=workers,
        task=make_task(Blueprint(tree=Tree(tree), out=planned, info=made.info, rows=table), todo, in_turn),
        tree=tree,
        shard_rows=made.info.rows_per_shard,
        each=each,
        per_second=per_second,
    )


def measurements(setup: Setup, peers: dict[str, Peer], notes: Notes) -> dict[str, Measurement]:
    files = [path.read_bytes() for path in setup.images]

    def write_all(peer: Peer, folder: Path) -> int:
        for path in setup.images:
            peer(path, setup.scales, folder)
        return len(setup.images)

    found: dict[str, Measurement] = {"ours": partial(_ours, setup, notes.setdefault("ours", []))}
    found |= {name: partial(_passes, setup, partial(write_all, peer)) for name, peer in peers.items()}
    found["kernels"] = partial(_passes, setup, lambda folder: kernels(files, setup.scales))
    builds = {build_name(n): n for n in sorted({1, setup.workers})}
    return found | {name: partial(_build, setup, notes.setdefault(name, []), n) for name, n in builds.items()}


def build_name(workers: int) -> str:
    return f"build, {workers} worker{'s' if workers > 1 else ''}"


@contextmanager
def _folder(setup: Setup) -> Iterator[Path]:
    """A temporary folder with one folder per scale; making and removing it takes no measured time."""
    with tempfile.TemporaryDirectory(dir=setup.scratch) as name:
        for scale in setup.scales:
            (Path(name) / str(scale)).mkdir()
        yield Path(name)


def _passes(setup: Setup, work: Callable[[Path], int], seconds: float) -> float:
    """Images/s of whole passes over the images, until the seconds are over."""
    images, spent = 0, 0.0
    with one_core():
        while spent < seconds:
            with _folder(setup) as folder:
                start = time.perf_counter()
                images += work(folder)
                spent += time.perf_counter() - start
    return images / spent


def shard_rows(setup: Setup, seconds: float) -> int:
    """Rows that take about `seconds`, in whole passes over the images, at most as many as a shard holds."""
    n = len(setup.images)
    return max(1, min(round(seconds * setup.per_second), LARGEST) // n) * n


def _ours(setup: Setup, stages: list[dict[str, float]], seconds: float) -> float:
    """Build one shard as a worker does. The profile adds some hundred calls per image, well under 1 %."""
    with one_core(), _folder(setup) as folder:
        task = replace(setup.task, out=folder, images=setup.task.images[: shard_rows(setup, seconds)])
        profile = cProfile.Profile()
        start = time.perf_counter()
        profile.runcall(build_shard, task)
        spent = time.perf_counter() - start
    stages.append(_stages(profile, len(task.images), spent))
    return len(task.images) / spent


def _stages(profile: cProfile.Profile, images: int, spent: float) -> dict[str, float]:
    """ms per image in each of `STAGES`, in fsync and in the rest; they add up to `spent` seconds for all images."""
    stats: dict[tuple[str, int, str], tuple] = pstats.Stats(profile).stats  # type: ignore[attr-defined]

    def ms(file: str, line: int, name: str) -> float:
        return 1e3 / images * stats.get((file, line, name), (0, 0, 0.0, 0.0))[3]  # calls, more calls, own, cumulative

    found = {
        stage: sum(ms(code.co_filename, code.co_firstlineno, code.co_name) for code in codes)
        for stage, codes in STAGES.items()
    }
    found["sync"] = ms("~", 0, "<built-in method posix.fsync>")
    found["tar, hash"] -= found["sync"]
    return {**found, "rest": 1e3 / images * spent - sum(found.values())}


def _build(setup: Setup, calls: list[dict[str, float]], workers: int, seconds: float) -> float:
    """A whole `build` of as many shards per worker as fit into the seconds, at least one.

    Work lasts from set.json, when the plan is done, to the last manifest; it includes the start of the workers.
    """
    each = max(1, min(setup.each, round(seconds * setup.per_second / setup.shard_rows)))
    with tempfile.TemporaryDirectory(dir=setup.scratch) as name:
        out = Path(name)
        start = time.perf_counter()
        with quiet():
            limit = each * workers * setup.shard_rows
            report = build(setup.tree, out, setup.scales, workers=workers, limit=limit, **SOURCE)
        spent = time.perf_counter() - start
        manifests = [path.stat().st_mtime for scale in setup.scales for path in (out / str(scale)).glob("*.json")]
        work = max(manifests) - (out / "set.json").stat().st_mtime
    images = min(report.rows.values())
    written = sum(report.bytes.values())
    calls.append({"images": images, "work_seconds": work, "seconds": spent, "written_bytes": written})
    return images / work


def startup_seconds(setup: Setup) -> float:
    """Seconds until a new worker has done a task without rows and exited."""
    start = time.perf_counter()
    with start_pool(1) as pool:
        for _, error in run_here([replace(setup.task, images=[], scales=[])], 1, lambda text: None, pool):
            if error:
                raise error
    return time.perf_counter() - start


def memory(setup: Setup, rows: int) -> dict[str, Any]:
    """Build a tree of `rows` rows, one in sixteen of full size, in its own process; watch it and its workers.

    Peaks in bytes, of the largest worker and the parent. USS leaves out what processes share, such as libraries.
    """
    tree = crowd(setup.images, setup.scratch / f"tree-{rows}", rows, mixed=True)
    peaks = dict.fromkeys(("worker_rss", "worker_uss", "parent_rss", "parent_uss"), 0)

    def watch(process: psutil.Process) -> None:
        for one in (process, *process.children()):
            with suppress(psutil.Error):  # it has just ended
                if one == process or "spawn_main" in " ".join(one.cmdline()):
                    who, used = "parent" if one == process else "worker", one.memory_full_info()
                    peaks[f"{who}_rss"] = max(peaks[f"{who}_rss"], used.rss)
                    peaks[f"{who}_uss"] = max(peaks[f"{who}_uss"], used.uss)

    with tempfile.TemporaryDirectory(dir=setup.scratch) as out:
        options = {"data": str(tree), "out": out, "scales": setup.scales, "workers": setup.workers, **SOURCE}
        start = time.perf_counter()
        try:
            in_own_process(build, options, watch=watch)
        except (RunError, MemoryError) as error:
            raise ShardError(f"the build of {rows:,} rows failed: {error}") from error
        spent = time.perf_counter() - start
    numbers = {"rows": rows, "full_size": -(-rows // FULL_SIZE), "workers": setup.workers}
    return {**numbers, **peaks, "seconds": spent}
