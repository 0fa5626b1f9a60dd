import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from cxrfast.bench.load_measure import LongOrder, large
from cxrfast.bench.trees import tiny_images, uncompressed
from cxrfast.cli import cli
from cxrfast.pipelines import dali
from cxrfast.pipelines.order import TrainOrder
from cxrfast.pipelines.pixels import Pixels
from cxrfast.pipelines.reader import Reader

QUICK = ["--seconds", "0.05", "--rounds", "1", "--no-peers", "--device", "cpu", "--workers", "2"]


def run(*arguments: object) -> Any:
    return CliRunner().invoke(cli, ["bench", "load", *map(str, arguments)])


@pytest.fixture(scope="module")
def measured(tiny_set: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a small run's results, and what it printed."""
    out = tmp_path_factory.mktemp("bench") / "results"
    more = ["--engines"] if dali.available() else []
    done = run("--shards", tiny_set, "--out", out, "--scale", 32, "--scale", 64, "--cold", *more, *QUICK)
    assert done.exit_code == 0, (done.output, done.exception)
    return out, done.stdout


@pytest.fixture
def result(measured: tuple[Path, str]) -> dict[str, Any]:
    return json.loads((measured[0] / "load.json").read_text())


def test_every_way_has_a_rate_at_every_scale_for_both_tasks(result: dict[str, Any]) -> None:
    ways = {"host", "host, 1 thread", "host, cache", "host, raw", "limit"} | ({"dali"} if dali.available() else set())
    for scale in (32, 64):
        for task in "AB":
            lines = {line["way"]: line for line in result["lines"] if (line["scale"], line["task"]) == (scale, task)}
            assert lines.keys() == ways
            assert all(line["rate"] > 0 and line["rounds"] == [line["rate"]] for line in lines.values())
            assert lines["host"]["ratio"] == lines["host, cache"]["ratio"] == lines["limit"]["of_limit"] == 1
            host, limit = lines["host"], lines["limit"]
            assert limit["ratio"] == host["of_limit"] == pytest.approx(host["rate"] / limit["rate"])
            raw, cache = lines["host, raw"], lines["host, cache"]
            assert (raw["pixels"], raw["of_limit"]) == (True, None)
            assert raw["ratio"] == pytest.approx(cache["rate"] / raw["rate"]), "pixels are compared with pixels"


def test_cold_passes_are_reported_beside_warm_ones(result: dict[str, Any]) -> None:
    assert [(line["scale"], line["images"]) for line in result["cold"]] == [(32, 150), (64, 150)]
    assert all(line[key] > 0 for line in result["cold"] for key in ("warm", "cold", "cold_block", "cold_unadvised"))


@pytest.mark.skipif(not dali.available(), reason="NVIDIA DALI is not installed")
def test_the_engines_are_compared_by_rate_and_by_pixel(result: dict[str, Any]) -> None:
    for line in result["engines"]:
        assert line["images"] == 150
        assert line["host"].keys() == line["dali"].keys() == {"A", "B"}
        assert line["within_4"] == 1
        assert line["within_1"] >= 0.9999
        assert line["largest"] <= 4
        assert line["gpu_bytes"] is None


def test_the_report_is_printed_and_written_with_where_it_ran_and_a_plot(
    measured: tuple[Path, str], tiny_set: Path
) -> None:
    out, printed = measured
    text = (out / "load.md").read_text()
    for part in ("Task A, decode", "Task B, decode, rotate", "without JPEG", "Cold storage", "The ways"):
        assert part in text
        assert part in " ".join(printed.split())
    assert "- processor: " in text
    assert str(tiny_set) not in text, "a folder is nobody's business"
    assert (out / "load.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--scale", "4096"], "no shards at 4096 px (scales there: 32, 64)"),
        (["--device", "gpu"], "--device gpu is unknown"),
    ],
)
def test_bad_input_is_refused_before_anything_is_measured(
    tiny_set: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    done = run("--shards", tiny_set, "--out", tmp_path / "out", *QUICK, *options)
    assert (done.exit_code, (tmp_path / "out").exists()) == (2, False)
    assert message in done.stderr


def test_a_raw_set_and_a_folder_that_is_none_are_refused(raw_set: Path, tmp_path: Path) -> None:
    done = run("--shards", raw_set, "--out", tmp_path / "out", *QUICK)
    assert done.exit_code == 2
    assert f"{raw_set} holds no JPEGs" in done.stderr
    assert "is not a shard set" in run("--shards", tmp_path, "--out", tmp_path / "out", *QUICK).stderr


def test_a_long_epoch_is_whole_epochs_in_different_orders() -> None:
    order = TrainOrder(rows=np.arange(1000), global_batch=50, micro_batch=50)
    rows = np.concatenate(LongOrder(order).micro_batches(0, 0)).reshape(-1, 1000)
    assert len(rows) == 100
    assert all(np.array_equal(np.sort(epoch), np.arange(1000)) for epoch in rows)
    assert not np.array_equal(rows[0], rows[1])


def test_an_uncompressed_copy_of_a_set_has_its_pixels(tiny_set: Path, tmp_path: Path) -> None:
    rows = np.arange(5, 25)
    with Reader(tiny_set, 32) as jpegs, Reader(uncompressed(tiny_set, 32, rows, tmp_path), 32) as raw:
        assert raw.is_raw
        assert len(raw.rows) == 20
        before, after = Pixels(jpegs, 32), Pixels(raw, 32)
        there = sorted(before.get(row).tobytes() for row in rows.tolist())
        assert there == sorted(after.get(row).tobytes() for row in raw.rows.tolist())


def test_a_set_of_many_tiny_images_is_opened_read_and_measured(tmp_path: Path) -> None:
    folder = tiny_images(tmp_path / "set", 3000, 16)
    with Reader(folder, 16) as reader:
        assert reader.rows.tolist() == list(range(3000))
        assert len({bytes(reader.read(row)) for row in range(3000)}) == 64
    found = large(folder, 16, images=5000)
    assert (found.rows, found.shards, found.images, len(found.anonymous)) == (3000, 47, 5000, 10)
    assert min(found.open_resident, *found.anonymous) > 2**20
