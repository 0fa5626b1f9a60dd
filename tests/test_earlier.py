"""What an earlier version wrote is read by this one: tests/data/earlier holds its shard set and two of its runs.

Fold 0 was preempted in its third epoch; fold 1 is done, with predictions. auroc.csv is what `evaluate` made of fold 1, and
continued.json the last line of fold 0's metrics after that version had trained it to its end.
"""

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
from commands import invoke

EARLIER = Path(__file__).parent / "data" / "earlier"
NAME = "shufflenet_v2_x0_5-32"

TRAIN = (
    f"train --shards set --runs runs --scale 32 --arch {NAME.removesuffix('-32')} --weights none --epochs 3 "
    "--global-batch 4 --micro-batch 2 --precision fp32 --device cpu --learning-rate 0.001 --checkpoint-steps 3 --fold 0"
)


@pytest.fixture
def earlier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the earlier version's folder, and the working directory: its runs name their set by a relative path."""
    copy = Path(shutil.copytree(EARLIER, tmp_path / "earlier"))
    monkeypatch.chdir(copy)
    return copy


def cxrfast(command: str) -> str:
    """What a command that succeeds prints, stdout and stderr."""
    done = invoke(*command.split())
    assert done.exit_code == 0, (done.output, done.exception)
    return done.output


@pytest.mark.usefixtures("earlier")
def test_an_earlier_set_is_whole() -> None:
    assert "80 rows at 32 px; 80 planned, 0 quarantined" in cxrfast("verify set --deep")


def test_an_earlier_checkpoint_trains_on_to_its_end(earlier: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With as many threads as the earlier version had. The tolerance is for other CPUs, whose last bits differ."""
    monkeypatch.setattr("cxrfast.distributed.usable_cores", lambda: 2)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    expected = json.loads((earlier / "continued.json").read_text())
    run = earlier / "runs" / NAME / "fold-0"
    before = (run / "metrics.jsonl").read_text()
    assert "resuming in epoch 3 after 8 images" in cxrfast(TRAIN)
    assert json.loads((run / "state.json").read_text())["state"] == "done"
    after = (run / "metrics.jsonl").read_text()
    assert after.startswith(before)
    line = json.loads(after.removeprefix(before))
    assert line.keys() == expected.keys()
    assert line["train_loss"] == pytest.approx(expected["train_loss"], abs=0.01)
    assert line["val_loss"] == pytest.approx(expected["val_loss"], abs=0.03)


def test_earlier_predictions_have_the_same_scores(earlier: Path) -> None:
    assert f"without predictions: {NAME}/fold-0" in " ".join(cxrfast("evaluate runs").split())
    scores, expected = (pd.read_csv(path) for path in (earlier / "runs/evaluation/auroc.csv", earlier / "auroc.csv"))
    pd.testing.assert_frame_equal(scores, expected)
