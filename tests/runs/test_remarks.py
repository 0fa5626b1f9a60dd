"""What is said about runs that are unfinished or whose set was relabelled, and that nothing is said about others."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from runs import make_untrained, rewrite_config
from sets import relabel_rows

from cxrfast.runs.remarks import LabelsNow, remarks_on, unfinished
from cxrfast.runs.run import Run
from cxrfast.shards.format.rows import read_rows

PARTS = ["train", "val", "test"] * 50


@pytest.fixture
def run(folder: Path, tmp_path: Path) -> Run:
    """A finished run of all rows of a set of its own."""
    run = make_untrained(tmp_path / "runs", folder, PARTS)
    run.set_state("done", epoch=2)
    return run


def a_label(run: Run, value: float, at: int = 0) -> tuple[int, str]:
    """Row and name of a label of the run that is `value`."""
    rows = run.rows()
    names = list(run.config.labels)
    row, label = np.argwhere(rows[names].to_numpy() == value)[at]
    return int(rows["row"].iloc[row]), names[label]


def test_a_finished_run_with_the_labels_of_its_set_has_no_remark(run: Run) -> None:
    assert remarks_on([run]) == {run.folder: ""}


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ({"state": "preempted", "epoch": 1, "epochs": 50}, "preempted after 1 of 50 epochs"),
        ({"state": "running", "epoch": 0, "epochs": 1}, "running after 0 of 1 epoch"),
        ({"state": "failed"}, "failed"),
        ({"state": "failed", "epoch": "two"}, "failed"),
        ({"state": ["done"]}, "state.json does not say that it is done"),
        ({"state": "finished"}, "state.json does not say that it is done"),
        ({}, "state.json is missing"),
        (None, "state.json is missing"),
        ("{", "state.json is damaged"),
        ([], "state.json is damaged"),
    ],
)
def test_a_run_that_is_not_known_to_be_done_is_unfinished(run: Run, content: object, text: str) -> None:
    if content is None:
        run.state_path.unlink()
    else:
        run.state_path.write_text(content if isinstance(content, str) else json.dumps(content))
    assert unfinished(run) == text
    assert remarks_on([run]) == {run.folder: f"unfinished, {text}"}


def test_a_run_that_missed_rows_of_its_set_says_so(run: Run) -> None:
    rewrite_config(run, allow_partial=True)
    assert remarks_on([Run.open(run.folder)]) == {run.folder: "trained on a partly built set (--allow-partial)"}


def test_changed_labels_are_counted(run: Run, folder: Path, tmp_path: Path) -> None:
    one, other = a_label(run, 1.0), a_label(run, 0.0)
    relabel_rows(folder, tmp_path, {one: 0.0, other: -1.0})
    change = LabelsNow.of(run).compare(run)
    rows = len({one[0], other[0]})
    assert (change.labels, change.rows, change.gone, change.new_rows) == (2, rows, (), 0)
    first, (then, now) = min((one, ("1", "0")), (other, ("0", "-1")))
    assert change.example == f"{first[1]} of row {first[0]}: {then} then, {now} now"
    assert remarks_on([run])[run.folder].startswith("its set has other labels now, 2 labels of ")


def test_the_same_labels_from_another_table_are_no_change(run: Run, folder: Path, tmp_path: Path) -> None:
    relabel_rows(folder, tmp_path, {})
    assert remarks_on([run]) == {run.folder: ""}


def test_rows_that_got_their_first_label_since_are_counted(run: Run, folder: Path, tmp_path: Path) -> None:
    """The run leaves out rows without any label."""
    rows = run.rows()
    relabel_rows(folder, tmp_path, {})
    rows[rows["row"] != 7].to_parquet(run.rows_path)
    change = LabelsNow.of(run).compare(run)
    assert (change.labels, change.new_rows) == (0, 1)
    assert change.in_words() == "1 row without any label then has one now"
    assert remarks_on([run])[run.folder] == "its set has other labels now, 1 row labelled since"


@pytest.mark.parametrize("options", [{"limit": 50}, {"subset": "0" * 16}, {"views": ("ZZ",)}])
def test_rows_that_were_left_out_for_another_reason_are_not(
    run: Run, folder: Path, tmp_path: Path, options: dict
) -> None:
    rows = run.rows()
    relabel_rows(folder, tmp_path, {})
    rows[rows["row"] != 7].to_parquet(run.rows_path)
    reopened = rewrite_config(run, **options)
    assert remarks_on([reopened]) == {run.folder: ""}


def without_row(run: Run, row: int) -> None:
    rows = run.rows()
    rows[rows["row"] != row].to_parquet(run.rows_path)


def test_a_run_of_an_earlier_version_that_missed_rows_of_its_set_says_so(run: Run, folder: Path) -> None:
    """It was trained before the build of its set was finished, and did not record that."""
    without_row(run, 7)
    assert remarks_on([run]) == {run.folder: "its set has 1 row now that it did not have"}
    assert LabelsNow.of(run).compare(run) is None
    (folder / "quarantine.csv").unlink()
    assert remarks_on([run]) == {run.folder: ""}, "while the set is built, nobody knows"


def test_rows_in_quarantine_are_not_missed(run: Run, folder: Path) -> None:
    without_row(run, 7)
    (folder / "quarantine.csv").write_text('row,path,reason\n7,"a, ""b"".jpg",truncated\n')
    assert remarks_on([run]) == {run.folder: ""}


@pytest.mark.parametrize(
    "text", ["", "row,path,reason\n7x,a,b\n", "row,path\n99999999999999999999,a\n", "a\n1\n", "row\n-500\n"]
)
def test_a_damaged_quarantine_says_nothing_of_rows(run: Run, folder: Path, text: str) -> None:
    without_row(run, 7)
    (folder / "quarantine.csv").write_text(text)
    assert remarks_on([run])[run.folder] in ("", "its set has 1 row now that it did not have")


def test_a_label_that_the_set_lost_is_named(run: Run, folder: Path, tmp_path: Path) -> None:
    relabel_rows(folder, tmp_path, {}, dropped=("Fracture",))
    change = LabelsNow.of(run).compare(run)
    assert change.gone == ("Fracture",)
    assert change.in_words().endswith("the set no longer has Fracture")


def test_blank_labels_that_were_filled_in_are_counted(run: Run, folder: Path, tmp_path: Path) -> None:
    rows = run.rows()
    labels = list(run.config.labels)
    row, j = np.argwhere(rows[labels].isna().to_numpy())[0]
    relabel_rows(folder, tmp_path, {(int(rows["row"].iloc[row]), labels[j]): 1.0})
    assert f"{labels[j]} of row {rows['row'].iloc[row]}: blank then, 1 now" in LabelsNow.of(run).compare(run).in_words()


@pytest.mark.parametrize("what", ["gone", "another set", "damaged", "a pipe", "no path"])
def test_nothing_is_said_of_a_set_that_cannot_be_read(run: Run, folder: Path, tmp_path: Path, what: str) -> None:
    relabel_rows(folder, tmp_path, {a_label(run, 1.0): 0.0})
    assert remarks_on([run])[run.folder]
    if what == "gone":
        shutil.rmtree(folder)
    elif what == "another set":
        rewrite_config(run, set_id="0" * 32)
    elif what == "damaged":
        (folder / "rows.parquet").write_bytes(b"PAR1")
    elif what == "a pipe":
        for name in ("rows.parquet", "set.json"):
            (folder / name).unlink()
            (folder / name).symlink_to("/dev/zero")
    elif what == "no path":
        config = json.loads(run.config_path.read_text())
        config["shards"] = "set\0"
        run.config_path.write_text(json.dumps(config))
    reopened = Run.open(run.folder)
    assert remarks_on([reopened]) == {run.folder: ""}


def test_the_table_of_a_set_is_read_once_for_all_its_runs(
    run: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [run, *(make_untrained(tmp_path / "runs", folder, PARTS, fold=fold) for fold in (1, 2))]
    opened = []
    read = LabelsNow.of
    monkeypatch.setattr(LabelsNow, "of", classmethod(lambda cls, run: opened.append(run) or read(run)))
    assert len(remarks_on(runs)) == 3
    assert len(opened) == 1


def test_only_the_asked_columns_of_a_table_are_read_and_checked(folder: Path) -> None:
    table = read_rows(folder / "rows.parquet", columns=["row", "view", "Edema"])
    assert list(table) == ["row", "view", "Edema"]
    pd.testing.assert_frame_equal(table, read_rows(folder / "rows.parquet")[["row", "view", "Edema"]])
