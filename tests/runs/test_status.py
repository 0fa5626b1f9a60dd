"""One line per run, whatever state its files are in."""

import json
from pathlib import Path
from typing import Any

import pytest
from commands import invoke

from cxrfast.errors import RunError
from cxrfast.runs.status import auroc_at_lowest_loss, status

NOW = 1_800_000_000


def make(runs: Path, name: str, state: dict[str, Any] | None = None, metrics: str = "") -> Path:
    """A run's folder with the small files that `status` reads."""
    folder = runs / name
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"config": {"epochs": 7}}))
    if state is not None:
        (folder / "state.json").write_text(json.dumps(state))
    if metrics:
        (folder / "metrics.jsonl").write_text(metrics)
    return folder


def line(**values: Any) -> str:
    return json.dumps(values) + "\n"


def test_every_state_is_told_apart(tmp_path: Path) -> None:
    make(tmp_path, "d-32/fold-0")
    make(tmp_path, "d-32/fold-1", {"state": "running", "time": NOW - 299})
    make(tmp_path, "d-32/fold-2", {"state": "running", "time": NOW - 301})
    make(tmp_path, "d-32/fold-3", {"state": "preempted", "time": NOW - 9999})
    make(tmp_path, "d-32/fold-4", {"state": "done", "time": NOW - 9999, "eta_seconds": 5})
    make(tmp_path, "d-64/fold-0", {"state": "failed", "time": NOW, "error": "RunError: loss [nan]"})
    make(tmp_path, "d-64/fold-1").joinpath("state.json").write_text('{"state": "runn')
    lines = status(tmp_path, NOW)
    assert [s.state for s in lines] == ["not started", "running", "silent", "preempted", "done", "failed", "damaged"]
    assert [s.heartbeat_seconds for s in lines[:3]] == [None, 299, 301]
    assert lines[4].eta_seconds is None
    assert lines[5].note == "RunError: loss [nan]"
    assert lines[6].note == "state.json is damaged"


def test_everything_that_a_training_writes_is_shown_by_scale_and_what_lacks_or_is_of_another_kind_filled_up_or_left_out(
    tmp_path: Path,
) -> None:
    first = line(epoch=0, val_loss=0.5, val_auroc=0.6, images_per_s=10)
    state = {"state": "running", "time": NOW - 20, "epoch": 2, "epochs": 50, "images_per_s": 75.5, "eta_seconds": 3700}
    make(tmp_path, "d-1024/fold-0", {**state, "job": 4711}, first + line(epoch=1, val_loss=0.4, val_auroc=0.71))
    older = first + line(epoch=1, val_loss=0.9, val_auroc=0.9) + '{"epoch": 2, "val_lo'
    make(tmp_path, "d-256/fold-1", {"state": "running", "time": NOW}, older)
    odd = {"time": "soon", "epoch": None, "epochs": [], "images_per_s": "fast", "eta_seconds": True}
    make(tmp_path, "d-256/fold-0", {"state": "running", **odd}, line(val_loss="low", val_auroc=1) + "7\n")

    lines = status(tmp_path, NOW)
    assert [s.name for s in lines] == ["d-256/fold-0", "d-256/fold-1", "d-1024/fold-0"]
    odd_one, older_one, s = lines
    assert (s.epoch, s.epochs, s.val_auroc, s.images_per_s, s.eta_seconds, s.job) == (2, 50, 0.71, 75.5, 3700, "4711")
    assert (older_one.epoch, older_one.epochs, older_one.val_auroc, older_one.images_per_s) == (2, 7, 0.6, None)
    assert (odd_one.state, odd_one.heartbeat_seconds, odd_one.epochs) == ("silent", None, 7)
    assert (odd_one.images_per_s, odd_one.eta_seconds) == (None, None)


@pytest.mark.parametrize("content", [b"", b"[1, 2]", b"\xff\xfe", b"null", b"{}"])
def test_no_content_of_a_file_hides_the_other_runs(tmp_path: Path, content: bytes) -> None:
    broken = make(tmp_path, "d-32/fold-0", {})
    make(tmp_path, "d-32/fold-1", {"state": "done"})
    for name in ("config.json", "state.json", "metrics.jsonl"):
        (broken / name).write_bytes(content)
    first, second = status(tmp_path, NOW)
    assert first.state == ("not started" if content == b"{}" else "damaged")
    assert second.state == "done"


def test_the_auroc_shown_is_that_of_the_epoch_with_the_lowest_loss() -> None:
    assert auroc_at_lowest_loss([]) is None
    assert auroc_at_lowest_loss([{"val_loss": 1, "val_auroc": 0.9}, {"val_loss": 0.5, "val_auroc": None}]) is None
    assert (
        auroc_at_lowest_loss([{"val_loss": 1, "val_auroc": 0.9}, {"val_loss": float("nan"), "val_auroc": 0.1}]) == 0.9
    )


def test_no_runs_are_one_message(tmp_path: Path) -> None:
    for runs in (tmp_path, tmp_path / "none"):
        with pytest.raises(RunError, match="no runs in"):
            status(runs)
        done = invoke("status", runs)
        assert done.exit_code == 2
        assert done.stderr.startswith(f"cxrfast: no runs in {runs}: train one with")


def test_the_command_prints_a_table_or_json(tmp_path: Path) -> None:
    make(tmp_path, "d-32/fold-0", {"state": "failed", "time": NOW, "error": "[red]disk full"})
    make(tmp_path, "d-32/fold-1").joinpath("state.json").write_text("{")
    table = invoke("status", tmp_path)
    assert table.exit_code == 0
    for text in ("d-32/fold-0", "failed", "[red]disk full", "damaged", "0/7", "lowest loss"):
        assert text in table.output
    assert "best" not in table.output
    values = json.loads(invoke("status", "--json", tmp_path).output)
    assert [value["state"] for value in values] == ["failed", "damaged"]
