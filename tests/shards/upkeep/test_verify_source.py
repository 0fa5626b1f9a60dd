import shutil
from pathlib import Path

import pytest
from damage import flip_bit

from cxrfast.errors import ShardError
from cxrfast.shards.format.rows import read_rows
from cxrfast.shards.storage import Tree
from cxrfast.shards.upkeep.problem import Problem
from cxrfast.shards.upkeep.verify_source import verify_source


@pytest.fixture
def tree(phantoms: Path, tmp_path: Path) -> Path:
    """A copy of the tiny set's source that can be spoiled."""
    return Path(shutil.copytree(phantoms, tmp_path / "tree"))


def images(folder: Path) -> list[str]:
    return read_rows(folder / "rows.parquet")["path"].tolist()


def problems(folder: Path, tree: Path) -> list[Problem]:
    return verify_source(folder, Tree(tree)).problems


def test_a_source_as_it_was_published_has_no_problems(tiny_set, tree):
    verdict = verify_source(tiny_set, Tree(tree))
    assert verdict.problems == []
    listed = [line.split()[1] for line in (tree / "SHA256SUMS.txt").read_text().splitlines()]
    assert (verdict.files, verdict.bytes) == (len(listed), sum((tree / name).stat().st_size for name in listed))
    assert f"{tree}: {len(listed)} files" in verdict.summary(Tree(tree))
    assert verdict.summary(Tree(tree)).endswith(": as listed in SHA256SUMS.txt")


def test_images_that_are_changed_missing_or_not_listed_are_named(tiny_set, tree):
    changed, missing, unlisted = images(tiny_set)[:3]
    flip_bit(tree / changed, 99)
    (tree / missing).unlink()
    lines = (tree / "SHA256SUMS.txt").read_text().splitlines(keepends=True)
    (tree / "SHA256SUMS.txt").write_text("".join(line for line in lines if unlisted not in line))
    found = problems(tiny_set, tree)
    assert set(found) == {
        Problem(changed, "its bytes have changed"),
        Problem(missing, "missing"),
        Problem(unlisted, "not listed in SHA256SUMS.txt"),
    }
    assert verify_source(tiny_set, Tree(tree)).summary(Tree(tree)).endswith(": 3 problems")


@pytest.mark.parametrize("form", ["{} {}\n", "{}  {}\n", "{} *{}\n", "{}  ./{}\n", "{} {}\r\n\r\n"])
def test_lists_as_several_tools_write_them_are_read(form, tiny_set, tree):
    path = tree / "SHA256SUMS.txt"
    path.write_text("".join(form.format(*line.split()) for line in path.read_text().splitlines()))
    assert problems(tiny_set, tree) == []


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "has no SHA256SUMS.txt"),
        (b"", "is not a list"),
        (b"no hash\n", "is not a list"),
        (b"\xff\xfe", "cannot be read"),
    ],
)
def test_a_source_without_a_list_that_can_be_read_is_refused(data, message, tiny_set, tree):
    (tree / "SHA256SUMS.txt").unlink()
    if data is not None:
        (tree / "SHA256SUMS.txt").write_bytes(data)
    with pytest.raises(ShardError, match=message):
        problems(tiny_set, tree)
