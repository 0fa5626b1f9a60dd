import pytest
from damage import flip_bit

from cxrfast.errors import ShardError
from cxrfast.shards.format.rows import read_rows
from cxrfast.shards.storage import Tree
from cxrfast.shards.upkeep.problem import Problem
from cxrfast.shards.upkeep.verify_source import verify_source


def test_images_that_are_changed_missing_or_not_listed_are_named(tiny_set, tree):
    changed, missing, unlisted = read_rows(tiny_set / "rows.parquet")["path"][:3]
    flip_bit(tree / changed, 99)
    (tree / missing).unlink()
    lines = (tree / "SHA256SUMS.txt").read_text().splitlines(keepends=True)
    (tree / "SHA256SUMS.txt").write_text("".join(line for line in lines if unlisted not in line))
    verdict = verify_source(tiny_set, Tree(tree))
    assert set(verdict.problems) == {
        Problem(changed, "its bytes have changed"),
        Problem(missing, "missing"),
        Problem(unlisted, "not listed in SHA256SUMS.txt"),
    }
    assert verdict.summary(Tree(tree)).endswith(": 3 problems")


@pytest.mark.parametrize("form", ["{} {}\n", "{}  {}\n", "{} *{}\n", "{}  ./{}\n", "{} {}\r\n\r\n"])
def test_a_source_as_it_was_published_has_no_problems_whatever_tool_wrote_its_list(form, tiny_set, tree):
    path = tree / "SHA256SUMS.txt"
    lines = [line.split() for line in path.read_text().splitlines()]
    path.write_text("".join(form.format(*line) for line in lines))
    verdict = verify_source(tiny_set, Tree(tree))
    assert verdict.problems == []
    assert (verdict.files, verdict.bytes) == (len(lines), sum((tree / name).stat().st_size for _, name in lines))
    assert f"{tree}: {len(lines)} files" in verdict.summary(Tree(tree))
    assert verdict.summary(Tree(tree)).endswith(": as listed in SHA256SUMS.txt")


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
        verify_source(tiny_set, Tree(tree))
