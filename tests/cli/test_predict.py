"""What `cxrfast predict` makes of its arguments."""

from pathlib import Path

import pytest
from runs import make_run

from cxrfast.cli.predict import Targets, sort_targets
from cxrfast.errors import RunError


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    for scale in (32, 64):
        for fold in (0, 1):
            make_run(tmp_path / "runs", scale, fold, quality=None)
    return tmp_path / "runs"


def test_a_folder_of_runs_stands_for_all_of_them(runs):
    folders = [runs / f"densenet121-{scale}" / f"fold-{fold}" for scale in (32, 64) for fold in (0, 1)]
    assert sort_targets((str(runs),)) == Targets(runs=folders)
    assert sort_targets((str(runs / "densenet121-64"),)) == Targets(runs=folders[2:])
    assert sort_targets(tuple(map(str, folders[1:3]))) == Targets(runs=folders[1:3])


def test_arguments_are_sorted_by_what_they_name(runs, tiny_set, tmp_path):
    fold = runs / "densenet121-32" / "fold-0"
    assert sort_targets((str(fold), str(tiny_set))) == Targets(runs=[fold], sets=[Path(tiny_set)])
    films = (str(tmp_path / "a.png"), "x/*.dcm")
    assert sort_targets((str(fold), *films)) == Targets(runs=[fold], films=list(films))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.json").write_text("{}")
    assert sort_targets((str(tmp_path / "out"), *films)) == Targets(exports=[tmp_path / "out"], films=list(films))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("none", "none is not a run"),
        ("film.png folder", "film.png is not a run"),
        ("{set}", "is not a run"),
        ("{run} {set} film.png", "give a set or films"),
        ("{run} {out} film.png", "give one export"),
        ("{out} {set}", "give one export"),
    ],
)
def test_arguments_that_do_not_go_together_are_refused(runs, tiny_set, tmp_path, given, words):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.json").write_text("{}")
    places = {"run": runs / "densenet121-32" / "fold-0", "set": tiny_set, "out": tmp_path / "out"}
    with pytest.raises(RunError, match=words):
        sort_targets(tuple(given.format(**places).split()))
