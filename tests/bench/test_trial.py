"""bench/gpu_trial.sh, rehearsed whole on a CPU, and what its summary makes of results."""

import json
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from commands import run
from runs import make_run

from cxrfast.bench.trial import compare_runs, rates, read_steps, trial
from cxrfast.pipelines import dali
from cxrfast.pipelines.loader import Rates

SCRIPT = Path(__file__).parents[2] / "bench" / "gpu_trial.sh"


@pytest.mark.slow
@pytest.mark.skipif(not dali.available(), reason="NVIDIA DALI is not installed")
def test_a_rehearsal_goes_through_every_step_without_a_failing_line(tmp_path):
    environment = {"TRIAL_REHEARSAL": "1", "TRIAL_WORK": str(tmp_path / "work"), "PYTHON": sys.executable}
    printed = []
    for call in ("1", "2"):
        done = run("bash", SCRIPT, call, tmp_path / "out", timeout=1500, **environment)
        assert done.returncode == 0, done.stdout + done.stderr
        printed.append(done.stdout)
    found = json.loads((tmp_path / "out" / "trial.json").read_text())
    assert {step["outcome"] for step in found["steps"]} == {"ok"}
    assert [step["name"] for step in found["steps"]] == [
        "versions",
        "ladder-64",
        "train-host",
        "deterministic-1",
        "deterministic-2",
        "ladder-32",
        "ladder-large-batch",
        "train-dali",
        "checkup-64",
        "step-64",
        "step-32",
        "load-64",
        "load-32",
        "checkup-32",
    ]
    measured = {f"{what}-{scale}" for what in ("ladder", "load", "step") for scale in (32, 64)}
    assert found["results"].keys() == {"ladder-large-batch", *measured}
    assert [finding["is_right"] for finding in found["findings"]] == [True, True]
    assert found["rates"]  # of the scales whose engines there was time for
    assert {rates["scale"] for rates in found["rates"]} <= {32, 64}
    assert min(min(rates.values()) for rates in found["rates"]) > 0
    text = (tmp_path / "out" / "trial.md").read_text()
    assert f"Rates(scale={found['rates'][0]['scale']}, host=" in text
    assert str(tmp_path) not in text + json.dumps(found), "a folder of this machine"
    assert "right: training losses with host and with dali, within 1%" in printed[1]
    with tarfile.open(tmp_path / "out" / "all.tar.gz") as everything:
        for name in ("checkup-64", "checkup-32"):
            said = everything.extractfile(f"./{name}.txt")
            assert said is not None
            assert b"FAILED" not in said.read()
        assert "./step-32/bench.png" in everything.getnames()


def test_losses_that_differ_and_steps_that_failed_are_reported(tmp_path):
    for dali_loss, is_right in ((0.5, True), (0.504, True), (0.51, False)):
        runs = {
            f"train-{engine}": SimpleNamespace(metrics=lambda loss=loss: [{"train_loss": loss}])
            for engine, loss in (("host", 0.5), ("dali", dali_loss))
        }
        assert [finding["is_right"] for finding in compare_runs(runs)] == [is_right]  # type: ignore[arg-type]
    steps = "1\tversions\t0\t3\tpython -c print\n"
    for last, is_right in (("", True), ("2\tlast\t1\t3\tpython\n", False), ("2\tlast\t124\t3\tpython\n", False)):
        (tmp_path / "steps.tsv").write_text(steps + last)
        assert trial(tmp_path, tmp_path / "runs") is is_right
    assert "| 2 | last | timeout | 3 |" in (tmp_path / "trial.md").read_text()


def test_weights_of_deterministic_runs_are_compared_by_value(tmp_path):
    for last, is_right in ((1.0, True), (torch.nextafter(torch.tensor(1.0), torch.tensor(2.0)).item(), False)):
        runs = {}
        for number, value in ((1, 1.0), (2, last)):
            run = make_run(tmp_path / str(is_right), 32, name=f"deterministic-{number}")
            run.write_weights({"weight": torch.tensor([value])})
            runs[f"deterministic-{number}"] = run
        assert len({run.weights_path.read_bytes() for run in runs.values()}) == 2, "each file names its run"
        assert [finding["is_right"] for finding in compare_runs(runs)] == [is_right]


def test_steps_are_read_without_folders(tmp_path):
    path = tmp_path / "steps.tsv"
    path.write_text(
        "1\tone\t0\t12\t/usr/bin/python3 -m cxrfast --out /tmp/x/y\n2\ttwo\tskipped\t0\tx\n2\tthree\t137\t9\ty\n"
    )
    one, two, three = read_steps(path)
    command = "python3 -m cxrfast --out y"
    assert one == {"call": 1, "name": "one", "outcome": "ok", "seconds": 12, "command": command}
    assert (two["outcome"], three["outcome"]) == ("skipped", "timeout")


def test_what_the_choice_of_an_engine_needs_is_taken_from_the_benchmarks():
    load = {
        "workers": 8,
        "engines": [{"scale": 256, "host": {"A": 9e4, "B": 14_000}, "dali": {"A": {}, "B": {"0": 9_000, "1": 2e4}}}],
    }
    ladder = {"lines": [{"scale": 256, "rounds": [2_000, 3_000, 2_500]}, {"scale": 512, "rounds": None}]}
    compiled = {"lines": [{"scale": 256, "rounds": [4_000]}]}
    found = rates({"load-256": load, "ladder": ladder, "compiled-256": compiled})
    assert found == [Rates(scale=256, host=1_750, dali=20_000, step=4_000)]
    step = {"lines": [{"scale": 256, "rounds": {"bare": [4_100]}}]}
    assert rates({"load-256": load, "ladder": ladder, "step-256": step})[0].step == 4_100
    assert rates({"load-256": load}) == [], "without a step's rate nothing can be compared"


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        ([], {}, "usage: bench/gpu_trial.sh 1|2"),
        (["3"], {}, "usage: bench/gpu_trial.sh 1|2"),
        (["1", "/proc/nowhere"], {}, "/proc/nowhere cannot be written"),
        (["1"], {"TRIAL_WORK": "occupied"}, "occupied holds something else"),
        (["1"], {"PACKAGES": "absent"}, "*.tar.xz cannot be unpacked"),
        (["1"], {"PYTHON": "no-python"}, "no-python is not a program"),
    ],
)
def test_bad_input_is_refused_before_anything_runs(arguments, environment, message, tmp_path):
    (tmp_path / "occupied").mkdir()
    (tmp_path / "occupied" / "paper.md").touch()
    given = {"OUT": "out", "TRIAL_WORK": "work", "PYTHON": sys.executable, **environment}
    done = run("bash", SCRIPT, *arguments, folder=tmp_path, timeout=60, **given)
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1]
    assert (tmp_path / "occupied" / "paper.md").exists()
