"""What a dry run says of a study, and that it writes nothing."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from commands import invoke
from runs import rewrite_config
from sets import relabel_rows

from cxrfast.errors import RunError
from cxrfast.files import write_json
from cxrfast.runs.run import Run
from cxrfast.shards.format.rows import read_rows
from cxrfast.study.forecast import Forecast, forecast, jobs, parse_walltime, projection
from cxrfast.study.plan import Plan, make_plan
from cxrfast.training.setup import select_rows
from cxrfast.units import duration

OPTIONS: dict[str, Any] = {"weights": "none", "epochs": 10, "global_batch": 8, "micro_batch": 4}


def planned(shards: Path, runs: Path, scales: list[int], folds: list[int], nproc: int = 1, **options: Any) -> Plan:
    return make_plan(shards, runs, scales, folds, nproc=nproc, device="cpu", options={**OPTIONS, **options})


def started(plan: Plan, scale: int = 32, fold: int = 0, **state: Any) -> Run:
    """A run on disk as a training leaves it."""
    config = plan.config(scale, fold, "cpu")
    table = read_rows(plan.runtime.shards / "rows.parquet")
    rows = select_rows(table, config, table["row"].to_numpy())
    run = Run.start(plan.runtime.runs / plan.run_name(scale, fold), config, plan.runtime.shards, rows)
    if state:
        run.set_state(**state)
        (run.folder / "last.pt").write_bytes(b"x")
    return run


def refusals(result: Forecast) -> str:
    with pytest.raises(RunError) as caught:
        result.check()
    return str(caught.value)


def test_a_study_not_begun(tiny_set: Path, tmp_path: Path) -> None:
    result = forecast(planned(tiny_set, tmp_path / "runs", [32, 64], [0, 3]), {64: 10.0})
    result.check()
    assert [(o.name, o.what) for o in result.outlooks] == [
        (f"densenet121-{scale}/fold-{fold}", "start") for scale in (32, 64) for fold in (0, 3)
    ]
    assert not (tmp_path / "runs").exists()
    first, _, third, _ = result.outlooks
    assert list(first.rows) == ["train", "val", "test"]
    assert sum(first.rows.values()) <= 150
    assert first.images == first.rows["train"] // 8 * 8
    assert (first.seconds, first.images_per_s) == (None, None), "nothing is known of 32 px"
    assert third.seconds == pytest.approx(10 * (third.images + third.rows["val"] / 3) / 10.0)
    assert 4 * result.outlooks[0].room == result.room
    assert 7 * 4 * 6.9e6 < first.room < 7 * 4 * 7.2e6, "seven times DenseNet121's 7 million weights of 4 bytes"


def test_what_is_there_is_taken_up(tiny_set: Path, tmp_path: Path) -> None:
    plan = planned(tiny_set, tmp_path, [32], [0, 1, 2, 3, 4])
    started(plan, fold=0, state="done", epoch=10).add_metrics({"epoch": 0, "images_per_s": 50.0})
    resumed = started(plan, fold=1, state="preempted", epoch=4)
    resumed.add_metrics({"epoch": 0, "images_per_s": 25.0})
    started(plan, fold=2)
    started(plan, fold=4, state="running", epoch=0)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    result = forecast(plan)
    result.check()
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    done, resume, begun, fresh, alive = result.outlooks
    assert [o.what for o in (done, resume, begun, fresh)] == ["done", "resume in epoch 5", "start", "start"]
    assert alive.what == "resume in epoch 1, runs now"
    assert (done.seconds, done.room) == (0.0, 0)
    assert resume.seconds == pytest.approx(6 * (resume.images + resume.rows["val"] / 3) / 25.0), "its own rate"
    assert resume.weights == "last.pt"
    assert begun.images_per_s == fresh.images_per_s, "that of another run of the scale"


@pytest.mark.parametrize("wrong", ["x", [1], None, 10**400, float("nan"), float("inf")])
def test_progress_of_the_wrong_kind_counts_as_none(tiny_set: Path, tmp_path: Path, wrong: Any) -> None:
    plan = planned(tiny_set, tmp_path, [32], [0])
    run = started(plan, state="running", epoch=wrong)
    write_json(run.state_path, run.state() | {"time": wrong})
    lines = [{"epoch": wrong, "images_per_s": 5.0}, {"epoch": 1, "images_per_s": wrong}, {"images_per_s": 5.0}]
    run.metrics_path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (outlook,) = forecast(plan).outlooks
    assert (outlook.what, outlook.images_per_s) == ("resume in epoch 1", None)


def test_every_reason_is_listed(tiny_set: Path, tmp_path: Path) -> None:
    started(planned(tiny_set, tmp_path, [32], [0], epochs=3, seed=3))
    damaged = started(planned(tiny_set, tmp_path, [32], [1]), fold=1)
    (damaged.folder / "config.json").write_text("{")
    result = forecast(planned(tiny_set, tmp_path, [32, 48], [0, 1, 2], weights=str(tmp_path / "none.pth")))
    text = refusals(result)
    assert text.startswith("this study cannot run; nothing was started or written:\n  densenet121-32/fold-0: ")
    assert "another configuration (" in text
    assert "seed: 0, not 3" in text
    assert "epochs" not in text, "which may be more later"
    assert "fold-1/config.json is damaged" in text
    assert "densenet121-32/fold-2: --weights" in text
    assert text.count("holds no shards at 48 px (scales there: 32, 64)") == 3
    assert {o.what for o in result.outlooks} == {"refused"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nproc": 3}, "3 ranks cannot share the 2 micro-batches"),
        ({"global_batch": 512}, "training rows do not fill one global batch"),
        ({"arch": "densenet"}, "architecture 'densenet' is unknown"),
    ],
)
def test_what_cannot_train_is_refused(tiny_set: Path, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    assert message in refusals(forecast(planned(tiny_set, tmp_path, [32], [0], **options)))


def test_runs_of_another_set_are_refused(tiny_set: Path, tmp_path: Path) -> None:
    plan, runs = planned(tiny_set, tmp_path / "runs", [32], [0]), tmp_path / "runs"
    for run in (started(plan), started(plan, fold=4)):
        rewrite_config(run, set_id="0" * 16)
    text = refusals(forecast(plan))
    assert "densenet121-32/fold-0 was trained on set 0000000000000000" in text
    assert "densenet121-32/fold-4 was trained on set" in text, "though it is not of this study"
    assert text.count(f"{runs}/densenet121-32/fold-0 was trained") == 1


def test_runs_made_before_a_relabelling_are_refused(folder: Path, tmp_path: Path) -> None:
    plan, runs = planned(folder, tmp_path / "runs", [32], [0, 1, 2]), tmp_path / "runs"
    done, begun = started(plan, state="done", epoch=10), started(plan, fold=1, state="preempted", epoch=4)
    other = started(planned(folder, runs, [64], [4]), 64, 4, state="done", epoch=10)
    forecast(plan).check()
    rows = done.rows()
    row = int(rows["row"][rows["Support Devices"] == 1].iloc[0])
    relabel_rows(folder, tmp_path, {(row, "Support Devices"): 0.0})
    result = forecast(plan)
    text = refusals(result)
    for run in (done, begun, other):
        assert (
            f"{run.folder} was trained before {folder} was relabelled: 1 label of 1 row differs, such as Support Devices of row {row}: "
            "1 then, 0 now; choose another RUNS to train with the labels of now, or relabel the set with the former table"
        ) in text
    assert [o.what for o in result.outlooks] == ["refused", "refused", "start"]
    assert text.count("was relabelled") == 3


def test_a_run_that_starts_over_takes_the_labels_of_now(folder: Path, tmp_path: Path) -> None:
    """Such as one that was killed before its first checkpoint, or whose checkpoint was deleted since it was damaged."""
    plan = planned(folder, tmp_path / "runs", [32], [0])
    run = started(plan)
    run.set_state("running", epoch=1)
    run.add_metrics({"epoch": 0})
    rows = run.rows()
    row = int(rows["row"][rows["Support Devices"] == 1].iloc[0])
    relabel_rows(folder, tmp_path, {(row, "Support Devices"): 0.0})
    result = forecast(plan)
    result.check()
    assert result.outlooks[0].what == "start"
    assert started(plan).rows().set_index("row").loc[row, "Support Devices"] == 0


def test_a_precision_left_to_the_machine_may_differ(tiny_set: Path, tmp_path: Path) -> None:
    started(planned(tiny_set, tmp_path, [32], [0], precision="fp16"), state="done", epoch=1)
    assert forecast(planned(tiny_set, tmp_path, [32], [0])).outlooks[0].what == "done"
    assert "precision: bf16, not fp16" in refusals(forecast(planned(tiny_set, tmp_path, [32], [0], precision="bf16")))


def test_too_little_room(tiny_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=10**6)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert "checkpoints need 1" in refusals(forecast(planned(tiny_set, tmp_path, [32], [0])))


def test_the_table_shows_rows_batches_and_hours(tiny_set: Path, tmp_path: Path) -> None:
    done = invoke(
        *("study", str(tiny_set), str(tmp_path / "runs"), "--scale", "32", "--scale", "64", "--fold", "0"),
        *("--weights", "none", "--global-batch", "8", "--micro-batch", "4", "--nproc", "2", "--dry-run"),
        *("--rate", "32=0.5", "--walltime", "01:00:00", "--device", "cuda"),
    )
    assert done.exit_code == 0, done.output
    for text in ("densenet121-32/fold-0", "start", "2 processes each", "GPU-hours", "jobs", "?", "are free"):
        assert text in " ".join(done.output.split())
    assert not (tmp_path / "runs").exists()


def test_a_refused_study_has_exit_code_2_and_its_reasons_on_stderr(tiny_set: Path, tmp_path: Path) -> None:
    arguments = ["study", str(tiny_set), str(tmp_path / "runs"), "--scale", "48", "--weights", "none"]
    for more in (["--dry-run"], ["--sbatch", str(tmp_path / "jobs")], ["--device", "cpu"]):
        done = invoke(*arguments, *more)
        assert done.exit_code == 2
        assert done.stderr.count("holds no shards at 48 px") == 5
    assert not list(tmp_path.iterdir())


def test_finished_runs_tell_what_the_rest_will_take(tiny_set: Path, tmp_path: Path) -> None:
    plan = planned(tiny_set, tmp_path, [32, 64], [0, 3], nproc=2)
    started(plan, state="done", epoch=10).add_metrics({"epoch": 0, "images_per_s": 0.1})
    left = forecast(plan).outlooks[1:]
    seconds = left[0].work / 0.1
    time = f"{duration(seconds)} at most, {2 * seconds / 3600:,.2f} GPU-hours"
    assert projection(plan, left) == f"study: 3 runs left; 1 of them {time}; no rate is known yet at 64 px"
    assert projection(plan, left[:1]) == f"study: 1 run left; {time}"
    assert projection(plan, left[1:]) == "study: 2 runs left; no rate is known yet at 64 px"


def test_smaller_sizes_cost_their_area(tiny_set: Path, tmp_path: Path) -> None:
    whole = forecast(planned(tiny_set, tmp_path, [64], [0])).outlooks[0]
    plan = planned(tiny_set, tmp_path, [64], [0], sizes=((32, 4),))
    resized = forecast(plan).outlooks[0]
    assert whole.work == pytest.approx(10 * whole.images + 10 * whole.rows["val"] / 3)
    assert resized.work == pytest.approx(7 * whole.images + 10 * whole.rows["val"] / 3)
    started(plan, scale=64).add_metrics({"epoch": 3, "size": 32, "images_per_s": 400.0})
    assert forecast(plan).outlooks[0].images_per_s == 100.0, "what 400 at half the side are worth at the whole one"


def test_wall_times() -> None:
    assert parse_walltime("24:00:00") == 86400
    assert parse_walltime("1-00:00:10") == 86410
    for text in ("24", "24:00", "1:60:00", "00:02:00", "", "-1:00:00"):
        with pytest.raises(RunError, match="such as 24:00:00"):
            parse_walltime(text)
    assert jobs(3600 * 23, 86400) == 1
    assert jobs(86400, 86400) == 2, "what saving takes is not counted on"
