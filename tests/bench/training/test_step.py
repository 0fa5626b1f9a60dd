"""`cxrfast bench` and `bench step`."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import invoke

from cxrfast.bench.training import step
from cxrfast.bench.training.step import bench
from cxrfast.bench.training.step_measure import FIGURES, make_trainer, measurements
from cxrfast.config import Runtime
from cxrfast.distributed import World
from cxrfast.errors import LoadError
from cxrfast.pipelines.host import HostEngine
from cxrfast.tables import markdown_text


@pytest.mark.slow
def test_every_scale_is_measured_with_its_real_loop(tiny_set, tmp_path, caplog):
    caplog.set_level("INFO", "cxrfast")
    result = bench(tiny_set, [], tmp_path, seconds=0.3, micro_batch=8, device="cpu")
    assert (result.failed, result.left_out) == ({}, {})
    assert [line["scale"] for line in result.lines] == [32, 64]
    for line in result.lines:
        assert min(line[name] for name in FIGURES) > 0
        assert 2**20 < line["saved_bytes_per_image"] < 2**26
        assert 2**28 < line["process_bytes"] < 2**34, "a process that trains densenet121 takes a good part of a GiB"
        assert (line["torch_peak_bytes"], line["micro_batch"]) == (None, 8)
        assert {len(rounds) for rounds in line["rounds"].values()} == {5}
    assert json.loads((tmp_path / "bench.json").read_text())["provenance"]["torch"]
    assert (tmp_path / "bench.md").read_text().startswith("## Memory and images/s by resolution")
    said = "\n".join(caplog.messages)
    assert said.startswith("bench step: load, train, cached, bare, validate of densenet121 (cpu)\n  scales: 32, 64 px,")
    assert "32 px × 8 images: 30/30 figures" in said


def test_an_absent_scale_is_refused_before_anything_is_measured(tiny_set, tmp_path):
    with pytest.raises(LoadError, match="no shards at 4096 px"):
        bench(tiny_set, [32, 4096], tmp_path / "out", device="cpu")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_scale_that_cannot_be_measured_is_named_and_costs_only_its_line(tiny_set, tmp_path):
    broken = tmp_path / "set"
    shutil.copytree(tiny_set, broken)
    for tar in (broken / "32").glob("*.tar"):
        data = tar.read_bytes()
        tar.write_bytes(bytes(len(data)))
    result = bench(broken, [], tmp_path / "out", arch="resnet18", seconds=0.1, rounds=1, micro_batch=4, device="cpu")
    assert [line["scale"] for line in result.lines] == [64]
    assert "`cxrfast verify" in result.failed[32]
    assert markdown_text(f"32 px: {result.failed[32]}") in (tmp_path / "out" / "bench.md").read_text()


def test_a_pipeline_starts_once_a_turn_however_few_the_rows(tiny_set, tmp_path, monkeypatch):
    starts: list[HostEngine] = []
    batches = HostEngine.batches
    monkeypatch.setattr(HostEngine, "batches", lambda engine, work: starts.append(engine) or batches(engine, work))
    runtime = Runtime(shards=tiny_set, runs=tmp_path, device="cpu", engine="host")
    trainer = make_trainer(runtime, 32, "shufflenet_v2_x0_5", 120, World(torch.device("cpu")))
    assert max(len(trainer.order.rows), len(trainer.val_rows)) < 120, "each batch is more than all rows"
    each = measurements(trainer, 120)
    assert len(starts) == 1, "of the batch that is kept"
    consumed = trainer.counters.consumed
    for name, expected in zip(FIGURES, (1, 1, 0, 0, 1), strict=True):
        starts.clear()
        assert each[name](0.01) > 0
        assert len(starts) == expected, name
    assert trainer.counters.consumed == consumed + 2 * 2 * 120, (
        "a step to warm up and one that counts, of `train` and `cached`"
    )


def test_without_any_time_nothing_is_measured_and_every_scale_is_named(tiny_set, tmp_path):
    options = ["--shards", str(tiny_set), "--minutes", "1e-6", "--device", "cpu", "--out", str(tmp_path)]
    done = invoke("bench", "step", *options)
    assert done.exit_code == 2
    assert "no scale could be measured" in done.stderr
    assert list(json.loads((tmp_path / "bench.json").read_text())["left_out"]) == ["32 px", "64 px"]
    assert "Left out: 32 px (no time left" in done.stdout


def test_without_a_command_steps_are_measured_in_two_minutes(monkeypatch):
    given: list[Any] = []

    def stand_in(*arguments: Any, **options: Any) -> None:  # the real one takes minutes with its defaults
        given.append((arguments, options))
        raise LoadError("seen")

    monkeypatch.setattr(step, "bench", stand_in)
    said = [invoke(*words).stderr for words in (["bench"], ["bench", "--full"], ["bench", "step"])]
    assert said[0].startswith(
        "cxrfast bench: memory and images/s of training by resolution, about 2 minutes (all of it: "
    )
    alone, full, steps = given
    assert full == steps
    assert alone == (steps[0], steps[1] | {"minutes": 2.0})
    assert alone[0] == (None, [], Path("bench-results"))
    done = invoke("bench", "--full", "step")
    assert (done.exit_code, "leave out --minutes" in done.stderr) == (2, True), "--full belongs to no command"
