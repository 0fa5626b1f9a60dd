"""What loading is compared with: which other loaders can be run here, and why those that cannot are left out."""

from collections.abc import Collection, Iterator
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from itertools import chain

from cxrfast.bench.loading import libraries, torch_loaders
from cxrfast.bench.loading.job import Peer, files

KERNELS = Peer(
    "torch's DataLoader over our reader, decoder and warp: whole batches, made in memory that its processes share",
    prepare=lambda job: None,
    batches=torch_loaders.over_kernels,
)

RING = KERNELS._replace(
    what="the same, but a batch lies in a ring of buffers that are made once, and is overwritten soon after the next one",
    batches=torch_loaders.over_ring,
)

PILLOW = Peer(
    'torch\'s DataLoader over files: Pillow open, convert("L"), torchvision RandomHorizontalFlip and RandomRotation',
    prepare=files,
    batches=torch_loaders.over_files,
)

MEMMAP = Peer(
    "one np.memmap of all images, indexed by batches of a permutation; turned by our warp in threads",
    prepare=torch_loaders.write_array,
    batches=torch_loaders.over_array,
    pixels=True,
)

WEBDATASET = Peer(
    'WebDataset(tars, resampled=True).shuffle(1000).decode(…, grey).map(…).batched(…) in a WebLoader; turned as "Pillow"',
    prepare=libraries.write_tars,
    batches=libraries.webdataset,
)

DALI_TARS = Peer(
    "fn.readers.webdataset(random_shuffle=True), decoders.image(GRAY), flip, rotate: on the CPU",
    prepare=libraries.write_tars,
    batches=libraries.dali_tars,
)

LITDATA = Peer(
    "StreamingDataset of JPEG bytes, torchvision decode_jpeg(GRAY), StreamingDataLoader; turned as Pillow",
    prepare=libraries.write_litdata,
    batches=libraries.litdata,
)

LITDATA_RAW = Peer(
    "StreamingDataset of arrays, StreamingDataLoader; turned as Pillow",
    prepare=libraries.write_litdata_raw,
    batches=libraries.litdata_raw,
    pixels=True,
)

STREAMING = Peer(
    "MDS shards of JPEGs (they come as Pillow images), torch's DataLoader; turned as Pillow",
    prepare=libraries.write_mds,
    batches=libraries.streaming,
)

SPDL = Peer(
    "PipelineBuilder: files, torchvision decode_jpeg(GRAY), batches in a pool of threads; turned as Pillow",
    prepare=files,
    batches=libraries.spdl,
)

FFCV = Peer(
    "Loader of a beton of JPEGs, os_cache, RANDOM; decodes to colour, in haste (up to 11 grey levels off), and cannot rotate",
    prepare=libraries.write_beton,
    batches=libraries.ffcv,
    turns=False,
)

FFCV_RAW = Peer(
    "Loader of a beton of grey arrays, os_cache, RANDOM; cannot rotate",
    prepare=libraries.write_beton_raw,
    batches=libraries.ffcv_raw,
    turns=False,
    pixels=True,
)

OURS: dict[str, Peer] = {
    "DataLoader, our kernels": KERNELS,
    "DataLoader, our kernels, ring": RING,
    "DataLoader, Pillow": PILLOW,
    "memmap": MEMMAP,
}
"""Those that need nothing that cxrfast does not need."""

LIBRARIES: dict[str, dict[str, Peer]] = {
    "webdataset": {"webdataset": WEBDATASET},
    "nvidia.dali": {"DALI's tar reader": DALI_TARS},
    "litdata": {"LitData": LITDATA, "LitData, raw": LITDATA_RAW},
    "streaming": {"Streaming": STREAMING},
    "spdl.pipeline": {"SPDL": SPDL},
    "ffcv": {"FFCV": FFCV, "FFCV, raw": FFCV_RAW},
}
"""By the module that they need."""

ADVICE = {
    "nvidia.dali": "pip install nvidia-dali-cuda120",
    "ffcv": "apt install g++ pkg-config libopencv-dev libturbojpeg0-dev, then pip install --no-deps ffcv numba",
}
"""How to install a library that is not in the `bench` extra; FFCV must be compiled, and would bring a second OpenCV."""

PACKAGES = ("webdataset", "litdata", "mosaicml-streaming", "spdl-core", "ffcv", "pillow", "simplejpeg")


def peer_names() -> list[str]:
    """All loaders, installed or not."""
    return [*OURS, *chain.from_iterable(LIBRARIES.values())]


def peers(names: Collection[str] | None = None) -> tuple[dict[str, Peer], dict[str, str]]:
    """Loaders by name, of these `names` or all; and those that cannot be run here, with the reason."""
    wanted = set(peer_names() if names is None else names)
    found, left_out = {name: peer for name, peer in OURS.items() if name in wanted}, dict[str, str]()
    for module, peers_of in LIBRARIES.items():
        ways = {name: peer for name, peer in peers_of.items() if name in wanted}
        if not ways:
            continue
        try:
            import_module(module)
        except (ImportError, OSError) as error:  # OSError: the Python package without a library that it loads
            advice = ADVICE.get(module, "pip install 'cxrfast[bench]'")
            left_out |= {name: f"{error}: {advice}" for name in ways}
        else:
            found |= ways
    return found, left_out


def peer_versions() -> dict[str, str | None]:
    return dict(_versions())


def _versions() -> Iterator[tuple[str, str | None]]:
    for package in PACKAGES:
        try:
            yield package, version(package)
        except PackageNotFoundError:
            yield package, None
