"""What tables say of a run's first weights."""

import pytest

from cxrfast.config import TrainConfig
from cxrfast.runs.lineage import marked_name, origin_footnote, origin_of, shared_origin


def config(weights: str, fold: int = 0) -> TrainConfig:
    given = {"set_id": "a1", "scale": 64, "labels": ("Edema",), "learning_rate": 1e-4}
    return TrainConfig(**given, global_batch=8, micro_batch=8, weights=weights, fold=fold)


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
    ],
)
def test_the_start_is_told_without_looking_for_the_files(weights: str, start: str) -> None:
    assert origin_of(config(weights)) == start


def test_folds_that_each_started_from_their_own_fold_share_a_start() -> None:
    origins = [origin_of(config(f"runs/densenet121-64/fold-{k}", k)) for k in range(5)]
    assert shared_origin(origins) == "from densenet121-64"
    assert shared_origin(["none", "ImageNet", "none"]) == "none; ImageNet"


@pytest.mark.parametrize("path", ["runs/densenet121-32/fold-1", "runs/densenet121-32/fold-1/best.safetensors"])
def test_weights_of_another_fold_are_named_with_that_fold(path: str) -> None:
    """Its training rows hold test patients of this one: the file can be given by its path, and the table says so."""
    start = origin_of(config(path, fold=0))
    assert start == "from densenet121-32/fold-1, another fold"
    footnote = origin_footnote({"densenet121-64": shared_origin([start])})
    assert (
        footnote
        == "† weights started from the run of a smaller scale: densenet121-64 from densenet121-32/fold-1, another fold."
    )
    assert origin_of(config(path, fold=1)) == "from densenet121-32/fold-1"


def test_the_footnote_names_those_it_marks_and_stays_away_without_any() -> None:
    starts = {"densenet121-64": "ImageNet", "densenet121-128": "from densenet121-64"}
    assert [marked_name(name, start) for name, start in starts.items()] == ["densenet121-64", "densenet121-128†"]
    expected = "† weights started from the run of a smaller scale: densenet121-128 from densenet121-64."
    assert origin_footnote(starts) == expected
    assert origin_footnote({"densenet121-64": "ImageNet"}) == ""


@pytest.mark.parametrize("parent", ["densenet121-128", "densenet121-256", "trial"])
def test_a_start_that_is_not_known_to_be_smaller_is_not_called_so(parent: str) -> None:
    assert origin_footnote({"densenet121-128": f"from {parent}"}).startswith("† weights started from another run: ")
