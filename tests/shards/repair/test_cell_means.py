import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from damage import contents, copy_set, flip_bit, image_bytes, replace_image, without_grids

from cxrfast.pipelines.reader import Reader
from cxrfast.shards.format.manifest import read_manifests
from cxrfast.shards.format.names import shard_path
from cxrfast.shards.images.cell_means import STEPS, tolerance
from cxrfast.shards.repair.repair import repair
from cxrfast.shards.storage import Tree
from cxrfast.shards.upkeep.verify import verify

KILLS = int(os.environ.get("CXRFAST_KILLS", "6"))


@pytest.fixture
def old(tiny_set: Path, tmp_path: Path) -> Path:
    """The tiny set as it was built before there were grids."""
    return without_grids(copy_set(tiny_set, tmp_path / "old"))


def grids(folder: Path, scale: int) -> np.ndarray:
    with Reader(folder, scale) as reader:
        return reader.grids.astype(int)


def test_an_old_set_gets_the_grids_of_its_decoded_images_and_nothing_else_changes(old, tiny_set, raw_set, tmp_path):
    raw = without_grids(copy_set(raw_set, tmp_path / "raw"), [(32, 0), (64, 2)])
    repair(raw)
    assert contents(raw) == contents(raw_set), "those of raw images are the very ones"
    before = contents(old)
    work = repair(old)
    assert work.lines() == [f"repaired: {scale}/: grids added to 3 manifests" for scale in (32, 64)]
    after = contents(old)
    changed = {name for name in before if after[name] != before[name]}
    assert changed == {"SHA256SUMS", *(f"{scale}/00000{n}.json" for scale in (32, 64) for n in range(3))}
    assert verify(old, deep=True).problems == []
    for scale in (32, 64):
        off = np.abs(grids(old, scale) - grids(tiny_set, scale)).max()
        assert 0 < off < STEPS * tolerance("jpeg", 95, scale)
    assert repair(old).lines() == []
    assert contents(old) == after


@pytest.mark.parametrize("suffix", ["tar", "idx", "json"])
def test_a_damaged_old_set_is_repaired_first_or_keeps_its_manifests(old, phantoms, tmp_path, suffix):
    whole = copy_set(old, tmp_path / "whole")
    repair(whole)
    flip_bit(shard_path(old, 64, 1, suffix), 60)
    if suffix == "tar":
        before = contents(old)
        assert list(repair(old).failed) == ["64/000001.tar"]
        assert contents(old) == before
    work = repair(old, Tree(phantoms) if suffix == "tar" else None, workers=1)
    assert contents(old) == contents(whole)
    assert [problem.path for problem in work.done] == [f"64/000001.{suffix}", "32/", "64/"]


def test_an_image_that_cannot_be_decoded_is_named_and_the_other_shards_get_their_grids(old):
    replace_image(old, 32, 70, image_bytes(old, 32, 70)[:300])
    failed = repair(old).failed
    assert list(failed) == ["32/000001.json"]
    assert "row 70 in" in failed["32/000001.json"]
    assert "32/000001.tar is truncated: restore the tar" in failed["32/000001.json"]
    assert [(m.scale, m.shard) for m in read_manifests(old) if m.lacks_grids] == [(32, 1)]
    assert verify(old).problems == []


def test_a_repair_killed_between_a_manifest_and_its_line_is_finished_by_the_same_command(old, tmp_path):
    whole = copy_set(old, tmp_path / "whole")
    repair(whole)
    shutil.copy(shard_path(whole, 64, 1, "json"), shard_path(old, 64, 1, "json"))
    assert verify(old).problems
    repair(old)
    assert contents(old) == contents(whole)


@pytest.mark.slow
def test_a_repair_that_is_killed_while_it_adds_grids_is_finished_by_the_same_command(real_set, tmp_path):
    start = without_grids(copy_set(real_set, tmp_path / "start"))
    whole = copy_set(start, tmp_path / "whole")
    begin = time.monotonic()
    assert run(whole).wait() == 0
    usual = time.monotonic() - begin
    rng, runs, kills, between = random.Random(KILLS), 0, 0, 0
    while kills < KILLS:
        runs += 1
        folder = copy_set(start, tmp_path / f"set-{runs}")
        child = run(folder)
        while child.poll() is None and all(m.lacks_grids for m in read_manifests(folder)):
            time.sleep(0.001)
        time.sleep(rng.uniform(0, usual / 20))
        child.kill()
        if child.wait() == -signal.SIGKILL:
            kills += 1
            between += bool(verify(folder).problems)
        assert run(folder).wait() == 0
        assert contents(folder) == contents(whole)
    print(f"{runs} runs, {kills} kills, {between} of them between a manifest and its line")


def run(folder: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "cxrfast", "verify", "--repair", folder],
        env={**os.environ, "CXRFAST_DATA": "nowhere"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
