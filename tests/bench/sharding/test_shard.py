import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner

from cxrfast.bench.harness import one_core
from cxrfast.bench.sharding.measure import memory, prepare
from cxrfast.bench.sharding.peers import QUALITY, kernels, peers
from cxrfast.bench.training import step
from cxrfast.bench.trees import FULL_SIZE, SOURCE, crowd, sample
from cxrfast.cli.main import cli
from cxrfast.errors import LoadError, ShardError
from cxrfast.phantoms.dataset import synth
from cxrfast.shards.building.layout import assign_rows
from cxrfast.shards.images.decode import decode, encode
from cxrfast.shards.images.jpeg import decode_grey
from cxrfast.shards.images.resize import at_scales
from cxrfast.shards.sources.read import read_source
from cxrfast.shards.storage import Tree


@pytest.fixture(scope="module")
def measured(phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a small run's results, and what it printed."""
    out = tmp_path_factory.mktemp("bench") / "results"
    options = "--images 3 --scale 64 --scale 32 --seconds 0.05 --rounds 1 --workers 2"
    done = CliRunner().invoke(cli, ["bench", "shard", "--data", str(phantoms), "--out", str(out), *options.split()])
    assert done.exit_code == 0, (done.output, done.exception)
    return out, done.stdout


@pytest.fixture
def result(measured: tuple[Path, str]) -> dict[str, Any]:
    return json.loads((measured[0] / "shard.json").read_text())


def test_a_tree_that_is_not_there_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    out = tmp_path / "results"
    done = CliRunner().invoke(cli, ["bench", "shard", "--data", str(tmp_path / "none"), "--out", str(out)])
    assert (done.exit_code, out.exists()) == (2, False)
    assert f"{tmp_path / 'none'} does not exist" in done.stderr


def test_every_way_has_a_rate_and_a_ratio_to_ours(result: dict[str, Any]) -> None:
    rates, ratios = result["rates"], result["ratios"]
    assert list(rates) == ["ours", "pillow_rgb", "pillow_grey", "libvips", "kernels"]
    assert all(0 < rate < 1e6 for rate in rates.values())
    assert ratios == {name: pytest.approx(rates["ours"] / rate) for name, rate in rates.items() if name != "ours"}
    assert {name: rounds for name, rounds in result["rounds"].items() if name in rates} == {
        name: [rate] for name, rate in rates.items()
    }
    assert result["left_out"] == {}
    assert (result["images"], result["scales"]) == (3, [32, 64])


def test_the_stages_add_up_to_an_image_s_time(result: dict[str, Any]) -> None:
    assert list(result["stages"]) == ["read", "decode", "resize", "encode", "tar, hash", "sync", "rest"]
    assert min(result["stages"].values()) > 0
    assert sum(result["stages"].values()) == pytest.approx(1e3 / result["rates"]["ours"])


def test_builds_are_compared_with_one_worker_s(result: dict[str, Any]) -> None:
    one, two = result["builds"]
    assert [one["workers"], two["workers"], one["ratio"]] == [1, 2, 1.0]
    assert two["ratio"] == pytest.approx(two["rate"] / one["rate"])
    assert two["images"] == 2 * one["images"], "as many shards for each worker"
    for builds in (one, two):
        assert builds["rate"] == pytest.approx(builds["images"] / builds["work_seconds"])
        assert 0 < builds["work_seconds"] < builds["seconds"]
    assert result["startup_seconds"] > 0


def test_what_is_computed_follows_from_what_was_measured(result: dict[str, Any]) -> None:
    for line in result["computed"]:
        assert line["rate"] == pytest.approx(line["cores"] * result["builds"][-1]["rate"] / 2)
        assert line["hours"] == pytest.approx(377_110 / line["rate"] / 3600)
        assert line["read_mb"] == pytest.approx(line["rate"] * result["mean_bytes"] / 1e6)
        assert line["written_mb"] == pytest.approx(line["rate"] * result["written_bytes"] / 1e6)
    assert [line["cores"] for line in result["computed"]] == [2, 16, 128]


def test_table_and_plot_say_the_same(measured: tuple[Path, str], result: dict[str, Any]) -> None:
    out, printed = measured
    text = (out / "shard.md").read_text()
    for name, rate in result["rates"].items():
        assert f"| {name} | {rate:,.1f} | " in text
        assert re.search(rf"│ {name} +│ +{re.escape(f'{rate:,.1f}')} │", printed)
    assert "Computed, not measured" in text
    assert f"- libvips: {result['provenance']['libvips']}" in text
    assert str(Path.home()) not in text
    assert (out / "shard.png").read_bytes()[:4] == b"\x89PNG"
    assert sorted(path.name for path in out.iterdir()) == ["shard.json", "shard.md", "shard.png"]


def test_all_ways_write_the_same_pictures(tmp_path: Path) -> None:
    synth(tmp_path / "mimic", images=1, size=3056, workers=1)
    [path] = sample(Tree(tmp_path / "mimic"), tmp_path, 1)
    ways, _ = peers()
    assert set(ways) == {"pillow_rgb", "pillow_grey", "libvips"}
    for scales in ([256, 512, 1024, 2048], [64]):  # 64: draft and thumbnail decode at an eighth
        wanted = {
            scale: encode(x, QUALITY) for scale, x in at_scales(decode(path.read_bytes(), "none"), scales).items()
        }
        for name, peer in ways.items():
            folder = tmp_path / f"{name}-{len(scales)}"
            for scale in scales:
                (folder / str(scale)).mkdir(parents=True)
            peer(path, scales, folder)
            assert len(list(folder.rglob("*.jpg"))) == len(scales)
            for scale in scales:
                there, ours = decode_grey((folder / str(scale) / path.name).read_bytes()), decode_grey(wanted[scale])
                assert there.shape == ours.shape == (scale, scale)
                error = np.mean((there.astype(np.float64) - ours) ** 2)
                assert 10 * np.log10(255**2 / error) > 35, (name, scale)
    assert kernels([path.read_bytes()] * 3, [64]) == 3


def test_without_libvips_the_others_are_compared_with_and_the_reason_is_given() -> None:
    code = "import sys; sys.modules['pyvips'] = None; from cxrfast.bench.sharding.peers import *; print(*map(list, peers())); print(peers())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("['pillow_rgb', 'pillow_grey'] ['libvips']")
    assert "pip install 'cxrfast[bench]'" in done.stdout


def test_only_sound_images_are_taken_from_a_tree(tmp_path: Path) -> None:
    synth(tmp_path / "mimic", images=6, size=64, corrupt=3, workers=1)
    (tmp_path / "found").mkdir()
    found = sample(Tree(tmp_path / "mimic"), tmp_path / "found", 5)
    originals = {path.read_bytes() for path in (tmp_path / "mimic").rglob("*.jpg")}
    assert len({path.read_bytes() for path in found} & originals) == len(found) == 3


def test_a_tree_without_a_sound_image_is_refused(tmp_path: Path) -> None:
    synth(tmp_path / "mimic", images=3, size=64, corrupt=3, workers=1)
    with pytest.raises(ShardError, match=r"none of the 3 images .* is a sound JPEG"):
        sample(Tree(tmp_path / "mimic"), tmp_path, 3)


@pytest.mark.parametrize("rows", [64, 100, 1000])
def test_every_shard_of_a_mixed_tree_holds_images_of_full_size(rows: int, tmp_path: Path) -> None:
    synth(tmp_path / "mimic", images=2, size=64, workers=1)
    images = sample(Tree(tmp_path / "mimic"), tmp_path, 2)
    tree = Tree(crowd(images, tmp_path / "tree", rows, mixed=True))
    source = read_source(SOURCE["source"], tree, SOURCE["source_options"])
    planned = assign_rows(source.images, source.labels, 0)
    is_full = pd.Series(tree.sizes(planned["path"].tolist())).isin([path.stat().st_size for path in images])
    assert np.flatnonzero(is_full).tolist() == list(range(0, rows, FULL_SIZE))


def test_the_memory_of_a_build_and_of_its_workers_is_seen(phantoms: Path, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    images = sample(Tree(phantoms), tmp_path / "images", 2)
    used = memory(prepare(tmp_path, images, [64], 0.01, 1), 64)
    assert (used.rows, used.full_size, used.workers) == (64, 4, 1)
    for rss, uss in ((used.worker_rss, used.worker_uss), (used.parent_rss, used.parent_uss)):
        assert 2**23 < uss <= rss < 2**32, "a process with numpy and OpenCV in it"


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system binds no process to a core")
def test_one_core_is_held_and_given_back() -> None:
    before = os.sched_getaffinity(0)
    with pytest.raises(ZeroDivisionError), one_core():
        assert len(os.sched_getaffinity(0)) == 1
        assert os.sched_getaffinity(0) <= before
        raise ZeroDivisionError
    assert os.sched_getaffinity(0) == before


def test_bench_alone_measures_steps_in_two_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []

    def stand_in(*arguments: Any, **options: Any) -> None:  # the real one takes minutes with its defaults
        given.append((arguments, options))
        raise LoadError("seen")

    monkeypatch.setattr(step, "bench", stand_in)
    runner = CliRunner()
    for words in (["bench"], ["bench", "--full"], ["bench", "step"]):
        assert runner.invoke(cli, words).exit_code == 2
    alone, full, steps = given
    assert full == steps
    assert alone == (steps[0], steps[1] | {"minutes": 2.0})
    assert alone[0] == (None, [], Path("bench-results"))
