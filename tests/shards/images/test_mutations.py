"""Thousands of damaged files, decoded in processes of their own: each becomes pixels or a BadImage, soon and within bounds."""

import io
import os
import pickle
import subprocess
import sys
import tarfile
import threading
from collections import Counter
from pathlib import Path
from queue import Empty, Queue

import cv2
import numpy as np
import pytest
from dicoms import baseline, jpeg_2000, lossless, radiograph, rle, written
from mutator import damaged
from PIL import Image
from sets import REAL

from cxrfast.shards.images.decode import decode, encode

MUTATIONS = int(os.environ.get("CXRFAST_MUTATIONS", "600"))
DEADLINE = 30
"""Seconds for one image; a machine that is busy may take a hundred times as long as a free one."""
MEMORY = 1024
"""MiB a process may hold at its peak, libraries included."""
TESTS = Path(__file__).parents[2]


def saved(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def made() -> list[bytes]:
    """Files of each kind that there are no real ones of."""
    rng = np.random.default_rng(1)
    shapes = cv2.GaussianBlur(rng.integers(0, 256, (160, 120, 4), np.uint8), (0, 0), 4)
    shapes = cv2.normalize(shapes, None, 0, 255, cv2.NORM_MINMAX)
    grey = shapes[:, :, 0]
    deep = grey.astype(np.uint16) * 16 + rng.integers(0, 16, grey.shape, np.uint16)
    exif = Image.Exif()
    exif[0x0112] = 6
    jpegs = [
        encode(grey, 95),
        saved(Image.fromarray(grey), "JPEG", progressive=True, exif=exif),
        saved(Image.fromarray(shapes[:, :, :3]), "JPEG", subsampling=2, exif=exif),
        saved(Image.fromarray(shapes[:, :, :3]), "JPEG", progressive=True, restart_marker_rows=2),
        saved(Image.fromarray(shapes, "CMYK"), "JPEG"),
    ]
    pngs = [
        saved(Image.fromarray(grey), "PNG"),
        saved(Image.fromarray(shapes), "PNG"),
        saved(Image.fromarray(shapes[:, :, :3]).quantize(200), "PNG"),
        cv2.imencode(".png", cv2.merge([deep, deep, deep]))[1].tobytes(),
    ]
    dicoms = [radiograph(deep, 12), baseline(grey), lossless(deep, 12), jpeg_2000(deep, 12), rle(deep, 12)]
    return [*jpegs * 4, *pngs, *map(written, dicoms)]


def real() -> list[bytes]:
    """Small ones, mostly JPEGs; none where the folder is not here."""
    files = []
    for name, limit in (("kermany224.tar", 10**5), ("odd.tar", 250_000)):
        if (REAL / name).exists():
            with tarfile.open(REAL / name) as tar:
                members = [member for member in tar if member.isfile() and member.size < limit][:12]
                files += [tar.extractfile(member).read() for member in members]
    return files + [path.read_bytes() for folder in ("single", "dicom") for path in sorted((REAL / folder).glob("*"))]


@pytest.fixture(scope="module")
def files() -> list[bytes]:
    return made() + real()


def run(files: list[bytes], first: int, last: int, folder: Path) -> Counter[str]:
    """What became of each seed, from a process that decodes them; also its `peak` of memory, MiB. Fails where it hangs or dies."""
    held = folder / "files.pickle"
    held.write_bytes(pickle.dumps(files))
    root = TESTS.parent
    process = subprocess.Popen(
        [sys.executable, TESTS / "support" / "mutator.py", held, str(first), str(last)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    lines: Queue[str | None] = Queue()
    errors: list[str] = []

    def read() -> None:
        for line in process.stdout:
            lines.put(line.strip())
        lines.put(None)

    readers = [threading.Thread(target=read), threading.Thread(target=lambda: errors.append(process.stderr.read()))]
    for reader in readers:
        reader.start()
    found: Counter[str] = Counter()
    seed = "before the first seed"
    try:
        while (line := lines.get(timeout=DEADLINE)) is not None:
            if line.startswith("seed"):
                seed = line
            elif line.startswith("peak"):
                found["peak"] = int(line.split()[1])
            else:
                found[line] += 1
        process.wait()
    except Empty:
        pytest.fail(f"{seed} hangs")
    finally:
        process.kill()
        process.wait()
        for reader in readers:
            reader.join()
        process.stdout.close()
        process.stderr.close()
    assert process.returncode == 0, f"{seed}: exit status {process.returncode}\n{errors[0]}"
    assert not errors[0], f"{seed}: a library wrote to stderr\n{errors[0]}"
    return found


def test_what_is_mutated_is_sound_before(files):
    for data in files:
        assert decode(data, "window").dtype == np.uint8


def test_a_seed_names_its_damaged_file(files):
    assert damaged(files, 7) == damaged(files, 7)
    assert len({damaged(files, seed) for seed in range(50)}) > 45


def test_a_damaged_file_becomes_pixels_or_a_bad_image_and_nothing_else(files, tmp_path):
    found = run(files, 0, MUTATIONS, tmp_path)
    peak = found.pop("peak")
    print(f"{MUTATIONS} mutations, peak {peak} MiB:", *(f"{kind}: {n}" for kind, n in found.most_common()), sep="\n  ")
    assert found.total() == MUTATIONS
    assert found["decoded"] > MUTATIONS / 20
    assert {"refused truncated", "refused corrupt", "refused unsupported format"} <= found.keys()
    assert peak < MEMORY


def test_a_process_that_dies_fails_the_test_and_says_where(tmp_path):
    with pytest.raises(AssertionError, match="exit status 1"):
        run([], 0, 1, tmp_path)
