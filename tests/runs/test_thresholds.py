"""thresholds.json of a run: what it says, when it goes, and what is refused, since it may come from elsewhere."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs import LABELS, make_run

from cxrfast.errors import RunError
from cxrfast.runs.run import Run
from cxrfast.runs.thresholds import shared_rule
from cxrfast.thresholds import YOUDEN, Rule, Thresholds, choose


def chosen(rule: Rule = YOUDEN) -> Thresholds:
    """Thresholds of the four findings of `make_run`; the last has no positives."""
    return choose(np.arange(20.0).reshape(5, 4), np.outer([0, 0, 1, 1, 1], [1, 1, 1, 0]), None, rule)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = make_run(tmp_path / "runs", 32)
    run.write_thresholds(chosen(), 5)
    return run


def change(run: Run, **fields: Any) -> None:
    content = json.loads(run.thresholds_path.read_text())
    content.update(fields)
    run.thresholds_path.write_text(json.dumps(content))


def test_thresholds_are_read_as_they_were_written(run: Run, tmp_path: Path) -> None:
    assert Run.open(run.folder).read_thresholds() == chosen()
    content = json.loads(run.thresholds_path.read_text())
    assert (content["part"], content["rows"], content["labels"]) == ("val", 5, list(LABELS))
    assert content["config_hash"] == run.hash
    assert content["thresholds"]["rule"] == "youden"
    assert content["thresholds"]["logits"][3] is None
    assert make_run(tmp_path / "others", 32).read_thresholds() is None


def test_new_best_weights_remove_the_thresholds_of_the_old_ones(run: Run) -> None:
    run.write_weights({"w": torch.zeros(1)})
    assert run.read_thresholds() is None


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"config_hash": "0" * 64}, "belongs to another run"),
        ({"set_id": "b2"}, "belongs to another run"),
        ({"labels": LABELS[::-1]}, "is about other findings than the run"),
        ({"labels": LABELS[:3]}, "is about other findings than the run"),
        ({"part": "test"}, r"is damaged \(.*part"),
        ({"rows": -1}, r"is damaged \(.*rows"),
        ({"thresholds": {}}, r"is damaged \(.*missing required field"),
        ({"thresholds": None}, r"is damaged \("),
        ({"thresholds": {**chosen().json(), "logits": [0.0, 0.0, float("inf"), None]}}, r"is damaged \(.*not finite"),
        ({"thresholds": {**chosen().json(), "logits": [0.0]}}, r"is damaged \(.*differ in length"),
        ({"thresholds": {**chosen().json(), "rule": "best"}}, r"is damaged \('best' is not a rule"),
    ],
)
def test_thresholds_that_do_not_fit_the_run_are_refused(run: Run, fields: dict[str, Any], why: str) -> None:
    change(run, **fields)
    with pytest.raises(
        RunError, match=rf"thresholds\.json {why}.*choose thresholds again with `cxrfast thresholds RUNS`"
    ):
        run.read_thresholds()


def test_thresholds_of_fewer_findings_than_the_run_are_refused(run: Run) -> None:
    few = choose(np.arange(4.0).reshape(2, 2), np.eye(2), None)
    change(run, thresholds=few.json())
    with pytest.raises(RunError, match="is about other findings than the run"):
        run.read_thresholds()


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_text("{"),
        lambda path: path.write_text("[" * 100_000),
        lambda path: path.write_bytes(b"\xff"),
        lambda path: path.write_text(""),
        lambda path: (path.unlink(), os.mkfifo(path)),
        lambda path: (path.unlink(), path.mkdir()),
        lambda path: (path.unlink(), path.symlink_to("/dev/zero")),
        lambda path: (path.unlink(), path.symlink_to(path)),
        lambda path: (path.unlink(), path.symlink_to("/nowhere/at/all")),
    ],
)
def test_what_is_not_a_file_of_thresholds_is_a_message_and_never_waited_for(
    run: Run, damage: Callable[[Path], object]
) -> None:
    damage(run.thresholds_path)
    with pytest.raises(RunError, match=r"thresholds\.json is damaged"):
        run.read_thresholds()


def test_a_process_that_lost_its_lease_writes_no_thresholds(run: Run) -> None:
    before = run.thresholds_path.read_bytes()
    with run.lock("predicting") as mine:
        run.lease_path.unlink()
        run.lease_path.write_text("of another process")
        with pytest.raises(RunError, match="another process took over"):
            mine.write_thresholds(chosen(Rule.parse("sensitivity=0.9")), 5)
    run.lease_path.unlink()
    assert run.thresholds_path.read_bytes() == before


def test_runs_share_a_rule_or_are_told_apart(run: Run) -> None:
    other = make_run(run.folder.parents[1], 64)
    assert shared_rule([other]) == YOUDEN
    other.write_thresholds(chosen(Rule.parse("sensitivity=0.9")), 5)
    assert shared_rule([other]) == Rule.parse("sensitivity=0.9")
    with pytest.raises(RunError, match=r"youden \(such as densenet121-32/fold-0\), sensitivity=0\.9 .* --rule"):
        shared_rule([run, other])
