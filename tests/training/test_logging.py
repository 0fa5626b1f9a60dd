"""docs/logging.md holds every field that a training writes, and its programs run."""

import json
import re
import threading
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from trainings import SHORT

from cxrfast.config import Runtime
from cxrfast.runs.run import Run
from cxrfast.training.setup import make_config
from cxrfast.training.train import train

PAGE = (Path(__file__).parents[2] / "docs" / "logging.md").read_text()
PROGRAMS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def program(word: str) -> str:
    (found,) = [text for text in PROGRAMS if word in text]
    return found


@pytest.fixture(scope="module")
def weighted(tiny_set, tmp_path_factory) -> Run:
    """A run of one epoch that writes every field. Not to be written to."""
    config = make_config(tiny_set, 32, device="cpu", **SHORT, positive_weights=True)
    return train(config, Runtime(shards=tiny_set, runs=tmp_path_factory.mktemp("weighted"), device="cpu"))


def test_the_page_names_each_field_and_no_other(weighted):
    told = re.findall(r"^\| `(\w+)` \|", PAGE, re.MULTILINE)
    assert sorted(told) == sorted(weighted.metrics()[0])


def test_metrics_become_a_table(weighted, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(program("to_csv").replace("runs/densenet121-256/fold-0", str(weighted.folder)), {})
    (line,) = weighted.metrics()
    (row,) = pd.read_csv("metrics.csv").to_dict("records")
    assert row["val_loss"] == pytest.approx(line["val_loss"])
    for label, value in line["val_auroc_by_label"].items():
        stored = row[f"val_auroc_by_label.{label}"]
        assert pd.isna(stored) if value is None else stored == pytest.approx(value)


def test_a_tracker_is_given_each_line(tiny_set, tmp_path, monkeypatch):
    """As the page has it, with a tracker that only remembers, at a small scale."""
    logged: list[dict[str, Any]] = []
    code = program("on_epoch=wandb.log").replace("import wandb\n", "").replace("shards, 256", "shards, 32, **options")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shards").symlink_to(tiny_set)

    class Tracker:
        log = logged.append

        @staticmethod
        def init(**given: Any) -> threading.Lock:
            return threading.Lock()  # any context

    code = code.replace('runs=Path("runs"))', 'runs=Path("runs"), device="cpu")')
    exec(code, {"wandb": Tracker, "options": {**SHORT, "device": "cpu"}})
    assert logged == Run.open("runs/densenet121-32/fold-0").metrics()


def test_mlflow_is_given_the_numbers_alone(weighted):
    logged: list[tuple[dict[str, float], int]] = []

    class Mlflow:
        @staticmethod
        def log_metrics(values: dict[str, float], step: int) -> None:
            logged.append((values, step))

    given: dict[str, Any] = {"mlflow": Mlflow}
    exec(program("log_metrics"), given)
    (line,) = weighted.metrics()
    given["to_mlflow"](line)
    ((values, step),) = logged
    assert step == 0
    assert values == {name: value for name, value in line.items() if type(value) in (int, float)}
    assert "val_loss" in values


def test_a_run_is_followed_until_it_is_over(tmp_path):
    given: dict[str, Any] = {}
    exec(program("def follow").partition("\n\nfor ")[0], given)
    (tmp_path / "state.json").write_text('{"state": "running"}')
    metrics = tmp_path / "metrics.jsonl"

    def grow() -> None:
        for epoch in range(3):
            time.sleep(0.05)
            metrics.write_text("".join(f"{json.dumps({'epoch': i})}\n" for i in range(epoch + 1)))
        (tmp_path / "state.json").write_text('{"state": "done"}')

    thread = threading.Thread(target=grow)
    thread.start()
    found = list(given["follow"](tmp_path, seconds=0.01))
    thread.join()
    assert found == [{"epoch": 0}, {"epoch": 1}, {"epoch": 2}]
