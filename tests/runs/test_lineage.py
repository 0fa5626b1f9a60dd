"""What tables say of a run's first weights."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from cxrfast.config import TrainConfig
from cxrfast.errors import RunError
from cxrfast.runs.lineage import Origin, marked_name, origin_footnote, origin_of, shared_origin
from cxrfast.runs.run import Run


def run(weights: str | Origin, fold: int = 0) -> Run:
    """A run with a recorded origin; `weights`: of an earlier version, which recorded nothing but the option."""
    given = {"set_id": "a1", "scale": 64, "labels": ("Edema",), "learning_rate": 1e-4, "split": "folds"}
    option = weights if isinstance(weights, str) else "runs/anything"
    config = TrainConfig(**given, global_batch=8, micro_batch=8, weights=option, fold=fold)
    origin = Origin.of_path(config) if isinstance(weights, str) else weights
    return Run(Path("runs/densenet121-64") / f"fold-{fold}", config, Path("set"), origin)


SAME = Origin(kind="run", run="densenet121-32/fold-0", set_id="a1", fold=0, split="folds", labels=("Edema",))


@pytest.mark.parametrize(
    ("weights", "start"),
    [
        ("imagenet", "ImageNet"),
        ("none", "none"),
        ("runs/densenet121-64/fold-0", "from densenet121-64/fold-0"),
        ("/data/runs/densenet121-64/fold-0/", "from densenet121-64/fold-0"),
        ("runs/densenet121-64/fold-0/best.safetensors", "from densenet121-64/fold-0"),
        ("fold-0", "from fold-0"),
        ("/weights/densenet121-a639ec97.pth", "densenet121-a639ec97.pth"),
        ("/weights/flat.pth.tar", "flat.pth.tar"),
        ("weights/model.ckpt", "model.ckpt"),
    ],
)
def test_the_start_of_a_run_of_an_earlier_version_is_told_by_its_option(weights: str, start: str) -> None:
    assert origin_of(run(weights)) == start


@pytest.mark.parametrize(
    ("origin", "start"),
    [
        (Origin(kind="imagenet", file="resnet18-f37072fd.pth"), "ImageNet"),
        (Origin(kind="none"), "none"),
        (Origin(kind="file", file="mine.pth.tar"), "mine.pth.tar"),
        (SAME, "from densenet121-32/fold-0"),
        (replace(SAME, fold=1, run="densenet121-32/fold-1"), "from densenet121-32/fold-1, another fold"),
        (replace(SAME, fold=1, run="trial/copy"), "from trial/copy, another fold (1)"),
        (replace(SAME, split="official"), "from densenet121-32/fold-0, another split (official)"),
        (replace(SAME, set_id="b2" * 16), "from densenet121-32/fold-0, another set (b2b2b2b2)"),
        (replace(SAME, start=replace(SAME, run="densenet121-16/fold-0")), "from densenet121-32/fold-0"),
        (
            replace(SAME, start=replace(SAME, run="densenet121-16/fold-3", fold=3)),
            "from densenet121-32/fold-0, which started from densenet121-16/fold-3, another fold",
        ),
    ],
)
def test_the_start_is_the_run_that_trained_the_weights_and_those_before_that_saw_other_patients(
    origin: Origin, start: str
) -> None:
    assert origin_of(run(origin)) == start
    assert Origin.from_json(json.loads(json.dumps(origin.json()))) == origin


@pytest.mark.parametrize(
    "value",
    [
        {"kind": "elsewhere"},
        {"kind": "run", "fold": "one"},
        {"kind": "file", "file": "a\x1b[31mb.pth"},
        {"kind": "run", "run": "a/fold-0", "start": {"kind": "run", "run": "b\nc"}},
        {"kind": "run", "labels": ["x" * 300]},
        ["run"],
    ],
)
def test_a_record_that_no_version_wrote_is_refused(value: object) -> None:
    with pytest.raises(RunError, match="not an origin of weights"):
        Origin.from_json(value)


def test_folds_that_each_started_from_their_own_fold_share_a_start() -> None:
    origins = [origin_of(run(f"runs/densenet121-64/fold-{k}", k)) for k in range(5)]
    assert shared_origin(origins) == "from densenet121-64"
    assert shared_origin(["none", "ImageNet", "none"]) == "none; ImageNet"


@pytest.mark.parametrize("path", ["runs/densenet121-32/fold-1", "runs/densenet121-32/fold-1/best.safetensors"])
def test_weights_of_another_fold_are_named_with_that_fold(path: str) -> None:
    """Its training rows hold test patients of this one: the file can be given by its path, and the table says so."""
    start = origin_of(run(path, fold=0))
    assert start == "from densenet121-32/fold-1, another fold"
    footnote = origin_footnote({"densenet121-64": shared_origin([start])})
    assert (
        footnote
        == "† weights started from the run of a smaller scale: densenet121-64 from densenet121-32/fold-1, another fold."
    )
    assert origin_of(run(path, fold=1)) == "from densenet121-32/fold-1"


def test_the_footnote_names_those_it_marks_and_stays_away_without_any() -> None:
    starts = {"densenet121-64": "ImageNet", "densenet121-128": "from densenet121-64"}
    assert [marked_name(name, start) for name, start in starts.items()] == ["densenet121-64", "densenet121-128†"]
    expected = "† weights started from the run of a smaller scale: densenet121-128 from densenet121-64."
    assert origin_footnote(starts) == expected
    assert origin_footnote({"densenet121-64": "ImageNet"}) == ""


@pytest.mark.parametrize("parent", ["densenet121-128", "densenet121-256", "trial"])
def test_a_start_that_is_not_known_to_be_smaller_is_not_called_so(parent: str) -> None:
    assert origin_footnote({"densenet121-128": f"from {parent}"}).startswith("† weights started from another run: ")
