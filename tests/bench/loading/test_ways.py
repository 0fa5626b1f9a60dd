import json
import sys
import threading
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from bench_jobs import within_20_seconds
from commands import invoke

from cxrfast.bench.data import SOURCE, crowd
from cxrfast.bench.loading.job import Job, files, pixels
from cxrfast.bench.loading.ways import OURS, PEERS, WHAT, missing, peer_versions, pick_ways, typed
from cxrfast.pipelines.reader import Reader
from cxrfast.shards.build import build
from cxrfast.shards.images.decode import encode

pytestmark = pytest.mark.filterwarnings("ignore")  # other libraries may warn

QUICK = ("DataLoader, our kernels", "memmap")


def make_job(shards: Path, folder: Path, **changes: Any) -> Job:
    with Reader(shards, 64) as reader:
        rows = reader.rows
    given = {"folder": folder, "shards": shards, "scale": 64, "rows": rows, "batch": 16, "workers": 2, "turn": False}
    return Job(**given | changes)


@pytest.fixture(params=[pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in PEERS])
def peer(request):
    if missing([request.param]):
        pytest.skip(f"{request.param} is not installed")
    return PEERS[request.param]


@pytest.fixture(scope="module")
def halves(tmp_path_factory):
    """A set of 20 equal images of 64 px: grey level 200 on the left half, 100 on the right."""
    folder = tmp_path_factory.mktemp("halves")
    image = np.full((64, 64), 200, np.uint8)
    image[:, 32:] = 100
    (folder / "image.jpg").write_bytes(encode(image, 95))
    build(crowd([folder / "image.jpg"], folder / "tree", 20), folder / "set", [64], **SOURCE)
    return folder / "set"


def test_every_loader_gives_the_pixels_of_the_job_s_rows_and_leaves_nothing_running(peer, tiny_set, tmp_path):
    job = make_job(tiny_set, tmp_path, rows=np.arange(20, 60))
    wanted = np.stack(list(pixels(job))).astype(np.int16)
    tolerance = 16 if peer is PEERS["FFCV"] else 0  # it asks its decoder to be fast
    peer.prepare(job)
    threads, seen = set(threading.enumerate()), set[int]()
    for _ in range(2):  # it can be opened again
        with peer.batches(job) as supply:
            for batch in islice(supply, 500):
                images = np.asarray(batch)
                assert (images.dtype, len(images), images.size) == (np.uint8, 16, 16 * 64 * 64)
                for image in images.reshape(-1, 64, 64):
                    differences = abs(wanted - image).max(axis=(1, 2))
                    assert differences.min() <= tolerance
                    seen.add(int(differences.argmin()))
                if len(seen) == 40:
                    break
    assert seen == set(range(40))
    assert within_20_seconds(lambda: set(threading.enumerate()) <= threads), "queues of torch's DataLoader end late"
    assert within_20_seconds(lambda: not any(map(is_at_work, psutil.Process().children())))


def is_at_work(process: psutil.Process) -> bool:
    return process.status() != psutil.STATUS_ZOMBIE and "resource_tracker" not in " ".join(process.cmdline())


def test_every_loader_that_turns_images_flips_half_of_them_and_rotates_by_up_to_15_degrees(peer, halves, tmp_path):
    if not peer.turns:
        pytest.skip("it cannot rotate")
    job = make_job(halves, tmp_path, turn=True)
    peer.prepare(job)
    with peer.batches(job) as supply:
        images = np.concatenate([np.array(batch).reshape(-1, 64, 64) for batch in islice(supply, 16)])
    assert images.shape == (256, 64, 64)
    is_flipped = images[:, 32, 20] < 150
    assert 0.3 < is_flipped.mean() < 0.7
    # where the bright half ends, at two heights where nothing was rotated in from outside
    above, below = ((images[:, y, 16:48] > 150).sum(axis=1) for y in (16, 48))
    angles = np.degrees(np.arctan((below - above) / 32))
    assert -17 < angles.min() < -10
    assert 10 < angles.max() < 17
    assert abs(angles.mean()) < 3
    assert 6 < angles.std() < 12, "of uniform ones: 8.7"
    corners = images[:, [0, 0, -1, -1], [0, -1, 0, -1]]
    assert (corners[abs(angles) > 4] == 0).all()


def test_a_set_smaller_than_a_batch_is_loaded(peer, tiny_set, tmp_path):
    job = make_job(tiny_set, tmp_path, rows=np.arange(5))
    peer.prepare(job)
    with peer.batches(job) as supply:
        assert all(5 <= len(batch) <= 16 for batch in islice(supply, 3))


def test_a_library_that_is_not_installed_is_named_with_what_to_do(monkeypatch):
    for peer in PEERS.values():
        if peer.needs:
            monkeypatch.setitem(sys.modules, peer.needs, None)
    left_out = missing(PEERS)
    assert list(left_out) == [name for name, peer in PEERS.items() if peer.needs]
    assert "pip install 'cxrfast[bench]'" in left_out["LitData"]
    assert "libturbojpeg0-dev" in left_out["FFCV, raw"]


def test_ways_are_chosen_by_names_that_can_be_typed_and_those_that_ratios_need_stay():
    raw = ["host", "host, cache", "host, raw"]
    assert pick_ways(["limit", "host-raw"], True, 2) == ([*raw, "limit"], {})
    assert pick_ways(["memmap"], False, 2)[0] == ["host", "host, cache", "memmap"]
    assert pick_ways(["host-1-thread"], True, 1)[0] == ["host"], "which has one thread, too"
    ways, left_out = pick_ways([], False, 2)
    assert sorted([*ways, *left_out]) == sorted(OURS)
    assert typed("DALI's tar reader") == "dalis-tar-reader"


@pytest.mark.slow
def test_the_report_compares_with_those_that_are_there_and_names_the_others(tiny_set, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ffcv", None)
    options = (
        "--scale 32 --seconds 0.02 --rounds 1 --workers 2 --device cpu --only webdataset --only ffcv --only memmap"
    )
    out = str(tmp_path)
    done = invoke("bench", "load", "--shards", tiny_set, "--out", out, *options.split())
    assert done.exit_code == 0, (done.output, done.exception)
    result, text = json.loads((tmp_path / "load.json").read_text()), (tmp_path / "load.md").read_text()
    for task in "AB":
        rates = {line["way"]: line["rate"] for line in result["lines"] if line["task"] == task}
        assert rates.keys() == {"host", "host, cache", "webdataset", "memmap"}
        assert min(rates.values()) > 0
    assert {line["way"] for line in result["lines"] if line["pixels"]} == {"host, cache", "memmap"}
    assert result["left_out"].keys() == {"FFCV"}
    assert "Left out: FFCV (" in text
    assert f"| webdataset | {WHAT['webdataset']} |" in text


def test_all_versions_are_reported():
    assert {"webdataset", "litdata", "ffcv", "pillow"} < peer_versions().keys()
    assert peer_versions()["pillow"]


def test_files_are_written_once(tiny_set, tmp_path):
    job = make_job(tiny_set, tmp_path, rows=np.array([7, 3]))
    paths = files(job)
    with Reader(tiny_set, 64) as reader:
        assert [path.read_bytes() for path in paths] == [bytes(reader.read(row)) for row in (7, 3)]
    paths[0].write_bytes(b"")
    assert files(job) == paths
    assert paths[0].read_bytes() == b""
