import os
import shutil
from pathlib import Path

import pytest
from commands import invoke
from damage import change, contents, copy_set, flip_bit, sign
from hypothesis import given, settings
from hypothesis import strategies as st
from staging import of_scale, sums

from cxrfast.errors import ShardError
from cxrfast.shards.format.checksums import read_sums
from cxrfast.shards.format.info import read_set
from cxrfast.shards.format.lock import Lock
from cxrfast.shards.format.rows import read_rows, write_rows
from cxrfast.shards.upkeep.problem import Problem
from cxrfast.shards.upkeep.stage import stage
from cxrfast.shards.upkeep.verify import verify

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


def test_a_second_time_everything_is_kept_and_nothing_written(tiny_set, place):
    stage(tiny_set, place.url)
    when = "mtime" if place.is_folder else "LastModified" if place.is_s3 else "created"
    before = {path: info[when] for path, info in place.fs.find(place.at(""), detail=True).items()}
    done = stage(tiny_set, place.url)
    assert (done.files, done.bytes, done.kept) == (0, 0, 21)
    assert {path: info[when] for path, info in place.fs.find(place.at(""), detail=True).items()} == before


def test_a_set_travels_between_any_two_places_and_out_of_an_archive(large_set, tiny_set, bucket, tmp_path):
    stage(large_set, bucket.url)
    stage(bucket.url, f"{bucket.root}/other/", workers=3)
    stage(large_set, tmp_path / "a" / "b" / "set", workers=3)
    stage(f"{bucket.root}/other", tmp_path / "back")
    assert contents(tmp_path / "a" / "b" / "set") == contents(tmp_path / "back") == contents(large_set)
    assert bucket.uploads() == []
    archive = shutil.make_archive(str(tmp_path / "set"), "zip", tiny_set)
    stage(f"zip://::{archive}", tmp_path / "to")
    assert contents(tmp_path / "to") == contents(tiny_set)


def test_the_command_says_what_it_did(tiny_set, tmp_path):
    done = invoke("stage", tiny_set, tmp_path / "to", "--workers", "2")
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith(f"to {tmp_path / 'to'}: 2 scales, 21 files, ")
    assert " copied, 0 kept, " in done.stdout


def test_only_what_the_sums_list_travels(folder, tiny_set, place):
    for name in ("lease.lock", "notes.txt", "32/000000.tar.host-1.tmp", "64/000009.tar"):
        (folder / name).write_text("no part of the set")
    stage(folder, place.url)
    assert place.contents() == contents(tiny_set)


# Scales


def test_scales_staged_one_at_a_time_make_the_whole_set(tiny_set, place):
    assert stage(tiny_set, place.url, [64]).scales == [64]
    first = place.contents()
    assert of_scale(first, 64) == of_scale(contents(tiny_set), 64)
    assert first["SHA256SUMS"].decode() == "".join(f"{h}  {n}\n" for n, h in sorted(sums(first).items()))
    if place.is_folder:
        assert verify(Path(place.url)).rows == {64: 150}
    done = stage(tiny_set, place.url, [32])
    assert (done.scales, done.files, done.kept) == ([32], 9, 3)
    assert place.contents() == contents(tiny_set)


@pytest.mark.parametrize("forgotten", [False, True])
def test_a_scale_that_came_from_another_copy_stays_and_stays_listed(tiny_set, place, tmp_path, forgotten):
    for scale in (32, 64):
        stage(tiny_set, tmp_path / str(scale), [scale])
    stage(tmp_path / "32", place.url)
    if forgotten:  # killed while another scale was staged
        place.fs.rm_file(place.at("SHA256SUMS"))
    stage(tmp_path / "64", place.url)
    assert place.contents() == contents(tiny_set)


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


def test_shards_built_again_are_not_mixed_with_other_scales_of_before(folder, place):
    stage(folder, place.url)
    before = place.contents()
    for scale in (32, 64):
        change(folder / f"{scale}/000001.json", grids="")
    sign(folder)
    with pytest.raises(ShardError, match=r"holds 32 px from before .* stage it too \(--scale 32\)"):
        stage(folder, place.url, [64])
    assert place.contents() == before
    stage(folder, place.url)
    assert place.contents() == contents(folder)


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


@settings(max_examples=20)
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
    ("name", "data", "gone", "copied"),
    [
        ("32/000001.tar", lambda data: data[:-512], None, 2),
        ("32/000001.idx", lambda data: b"", None, 2),
        ("32/000001.json", lambda data: data.replace(b"32", b"23", 1), None, 3),
        ("rows.parquet", lambda data: data[::-1], None, 1),
        ("SHA256SUMS", lambda data: data[:-1], None, 0),
        ("64/000000.tar", lambda data: data[::-1], "64/000000.json", 3),  # the right size, but no manifest
    ],
)
def test_objects_that_differ_are_replaced(tiny_set, bucket, name, data, gone, copied):
    stage(tiny_set, bucket.url)
    bucket.fs.pipe_file(bucket.at(name), data((tiny_set / name).read_bytes()))
    if gone:
        bucket.fs.rm_file(bucket.at(gone))
    assert stage(tiny_set, bucket.url).files == copied
    assert bucket.contents() == contents(tiny_set)


def test_other_labels_reach_a_copy_and_no_tar_is_copied_again(folder, place):
    stage(folder, place.url)
    info, rows = read_set(folder), read_rows(folder / "rows.parquet")
    label, renamed = info.labels[0], info.labels[0][::-1]
    write_rows(folder / "rows.parquet", rows.rename(columns={label: renamed}))
    change(folder / "set.json", labels=[renamed, *info.labels[1:]])
    sign(folder)
    assert stage(folder, place.url, [32]).files == 2
    assert place.contents() == contents(folder)


def test_a_source_that_lacks_a_file_or_has_a_damaged_rows_table_is_refused(folder, bucket, tmp_path):
    (folder / "64/000002.idx").unlink()
    with pytest.raises(ShardError, match=r"is damaged: it lacks 64/000002.idx"):
        stage(folder, bucket.url)
    stage(folder, bucket.url, [32])
    bucket.fs.rm_file(bucket.at("32/000000.tar"))
    with pytest.raises(ShardError, match=r"is damaged: it lacks 32/000000.tar"):
        stage(bucket.url, tmp_path / "to")
    flip_bit(folder / "rows.parquet", 50)
    with pytest.raises(ShardError, match=r"damaged.*differ from its SHA256SUMS: rows.parquet"):
        stage(folder, tmp_path / "to", [32])
    assert not list((tmp_path / "to").rglob("*.*"))


# Refused


def test_another_set_and_anything_that_is_no_set_are_refused_and_nothing_is_touched(folder, place, tmp_path):
    other, notes = copy_set(folder, tmp_path / "other"), tmp_path / "notes"
    change(other / "set.json", id="0" * 32)
    notes.mkdir()
    (notes / "thesis.tex").write_text("all of it")
    for there, message in ((other, "holds another set"), (notes, "is not empty and not a shard set")):
        to = f"{place.root}/{there.name}"
        place.fs.put(f"{there}/", to, recursive=True)
        with pytest.raises(ShardError, match=message):
            stage(folder, to)
        left = [place.fs.cat_file(path) for path in place.fs.find(to)]
        assert sorted(left) == sorted(contents(there).values())


def test_what_is_no_set_or_unfinished_an_absent_scale_a_file_and_the_same_place_are_refused(
    tiny_set, folder, bucket, tmp_path
):
    for source in (tmp_path / "absent", bucket.url):
        with pytest.raises(ShardError, match=r"is not a shard set \(no set.json\)"):
            stage(source, tmp_path / "to")
    with pytest.raises(ShardError, match=r"has no 128, 512 px: it holds 32, 64 px"):
        stage(tiny_set, tmp_path / "to", [512, 32, 128])
    unfinished = f"{bucket.root}/unfinished"
    (folder / "SHA256SUMS").unlink()
    bucket.fs.put(f"{folder}/", unfinished, recursive=True)
    for source in (folder, unfinished):
        with pytest.raises(ShardError, match=r"is not finished \(no SHA256SUMS\)"):
            stage(source, tmp_path / "to")
    assert not (tmp_path / "to").exists()
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


def test_what_a_killed_call_left_in_a_folder_is_cleared_away_unless_another_command_writes_there(tiny_set, tmp_path):
    to = tmp_path / "to"
    to.mkdir()
    for name in ("rows.parquet.host-1.tmp", "rows.parquet"):
        (to / name).write_text("half, or of an earlier state")
    before = contents(to)
    with Lock(to):
        with pytest.raises(ShardError, match=f"to is being built by process {os.getpid()} on "):
            stage(tiny_set, to)
        assert {name: data for name, data in contents(to).items() if name != "lease.lock"} == before
    stage(tiny_set, to)
    assert contents(to) == contents(tiny_set)
    assert read_sums(to) == sums(contents(to))
