import json

import pytest
from commands import invoke

from cxrfast.bench.training.curriculum import RESIZED, SCRATCH, SMALLER, bench, best, way
from cxrfast.runs.run import Run

OPTIONS = {"global_batch": 8, "micro_batch": 8, "limit": 16, "precision": "fp32", "device": "cpu", "epochs": 2}


@pytest.mark.slow
def test_every_way_is_trained_once_and_the_smaller_run_s_seconds_count(tiny_set, tmp_path):
    result = bench(tiny_set, 64, 32, tmp_path, **OPTIONS)  # type: ignore[arg-type]
    assert [one["name"] for one in result.ways] == [SCRATCH, SMALLER, RESIZED]
    scratch, smaller, resized = result.ways
    assert result.target == best(scratch)
    assert scratch["reached"] in scratch["seconds"]
    assert len(resized["seconds"]) == 2
    below = Run.open(tmp_path / "runs" / "scratch-32" / "fold-0")
    above = Run.open(tmp_path / "runs" / "from-32-64" / "fold-0")
    assert above.config.weights == str(below.folder)
    assert smaller["before"] == sum(line["seconds"] for line in below.metrics())
    assert smaller["seconds"][0] == smaller["before"] + above.metrics()[0]["seconds"]
    assert json.loads((tmp_path / "curriculum.json").read_text())["ways"] == result.ways
    assert "| way | epochs | seconds before |" in (tmp_path / "curriculum.md").read_text()
    again = bench(tiny_set, 64, 32, tmp_path, target=1.1, **OPTIONS)  # type: ignore[arg-type]
    assert again.ways[1]["seconds"] == smaller["seconds"], "what was trained is not trained again"
    assert [one["reached"] for one in again.ways] == [None] * 3


def test_the_target_counts_from_the_first_epoch_that_has_it():
    lines = [{"seconds": 2.0, "val_auroc": value} for value in (None, 0.6, 0.8, 0.7, 0.9)]
    found = way("w", lines, 10.0, 0.75)
    assert found["seconds"] == [12.0, 14.0, 16.0, 18.0, 20.0]
    assert (found["reached"], best(found)) == (16.0, 0.9)
    assert way("w", lines, 10.0, 0.95)["reached"] is None


@pytest.mark.parametrize(
    ("scales", "message"),
    [
        ("--scale 4096 --from-scale 32", "no shards at 4096 px"),
        ("--scale 32 --from-scale 64", "must be smaller than 32 px, not 64"),
    ],
)
def test_bad_scales_are_refused_before_anything_is_trained(scales, message, tiny_set, tmp_path):
    options = ["--shards", str(tiny_set), "--out", str(tmp_path / "out"), "--device", "cpu", *scales.split()]
    done = invoke("bench", "curriculum", *options)
    assert (done.exit_code, (tmp_path / "out").exists()) == (2, False)
    assert message in done.stderr
