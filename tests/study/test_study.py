import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from click.testing import CliRunner

from cxrfast.cli.main import cli
from cxrfast.runs.run import Run
from cxrfast.shards.format.rows import read_rows
from cxrfast.study.plan import make_plan
from cxrfast.study.study import study
from cxrfast.training.setup import select_rows

OPTIONS = {
    "arch": "shufflenet_v2_x0_5",
    "weights": "none",
    "epochs": 1,
    "global_batch": 8,
    "micro_batch": 8,
    "limit": 16,
}
"""The fastest network; it has no receptive field and no Grad-CAM."""
NAME = "shufflenet_v2_x0_5-32"


@pytest.mark.slow
def test_a_study_has_maps_of_its_networks(tiny_set: Path, tmp_path: Path) -> None:
    result = study(tiny_set, tmp_path, [32], [0], device="cpu", options={**OPTIONS, "arch": "densenet121"})
    html = result.report.read_text()
    for part in ("Effective receptive fields", "Grad-CAM", "Theoretical, px", ">2071<"):
        assert part in html
    assert list(tmp_path.glob("*/fold-0/gradcam-*.png"))
    maps = (tmp_path / "densenet121-32" / "fold-0" / "maps.zarr").stat().st_mtime_ns
    study(tiny_set, tmp_path, [32], [0], device="cpu", options={**OPTIONS, "arch": "densenet121"})
    assert (tmp_path / "densenet121-32" / "fold-0" / "maps.zarr").stat().st_mtime_ns == maps


def test_a_study_trains_what_is_missing_and_repeats_nothing(
    tiny_set: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one = study(tiny_set, tmp_path, [32], [0], device="cpu", options=OPTIONS)
    assert len(one.tables) == 1
    weights = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("best.safetensors")}
    with caplog.at_level("INFO", "cxrfast"):
        both = study(tiny_set, tmp_path, [32, 64], [0], device="cpu", options=OPTIONS)
    assert [run.name for run in Run.find(tmp_path)] == [f"shufflenet_v2_x0_5-{scale}/fold-0" for scale in (32, 64)]
    assert len(both.tables) == 2, "two scales make an ensemble"
    assert {p: p.stat().st_mtime_ns for p in weights} == weights
    assert f"{NAME}/fold-0 is done already" in caplog.text


@pytest.mark.slow
def test_a_study_trains_with_several_processes_and_reports_the_time_left(
    tiny_set: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = {**OPTIONS, "micro_batch": 4, "views": ("AP", "PA")}
    with caplog.at_level("INFO", "cxrfast"):
        study(tiny_set, tmp_path, [32], [1, 2], nproc=2, device="cpu", options=options)
    assert len(re.findall(r"study: 1 run left; \d+s at most, 0.\d\d GPU-hours\n", caplog.text)) == 1
    runs = Run.find(tmp_path)
    assert [(run.is_done, run.config.views, run.config.fold) for run in runs] == [
        (True, ("AP", "PA"), k) for k in (1, 2)
    ]


def damaged_run(shards: Path, runs: Path, fold: int) -> Path:
    """Folder of a run that no training can resume."""
    plan = make_plan(shards, runs, [32], [fold], device="cpu", options=OPTIONS)
    config = plan.config(32, fold, "cpu")
    table = read_rows(shards / "rows.parquet")
    run = Run.start(
        plan.runtime.runs / plan.run_name(32, fold), config, shards, select_rows(table, config, table["row"].to_numpy())
    )
    (run.folder / "last.pt").write_bytes(b"no checkpoint")
    return run.folder


def arguments(shards: Path, runs: Path, *more: object) -> list[str]:
    options = [f"--{name.replace('_', '-')}={value}" for name, value in OPTIONS.items()]
    return ["study", str(shards), str(runs), "--scale", "32", "--device", "cpu", *options, *map(str, more)]


def test_a_run_that_fails_is_named_and_ends_the_study(tiny_set: Path, tmp_path: Path) -> None:
    damaged_run(tiny_set, tmp_path, 0)
    done = CliRunner().invoke(cli, arguments(tiny_set, tmp_path, "--fold", 0, "--fold", 1))
    assert done.exit_code == 2
    assert f"{NAME}/fold-0" in done.stderr
    assert "last.pt is damaged" in done.stderr
    assert not (tmp_path / NAME / "fold-1").exists()


def test_keep_going_carries_out_the_rest_and_reports_the_failures_last(tiny_set: Path, tmp_path: Path) -> None:
    damaged_run(tiny_set, tmp_path, 0)
    done = CliRunner().invoke(cli, arguments(tiny_set, tmp_path, "--fold", 0, "--fold", 1, "--keep-going"))
    assert done.exit_code == 2, done.output
    assert "AUROC, test rows" in done.stdout
    assert (tmp_path / "report.html").exists()
    assert "1 run failed" in done.stderr.strip().splitlines()[-2]
    assert "fold-0/last.pt is damaged" in done.stderr.strip().splitlines()[-1]


@pytest.mark.slow
def test_a_stopped_study_leaves_no_process_behind(tiny_set: Path, tmp_path: Path) -> None:
    fields = {**OPTIONS, "epochs": 50, "micro_batch": 4}
    options = [f"--{name.replace('_', '-')}={value}" for name, value in fields.items()]
    command = ["study", tiny_set, tmp_path, "--scale", "32", "--fold", "0", "--device", "cpu", "--nproc", "2", *options]
    process = subprocess.Popen([sys.executable, "-m", "cxrfast", *map(str, command)], stderr=subprocess.DEVNULL)
    metrics = tmp_path / NAME / "fold-0" / "metrics.jsonl"
    while not metrics.exists():
        assert process.poll() is None
        time.sleep(0.1)
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) >= 3, "torchrun and two ranks"
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 143
    _, alive = psutil.wait_procs(children, timeout=5)
    assert not alive
