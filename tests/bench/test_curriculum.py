import json
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from cxrfast.bench.curriculum import RESIZED, SCRATCH, SMALLER, bench, main, way
from cxrfast.config import TrainConfig
from cxrfast.errors import LoadError
from cxrfast.runs.run import Run

OPTIONS = {"global_batch": 8, "micro_batch": 8, "limit": 16, "precision": "fp32"}


def test_every_way_is_trained_and_the_smaller_run_s_seconds_count(tiny_set: Path, tmp_path: Path) -> None:
    result = bench(tiny_set, 64, 32, tmp_path, epochs=1, device="cpu", **OPTIONS)
    assert [one.name for one in result.ways] == [SCRATCH, SMALLER]
    scratch, smaller = result.ways
    assert result.target == scratch.best
    assert scratch.reached == scratch.seconds[-1]
    below = Run.open(tmp_path / "runs" / "scratch-32" / "fold-0")
    above = Run.open(tmp_path / "runs" / "from-32-64" / "fold-0")
    assert above.config.weights == str(below.folder)
    assert smaller.before == below.metrics()[0]["seconds"]
    assert smaller.seconds == [smaller.before + above.metrics()[0]["seconds"]]
    values = json.loads((tmp_path / "curriculum.json").read_text())
    assert [one["auroc"] for one in values["ways"]] == [one.auroc for one in result.ways]
    assert "| way | epochs | seconds before |" in (tmp_path / "curriculum.md").read_text()
    assert (tmp_path / "curriculum.png").read_bytes()[:4] == b"\x89PNG"
    again = bench(tiny_set, 64, 32, tmp_path, epochs=1, device="cpu", target=1.1, **OPTIONS)
    assert again.ways[1].seconds == smaller.seconds, "what was trained is not trained again"
    assert [one.reached for one in again.ways] == [None, None]


@pytest.mark.skipif(
    "sizes" not in {field.name for field in fields(TrainConfig)}, reason="no progressive resizing in this version"
)
def test_progressive_resizing_is_measured_where_it_exists(tiny_set: Path, tmp_path: Path) -> None:
    result = bench(tiny_set, 64, 32, tmp_path, epochs=2, device="cpu", **OPTIONS)
    assert [one.name for one in result.ways] == [SCRATCH, SMALLER, RESIZED]
    assert len(result.ways[2].seconds) == 2


def test_the_target_counts_from_the_first_epoch_that_has_it() -> None:
    lines = [{"seconds": 2.0, "val_auroc": value} for value in (None, 0.6, 0.8, 0.7, 0.9)]
    run = SimpleNamespace(metrics=lambda: lines)
    found = way("w", run, 10.0, 0.75)  # type: ignore[arg-type]
    assert found.seconds == [12.0, 14.0, 16.0, 18.0, 20.0]
    assert (found.reached, found.best) == (16.0, 0.9)
    assert way("w", run, 10.0, 0.95).reached is None  # type: ignore[arg-type]


def test_an_absent_scale_is_refused_before_anything_is_trained(tiny_set: Path, tmp_path: Path) -> None:
    with pytest.raises(LoadError, match="no shards at 4096 px"):
        bench(tiny_set, 4096, 32, tmp_path / "out", device="cpu")
    assert not (tmp_path / "out").exists()
    done = CliRunner().invoke(main, ["--shards", str(tiny_set), "--scale", "4096", "--from-scale", "32"])
    assert done.exit_code == 2
    assert "no shards at 4096 px" in done.output
