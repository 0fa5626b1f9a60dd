"""Time and processes of the benchmarks."""

import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from cxrfast.bench import harness
from cxrfast.bench.harness import Budget, Measured, in_own_process, interleave, least_seconds
from cxrfast.errors import RunError


class Clock:
    """A clock that stands still, but for work that takes so many seconds."""

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


def test_measurements_take_turns() -> None:
    calls: list[str] = []
    clock = Clock()
    each = {name: clock.measurement(name, rate, 1, calls) for name, rate in (("a", 6.0), ("b", 3.0))}
    told: list[str] = []
    figures = interleave(each, 1.0, 3, told=told.append)
    assert calls == told == ["a", "b"] * 4, "a burn-in each, then three rounds"
    assert figures["a"].ratio(figures["b"]) == 2.0


def test_a_ratio_is_taken_round_by_round() -> None:
    assert Measured([10.0, 1.0, 4.0]).ratio(Measured([5.0, 0.5, 2.0])) == 2.0


@pytest.mark.parametrize(("minutes", "rounds"), [(0.1, 1), (40 / 60, 1), (65 / 60, 2), (80 / 60, 3), (None, 5)])
def test_rounds_end_with_the_budget_but_one_is_whole(minutes: float | None, rounds: int) -> None:
    """A round of two takes 20 s, and so does the burn-in; one that would be over by less than half of it is begun."""
    clock, calls = Clock(), list[str]()
    each = {name: clock.measurement(name, 1.0, 10, calls) for name in "ab"}
    figures = interleave(each, 1.0, 5, Budget.of(minutes, clock))
    assert {len(figure.rounds) for figure in figures.values()} == {rounds}
    assert calls == ["a", "b"] * (rounds + 1)


def test_time_is_shared_by_what_fits() -> None:
    clock = Clock()
    budget = Budget.of(2, clock)
    assert budget.left == 120

    def share(*least: float) -> float | None:
        part = budget.share(list(least))
        return None if part is None else part.left

    assert share(0, 0, 0) == 40
    assert share(30, 60) == 30 + 15
    part = budget.share([0, 0])
    assert part is not None
    assert (part.left, part.left_of_all) == (60, 120)
    assert share(30, 60, 100) == 30 + 15, "the third does not fit and takes nothing"
    assert share(130) is None
    clock.now += 100
    assert share(10) == 20
    clock.now += 100
    assert budget.left == 0
    assert share(0) is None, "nothing is begun once the time is over"
    endless = Budget.of(None, clock).share([1e9, 1e9])
    assert endless is not None
    assert endless.left == float("inf")


def test_the_least_of_the_same_work_is_what_it_took_but_for_further_rounds() -> None:
    assert least_seconds(100, 1, [1.0, 2.0], 5.0) == pytest.approx(100)
    assert least_seconds(100, 3, [1.0, 2.0], 5.0) == pytest.approx(100 - 2 * (1 + 5) - 2 * (2 + 5))
    # steps of 10 and 20 s: one to warm up and one to measure, in the burn-in and in the round; start and end take 75 s
    assert least_seconds(75 + (2 + 1.25 + 5) + (4 + 2 + 5), 1, [1.0, 2.0], 5.0, 10.0) == pytest.approx(75 + 4 * 30)


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Makes a module of this text, and gives its name."""
    monkeypatch.setenv("PYTHONPATH", ":".join([str(tmp_path), *sys.path]))

    def make(text: str) -> str:
        (tmp_path / "made.py").write_text(textwrap.dedent(text))
        return "made"

    return make


def test_a_process_answers_and_tells_how_far_it_is(module: Callable[[str], str]) -> None:
    name = module(
        """
        from cxrfast.bench.harness import answer, tell
        def work(a, end, telling):
            for n in range(3):
                tell(f"figure {n}")
            return [a, end, telling]
        answer(work)
        """
    )
    notes: list[str] = []
    assert in_own_process(name, {"a": 1}, Budget(end=7.5), lambda n=1, note="": notes.append(note)) == [1, 7.5, True]
    assert notes == ["figure 0", "figure 1", "figure 2"]


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        (
            "raise RuntimeError('[enforce fail at alloc_cpu.cpp:117] not enough memory: you tried')",
            MemoryError,
            "not enough",
        ),
        ("raise MemoryError()", MemoryError, "out of memory"),
        ("raise MemoryError('std::bad_alloc')", MemoryError, "out of memory: std::bad_alloc"),
        ("raise RuntimeError('the shared memory of sets')", RunError, "RuntimeError: the shared memory of sets"),
        ("import os; os.kill(os.getpid(), 9)", MemoryError, "exit code -9"),
        ("import os; os.abort()", RunError, "exit code -6"),
    ],
)
def test_a_process_that_fails_says_why(
    module: Callable[[str], str], text: str, error: type[Exception], message: str
) -> None:
    name = module(f"from cxrfast.bench.harness import answer\ndef work():\n    {text}\nanswer(work)")
    with pytest.raises(error, match=message):
        in_own_process(name, {})


def test_a_process_that_hangs_is_killed_with_all_that_it_started(
    module: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = module(
        """
        import subprocess, sys, time
        from pathlib import Path
        started = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        Path(__file__).with_name("pid").write_text(str(started.pid))
        print("measured: something", flush=True)
        time.sleep(600)
        """
    )
    monkeypatch.setattr(harness, "GRACE", 5.0)
    with pytest.raises(RunError, match="did not end within 5s and was killed"):
        in_own_process(name, {}, Budget.of(0))
    pid = int((tmp_path / "pid").read_text())

    def has_ended() -> bool:
        try:
            return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True

    deadline = time.monotonic() + 20
    while not has_ended() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert has_ended()
