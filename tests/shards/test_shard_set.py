from dataclasses import replace

import pytest

from cxrfast import ShardSet
from cxrfast.errors import ShardError
from cxrfast.shards.format.info import read_set
from cxrfast.shards.format.manifest import read_manifest
from cxrfast.shards.format.rows import read_rows, write_rows


def test_a_set_says_what_it_holds_and_where(tiny_set):
    shards = ShardSet(str(tiny_set))
    assert (shards.folder, shards.info) == (tiny_set, read_set(tiny_set))
    assert (shards.scales, shards.shards(64), shards.shards(128)) == ([32, 64], [0, 1, 2], [])
    assert shards.rows().equals(read_rows(tiny_set / "rows.parquet"))
    assert [(m.scale, m.shard) for m in shards.manifests()] == [(scale, n) for scale in (32, 64) for n in range(3)]
    assert shards.manifest(64, 1) == read_manifest(tiny_set, 64, 1)
    assert shards.manifest(64, 3) is None
    assert [shards.path(64, 1, kind).is_file() for kind in ("tar", "idx", "json")] == [True] * 3
    assert shards.path(64, 1) == shards.path(64, 1, "tar")
    assert shards.is_whole


def test_a_set_that_lacks_a_shard_or_its_checksums_is_not_whole(folder):
    shards = ShardSet(folder)
    sums = (folder / "SHA256SUMS").read_bytes()
    (folder / "SHA256SUMS").unlink()
    assert not shards.is_whole
    (folder / "SHA256SUMS").write_bytes(sums)
    assert shards.is_whole
    shards.path(32, 2, "json").unlink()
    assert (shards.shards(32), shards.is_whole) == ([0, 1], False)


def test_labels_replaced_after_a_set_was_opened_are_never_taken_for_its_own(folder):
    opened, info = ShardSet(folder), read_set(folder)
    new = replace(info, labels_from="another table")
    write_rows(folder / "rows.parquet", opened.rows(), new)
    with pytest.raises(ShardError, match="were replaced since the set was opened: run this command again"):
        opened.rows()
    assert ShardSet(folder).info == new, "set.json is older"
    assert len(ShardSet(folder).rows()) == info.images


def test_a_set_is_described_by_set_json_where_its_table_does_not(folder):
    info, rows = read_set(folder), read_rows(folder / "rows.parquet")
    write_rows(folder / "rows.parquet", rows)
    assert ShardSet(folder).info == info
    assert ShardSet(folder).rows().equals(rows)
    (folder / "rows.parquet").write_bytes(b"PAR1")
    assert ShardSet(folder).info == info
