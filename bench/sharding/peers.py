"""What sharding is compared with: how radiographs are usually resized, and the codec's own limit.

Each peer writes an image at every scale, as a JPEG of quality 95 in a file of its own. Nothing is synced.
"""

from collections.abc import Callable
from pathlib import Path

import PIL
import simplejpeg
from PIL import Image

from cxrfast.bench.harness import missing_library
from cxrfast.shards.images.decode import encode
from cxrfast.shards.images.resize import at_scales

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
