import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from cxrfast.bench.data import LONG, LongOrder
from cxrfast.bench.loading.measure import large
from cxrfast.bench.trees import tiny_images, uncompressed
from cxrfast.cli.main import cli
from cxrfast.pipelines import dali
from cxrfast.pipelines.decoder import Pixels
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
    ways = {"host", "host, 1 thread", "host, cache", "host, raw", "limit"} | (
        {"dali", "dali, unproven"} if dali.available() else set()
    )
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
        (
            ["--only", "hots"],
            "no such way of loading, use one of host, dali, dali-unproven, host-1-thread, host-cache, host-raw",
        ),
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


@pytest.mark.parametrize("micro_batch", [1, 50, 5000])
def test_a_long_epoch_is_permutations_of_all_rows_in_full_micro_batches(micro_batch: int) -> None:
    order = LongOrder(rows=np.arange(7, 1007), micro_batch=micro_batch)
    batches = order.micro_batches(0)
    assert {len(batch) for batch in batches} == {micro_batch}
    permutations = np.concatenate(batches).reshape(-1, 1000)
    assert permutations.size == LONG
    assert (np.sort(permutations) == np.arange(7, 1007)).all()
    assert len(np.unique(permutations, axis=0)) == len(permutations)
    assert np.array_equal(
        np.concatenate(order.micro_batches(0, consumed=2 * micro_batch)), permutations.ravel()[2 * micro_batch :]
    )
    assert not np.array_equal(order.micro_batches(1)[0], batches[0])


def test_ways_are_chosen_by_names_that_can_be_typed_and_those_that_ratios_need_stay(
    tiny_set: Path, tmp_path: Path
) -> None:
    done = run("--shards", tiny_set, "--out", tmp_path, "--scale", 32, "--only", "limit", "--only", "host-raw", *QUICK)
    assert done.exit_code == 0, (done.output, done.exception)
    result = json.loads((tmp_path / "load.json").read_text())
    assert {line["way"] for line in result["lines"]} == {"host", "host, cache", "host, raw", "limit"}
    assert result["left_out"] == {}
    assert "ways: host, host-cache, host-raw, limit; host is always measured" in done.stderr
    assert "dataloader-pillow" in done.stderr, "the plan says what is left out"


def test_without_the_limit_there_is_no_share_of_it(tiny_set: Path, tmp_path: Path) -> None:
    assert (
        run("--shards", tiny_set, "--out", tmp_path, "--scale", 32, "--only", "host", "--engines", *QUICK).exit_code
        == 0
    )
    result = json.loads((tmp_path / "load.json").read_text())
    assert {(line["way"], line["of_limit"]) for line in result["lines"]} == {("host", None)}
    assert not (tmp_path / "load.png").exists()
    assert result["engines"] == []
    assert "--only dali" in result["left_out"]["engines"]


def test_what_there_is_no_time_for_is_named(tiny_set: Path, tmp_path: Path) -> None:
    """The time is over after a burn-in and one round of two ways at the first scale."""
    options = [
        "--only",
        "limit",
        "--seconds",
        "1.5",
        "--rounds",
        "5",
        "--minutes",
        "0.05",
        "--device",
        "cpu",
        "--workers",
        "2",
        "--cold",
    ]
    done = run("--shards", tiny_set, "--out", tmp_path, *options)
    assert done.exit_code == 0, (done.output, done.exception)
    result = json.loads((tmp_path / "load.json").read_text())
    assert [(line["scale"], line["task"], len(line["rounds"])) for line in result["lines"]] == [(32, "A", 1)] * 2
    others = ["32 px, task B", "64 px, task A", "64 px, task B", "cold storage, 32 px", "cold storage, 64 px"]
    assert list(result["left_out"]) == others
    text = (tmp_path / "load.md").read_text()
    assert all(f"Left out: {what} (" in text for what in others)
    plan = done.stderr.splitlines()
    assert plan[0].startswith("bench load: ")
    assert any("scales: 32, 64 px" in line for line in plan)
    assert any("with --minutes 0.05, rounds end early" in line for line in plan)


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
