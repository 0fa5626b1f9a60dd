"""Damaged files by the thousand, decoded in a process of their own: each becomes pixels or a BadImage, in bounded time and memory."""

import os
import pickle
import sys
import tarfile
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest
from commands import run
from dicoms import baseline, jpeg_2000, lossless, lut, radiograph, rle, written
from mutator import damaged
from pictures import saved, smooth
from PIL import Image
from sets import REAL

from cxrfast.shards.images.decode import decode, encode

MUTATIONS = int(os.environ.get("CXRFAST_MUTATIONS", "10000"))
MEMORY = 1024
"""MiB a process may hold at its peak, libraries included."""
TESTS = Path(__file__).parents[2]


def made() -> list[bytes]:
    """Files of each kind that no real files cover."""
    shapes = smooth(160, 120, 4)
    grey = shapes[:, :, 0]
    deep = grey.astype(np.uint16) * 16 + np.random.default_rng(1).integers(0, 16, grey.shape, np.uint16)
    exif = Image.Exif()
    exif[0x0112] = 6
    jpegs = [
        encode(grey, 95),
        saved(Image.fromarray(grey), progressive=True, exif=exif),
        saved(Image.fromarray(shapes[:, :, :3]), subsampling=2, exif=exif),
        saved(Image.fromarray(shapes[:, :, :3]), progressive=True, restart_marker_rows=2),
        saved(Image.fromarray(shapes, "CMYK")),
    ]
    pngs = [
        saved(Image.fromarray(grey), "PNG"),
        saved(Image.fromarray(shapes), "PNG"),
        saved(Image.fromarray(shapes[:, :, :3]).quantize(200), "PNG"),
        cv2.imencode(".png", cv2.merge([deep, deep, deep]))[1].tobytes(),
    ]
    dicoms = [radiograph(deep, 12), baseline(grey), lossless(deep, 12), jpeg_2000(deep, 12), rle(deep, 12)]
    windowed = radiograph(
        deep, 12, PixelPaddingValue=0, WindowCenter="2000", WindowWidth="1500", VOILUTFunction="SIGMOID"
    )
    looked_up = radiograph(
        deep, 12, VOILUTSequence=lut([*range(300)], 100, 10), ModalityLUTSequence=lut([*range(4096)], 0, 12)
    )
    bare = written(windowed)[132:]
    return [*jpegs * 4, *pngs, *map(written, [*dicoms, windowed, looked_up]), bare, bare]


def real() -> list[bytes]:
    """Small real files, mostly JPEGs; none where the folder is not at hand."""
    files = []
    for name, limit in (("kermany224.tar", 10**5), ("odd.tar", 250_000)):
        if (REAL / name).exists():
            with tarfile.open(REAL / name) as tar:
                members = [member for member in tar if member.isfile() and member.size < limit][:12]
                files += [tar.extractfile(member).read() for member in members]
    return files + [path.read_bytes() for folder in ("single", "dicom") for path in sorted((REAL / folder).glob("*"))]


def outcomes(files: list[bytes], last: int, folder: Path) -> Counter[str]:
    """Outcomes of the seeds below `last`, and the process's `peak` of memory, MiB. Fails where an image hangs or kills it."""
    held = folder / "files.pickle"
    held.write_bytes(pickle.dumps(files))
    done = run(sys.executable, TESTS / "support" / "mutator.py", held, last, timeout=None)
    lines = done.stdout.splitlines()
    seed = next((line for line in reversed(lines) if line.startswith("seed")), "before the first seed")
    assert done.returncode == 0, f"{seed}: exit status {done.returncode} (-14: it hangs)\n{done.stderr}"
    assert not done.stderr, f"a library wrote to stderr\n{done.stderr}"
    found = Counter(line for line in lines if not line.startswith(("seed", "peak")))
    return found + Counter(peak=int(lines[-1].removeprefix("peak ")))


def test_the_files_decode_before_they_are_damaged_and_a_seed_names_its_damage():
    files = made()
    for data in files:
        assert decode(data, "window").dtype == np.uint8
    assert damaged(files, 7) == damaged(files, 7)
    assert len({damaged(files, seed) for seed in range(50)}) > 45


@pytest.mark.parametrize("mutations", [300, pytest.param(MUTATIONS, marks=pytest.mark.slow)])
def test_a_damaged_file_becomes_pixels_or_a_bad_image_and_nothing_else(mutations, tmp_path):
    found = outcomes(made() + (real() if mutations > 300 else []), mutations, tmp_path)
    peak = found.pop("peak")
    print(f"{mutations} mutations, peak {peak} MiB:", *(f"{kind}: {n}" for kind, n in found.most_common()), sep="\n  ")
    assert found.total() == mutations
    assert found["decoded"] > mutations / 20
    assert {"refused truncated", "refused corrupt", "refused unsupported format"} <= found.keys()
    assert peak < MEMORY


def test_a_process_that_dies_fails_the_test_and_says_where(tmp_path):
    with pytest.raises(AssertionError, match="before the first seed: exit status 1"):
        outcomes([], 1, tmp_path)
