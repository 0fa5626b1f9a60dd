import csv
import dataclasses
import json
import shutil
import subprocess

import pytest
from damage import copy_set

from cxrfast.errors import ShardError
from cxrfast.shards.format.checksums import read_sums
from cxrfast.shards.format.info import SCHEMA, read_set, versions
from cxrfast.shards.format.manifest import ShardManifest, built, quarantine_bytes, read_manifest, scales_in
from cxrfast.shards.format.names import shard_path


def manifest(**fields) -> ShardManifest:
    return ShardManifest(
        **{
            "set": "abc",
            "scale": 32,
            "shard": 3,
            "sha256": "0" * 64,
            "bytes": 5,
            "rows": [1, 2],
            "crc32": [3, 2**32 - 1],
            "sizes": [[30, 20], [3056, 2544]],
            "quarantined": {"0": "missing"},
            **fields,
        }
    )


def change(path, **fields) -> None:
    path.write_text(json.dumps({**json.loads(path.read_bytes()), **fields}))


def test_set_json_says_what_the_set_is(tiny_set):
    info = read_set(tiny_set)
    assert (info.schema, info.source, info.images, info.seed, info.quality) == (SCHEMA, "mimic", 150, 0, 95)
    assert info.patients < info.studies < info.images
    assert info.shards == 3 == len(built(tiny_set, 32)) == len(built(tiny_set, 64))
    assert len(info.labels) == 14
    assert info.versions == versions()


def test_set_json_comes_back_as_it_was_written(tiny_set, tmp_path):
    info = dataclasses.replace(read_set(tiny_set), labels=["Röntgen"])
    info.write(tmp_path)
    assert read_set(tmp_path) == info


@pytest.mark.parametrize("images", [1, 64, 65, 128, 129])
def test_the_last_shard_holds_what_is_left(tiny_set, images):
    info = dataclasses.replace(read_set(tiny_set), images=images, rows_per_shard=64)
    assert 64 * (info.shards - 1) < images <= 64 * info.shards


def test_a_folder_that_is_no_set_is_named(tmp_path):
    with pytest.raises(ShardError, match=r"is not a shard set \(no set.json\): give the folder that"):
        read_set(tmp_path / "absent")


def test_another_schema_version_is_refused_and_both_versions_are_named(tiny_set, tmp_path):
    folder = copy_set(tiny_set, tmp_path / "set")
    change(folder / "set.json", schema=SCHEMA + 1, unheard_of=1)
    with pytest.raises(ShardError, match=rf"has schema version {SCHEMA + 1}, this cxrfast reads {SCHEMA}"):
        read_set(folder)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"schema": 2}', '{"schema": 2, "id": "x", "colour": 3}', "\xff"]
)
def test_a_damaged_set_json_is_an_error(tmp_path, text):
    (tmp_path / "set.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ShardError, match=r"set.json is damaged"):
        read_set(tmp_path)


def test_a_manifest_comes_back_as_it_was_written_and_an_absent_one_is_none(tmp_path):
    (tmp_path / "32").mkdir()
    manifest().write(tmp_path)
    assert read_manifest(tmp_path, 32, 3) == manifest()
    assert read_manifest(tmp_path, 32, 4) is None
    assert scales_in(tmp_path) == [32]
    assert built(tmp_path, 32) == [3]


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"set": "abc"}'])
def test_a_damaged_manifest_is_an_error_that_names_it(tmp_path, text):
    path = shard_path(tmp_path, 32, 3, "json")
    path.parent.mkdir()
    path.write_text(text)
    with pytest.raises(ShardError, match=r"32/000003.json is damaged: `cxrfast verify --repair"):
        read_manifest(tmp_path, 32, 3)


def test_scales_are_those_with_a_whole_shard(tmp_path):
    for folder in ("64", "128", "notes"):
        (tmp_path / folder).mkdir()
    manifest(scale=64).write(tmp_path)
    (tmp_path / "128" / "000000.tar").touch()
    (tmp_path / "notes" / "000000.json").touch()
    assert scales_in(tmp_path) == [64]


def test_the_quarantine_is_a_csv_sorted_by_row():
    manifests = [manifest(quarantined={"10": "truncated"}), manifest(quarantined={"2": "missing"})]
    text = quarantine_bytes({2: 'files/a,"b.jpg', 10: "files/c.jpg"}, manifests).decode()
    assert list(csv.DictReader(text.splitlines())) == [
        {"row": "2", "path": 'files/a,"b.jpg', "reason": "missing"},
        {"row": "10", "path": "files/c.jpg", "reason": "truncated"},
    ]


def test_sha256sum_agrees_with_the_sums_of_a_built_set(tiny_set):
    if shutil.which("sha256sum") is None:
        pytest.skip("no sha256sum here")
    done = subprocess.run(
        ["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=tiny_set, capture_output=True, text=True
    )
    assert done.returncode == 0
    assert done.stdout.count(": OK\n") == len(read_sums(tiny_set))


def test_the_sums_name_every_other_file_sorted(tiny_set):
    files = {str(path.relative_to(tiny_set)) for path in tiny_set.rglob("*") if path.is_file()} - {"SHA256SUMS"}
    assert list(read_sums(tiny_set)) == sorted(files)
    assert len(files) == 3 + 2 * 3 * 3


def test_a_set_without_sums_is_not_finished(tiny_set, tmp_path):
    folder = copy_set(tiny_set, tmp_path / "set")
    (folder / "SHA256SUMS").unlink()
    with pytest.raises(ShardError, match=r"is not finished \(no SHA256SUMS\): run the same `cxrfast shard`"):
        read_sums(folder)
