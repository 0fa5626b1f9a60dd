"""One process at a time writes into a run: another is refused, a killed one never blocks, a lost right writes nothing."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from commands import invoke
from runs import make_run, make_untrained

from cxrfast.analysis.gradcam import gradcam_run, save_figure
from cxrfast.analysis.receptive_field import erf
from cxrfast.errors import RunError
from cxrfast.runs.folder import RunFolder
from cxrfast.runs.lease import InUse, locked
from cxrfast.runs.run import Run

HOLD = """
import sys, time
from pathlib import Path
from cxrfast.runs.folder import RunFolder
from cxrfast.runs.lease import locked
with locked(RunFolder(Path(sys.argv[1])), "training"):
    print("held", flush=True)
    time.sleep(60)
"""


@contextmanager
def held(folder: Path, **environment: str) -> Iterator["subprocess.Popen[str]"]:
    """A process that holds the lease of a run as a training does; killed at the end."""
    command = [sys.executable, "-c", HOLD, folder]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **environment}) as process:
        assert process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


def test_a_second_process_is_refused_with_the_name_of_the_first_and_what_it_does(tmp_path: Path) -> None:
    run = make_run(tmp_path, 32, quality=None)
    with held(run.folder, SLURM_JOB_ID="4711") as other:
        message = rf"fold-0 is in use by process {other.pid} on .*, job 4711 \(training\): wait for it or end it"
        with pytest.raises(InUse, match=message), run.lock("predicting"):
            pass
    with run.lock("predicting") as mine:
        assert "task=predicting\n" in mine.lease_path.read_text()
        assert mine == run
    assert not run.lease_path.exists()


def test_the_lease_of_a_killed_process_is_taken_over_at_once_and_never_counts_as_a_file_of_the_run(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "densenet121-32" / "fold-0"
    with held(folder) as other:
        other.send_signal(signal.SIGKILL)
        other.wait()
    assert [path.name for path in folder.iterdir()] == ["lease.lock"]
    assert RunFolder.below(tmp_path) == []
    run = make_run(tmp_path, 32, quality=None)
    assert [found.name for found in Run.find(tmp_path)] == ["densenet121-32/fold-0"]
    with run.lock("predicting"):
        pass
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "rows.parquet"]


def test_folders_that_were_made_for_a_lease_are_removed_if_nothing_is_written(tmp_path: Path) -> None:
    run = RunFolder.of(tmp_path / "runs", "densenet121", 32, 0)
    with pytest.raises(KeyError), locked(run, "training"):
        raise KeyError
    assert not list(tmp_path.iterdir())
    with locked(run, "training"):
        run.config_path.write_text("{}")
    assert [path.name for path in run.folder.iterdir()] == ["config.json"]


def test_nothing_is_written_by_a_process_that_lost_its_lease(tmp_path: Path) -> None:
    run = make_run(tmp_path, 32)
    run.set_state("done")
    before = {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()}
    with run.lock("training") as mine:
        run.lease_path.unlink()
        run.lease_path.write_text("of another process")
        predictions = {"test": run.read_predictions("test")}
        for write in (
            lambda: mine.set_state("failed"),
            lambda: mine.add_metrics({"epoch": 0}),
            lambda: mine.write_checkpoint({}),
            lambda: mine.write_weights({}),
            lambda: mine.write_predictions(predictions),
            lambda: mine.add_maps({}, {}),
        ):
            with pytest.raises(RunError, match="another process took over, because this one gave no sign of life"):
                write()
    assert run.lease_path.read_text() == "of another process"
    run.lease_path.unlink()
    assert {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()} == before


def test_what_writes_into_a_run_waits_for_no_other_and_is_refused(tiny_set: Path, tmp_path: Path) -> None:
    parts = ["train"] * 6 + ["val"] * 4 + ["test"] * 4
    run = make_untrained(tmp_path, tiny_set, parts, Pleural_Effusion=[1.0] * 14)
    before = {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()}
    options = {"arch": run.config.arch, "weights": "none", "global-batch": 4, "micro-batch": 4}
    words = [f"--{name}={value}" for name, value in options.items()]
    with held(run.folder) as other:
        for command in (
            ("train", "--shards", tiny_set, "--runs", tmp_path, "--scale=64", "--device=cpu", *words),
            ("predict", run.folder, "--device=cpu"),
            ("erf", run.folder, "--device=cpu"),
            ("gradcam", run.folder, "--label=Pleural Effusion", "--device=cpu"),
        ):
            done = invoke(*command)
            assert done.exit_code == 2, (command, done.output, done.exception)
            assert f"is in use by process {other.pid} on " in done.stderr
            assert "(training)" in done.stderr
        for writes in (lambda: erf(run), lambda: gradcam_run(run, "Pleural Effusion"), lambda: save_figure(run, "x")):
            with pytest.raises(InUse):
                writes()
        lease = run.lease_path.read_bytes()
    assert lease.startswith(run.lease_path.read_bytes()[:10])
    run.lease_path.unlink()
    assert {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("kind", ["pipe", "folder", "link"])
def test_what_is_no_lease_is_named_and_is_never_waited_for(tmp_path: Path, kind: str) -> None:
    run = make_run(tmp_path, 32, quality=None)
    if kind == "pipe":
        os.mkfifo(run.lease_path)
    elif kind == "folder":
        run.lease_path.mkdir()
    else:
        run.lease_path.symlink_to(run.lease_path)
    with (
        pytest.raises(RunError, match=r"lease\.lock is not a file that cxrfast leaves: delete it"),
        run.lock("predicting"),
    ):
        pass
