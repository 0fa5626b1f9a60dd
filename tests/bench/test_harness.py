"""Rounds and time limits of the benchmarks."""

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from torch import nn

from cxrfast.bench import harness
from cxrfast.bench.harness import Budget, Measured, in_time, interleave, one_core, saved_bytes
from cxrfast.models.networks.densenet import lean


class Clock:
    """A clock that only moves when work takes time."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def measurement(self, name: str, rate: float, takes: float, calls: list[str]) -> Callable[[float], float]:
        def measure(seconds: float) -> float:
            self.now += takes
            calls.append(name)
            return rate

        return measure


def test_measurements_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    clock = Clock()
    each = {name: clock.measurement(name, rate, 1, calls) for name, rate in (("a", 6.0), ("b", 3.0))}
    heard: list[str] = []
    monkeypatch.setattr(harness, "tell", heard.append)
    figures = interleave(each, 1.0, 3)
    assert calls == heard == ["a", "b"] * 4, "a burn-in each, then three rounds"
    assert figures["a"].ratio(figures["b"]) == 2.0
    assert Measured([10.0, 1.0, 4.0]).ratio(Measured([5.0, 0.5, 2.0])) == 2.0, "round by round"


@pytest.mark.parametrize(("minutes", "rounds"), [(0.1, 1), (40 / 60, 1), (65 / 60, 2), (80 / 60, 3), (None, 5)])
def test_rounds_end_with_the_budget_but_one_is_whole(minutes: float | None, rounds: int) -> None:
    """A round of two takes 20 s, and so does the burn-in; a round starts if at most half of it exceeds the budget."""
    clock, calls = Clock(), list[str]()
    each = {name: clock.measurement(name, 1.0, 10, calls) for name in "ab"}
    figures = interleave(each, 1.0, 5, Budget.of(minutes, clock))
    assert {len(figure.rounds) for figure in figures.values()} == {rounds}
    assert calls == ["a", "b"] * (rounds + 1)


def test_time_is_shared_by_what_fits() -> None:
    clock = Clock()
    budget = Budget.of(2, clock)
    assert budget.left == 120

    def share(*least: float, of: Budget = budget) -> tuple[float, float] | None:
        part = of.share(list(least))
        return None if part is None else (part.left, part.left_of_all)

    assert share(0, 0, 0) == (40, 120)
    assert share(30, 60) == share(30, 60, 100) == (30 + 15, 120), "what does not fit takes nothing"
    assert share(130) is None
    assert share(1e9, 1e9, of=Budget.of(None, clock)) == (float("inf"), float("inf"))
    clock.now += 100
    assert share(10) == (20, 20)
    clock.now += 100
    assert budget.left == 0
    assert share(0) is None, "nothing starts once the time is over"


def test_what_does_not_fit_is_left_out_and_named() -> None:
    clock, left_out = Clock(), dict[str, str]()
    done: list[tuple[str, float]] = []

    def work(name: str, share: Budget) -> list[list[float]]:
        done.append((name, share.left))
        clock.now += 30
        return []

    in_time({name: (1, 1, name) for name in "abcd"}, work, Budget.of(1.75, clock), left_out)
    assert done == [("a", 105 / 4), ("b", 30 + 15 / 2), ("c", 30 + 15)]
    assert left_out == {"d": "about 30s needed, 15s left: give more --minutes, or measure less"}


def test_the_same_work_takes_at_least_what_it_took_without_its_further_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    def least(wall: float, rounds: int, growth: int = 1) -> float:
        clock, needed = Clock(), dict[str, Any]()

        def work(piece: None, share: Budget) -> list[list[float]]:
            clock.now += wall
            return [[4.0] * rounds, [2.0] * rounds]  # images/s: steps of 4 images take 1 and 2 s

        budget = Budget(end=clock.now + wall + 1, clock=clock)
        in_time({"first": (8, 4, None), "next": (8, 4 * growth, None)}, work, budget, needed, turn=5.0)
        return needed["next"]

    monkeypatch.setattr(harness, "no_time", lambda needed, left: needed)

    assert least(100, 1) == pytest.approx(100)
    assert least(100, 3) == pytest.approx(100 - 2 * (1 + 5) - 2 * (2 + 5))
    # steps of 10 and 20 s: one to warm up and one to measure, in the burn-in and in the round; start and end take 75 s
    assert least(75 + (2 + 1.25 + 5) + (4 + 2 + 5), 1, growth=10) == pytest.approx(75 + 4 * 30)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system binds no process to a core")
def test_one_core_is_held_and_given_back() -> None:
    before = os.sched_getaffinity(0)
    with pytest.raises(ZeroDivisionError), one_core():
        assert len(os.sched_getaffinity(0)) == 1
        assert os.sched_getaffinity(0) <= before
        raise ZeroDivisionError
    assert os.sched_getaffinity(0) == before


def test_a_measurement_is_killed_some_time_after_the_whole_budget(monkeypatch):
    given = {}
    monkeypatch.setattr(harness, "in_own_process", lambda work, options, **more: given.update(options, **more))
    budget = Budget(end=5, last=60, clock=lambda: 0.0)
    harness.measure_elsewhere(print, {"a": 1}, budget)
    assert (given["a"], given["budget"], given["limit"]) == (1, budget, 60 + harness.GRACE)


def test_it_keeps_less_for_the_backward_pass_and_with_checkpointing_far_less() -> None:
    with torch.device("meta"):
        theirs = saved_bytes(torchvision.models.densenet121(), 256, channels=3)
        plain, checkpointed = (saved_bytes(lean(torchvision.models.densenet121(), c), 256, 3) for c in (False, True))
    assert plain < theirs
    assert checkpointed < 0.6 * theirs


def test_saved_bytes_are_those_of_a_network_that_can_be_counted_by_hand() -> None:
    net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(4, 2, 1))
    assert saved_bytes(net, 8) == 8 * 8 * (1 + 4) * 4, "the image and the map behind the ReLU, kept once, float32"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert saved_bytes(net, 8) == 8 * 8 * (1 + 4) * 2
