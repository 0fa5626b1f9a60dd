"""Sets that several tests use: phantoms, and real radiographs where they are at hand (tests that need them skip else)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from damage import copy_set
from hypothesis import settings
from sets import REAL

from cxrfast.machine import let_threads_sleep
from cxrfast.phantoms.dataset import synth
from cxrfast.pipelines.reader import Reader
from cxrfast.shards.build import build
from cxrfast.shards.format.recipe import ImageRecipe

ROOT = Path(__file__).parents[1]
os.environ["PYTHONPATH"] = f"{ROOT}{os.pathsep}{ROOT / 'tests' / 'support'}"  # of the processes that tests start

settings.register_profile("cxrfast", deadline=None)  # no test depends on the time that it takes
settings.load_profile("cxrfast")
let_threads_sleep()  # two processes of pytest share the cores; before a test imports torch


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A MIMIC-CXR-JPG tree of 150 phantoms of 128 px. Not to be written to."""
    tree = tmp_path_factory.mktemp("phantoms") / "mimic"
    synth(tree, images=150, size=128, workers=1)
    return tree


@pytest.fixture(scope="session")
def tiny_set(phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shard set of the 150 phantoms at 32 and 64 px: three shards. Not to be written to."""
    out = tmp_path_factory.mktemp("tiny") / "set"
    build(phantoms, out, [32, 64], workers=1)
    return out


@pytest.fixture(scope="session")
def raw_set(phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `tiny_set`, uncompressed. Not to be written to."""
    out = tmp_path_factory.mktemp("raw") / "set"
    build(phantoms, out, [32, 64], recipe=ImageRecipe(codec="raw"), workers=1)
    return out


@pytest.fixture(scope="session", params=["tiny_set", "raw_set"])
def either_set(request: pytest.FixtureRequest) -> Path:
    """The tiny set in one codec and the other. Not to be written to."""
    return request.getfixturevalue(request.param)


@pytest.fixture
def folder(tiny_set, tmp_path):
    """A copy of the tiny set to damage."""
    return copy_set(tiny_set, tmp_path / "set")


@pytest.fixture
def either_copy(either_set, tmp_path):
    return copy_set(either_set, tmp_path / "set")


@pytest.fixture
def reader(tiny_set):
    """A reader of the tiny set at 64 px."""
    with Reader(tiny_set, 64) as reader:
        yield reader


@pytest.fixture
def either_reader(either_set):
    with Reader(either_set, 64) as reader:
        yield reader


@pytest.fixture(scope="session")
def real_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 real radiographs of 224 px and 37 of about 2500 × 1970 px as a MIMIC-CXR-JPG tree."""
    if not (REAL / "make_mimic.py").exists():
        pytest.skip("the real radiographs are not here")
    tree = tmp_path_factory.mktemp("real") / "mimic"
    subprocess.run([sys.executable, REAL / "make_mimic.py", tree, "--limit", "200"], check=True, capture_output=True)
    return tree


@pytest.fixture(scope="session")
def real_set(real_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shard set of the real radiographs at 64, 256 and 1024 px. Not to be written to."""
    out = tmp_path_factory.mktemp("real-set") / "set"
    build(real_tree, out, [64, 256, 1024])
    return out
