import os
import shutil
from pathlib import Path

import pytest
from damage import contents, copy_set, flip_bit, sign
from hypothesis import given, settings
from hypothesis import strategies as st
from staging import change, of_scale, stage, start, sums

from cxrfast.errors import ShardError
from cxrfast.shards.format.checksums import read_sums
from cxrfast.shards.format.info import read_set
from cxrfast.shards.format.lock import Lock
from cxrfast.shards.format.rows import read_rows, write_rows
from cxrfast.shards.upkeep.problem import Problem
from cxrfast.shards.upkeep.verify import verify


@pytest.fixture
def folder(tiny_set: Path, tmp_path: Path) -> Path:
    """A copy of the tiny set to damage."""
    return copy_set(tiny_set, tmp_path / "from")


# There and back


def test_a_set_comes_back_from_an_object_store_with_the_same_bytes(either_set, bucket, tmp_path):
    there = stage(either_set, bucket.url)
    assert bucket.contents() == contents(either_set)
    back = stage(bucket.url, tmp_path / "back")
    assert contents(tmp_path / "back") == contents(either_set)
    assert verify(tmp_path / "back", deep=True).problems == []
    size = sum(len(data) for name, data in contents(either_set).items() if name != "SHA256SUMS")
    for done in (there, back):
        assert (done.scales, done.files, done.bytes, done.kept) == ([32, 64], 21, size, 0)


def test_a_second_time_everything_is_kept_and_nothing_written(tiny_set, bucket, tmp_path):
    for to in (bucket.url, tmp_path / "to"):
        stage(tiny_set, to)
    when = "LastModified" if bucket.is_s3 else "created"
    objects = {path: info[when] for path, info in bucket.fs.find(bucket.at(""), detail=True).items()}
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "to").rglob("*.*")}
    for to in (bucket.url, tmp_path / "to"):
        done = stage(tiny_set, to)
        assert (done.files, done.bytes, done.kept) == (0, 0, 21)
    assert {path: info[when] for path, info in bucket.fs.find(bucket.at(""), detail=True).items()} == objects
    assert {path: path.stat().st_mtime_ns for path in files} == files


def test_between_two_places_of_an_object_store_and_two_folders_alike(large_set, bucket, tmp_path):
    stage(large_set, bucket.url)
    stage(bucket.url, f"{bucket.root}/other/", workers=3)
    stage(large_set, tmp_path / "a" / "b" / "set", workers=3)
    stage(f"{bucket.root}/other", tmp_path / "back")
    assert contents(tmp_path / "a" / "b" / "set") == contents(tmp_path / "back") == contents(large_set)
    assert bucket.uploads() == []


def test_the_command_says_what_it_did(tiny_set, tmp_path):
    with start(tiny_set, tmp_path / "to") as child:
        out, _ = child.communicate()
    assert child.returncode == 0
    assert out.startswith(f"to {tmp_path / 'to'}: 2 scales, 21 files, ")
    assert " copied, 0 kept, " in out


def test_only_what_the_sums_list_travels(folder, tiny_set, bucket, tmp_path):
    for name in ("lease.lock", "notes.txt", "32/000000.tar.host-1.tmp", "64/000009.tar"):
        (folder / name).write_text("no part of the set")
    for to in (bucket.url, tmp_path / "to"):
        stage(folder, to)
    assert contents(tmp_path / "to") == bucket.contents() == contents(tiny_set)


# Scales


@pytest.mark.parametrize("remote", [False, True])
def test_scales_staged_one_at_a_time_make_the_whole_set(tiny_set, bucket, tmp_path, remote):
    to = bucket.url if remote else tmp_path / "to"
    look = bucket.contents if remote else lambda: contents(tmp_path / "to")
    assert stage(tiny_set, to, [64]).scales == [64]
    first = look()
    assert of_scale(first, 64) == of_scale(contents(tiny_set), 64)
    assert first["SHA256SUMS"].decode() == "".join(f"{h}  {n}\n" for n, h in sorted(sums(first).items()))
    if not remote:
        assert verify(to).rows == {64: 150}
    done = stage(tiny_set, to, [32])
    assert (done.scales, done.files, done.kept) == ([32], 9, 3)
    assert look() == contents(tiny_set)


@pytest.mark.parametrize("remote", [False, True])
@pytest.mark.parametrize("forgotten", [False, True])
def test_a_scale_that_came_from_another_copy_stays_and_stays_listed(tiny_set, bucket, tmp_path, remote, forgotten):
    to = bucket.url if remote else tmp_path / "to"
    for scale in (32, 64):
        stage(tiny_set, tmp_path / str(scale), [scale])
    stage(tmp_path / "32", to)
    if forgotten:  # killed while another scale was staged
        bucket.fs.rm_file(bucket.at("SHA256SUMS")) if remote else (to / "SHA256SUMS").unlink()
    stage(tmp_path / "64", to)
    assert (bucket.contents() if remote else contents(to)) == contents(tiny_set)


@pytest.mark.parametrize("elsewhere", [False, True])
def test_damage_to_a_scale_that_came_earlier_is_not_signed_as_right(tiny_set, tmp_path, elsewhere):
    to = tmp_path / "to"
    stage(tiny_set, to, [32])
    flip_bit(to / "32/000001.idx", 3)
    source = tiny_set
    if elsewhere:
        source = tmp_path / "64"
        stage(tiny_set, source, [64])
    stage(source, to, [64])
    assert verify(to).problems == [Problem("32/000001.idx", "its bytes have changed")]


def test_a_scale_that_is_not_there_is_an_error_that_names_those_that_are(tiny_set, tmp_path):
    with pytest.raises(ShardError, match=r"has no 128, 512 px: it holds 32, 64 px"):
        stage(tiny_set, tmp_path / "to", [512, 32, 128])
    assert not (tmp_path / "to").exists()


@pytest.mark.parametrize("remote", [False, True])
def test_shards_built_again_are_not_mixed_with_other_scales_of_before(folder, bucket, tmp_path, remote):
    to = bucket.url if remote else tmp_path / "to"
    stage(folder, to)
    before = bucket.contents() if remote else contents(to)
    for scale in (32, 64):
        change(folder / f"{scale}/000001.json", grids="")
    sign(folder)
    with pytest.raises(ShardError, match=r"holds 32 px from before .* stage it too \(--scale 32\)"):
        stage(folder, to, [64])
    assert (bucket.contents() if remote else contents(to)) == before
    stage(folder, to)
    assert (bucket.contents() if remote else contents(to)) == contents(folder)


# Another writer


def test_a_folder_that_another_command_writes_into_is_refused(tiny_set, tmp_path):
    to = tmp_path / "to"
    stage(tiny_set, to, [32])
    before = contents(to)
    with Lock(to):
        with pytest.raises(ShardError, match=f"to is being built by process {os.getpid()} on "):
            stage(tiny_set, to)
        assert {name: data for name, data in contents(to).items() if name != "lease.lock"} == before
    stage(tiny_set, to)
    assert contents(to) == contents(tiny_set)


# What is there already


DAMAGE = ("missing", "flipped", "truncated", "empty", "longer")


def damage(path: Path, how: str) -> None:
    data = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how == "flipped":
        flip_bit(path, len(data) // 2)
    else:
        path.write_bytes({"truncated": data[:-1], "empty": b"", "longer": data + b"\0"}[how])


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_whatever_became_of_a_local_copy_only_what_differs_is_copied_again(tiny_set, tmp_path_factory, data):
    to = copy_set(tiny_set, tmp_path_factory.mktemp("damaged") / "to")
    names = sorted(contents(tiny_set).keys() - {"set.json"})
    damaged = data.draw(st.dictionaries(st.sampled_from(names), st.sampled_from(DAMAGE), max_size=6))
    for name, how in damaged.items():
        damage(to / name, how)
    done = stage(tiny_set, to)
    assert contents(to) == contents(tiny_set)
    again = {name.rsplit(".", 1)[0] + ".json" for name in damaged if "/" in name}  # a manifest follows its tar
    assert done.files == len((damaged.keys() | again) - {"SHA256SUMS"})
    shutil.rmtree(to.parent)


@pytest.mark.parametrize(
    ("name", "data", "copied"),
    [
        ("32/000001.tar", lambda data: data[:-512], 2),
        ("32/000001.idx", lambda data: b"", 2),
        ("32/000001.json", lambda data: data.replace(b"32", b"23", 1), 3),
        ("rows.parquet", lambda data: data[::-1], 1),
        ("SHA256SUMS", lambda data: data[:-1], 0),
    ],
)
def test_objects_that_differ_are_replaced(tiny_set, bucket, name, data, copied):
    stage(tiny_set, bucket.url)
    bucket.fs.pipe_file(bucket.at(name), data((tiny_set / name).read_bytes()))
    assert stage(tiny_set, bucket.url).files == copied
    assert bucket.contents() == contents(tiny_set)


def test_a_tar_of_the_right_size_without_its_manifest_is_not_relied_on(tiny_set, bucket):
    stage(tiny_set, bucket.url)
    data = (tiny_set / "64/000000.tar").read_bytes()
    bucket.fs.pipe_file(bucket.at("64/000000.tar"), data[::-1])
    bucket.fs.rm_file(bucket.at("64/000000.json"))
    assert stage(tiny_set, bucket.url).files == 3
    assert bucket.contents() == contents(tiny_set)


@pytest.mark.parametrize("remote", [False, True])
def test_other_labels_reach_a_copy_and_no_tar_is_copied_again(folder, bucket, tmp_path, remote):
    to = bucket.url if remote else tmp_path / "to"
    stage(folder, to)
    info, rows = read_set(folder), read_rows(folder / "rows.parquet")
    label, renamed = info.labels[0], info.labels[0][::-1]
    write_rows(folder / "rows.parquet", rows.rename(columns={label: renamed}))
    change(folder / "set.json", labels=[renamed, *info.labels[1:]])
    sign(folder)
    assert stage(folder, to, [32]).files == 2
    assert (bucket.contents() if remote else contents(to)) == contents(folder)


# Damaged


def test_a_damaged_rows_table_stops_before_any_shard_is_copied(folder, bucket):
    flip_bit(folder / "rows.parquet", 50)
    with pytest.raises(ShardError, match=r"damaged.*differ from its SHA256SUMS: rows.parquet"):
        stage(folder, bucket.url)
    assert bucket.contents() == {}


def test_a_source_that_lacks_a_file_is_refused(folder, bucket, tmp_path):
    (folder / "64/000002.idx").unlink()
    with pytest.raises(ShardError, match=r"is damaged: it lacks 64/000002.idx"):
        stage(folder, bucket.url)
    stage(folder, bucket.url, [32])
    bucket.fs.rm_file(bucket.at("32/000000.tar"))
    with pytest.raises(ShardError, match=r"is damaged: it lacks 32/000000.tar"):
        stage(bucket.url, tmp_path / "to")
    assert not (tmp_path / "to").exists()


# Refused


@pytest.mark.parametrize("remote", [False, True])
def test_another_set_and_anything_that_is_no_set_are_refused_and_nothing_is_touched(folder, bucket, tmp_path, remote):
    other, notes = copy_set(folder, tmp_path / "other"), tmp_path / "notes"
    change(other / "set.json", id="0" * 32)
    notes.mkdir()
    (notes / "thesis.tex").write_text("all of it")
    for place, message in ((other, "holds another set"), (notes, "is not empty and not a shard set")):
        to, before = place, contents(place)
        if remote:
            to = f"{bucket.root}/{place.name}"
            bucket.fs.put(f"{place}/", to, recursive=True)
        with pytest.raises(ShardError, match=message):
            stage(folder, to)
        assert contents(place) == before
    if remote:
        assert bucket.fs.cat_file(f"{bucket.name}/notes/thesis.tex") == b"all of it"
        assert len(bucket.fs.find(f"{bucket.name}/notes")) == 1


def test_an_unfinished_source_is_refused(folder, bucket, tmp_path):
    stage(folder, bucket.url)
    bucket.fs.rm_file(bucket.at("SHA256SUMS"))
    (folder / "SHA256SUMS").unlink()
    for source in (folder, bucket.url):
        with pytest.raises(ShardError, match=r"is not finished \(no SHA256SUMS\)"):
            stage(source, tmp_path / "to")
    assert not (tmp_path / "to").exists()


def test_what_is_no_set_a_file_or_the_same_place_is_refused(tiny_set, bucket, tmp_path):
    with pytest.raises(ShardError, match=r"is not a shard set \(no set.json\)"):
        stage(tmp_path / "absent", tmp_path / "to")
    with pytest.raises(ShardError, match=r"is not a shard set \(no set.json\)"):
        stage(bucket.url, tmp_path / "to")
    with pytest.raises(ShardError, match=r"set\.json is a file"):
        stage(tiny_set, tiny_set / "set.json")
    (tmp_path / "link").symlink_to(tiny_set)
    for source, to in (
        (tiny_set, tmp_path / "link" / "32"),
        (bucket.url, f"{bucket.root}/some"),
        (bucket.url, bucket.url + "/"),
    ):
        with pytest.raises(ShardError, match="are the same place, or one is inside the other"):
            stage(source, to)
    with pytest.raises(ShardError, match="s4://bucket/set cannot be opened"):
        stage(tiny_set, "s4://bucket/set")
    if bucket.is_s3:
        with pytest.raises(ShardError, match=r"s3:// cannot be reached|s3:// is not empty"):
            stage(tiny_set, "s3://")


def test_a_set_in_an_archive_is_unpacked(tiny_set, tmp_path):
    archive = shutil.make_archive(str(tmp_path / "set"), "zip", tiny_set)
    stage(f"zip://::{archive}", tmp_path / "to")
    assert contents(tmp_path / "to") == contents(tiny_set)


def test_what_a_killed_call_left_in_a_folder_is_cleared_away(tiny_set, tmp_path):
    to = tmp_path / "to"
    (to / "32").mkdir(parents=True)
    for name in ("rows.parquet.host-1.tmp", "32/000000.tar.host-1.tmp"):
        (to / name).write_text("half")
    (to / "rows.parquet").write_text("an earlier state")
    (to / "32").rename(to.parent / "32")  # a killed call leaves no scale before its set.json
    stage(tiny_set, to)
    assert contents(to) == contents(tiny_set)
    assert read_sums(to) == sums(contents(to))
