"""Run folders, TOML files and options that somebody hostile wrote: commands do the right thing or refuse them with a message.

Nothing outside the given folders changes, nothing is fetched, no other program starts, and nothing hangs. Sets have a generator of
their own in tests/shards/test_hostile_sets.py, and names of findings a test in tests/test_hostile_names.py.
"""

import os
import sys
from pathlib import Path

import pytest
from commands import run
from damage import contents, copy_set
from run_mutator import DONE, UNFINISHED, make_runs, mutate

SUPPORT = Path(__file__).parent / "support"
RUNS = int(os.environ.get("CXRFAST_HOSTILE_RUNS", "40"))
FILES = int(os.environ.get("CXRFAST_HOSTILE_FILES", "100"))
OPTIONS = int(os.environ.get("CXRFAST_HOSTILE_OPTIONS", "100"))


@pytest.fixture(scope="module")
def trained_runs(tiny_set, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hostile") / "runs"
    folder.mkdir()
    make_runs(folder, tiny_set)
    return folder


def tried(script: str, *arguments: object, first: int, last: int) -> int:
    """Number of seeds that went right, tried by a script that ends at the first that goes wrong."""
    done = run(sys.executable, SUPPORT / script, *arguments, first, last, timeout=None)
    lines = done.stdout.splitlines()
    seed = next((line for line in reversed(lines) if line.startswith("seed")), "before the first seed")
    assert done.returncode == 0, f"{seed}: exit status {done.returncode} (-14: it hangs)\n{done.stderr[-3000:]}"
    assert any(" right" in f" {line}" for line in lines)
    assert any("refused " in line for line in lines)
    return sum(line.startswith("seed") for line in lines)


def test_a_seed_names_a_change_of_a_run(trained_runs, tmp_path):
    first, second = (copy_set(trained_runs, tmp_path / name) for name in "ab")
    assert mutate(first, 4) == mutate(second, 4)
    assert contents(first) == contents(second) != contents(trained_runs)
    assert {(trained_runs / name / "last.pt").exists() for name in (DONE, UNFINISHED)} == {True}


@pytest.mark.parametrize("count", [12, pytest.param(RUNS, marks=pytest.mark.slow)])
def test_every_command_survives_hostile_run_folders(trained_runs, tiny_set, count):
    assert tried("run_mutator.py", trained_runs, tiny_set, first=0, last=count) == count


@pytest.mark.parametrize("count", [40, pytest.param(FILES, marks=pytest.mark.slow)])
def test_train_and_study_survive_hostile_toml_files(tiny_set, count):
    assert tried("toml_mutator.py", tiny_set, first=0, last=count) == count


@pytest.mark.parametrize("count", [40, pytest.param(OPTIONS, marks=pytest.mark.slow)])
def test_every_command_survives_hostile_values_of_every_option(trained_runs, tiny_set, count):
    assert tried("option_mutator.py", tiny_set, trained_runs / DONE, first=0, last=count) == count
