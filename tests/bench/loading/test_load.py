import json
from typing import Any

import numpy as np
import pytest
import torch
from commands import invoke

from cxrfast.bench.data import LONG, LongOrder, tiny_images, uncompressed
from cxrfast.bench.harness import Budget, Measured
from cxrfast.bench.loading import load
from cxrfast.bench.loading.job import Job
from cxrfast.bench.loading.large import large
from cxrfast.pipelines import dali
from cxrfast.pipelines.decoder import Pixels
from cxrfast.pipelines.reader import Reader

QUICK = ["--seconds", "0.05", "--rounds", "1", "--device", "cpu", "--workers", "2"]


def run(*arguments: object) -> Any:
    return invoke("bench", "load", *arguments)


@pytest.mark.slow
def test_every_way_is_measured_at_every_scale_for_both_tasks_and_reported(tiny_set, tmp_path):
    more = ["--engines"] if dali.available() else []
    done = run("--shards", tiny_set, "--out", tmp_path, "--no-peers", "--cold", *more, *QUICK)
    assert done.exit_code == 0, (done.output, done.exception)
    result = json.loads((tmp_path / "load.json").read_text())
    ways = {"host", "host, 1 thread", "host, cache", "host, raw", "limit"}
    ways |= {"dali", "dali, unproven"} if dali.available() else set()
    for scale in (32, 64):
        for task in "AB":
            lines = {line["way"]: line for line in result["lines"] if (line["scale"], line["task"]) == (scale, task)}
            assert lines.keys() == ways
            assert all(line["rate"] > 0 and line["rounds"] == [line["rate"]] for line in lines.values())
    assert [(line["scale"], line["images"]) for line in result["cold"]] == [(32, 150), (64, 150)]
    assert all(line[key] > 0 for line in result["cold"] for key in ("warm", "cold", "cold_block", "cold_unadvised"))
    for line in result["engines"]:
        assert line["images"] == 150
        assert line["host"].keys() == line["dali"].keys() == {"A", "B"}
        assert line["within_4"] == 1
        assert line["within_1"] >= 0.9999
        assert line["largest"] <= 4
        assert line["gpu_bytes"] is None
    assert len(result["engines"]) == (2 if more else 0)
    text, printed = (tmp_path / "load.md").read_text(), " ".join(done.stdout.split())
    for part in ("Task A, decode", "Task B, decode, rotate", "without JPEG", "Cold storage", "The ways"):
        assert part in text
        assert part in printed
    assert "- processor: " in text
    assert str(tiny_set) not in text, "no folder of this machine"
    assert (tmp_path / "load.png").read_bytes()[:4] == b"\x89PNG"


def test_the_plan_is_shown_and_one_way_is_measured(tiny_set, tmp_path):
    options = "--scale 32 --only host --engines --minutes 1"
    done = run("--shards", tiny_set, "--out", tmp_path, *options.split(), *QUICK)
    assert done.exit_code == 0, (done.output, done.exception)
    plan = done.stderr.splitlines()
    assert plan[0].startswith("bench load: ")
    assert "scales: 32 px" in plan[1]
    assert plan[2] == "  ways: host; host is always measured, since ratios refer to it"
    assert "dataloader-pillow" in done.stderr, "the plan says what is left out"
    assert "with --minutes 1, rounds end early" in done.stderr
    result = json.loads((tmp_path / "load.json").read_text())
    assert {(line["way"], line["of_limit"]) for line in result["lines"]} == {("host", None)}
    assert not (tmp_path / "load.png").exists(), "without the limit there is no share of it to plot"
    assert result["engines"] == []
    assert "--only dali" in result["left_out"]["engines"]
    assert "Left out: engines (" in (tmp_path / "load.md").read_text()


def test_ratios_compare_jpegs_with_jpegs_and_pixels_with_pixels():
    rates = {"host": 10.0, "host, cache": 40.0, "limit": 20.0, "host, raw": 80.0, "memmap": 160.0, "LitData": 5.0}
    lines = {line["way"]: line for line in load._lines(64, "A", {way: Measured([rate]) for way, rate in rates.items()})}
    assert {way: (line["ratio"], line["of_limit"]) for way, line in lines.items()} == {
        "host": (1, 0.5),
        "host, cache": (1, None),
        "limit": (0.5, 1),
        "host, raw": (0.5, None),
        "memmap": (0.25, None),
        "LitData": (2, 0.25),
    }
    assert [way for way, line in lines.items() if line["pixels"]] == ["host, cache", "host, raw", "memmap"]


def test_scales_tasks_and_passes_that_do_not_fit_the_time_are_named(tmp_path, monkeypatch):
    now = 0.0

    def figures(job: Job, seconds: float, rounds: int, share: Budget, label: str) -> dict[str, Measured]:
        nonlocal now
        now += 20 * (job.scale / 32) ** 2
        return {"host": Measured([8 / (5 * (job.scale / 32) ** 2)])}

    monkeypatch.setattr(load, "open_ways", lambda job, device, ways: job)
    monkeypatch.setattr(load, "interleave", figures)
    given = {"shards": tmp_path, "rows": np.arange(9), "batch": 8, "workers": 1, "turn": False}
    jobs = [Job(folder=tmp_path / str(scale), scale=scale, **given) for scale in (32, 64)]  # type: ignore[arg-type]
    left_out: dict[str, str] = {}
    budget = Budget.of(1, clock=lambda: now)
    lines = load._measure_all(jobs, ["host"], torch.device("cpu"), 0.1, 1, budget, left_out)
    assert [(line["scale"], line["task"]) for line in lines] == [(32, "A"), (32, "B")]
    assert list(left_out) == ["64 px, task A", "64 px, task B"]
    assert "about 1m20s needed, 20s left" in left_out["64 px, task A"]
    now = 60.0
    load._at_each_scale("cold storage", jobs, load._cold, budget, left_out)
    assert list(left_out)[2:] == ["cold storage, 32 px", "cold storage, 64 px"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--scale", "4096"], "no shards at 4096 px (scales there: 32, 64)"),
        (["--device", "gpu"], "--device gpu is unknown"),
        (["--only", "hots"], "no such way of loading, use one of host, dali, dali-unproven, host-1-thread, host-cache"),
    ],
)
def test_bad_input_is_refused_before_anything_is_measured(tiny_set, tmp_path, options, message):
    done = run("--shards", tiny_set, "--out", tmp_path / "out", *QUICK, *options)
    assert (done.exit_code, (tmp_path / "out").exists()) == (2, False)
    assert message in done.stderr


def test_a_raw_set_and_a_folder_without_a_set_are_refused(raw_set, tmp_path):
    done = run("--shards", raw_set, "--out", tmp_path / "out", *QUICK)
    assert done.exit_code == 2
    assert f"{raw_set} holds no JPEGs" in done.stderr
    assert "is not a shard set" in run("--shards", tmp_path, "--out", tmp_path / "out", *QUICK).stderr


@pytest.mark.parametrize("micro_batch", [1, 50, 5000])
def test_a_long_epoch_is_permutations_of_all_rows_in_full_micro_batches(micro_batch):
    order = LongOrder(rows=np.arange(7, 1007), micro_batch=micro_batch)
    batches = order.micro_batches(0)
    assert {len(batch) for batch in batches} == {micro_batch}
    assert len(order) == len(batches)
    permutations = np.concatenate(batches).reshape(-1, 1000)
    assert permutations.size == LONG
    assert (np.sort(permutations) == np.arange(7, 1007)).all()
    assert len(np.unique(permutations, axis=0)) == len(permutations)
    rest = np.concatenate(order.micro_batches(0, consumed=2 * micro_batch))
    assert np.array_equal(rest, permutations.ravel()[2 * micro_batch :])
    assert not np.array_equal(order.micro_batches(1)[0], batches[0])


def test_an_uncompressed_copy_of_a_set_has_its_pixels(tiny_set, tmp_path):
    rows = np.arange(5, 25)
    with Reader(tiny_set, 32) as jpegs, Reader(uncompressed(tiny_set, 32, rows, tmp_path), 32) as raw:
        assert raw.is_raw
        assert len(raw.rows) == 20
        before, after = Pixels(jpegs, 32), Pixels(raw, 32)
        there = sorted(before.get(row).tobytes() for row in rows.tolist())
        assert there == sorted(after.get(row).tobytes() for row in raw.rows.tolist())


def test_a_set_of_many_tiny_images_is_opened_read_and_measured(tmp_path):
    folder = tiny_images(tmp_path / "set", 1000, 16)
    with Reader(folder, 16) as reader:
        assert reader.rows.tolist() == list(range(1000))
        assert len({bytes(reader.read(row)) for row in range(1000)}) == 64
    found = large(folder, 16, images=2000)
    assert [found[name] for name in ("rows", "shards", "images")] == [1000, 16, 2000]
    assert len(found["anonymous"]) == 10
    assert min(found["open_resident"], *found["anonymous"]) > 2**20
    assert found["open_resident"] < 2**28, "the process has not loaded torch"
