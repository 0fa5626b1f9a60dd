"""Folders of runs that come from elsewhere: pipes and devices, damaged JSON and Parquet; a message, never a hang."""

import json
import os
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import zarr
from commands import invoke
from runs import make_run, metrics_line

from cxrfast.errors import RunError
from cxrfast.runs.folder import RunFolder
from cxrfast.runs.run import Run
from cxrfast.runs.status import status

FILES = (
    "config.json",
    "state.json",
    "metrics.jsonl",
    "rows.parquet",
    "last.pt",
    "best.safetensors",
    "predictions.zarr",
)
KINDS = ("pipe", "folder", "loop", "/dev/zero", "dangling")


def replace(path: Path, kind: str) -> None:
    """Put something else in the place of a file or folder."""
    if path.exists():
        path.rename(path.with_name(f"{path.name}.away"))
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to({"loop": path, "dangling": "/nowhere/at/all"}.get(kind, kind))


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = make_run(tmp_path / "runs", 32)
    run.set_state("done", epoch=1)
    run.add_metrics(metrics_line(0))
    run.write_checkpoint({})
    return run


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FILES)
def test_what_is_not_a_file_in_a_run_is_a_message_and_never_waited_for(run: Run, name: str, kind: str) -> None:
    replace(run.folder / name, kind)
    runs = run.folder.parents[1]
    for words in (("status", runs), ("evaluate", runs), ("predict", run.folder, "--device=cpu")):
        done = invoke(*words)
        assert done.exit_code in (0, 2), (words, done.output, done.exception)
        assert done.exception is None or isinstance(done.exception, SystemExit), (words, done.exception)
    if name not in ("last.pt", "best.safetensors", "predictions.zarr") and kind != "dangling":
        assert "damaged" in [line.state for line in status(runs)] or name in ("rows.parquet", "metrics.jsonl")


@pytest.mark.parametrize("kind", ["pipe", "folder", "loop", "/dev/zero"])
def test_each_file_that_is_none_is_named(run: Run, kind: str) -> None:
    read = {
        "config.json": lambda: Run.open(run.folder),
        "state.json": run.state,
        "metrics.jsonl": run.metrics,
        "rows.parquet": run.rows,
        "last.pt": run.read_checkpoint,
        "best.safetensors": run.read_weights,
    }
    for name, reads in read.items():
        if kind == "loop" and name in ("config.json", "state.json", "metrics.jsonl", "last.pt"):
            continue  # as if it were absent
        replace(run.folder / name, kind)
        with pytest.raises(RunError, match=name):
            reads()


@pytest.mark.parametrize("kind", ["pipe", "loop", "/dev/zero", "/etc"])
@pytest.mark.parametrize("name", ["zarr.json", "test/zarr.json", "test/logits/c/0/0", "more"])
def test_what_is_not_a_file_in_an_array_is_named(run: Run, name: str, kind: str) -> None:
    replace(run.predictions_path / name, kind)
    with pytest.raises(
        RunError, match=rf"predictions\.zarr/{name} is neither a file nor a folder: delete .*predictions\.zarr"
    ):
        run.read_predictions("test")
    done = invoke("evaluate", run.folder.parents[1])
    assert done.exit_code == 2, (done.output, done.exception)


def test_an_array_that_claims_more_than_the_memory_is_not_read(run: Run) -> None:
    path = run.predictions_path / "test/logits/zarr.json"
    claimed = json.loads(path.read_text())
    claimed["shape"] = [10**15, 4]
    path.write_text(json.dumps(claimed))
    with pytest.raises(RunError, match=r"test/logits in .* claims .*, more than this machine has: predict again with"):
        run.read_predictions("test")


@pytest.mark.parametrize("name", ["config.json", "state.json", "metrics.jsonl"])
def test_brackets_by_the_thousand_are_damage(run: Run, name: str) -> None:
    (run.folder / name).write_text("[" * 100_000 + "]" * 100_000 + "\n")
    with pytest.raises(RunError, match=f"{name} is damaged"):
        Run.open(run.folder), run.state(), run.metrics()
    assert len(status(run.folder.parents[1])) == 1


@pytest.mark.parametrize(
    "metadata",
    [b"", b"{", b"[]", b'{"columns": 3}', b'{"index_columns": [7], "columns": [], "column_indexes": []}', b"\xff"],
)
def test_damaged_metadata_of_pandas_in_the_rows_is_read_past_or_named(run: Run, metadata: bytes) -> None:
    whole = run.rows()
    table = pq.read_table(run.rows_path)
    pq.write_table(table.replace_schema_metadata({b"pandas": metadata}), run.rows_path)
    try:
        found = run.rows()
    except RunError as error:
        assert "rows.parquet is missing or damaged: restore it" in str(error)  # noqa: PT017
    else:
        assert found.equals(whole)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"epoch": 1, "val_loss": "low"}', r"line 2: Expected `float \| null`, got `str` - at `\$\.val_loss`"),
        ('{"epoch": 1, "seconds": [3]}', r"line 2: .* at `\$\.seconds`"),
        ('{"epoch": 1, "images_per_s": {}}', r"line 2: .* at `\$\.images_per_s`"),
        ('{"epoch": 1, "val_auroc_by_label": {"Edema": "x"}}', r"line 2: .*val_auroc_by_label"),
        ('{"epoch": -1}', r"line 2: .* at `\$\.epoch`"),
        ('{"val_loss": 1.0}', "line 2: .*missing required field `epoch`"),
        ("7", "line 2: "),
        ("", "line 2: "),
    ],
)
def test_a_wrong_line_of_the_metrics_is_named_with_its_field(run: Run, line: str, message: str) -> None:
    with open(run.metrics_path, "a") as file:
        file.write(line + "\n")
    with pytest.raises(RunError, match=rf"metrics\.jsonl is damaged \({message}"):
        run.metrics()


def test_fields_that_an_earlier_version_did_not_write_are_absent(run: Run) -> None:
    run.metrics_path.write_text('{"epoch": 0, "val_loss": 0.5, "more": "of a later version"}\n')
    assert run.metrics() == [{"epoch": 0, "val_loss": 0.5, "more": "of a later version"}]


def test_folders_in_place_of_files_are_messages_when_they_are_written(run: Run) -> None:
    folder = RunFolder(run.folder)
    for path, write in (
        (folder.state_path, lambda: run.set_state("running")),
        (folder.checkpoint_path, lambda: run.write_checkpoint({})),
    ):
        path.unlink()
        path.mkdir()
        with pytest.raises(OSError, match="Is a directory") as caught:  # which the command line turns into one line
            write()
        assert caught.value.filename
        assert not list(run.folder.glob("*.tmp"))


def test_an_array_of_another_kind_is_refused(run: Run) -> None:
    zarr.open_group(run.maps_path, mode="w", zarr_format=2).create_array("erf", data=np.zeros(3))
    with pytest.raises(RunError, match=r"maps\.zarr cannot be read"):
        run.open_maps()
