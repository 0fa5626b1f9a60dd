"""Trees with damaged images, their sets, and copies to damage."""

import shutil
from pathlib import Path

import pytest
from sets import build

from cxrfast.phantoms.dataset import synth


@pytest.fixture(scope="session")
def corrupt(tmp_path_factory):
    """70 phantoms, six of them damaged: two truncated, two empty, two no images. Not to be written to."""
    out = tmp_path_factory.mktemp("corrupt") / "mimic"
    synth(out, images=70, size=64, corrupt=6, workers=1)
    return out


@pytest.fixture(scope="session")
def sound(tmp_path_factory):
    """The same 70 phantoms, none damaged."""
    out = tmp_path_factory.mktemp("sound") / "mimic"
    synth(out, images=70, size=64, workers=1)
    return out


@pytest.fixture(scope="session")
def sound_set(sound, tmp_path_factory):
    """The set of the sound tree, at 32 px."""
    out = tmp_path_factory.mktemp("sound-set") / "set"
    build(sound, out, [32])
    return out


@pytest.fixture(scope="session")
def corrupt_set(corrupt, tmp_path_factory):
    """The set of the damaged tree, at 32 px."""
    out = tmp_path_factory.mktemp("corrupt-set") / "set"
    return out, build(corrupt, out, [32])


@pytest.fixture
def tree(phantoms, tmp_path):
    """A copy of the phantoms to damage."""
    return Path(shutil.copytree(phantoms, tmp_path / "mimic"))
