"""SIGKILL at random instants, to builds of real radiographs and to their workers: every finished set has the same bytes."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import numpy as np
import psutil
import pytest
from damage import contents
from sets import REAL, build, many

from cxrfast.shards.format.info import read_set
from cxrfast.shards.format.manifest import read_manifests
from cxrfast.shards.format.recipe import ImageRecipe
from cxrfast.shards.upkeep.verify import verify

KILLS = int(os.environ.get("CXRFAST_KILLS", "6"))
"""How many; 100 is the full measure, and from there on all the real radiographs are built, not 237 of them."""

SCALES = (64, 256, 512)


def start(tree: Path, out: Path) -> subprocess.Popen:
    asked = [word for scale in SCALES for word in ("--scale", str(scale))]
    return subprocess.Popen(
        [sys.executable, "-m", "cxrfast", "shard", "--data", tree, "--out", out, "--workers", "2", *asked],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def kill(child: subprocess.Popen, worker: bool) -> bool:
    """Kill the build or one of its workers; False if there was nothing to kill any more."""
    try:
        process = psutil.Process(child.pid)
        if worker:
            workers = [p for p in process.children() if "spawn_main" in " ".join(p.cmdline())]
            if not workers:
                return False
            process = random.choice(workers)
        process.send_signal(signal.SIGKILL)
    except psutil.NoSuchProcess:
        return False
    return True


def fingerprint(folder: Path) -> str:
    digest = sha256()
    for name, data in sorted(contents(folder).items()):
        digest.update(name.encode() + b"\0" + sha256(data).digest())
    return digest.hexdigest()


@pytest.fixture
def tree(real_tree: Path, tmp_path: Path) -> Path:
    if KILLS < 100:
        return real_tree
    subprocess.run([sys.executable, REAL / "make_mimic.py", tmp_path / "all"], check=True, capture_output=True)
    return tmp_path / "all"


@pytest.mark.slow
def test_every_set_that_survives_kills_at_random_instants_has_the_same_bytes(tree, tmp_path):
    rng = random.Random(KILLS)
    begin = time.monotonic()
    child = start(tree, tmp_path / "undisturbed")
    assert child.communicate()[1]
    assert child.returncode == 0
    usual = time.monotonic() - begin
    expected = fingerprint(tmp_path / "undisturbed")
    kills = {"build": 0, "worker": 0}
    finished = runs = 0
    out = tmp_path / "set"
    while sum(kills.values()) < KILLS or not finished:
        runs += 1
        child = start(tree, out)
        while child.poll() is None and sum(kills.values()) < KILLS:
            time.sleep(rng.uniform(0, usual))
            worker = rng.random() < 0.4
            if child.poll() is None and kill(child, worker):
                kills["worker" if worker else "build"] += 1
                if not worker:
                    break
        error = child.communicate()[1]
        if child.returncode == 0:
            assert fingerprint(out) == expected
            assert verify(out).problems == []
            rows = [row for m in read_manifests(out) if m.scale == SCALES[0] for row in m.rows]
            assert rows == sorted(set(rows)) == list(range(read_set(out).images)), "none lost, none doubled"
            shutil.rmtree(out)
            finished += 1
        else:
            assert child.returncode == -signal.SIGKILL or "died twice (SIGKILL)" in error, error
    print(f"{runs} runs, kills {kills}, {finished} sets finished, all {expected[:16]}")
    assert sum(kills.values()) >= KILLS


@pytest.mark.slow
def test_ctrl_c_ends_a_build_at_once_with_one_message_and_the_same_command_goes_on(real_tree, real_set, tmp_path):
    out = tmp_path / "set"
    command = [sys.executable, "-m", "cxrfast", "shard", "--data", real_tree, "--out", out, "--workers", "2"]
    child = subprocess.Popen(
        [*command, "--scale", "64", "--scale", "256", "--scale", "1024"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while child.poll() is None and not list(out.glob("1024/*.tmp")):
        time.sleep(0.002)
    os.killpg(child.pid, signal.SIGINT)
    error = child.communicate()[1]
    assert child.returncode == 130
    assert "Traceback" not in error
    assert error.endswith("cxrfast: interrupted; finished work is kept, run the same command to resume\n")
    assert not [name for name in contents(out) if name.endswith(".tmp") or name.startswith("lease")]
    build(real_tree, out, [64, 256, 1024], workers=1)
    assert contents(out) == contents(real_set)


def shard_command(data: Path, out: Path, scales: list[int], *options: str) -> list[str]:
    asked = [word for scale in scales for word in ("--scale", str(scale))]
    command = [sys.executable, "-m", "cxrfast", "shard", "--data", str(data), "--out", str(out), *asked]
    return [*command, "--workers", "2", *options]


def environment(mark: str) -> dict[str, str]:
    return {**os.environ, "CXRFAST_TEST": mark}


def kill_when(command: list[str], ready: Callable[[], bool], mark: str) -> bool:
    """Start the command and SIGKILL its process, and only that, as soon as `ready`. False if it ended before."""
    with subprocess.Popen(
        command, env=environment(mark), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as child:
        while child.poll() is None and not ready():
            time.sleep(0.001)
        child.kill()
    return child.returncode == -signal.SIGKILL


def marked(mark: str) -> list[psutil.Process]:
    """Living processes that were started with `mark` in their environment, by whomever."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("CXRFAST_TEST") == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return found


def has_bytes(path: Path) -> bool:
    try:
        return path.stat().st_size > 0
    except FileNotFoundError:  # renamed since it was listed
        return False


def all_end(mark: str) -> bool:
    end = time.monotonic() + 30
    while marked(mark) and time.monotonic() < end:
        time.sleep(0.05)
    return not marked(mark)


@pytest.mark.slow
@pytest.mark.parametrize("codec", ["jpeg", "raw"])
def test_a_killed_build_finishes_with_the_same_bytes(phantoms, tmp_path, codec):
    tree = many(tmp_path / "mimic", 8 * 64, sorted(phantoms.rglob("*.jpg"))[:40])
    out, scales, rng, mark = tmp_path / "set", [32, 320], np.random.default_rng(4), uuid.uuid4().hex
    build(tree, tmp_path / "undisturbed", scales, workers=2, recipe=ImageRecipe(codec=codec))
    command = shard_command(tree, out, scales, "--codec", codec)
    killed = 0
    for whole in (0, 1, 4, 7):  # of 16 tars; the run that follows meets the orphans of this one
        pause = rng.random() * 0.04

        def ready(whole: int = whole, pause: float = pause) -> bool:
            if len(list(out.glob("*/*.json"))) < whole or not any(map(has_bytes, out.glob("320/*.tmp"))):
                return False
            time.sleep(pause)
            return True

        killed += kill_when(command, ready, mark)
        assert not (out / "SHA256SUMS").exists()
    assert killed == 4
    done = subprocess.run(command, env=environment(mark), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert contents(out) == contents(tmp_path / "undisturbed")
    assert all_end(mark)


def test_workers_end_with_the_build_that_started_them(phantoms, tmp_path):
    out, mark = tmp_path / "set", uuid.uuid4().hex
    assert kill_when(shard_command(phantoms, out, [512]), lambda: any(out.glob("512/*.tmp")), mark)
    assert all_end(mark), [process.cmdline() for process in marked(mark)]
    before = contents(out)
    time.sleep(0.2)
    assert contents(out) == before
    assert not list(out.glob("512/*.json"))
