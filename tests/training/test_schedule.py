"""The learning rate over a training, as given and as its metrics say; recipes survive a stop, and are not mixed."""

import math
import os
import signal
from typing import Any

import pytest
import torch
from commands import invoke
from runs import make_run
from trainings import FAST, assert_same

from cxrfast.analysis.evaluate import evaluate
from cxrfast.config import Runtime, TrainConfig
from cxrfast.errors import RunError
from cxrfast.runs.run import Run
from cxrfast.training.checkpoint import Counters
from cxrfast.training.monitor import is_over
from cxrfast.training.schedule import Schedule, rate_factor
from cxrfast.training.setup import make_config
from cxrfast.training.signals import Stopped
from cxrfast.training.train import train


def config(**options: Any) -> TrainConfig:
    known = {"set_id": "a", "scale": 32, "labels": ("A",), "global_batch": 2, "micro_batch": 2, "learning_rate": 0.5}
    return TrainConfig(**{**known, **options})


def rates(chosen: TrainConfig, losses: list[float], steps: int = 4) -> list[float]:
    """The learning rate of each step, with `losses` by epoch."""
    optimizer = torch.optim.Adam([torch.zeros(1, requires_grad=True)], lr=chosen.learning_rate)
    schedule, found = Schedule(chosen, optimizer, steps), []
    for epoch, loss in enumerate(losses):
        for step in range(steps):
            schedule.start_step(epoch, step)
            found.append(optimizer.param_groups[0]["lr"])
        schedule.end_epoch(epoch, loss)
    return found


def test_the_studys_schedule_is_torchs():
    losses = [1.0, 0.9, *[0.95] * 12]
    optimizer = torch.optim.Adam([torch.zeros(1, requires_grad=True)], lr=0.5)
    oracle, expected = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=3), []
    for loss in losses:
        expected += [optimizer.param_groups[0]["lr"]] * 4
        oracle.step(loss)
    assert rates(config(), losses) == expected
    assert set(expected) == {0.5, 0.25, 0.125}


def test_a_cosine_is_torchs_over_all_steps():
    optimizer = torch.optim.Adam([torch.zeros(1, requires_grad=True)], lr=0.5)
    oracle, expected = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20), []
    for _ in range(20):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        oracle.step()
    assert rates(config(schedule="cosine", epochs=5), [1.0] * 5) == pytest.approx(expected)


def test_warm_up_is_linear_and_ends_at_the_learning_rate():
    found = rates(config(schedule="cosine", epochs=5, warmup=2), [1.0] * 5)
    assert found[:9] == pytest.approx([0.5 * i / 8 for i in range(1, 9)] + [0.5])
    assert found[8:] == pytest.approx([0.25 * (1 + math.cos(math.pi * i / 12)) for i in range(12)])
    half = rates(config(warmup=0.6), [1.0, 0.9, 0.8])
    assert half == pytest.approx([0.5 / 2.4, 1 / 2.4, 0.5, *[0.5] * 9])


def test_epochs_of_the_warm_up_do_not_count_for_the_plateau_rule():
    assert set(rates(config(warmup=5), [1.0] * 9)[20:]) == {0.5}
    assert rates(config(warmup=5), [1.0] * 11)[-1] == 0.25


def test_the_factor_is_a_function_of_the_position_alone():
    chosen = config(schedule="cosine", epochs=3, warmup=1)
    assert [rate_factor(chosen, 2, step) for step in range(6)] == pytest.approx(
        [0.5, 1.0, 1.0, *(0.5 * (1 + math.cos(math.pi * i / 4)) for i in (1, 2, 3))]
    )
    assert rate_factor(config(), 2, 0) is None


def test_a_cosine_is_not_stopped_early():
    stale = Counters(epoch=20, stale=12)
    assert is_over(config(), stale)
    assert not is_over(config(schedule="cosine"), stale)
    assert is_over(config(schedule="cosine", epochs=20), stale)


# Trainings

NEW = {"optimizer": "adamw", "schedule": "cosine", "warmup": 1.0, "weight_decay": 0.1, "flip": 0.0, "degrees": 5.0}
SMALL = {**FAST, "limit": 24, "epochs": 3}


def trained(shards, runs, on_epoch=None, **options: Any) -> Run:
    chosen = make_config(shards, 32, device="cpu", **{**SMALL, **NEW, **options})
    return train(chosen, Runtime(shards=shards, runs=runs, device="cpu"), on_epoch)


@pytest.fixture(scope="module")
def whole(tiny_set, tmp_path_factory) -> Run:
    """A training with every option that is not the study's. Not to be written to."""
    return trained(tiny_set, tmp_path_factory.mktemp("whole"))


def test_a_stopped_training_ends_with_bitwise_the_same_weights(tiny_set, tmp_path, whole):
    with pytest.raises(Stopped):
        trained(tiny_set, tmp_path, lambda line: line["epoch"] or os.kill(os.getpid(), signal.SIGUSR1))
    run = Run.open(tmp_path / whole.name)
    checkpoint = run.read_checkpoint()
    assert (checkpoint["epoch"], checkpoint["consumed"]) == (1, 8), "in the middle of an epoch"
    trained(tiny_set, tmp_path)
    assert_same(whole.folder, run.folder)


def test_metrics_hold_the_rate_of_each_epochs_last_step(whole):
    chosen = whole.config
    steps = 3
    expected = [chosen.learning_rate * rate_factor(chosen, steps, steps * (epoch + 1) - 1) for epoch in range(3)]
    assert [line["learning_rate"] for line in whole.metrics()] == pytest.approx(expected)
    assert expected[0] == chosen.learning_rate > expected[1] > expected[2]


def test_more_epochs_of_a_cosine_are_refused_and_change_nothing(tiny_set, whole):
    before = {path.name: path.read_bytes() for path in whole.folder.iterdir()}
    with pytest.raises(RunError, match="epochs: 4, not 3, over which its cosine schedule is laid out"):
        trained(tiny_set, whole.folder.parents[1], epochs=4)
    assert {path.name: path.read_bytes() for path in whole.folder.iterdir()} == before


def test_each_option_is_one_of_the_command_line_and_of_a_file(tiny_set, tmp_path, whole):
    (tmp_path / "recipe.toml").write_text(
        'optimizer = "adamw"\nschedule = "cosine"\nwarmup = 1\nweight-decay = 0.1\nflip = 0\ndegrees = 5'
    )
    words = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    more = ("--scale=32", "--device=cpu", "--shards", tiny_set, "--runs", whole.folder.parents[1])
    for given in (
        [f"--{name.replace('_', '-')}={value}" for name, value in NEW.items()],
        [f"--config={tmp_path / 'recipe.toml'}"],
    ):
        done = invoke("train", *more, *words, *given)
        assert done.exit_code == 0, done.output
        assert "is done already: 3 epochs are trained" in done.output


def test_the_callback_sees_each_line_of_the_metrics_and_what_it_raises_loses_nothing(tiny_set, tmp_path, whole):
    seen: list[dict[str, Any]] = []

    def fails_once(line: dict[str, Any]) -> None:
        seen.append(line)
        if len(seen) == 2:
            raise OSError("the tracking server is away")

    with pytest.raises(OSError, match="away"):
        trained(tiny_set, tmp_path, fails_once)
    run = trained(tiny_set, tmp_path, fails_once)
    assert seen == run.metrics()
    assert_same(whole.folder, run.folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": "adamw"}, "optimizer: "),
        ({"schedule": "cosine"}, "schedule: "),
        ({"warmup": 2.0}, "warmup: "),
        ({"weight_decay": 0.1}, "weight_decay: "),
        ({"flip": 0.0}, "flip: "),
        ({"degrees": 5.0}, "degrees: "),
    ],
)
def test_folds_of_different_recipes_are_not_joined(tmp_path, options, message):
    make_run(tmp_path, 64, 0)
    make_run(tmp_path, 64, 1, **options)
    with pytest.raises(RunError, match=f"configurations differ .*{message}"):
        evaluate(tmp_path)


def test_folds_of_cosines_over_different_epochs_are_not_joined(tmp_path):
    make_run(tmp_path, 64, 0, schedule="cosine", epochs=30)
    make_run(tmp_path, 64, 1, schedule="cosine", epochs=60)
    with pytest.raises(RunError, match="epochs: "):
        evaluate(tmp_path)


def test_tables_name_a_recipe_that_is_not_the_studys(tmp_path):
    make_run(tmp_path, 64, 0)
    assert "Recipe" not in evaluate(tmp_path).rules
    make_run(tmp_path, 128, 0, optimizer="adamw", weight_decay=0.01, flip=0.0)
    told = "Recipes differ. densenet121-64: the study's. densenet121-128: adamw, weight decay 0.01, flip 0."
    assert told in evaluate(tmp_path).rules
