import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from damage import contents, copy_set
from sets import build

from cxrfast.errors import ShardError
from cxrfast.phantoms.dataset import synth
from cxrfast.shards.building.layout import assign_rows
from cxrfast.shards.format.manifest import read_manifest
from cxrfast.shards.format.rows import read_rows
from cxrfast.shards.sources.read import read_source

RETRY = """
import os, signal, sys
from pathlib import Path
from cxrfast.shards import build
if __name__ == "__main__":
    step, data, out = sys.argv[1:]
    real = getattr(build, step)
    def killed(*arguments, **options):
        os.kill(os.getpid(), signal.SIGKILL)
    setattr(build, step, killed)
    build.build(Path(data), Path(out), [32], workers=1, retry_quarantined=True)
"""


@pytest.mark.parametrize(
    "step", ["write_rows", *(pytest.param(s, marks=pytest.mark.slow) for s in ("find_todo", "_run", "_finish"))]
)
def test_a_retry_that_was_killed_is_finished_by_the_same_command(corrupt_set, sound, sound_set, tmp_path, step):
    out = copy_set(corrupt_set[0], tmp_path / "set")
    (tmp_path / "script.py").write_text(RETRY)
    done = subprocess.run(
        [sys.executable, tmp_path / "script.py", step, sound, out],
        check=False,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
    )
    assert done.returncode == -9
    build(sound, out, [32], retry_quarantined=True)
    assert contents(out) == contents(sound_set)


def test_retrying_with_another_tree_changes_nothing(corrupt, corrupt_set, tmp_path):
    out = copy_set(corrupt_set[0], tmp_path / "set")
    shutil.copytree(corrupt, tmp_path / "empty", ignore=shutil.ignore_patterns("p1*"))
    (tmp_path / "empty" / "files").mkdir(exist_ok=True)
    with pytest.raises(ShardError, match="give --data the tree that the set was built from"):
        build(tmp_path / "empty", out, [32], retry_quarantined=True, allow_missing=True)
    assert contents(out) == contents(corrupt_set[0])


@pytest.fixture
def left_out(tmp_path: Path) -> tuple[Path, Path]:
    """A tree of 130 images, whose set at 16 and 32 px lacks one that could not be used, and can be now."""
    tree, out = tmp_path / "left-out", tmp_path / "left-out-set"
    synth(tree, images=130, size=64, workers=1)
    source = read_source("mimic", tree)
    path = tree / assign_rows(source.images, source.labels, 0)["path"][5]
    data = path.read_bytes()
    path.write_bytes(b"no image")
    build(tree, out, [16, 32])
    path.write_bytes(data)
    return tree, out


def test_a_retry_never_loses_a_row_that_was_fine(left_out):
    tree, out = left_out
    path = tree / read_rows(out / "rows.parquet")["path"][6]
    data = path.read_bytes()
    path.write_bytes(bytes(len(data)))
    with pytest.raises(ShardError, match="was fine at other scales but is not an image now"):
        build(tree, out, [32], retry_quarantined=True)
    assert 6 in read_manifest(out, 32, 0).rows, "the old shard is still there"
    path.write_bytes(data)
    assert build(tree, out, [32], retry_quarantined=True).quarantined == {}


def test_a_retry_touches_the_shards_within_its_limit_and_the_scales_they_have(left_out, tmp_path):
    tree, out = left_out
    shutil.rmtree(out / "16")
    build(tree, out, [16], limit=1)
    assert build(tree, out, [32], retry_quarantined=True).quarantined == {}
    assert [n for n in range(3) if read_manifest(out, 16, n)] == [0]
    assert read_manifest(out, 16, 0).rows == read_manifest(out, 32, 0).rows == list(range(64))
