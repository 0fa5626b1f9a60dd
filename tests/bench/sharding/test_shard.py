import json
import re
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from commands import invoke

from cxrfast.bench.data import FULL_SIZE, SOURCE, crowd, sample
from cxrfast.bench.sharding.measure import (
    QUALITY,
    Notes,
    Setup,
    kernels,
    measurements,
    memory,
    peer_versions,
    peers,
    prepare,
)
from cxrfast.bench.sharding.shard import _compute
from cxrfast.errors import ShardError
from cxrfast.phantoms.dataset import synth
from cxrfast.shards.building.layout import assign_rows
from cxrfast.shards.images.decode import decode, encode
from cxrfast.shards.images.jpeg import decode_grey
from cxrfast.shards.images.resize import at_scales
from cxrfast.shards.sources.read import read_source
from cxrfast.shards.storage import Tree


@pytest.fixture(scope="module")
def setup(phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> Setup:
    """Two phantoms to be measured at 32 and 64 px."""
    folder = tmp_path_factory.mktemp("setup")
    (folder / "images").mkdir()
    return prepare(folder, sample(Tree(phantoms), folder / "images", 2), [32, 64], 0.01, 1)


def test_a_tree_that_is_not_there_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    out = tmp_path / "results"
    done = invoke("bench", "shard", "--data", tmp_path / "none", "--out", out)
    assert (done.exit_code, out.exists()) == (2, False)
    assert f"{tmp_path / 'none'} does not exist" in done.stderr


@pytest.mark.slow
def test_a_run_measures_every_way_and_whole_builds_and_reports_them(phantoms: Path, tmp_path: Path) -> None:
    options = "--images 3 --scale 64 --scale 32 --seconds 0.05 --rounds 1 --workers 2"
    done = invoke("bench", "shard", "--data", phantoms, "--out", tmp_path, *options.split())
    assert done.exit_code == 0, (done.output, done.exception)
    result, text = json.loads((tmp_path / "shard.json").read_text()), (tmp_path / "shard.md").read_text()
    rates, ratios = result["rates"], result["ratios"]
    assert list(rates) == ["ours", "pillow_rgb", "pillow_grey", "libvips", "kernels"]
    assert all(0 < rate < 1e6 for rate in rates.values())
    assert ratios == {name: pytest.approx(rates["ours"] / rate) for name, rate in rates.items() if name != "ours"}
    assert {name: result["rounds"][name] for name in rates} == {name: [rate] for name, rate in rates.items()}
    assert sum(result["stages"].values()) == pytest.approx(1e3 / rates["ours"])
    assert (result["images"], result["scales"], result["left_out"]) == (3, [32, 64], {})
    one, two = result["builds"]
    assert [one["workers"], two["workers"], one["ratio"]] == [1, 2, 1.0]
    assert two["ratio"] == pytest.approx(two["rate"] / one["rate"])
    assert two["images"] == 2 * one["images"], "as many shards per worker"
    for builds in (one, two):
        assert builds["rate"] == pytest.approx(builds["images"] / builds["work_seconds"])
        assert 0 < builds["work_seconds"] < builds["seconds"]
    assert result["startup_seconds"] > 0
    for name, rate in rates.items():
        assert f"| {name} | {rate:,.1f} | " in text
        assert re.search(rf"\b{name} +{re.escape(f'{rate:,.1f}')} ", done.stdout)
    assert f"- libvips: {result['provenance']['libvips']}" in text
    assert str(Path.home()) not in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["shard.json", "shard.md", "shard.png"]


def test_the_stages_add_up_to_the_time_of_an_image(setup: Setup) -> None:
    notes: Notes = {}
    rate = measurements(setup, {}, notes)["ours"](0.01)
    [stages] = notes["ours"]
    assert list(stages) == ["read", "decode", "resize", "encode", "tar, hash", "sync", "rest"]
    assert min(stages.values()) > 0
    assert sum(stages.values()) == pytest.approx(1e3 / rate)


def test_what_is_computed_follows_from_what_was_measured() -> None:
    found = _compute({"workers": 2, "rate": 50.0}, 16, read=2e6, written=1e6)
    hours = pytest.approx(377_110 / 400 / 3600)
    assert found == {"cores": 16, "rate": 400, "hours": hours, "read_mb": 800, "written_mb": 400}


def test_all_ways_write_the_same_pictures(tmp_path: Path) -> None:
    synth(tmp_path / "mimic", images=1, size=3056, workers=1)
    [path] = sample(Tree(tmp_path / "mimic"), tmp_path, 1)
    ways, _ = peers()
    assert set(ways) == {"pillow_rgb", "pillow_grey", "libvips"}
    for scales in ([256, 512, 1024, 2048], [64]):  # 64: draft and thumbnail decode at an eighth
        resized = at_scales(decode(path.read_bytes(), "none"), scales)
        for name, peer in ways.items():
            folder = tmp_path / f"{name}-{len(scales)}"
            for scale in scales:
                (folder / str(scale)).mkdir(parents=True)
            peer(path, scales, folder)
            assert len(list(folder.rglob("*.jpg"))) == len(scales)
            for scale in scales:
                there = decode_grey((folder / str(scale) / path.name).read_bytes())
                ours = decode_grey(encode(resized[scale], QUALITY))
                assert there.shape == ours.shape == (scale, scale)
                error = np.mean((there.astype(np.float64) - ours) ** 2)
                assert 10 * np.log10(255**2 / error) > 35, (name, scale)
    assert kernels([path.read_bytes()] * 3, [64]) == 3


def test_without_libvips_the_reason_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyvips", None)
    found, left_out = peers()
    assert list(found) == ["pillow_rgb", "pillow_grey"]
    assert "pip install 'cxrfast[bench]'" in left_out["libvips"]
    assert peer_versions()["libvips"] is None


def test_only_sound_images_are_taken_from_a_tree_and_one_without_any_is_refused(tmp_path: Path) -> None:
    synth(tmp_path / "mimic", images=6, size=64, corrupt=3, workers=1)
    (tmp_path / "found").mkdir()
    found = sample(Tree(tmp_path / "mimic"), tmp_path / "found", 5)
    jpegs = {path.read_bytes(): path for path in (tmp_path / "mimic").rglob("*.jpg")}
    sound = {path.read_bytes() for path in found} & jpegs.keys()
    assert len(sound) == len(found) == 3
    for data in sound:
        jpegs[data].write_bytes(b"")
    with pytest.raises(ShardError, match=r"none of the 6 images .* is a sound JPEG"):
        sample(Tree(tmp_path / "mimic"), tmp_path, 3)


@pytest.mark.parametrize("rows", [100, 1000])
def test_every_shard_of_a_mixed_tree_holds_images_of_full_size(rows: int, tmp_path: Path) -> None:
    synth(tmp_path / "mimic", images=2, size=64, workers=1)
    images = sample(Tree(tmp_path / "mimic"), tmp_path, 2)
    tree = Tree(crowd(images, tmp_path / "tree", rows, mixed=True))
    source = read_source(SOURCE["source"], tree, SOURCE["source_options"])
    planned = assign_rows(source.images, source.labels, 0)
    is_full = pd.Series(tree.sizes(planned["path"].tolist())).isin([path.stat().st_size for path in images])
    assert np.flatnonzero(is_full).tolist() == list(range(0, rows, FULL_SIZE))


@pytest.mark.slow
def test_the_memory_of_a_build_and_of_its_workers_is_seen(setup: Setup) -> None:
    used = memory(setup, 64)
    assert (used["rows"], used["full_size"], used["workers"]) == (64, 4, 1)
    for who in ("worker", "parent"):
        assert 2**23 < used[f"{who}_uss"] <= used[f"{who}_rss"] < 2**32, "a process with numpy and OpenCV in it"
