"""Configurations are read back as they were written, or refused with the field that is wrong."""

import json
import math
from dataclasses import asdict
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cxrfast.config import VALIDATION_COST, Runtime, TrainConfig, label_differences, recipe_in_words
from cxrfast.errors import RunError
from cxrfast.runs.run import Run

EARLIER = Path(__file__).parents[1] / "data/earlier/runs/shufflenet_v2_x0_5-32/fold-0/config.json"
STORED = json.loads(EARLIER.read_bytes())
ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["folds", "global"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=5,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("run")


def test_a_configuration_of_an_earlier_version_has_the_hash_it_had():
    assert Run.open(EARLIER.parent).config.hash == STORED["hash"]


@pytest.mark.parametrize("rate", [1, 1.0])
def test_a_stored_number_keeps_its_hash_and_therefore_its_checkpoint(rate):
    config = TrainConfig.from_json({**STORED["config"], "learning_rate": rate})
    assert TrainConfig.from_json(json.loads(json.dumps(asdict(config)))).hash == config.hash
    assert json.dumps(asdict(config)["learning_rate"]) == json.dumps(rate)


@given(st.sampled_from([*STORED, *STORED["config"]]), ANYTHING)
def test_a_mutated_configuration_is_read_as_it_says_or_refused(folder, name, new):
    value = {**STORED, name: new} if name in STORED else {**STORED, "config": {**STORED["config"], name: new}}
    (folder / "config.json").write_text(json.dumps(value))
    try:
        run = Run.open(folder)
    except RunError:
        return
    read = json.loads(json.dumps(asdict(run.config)))
    later = {name: v for name, v in read.items() if name not in STORED["config"]}
    assert read == {**later, **value["config"]}
    assert str(run.shards) == str(Path(value["shards"]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scale": None}, "Expected `int`, got `null` - at `$.scale`"),
        ({"sizes": [[64]]}, "at `$.sizes[0]`"),
        ({"precision": "fp8"}, "precision 'fp8' is unknown: use one of auto, bf16"),
        ({"policy": "maybe"}, "policy 'maybe' is unknown: use one of u_zeros"),
        ({"split": "none"}, "split 'none' is unknown: use one of folds, official"),
        ({"unlabelled": "ignore"}, "unlabelled 'ignore' is unknown: use one of drop, negative"),
        ({"blank": [["", "drop"]]}, "--blank drop: give negative or ignore, or LABEL=ignore with a label of the set"),
        ({"blank": [["Hernia", "ignore"]]}, "--blank Hernia=ignore: give negative or ignore, or LABEL=ignore with"),
        ({"fold": 5}, "--fold 5 does not exist: folds are 0 to 4"),
        ({"epochs": 0}, "epochs must be above 0, not 0"),
        ({"global_batch": -1}, "global batch must be above 0, not -1"),
        ({"learning_rate": -1.0}, "learning rate must be above 0, not -1.0"),
        ({"learning_rate": 0.0}, "learning rate must be above 0, not 0.0"),
        ({"learning_rate": float("nan")}, "learning rate must be above 0, not nan"),
        ({"optimizer": "sgd"}, "optimizer 'sgd' is unknown: use one of adam, adamw"),
        ({"schedule": "step"}, "schedule 'step' is unknown: use one of plateau, cosine"),
        ({"weight_decay": -0.1}, "weight decay must be at least 0 and below 1, not -0.1"),
        ({"weight_decay": float("nan")}, "weight decay must be at least 0 and below 1, not nan"),
        ({"warmup": -1.0}, "warmup must be at least 0 and below the number of epochs, 3, not -1.0"),
        ({"warmup": 3.0}, "warmup must be at least 0 and below the number of epochs, 3, not 3.0"),
        ({"warmup": float("nan")}, "warmup must be at least 0"),
        ({"flip": 1.1}, "flip must be between 0 and 1, not 1.1"),
        ({"flip": float("nan")}, "flip must be between 0 and 1, not nan"),
        ({"degrees": -1.0}, "degrees must be between 0 and 180, not -1.0"),
        ({"degrees": float("inf")}, "degrees must be between 0 and 180, not inf"),
        ({"labels": []}, "findings must be one or more different names"),
        ({"labels": ["Edema", "Edema"]}, "findings must be one or more different names"),
        ({"labels": ["Edema", "part"]}, "a finding cannot be called 'part', as a column of a run's rows is"),
        ({"labels": ["row"]}, "a finding cannot be called 'row'"),
        ({"momentum": 0.9}, "unexpected keyword argument 'momentum'"),
    ],
)
def test_the_wrong_field_is_named(change, message):
    with pytest.raises(RunError) as caught:
        TrainConfig.from_json({**STORED["config"], **change})
    assert message in str(caught.value)


def test_a_missing_field_is_named():
    with pytest.raises(RunError, match="missing required field `scale`"):
        TrainConfig.from_json({name: value for name, value in STORED["config"].items() if name != "scale"})


def config(**options) -> TrainConfig:
    known = {"set_id": "a1", "labels": ("Edema",), "global_batch": 8, "micro_batch": 8, "learning_rate": 1e-4}
    return TrainConfig(**{**known, "scale": 64, **options})


@given(
    st.lists(st.tuples(st.integers(1, 128), st.integers(1, 9)), max_size=3),
    st.integers(1, 30),
    st.integers(0, 40),
)
def test_the_cost_of_a_training_is_the_sum_over_its_epochs(sizes, epochs, done):
    one = config(sizes=tuple(sizes), epochs=epochs)
    each = [500 * (one.size_at(epoch) / 64) ** 2 + VALIDATION_COST * 100 for epoch in range(done, epochs)]
    assert one.work(done, 500, 100) == pytest.approx(sum(each))
    assert one.work(done, 500, 100) == pytest.approx(sum(500 * one.area_at(e) + 100 / 3 for e in range(done, epochs)))


def test_the_cost_of_a_billion_epochs_is_known_at_once():
    assert config(epochs=10**9, sizes=((32, 10**8),)).work(0, 3, 3) == pytest.approx(0.9e9 * 4 + 1e8 * 1.75)


def test_a_recipe_in_words_tells_what_differs_from_the_study():
    assert recipe_in_words(config()) == ""
    assert recipe_in_words(config(weight_decay=0.0)) == ""
    assert recipe_in_words(config(optimizer="adamw")) == "adamw, weight decay 0.01"
    assert recipe_in_words(config(optimizer="adamw", weight_decay=0.0, flip=0.0)) == "adamw, flip 0"
    told = recipe_in_words(config(schedule="cosine", epochs=30, warmup=2, degrees=5.0, weight_decay=1e-4))
    assert told == (
        "weight decay 0.0001, cosine schedule over 30 epochs without early stopping, warm-up over 2 epochs, degrees 5"
    )


def test_more_epochs_are_another_configuration_only_under_a_cosine():
    one, more = (config(schedule="cosine", epochs=epochs) for epochs in (30, 60))
    assert more.differences(one) == ["epochs: 60, not 30, over which its cosine schedule is laid out"]
    assert config(epochs=60).differences(config(epochs=30)) == []
    assert more.differences(config(epochs=30)) == ["schedule: cosine, not plateau"]


@pytest.mark.parametrize("name", ["global_batch", "micro_batch", "epochs", "scale", "limit", "learning_rate"])
@pytest.mark.parametrize("value", [0, -2, 2**31, 10**30, math.inf, math.nan])
def test_numbers_that_nobody_means_are_refused(name, value):
    with pytest.raises(RunError, match=f"{name.replace('_', ' ')} must be (above 0|at most 2,147,483,647)"):
        config(**{name: value})


@pytest.mark.parametrize("name", ["checkpoint_minutes", "dist_timeout"])
@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf, 1e300])
def test_times_to_wait_are_bounded(name, value):
    with pytest.raises(RunError, match=f"--{name.replace('_', '-')} .* must be above 0 and at most 525,600 minutes"):
        Runtime(shards=Path("set"), runs=Path("runs"), **{name: value})


def test_labels_that_differ_are_named_a_few_at_most():
    many = [f"L{i}" for i in range(9)]
    assert label_differences(["Edema", "Tube"], ["Edema", "Mass"]) == "without Mass, with Tube"
    assert label_differences(["Edema"], ["Edema", *many]) == "without L0, L1, L2, L3, L4 and 4 more"
    assert label_differences(["A", "B"], ["B", "A"]) == "in another order"
