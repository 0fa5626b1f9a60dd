import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from commands import invoke

from cxrfast.runs.run import Run
from cxrfast.shards.format.rows import read_rows
from cxrfast.study.plan import make_plan
from cxrfast.study.study import study
from cxrfast.training.setup import select_rows

FAST = "shufflenet_v2_x0_5"
"""The fastest network; it has no receptive field and no Grad-CAM."""
NAME = f"{FAST}-32"
OPTIONS = {"arch": FAST, "weights": "none", "epochs": 1, "global_batch": 8, "micro_batch": 8, "limit": 16}


@pytest.mark.slow
def test_a_study_has_maps_of_its_networks(tiny_set, tmp_path):
    options, maps = {**OPTIONS, "arch": "densenet121"}, tmp_path / "densenet121-32" / "fold-0" / "maps.zarr"
    html = study(tiny_set, tmp_path, [32], [0], device="cpu", options=options).report.read_text()
    for part in ("Effective receptive fields", "Grad-CAM", "Theoretical, px", ">2071<"):
        assert part in html
    assert list(tmp_path.glob("*/fold-0/gradcam-*.png"))
    before = maps.stat().st_mtime_ns
    study(tiny_set, tmp_path, [32], [0], device="cpu", options=options)
    assert maps.stat().st_mtime_ns == before


def test_a_study_trains_what_is_missing_and_repeats_nothing(tiny_set, tmp_path, caplog):
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
def test_a_study_trains_with_several_processes_and_reports_the_time_left(tiny_set, tmp_path, caplog):
    options = {**OPTIONS, "micro_batch": 4, "views": ("AP", "PA")}
    with caplog.at_level("INFO", "cxrfast"):
        study(tiny_set, tmp_path, [32], [1, 2], nproc=2, device="cpu", options=options)
    assert len(re.findall(r"study: 1 run left; \d+s at most, 0.\d\d GPU-hours\n", caplog.text)) == 1
    runs = Run.find(tmp_path)
    assert [(run.is_done, run.config.views, run.config.fold) for run in runs] == [
        (True, ("AP", "PA"), k) for k in (1, 2)
    ]


def command(shards: Path, runs: Path, *more: str, **options: int) -> list[str]:
    given = [f"--{name.replace('_', '-')}={value}" for name, value in {**OPTIONS, **options}.items()]
    return ["study", str(shards), str(runs), "--scale=32", "--device=cpu", "--fold=0", *given, *more]


def test_a_run_that_fails_is_named_and_ends_the_study_unless_it_shall_keep_going(tiny_set, tmp_path):
    plan = make_plan(tiny_set, tmp_path, [32], [0], device="cpu", options=OPTIONS)
    config, table = plan.config(32, 0, "cpu"), read_rows(tiny_set / "rows.parquet")
    run = Run.start(
        tmp_path / plan.run_name(32, 0), config, tiny_set, select_rows(table, config, table["row"].to_numpy())
    )
    (run.folder / "last.pt").write_bytes(b"no checkpoint")
    done = invoke(*command(tiny_set, tmp_path, "--fold=1"))
    assert done.exit_code == 2
    assert f"{NAME}/fold-0" in done.stderr
    assert "last.pt is damaged" in done.stderr
    assert not (tmp_path / NAME / "fold-1").exists()

    done = invoke(*command(tiny_set, tmp_path, "--fold=1", "--keep-going"))
    assert done.exit_code == 2, done.output
    assert "AUROC, test rows" in done.stdout
    assert (tmp_path / "report.html").exists()
    assert "1 run failed" in done.stderr.strip().splitlines()[-2]
    assert "fold-0/last.pt is damaged" in done.stderr.strip().splitlines()[-1]


@pytest.mark.slow
def test_a_stopped_study_leaves_no_process_behind(tiny_set, tmp_path):
    given = command(tiny_set, tmp_path, "--nproc=2", epochs=50, micro_batch=4)
    process = subprocess.Popen([sys.executable, "-m", "cxrfast", *given], stderr=subprocess.DEVNULL)
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
