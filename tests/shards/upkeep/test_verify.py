import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from damage import copy_set, flip_bit, image_bytes, replace_image, sign, without_grids

from cxrfast.errors import ShardError
from cxrfast.files import sha256
from cxrfast.shards.format.codec import encode_member, pgm_header
from cxrfast.shards.format.info import read_set
from cxrfast.shards.format.names import shard_path
from cxrfast.shards.format.rows import read_rows, write_rows
from cxrfast.shards.images.cell_means import STEPS, pack, tolerance, unpack
from cxrfast.shards.images.decode import encode
from cxrfast.shards.storage import Tree
from cxrfast.shards.upkeep.problem import Problem
from cxrfast.shards.upkeep.verify import Verdict, find_source, inspect, verify


def check(folder: Path, deep: bool = False) -> Verdict:
    return verify(folder, deep=deep)


def change(path: Path, **fields) -> None:
    path.write_text(json.dumps({**json.loads(path.read_bytes()), **fields}) + "\n")


@pytest.fixture
def folder(tiny_set: Path, tmp_path: Path) -> Path:
    """A copy of the tiny set that can be spoiled."""
    return copy_set(tiny_set, tmp_path / "set")


def test_a_set_as_it_was_built_has_no_problems_and_is_not_written_to(tiny_set):
    before = {path: path.stat().st_mtime_ns for path in tiny_set.rglob("*")}
    verdict = check(tiny_set)
    assert verdict.problems == []
    assert verdict.rows == {32: 150, 64: 150}
    assert verdict.quarantined == 0
    assert verdict.bytes == sum(p.stat().st_size for p in before if p.is_file() and p.name != "SHA256SUMS")
    assert {path: path.stat().st_mtime_ns for path in tiny_set.rglob("*")} == before


def test_every_real_radiograph_decodes(real_set):
    verdict = check(real_set, deep=True)
    assert verdict.problems == []
    assert verdict.rows == {64: 237, 256: 237, 1024: 237}


@pytest.mark.parametrize(
    "name", ["32/000001.tar", "32/000001.idx", "64/000002.json", "rows.parquet", "quarantine.csv", "set.json"]
)
def test_a_single_flipped_bit_anywhere_in_a_file_is_found(folder, name):
    rng = np.random.default_rng(len(name))
    data = (folder / name).read_bytes()
    for position in {0, len(data) - 1, *rng.integers(len(data), size=6).tolist()}:
        flip_bit(folder / name, position, 1 << int(rng.integers(8)))
        try:
            assert Problem(name, "its bytes have changed") in check(folder).problems, f"byte {position}"
        except ShardError:
            assert name == "set.json", "only without it there is nothing to compare"
        (folder / name).write_bytes(data)
    assert check(folder).problems == []


@pytest.mark.parametrize("name", ["64/000000.tar", "64/000000.idx", "64/000002.json", "rows.parquet", "quarantine.csv"])
def test_a_missing_file_is_found(folder, name):
    (folder / name).unlink()
    assert check(folder).problems == [Problem(name, "missing")]


@pytest.mark.parametrize("name", ["64/000003.tar", "32/000001.tar.1.tmp", "notes.txt"])
def test_a_file_that_does_not_belong_to_the_set_is_found(folder, name):
    (folder / name).touch()
    assert check(folder).problems == [Problem(name, "not part of the set")]


def test_swapped_tars_are_found(folder):
    one, two = (shard_path(folder, 32, n, "tar") for n in (0, 1))
    one.rename(folder / "aside")
    two.rename(one)
    (folder / "aside").rename(two)
    changed = "its bytes have changed"
    assert check(folder).problems == [Problem("32/000000.tar", changed), Problem("32/000001.tar", changed)]


# The hashes agree, but the files contradict each other


def test_two_shards_swapped_whole_are_found(folder):
    for suffix in ("tar", "idx", "json"):
        one, two = (shard_path(folder, 32, n, suffix) for n in (0, 1))
        one.rename(folder / "aside")
        two.rename(one)
        (folder / "aside").rename(two)
    sign(folder)
    assert any(p.path.startswith("32/") for p in check(folder).problems)


def test_a_shard_of_another_set_is_found(folder):
    change(shard_path(folder, 64, 1, "json"), set="0" * 32)
    sign(folder)
    assert check(folder).problems == [Problem("64/000001.json", "belongs to another set")]


def test_a_shard_lost_between_others_is_found(folder):
    for suffix in ("tar", "idx", "json"):
        shard_path(folder, 64, 1, suffix).unlink()
    sign(folder)
    assert [p.what for p in check(folder).problems] == [
        "shard 1 is missing at 64 px: `cxrfast shard --scale 64` builds it"
    ]


def test_rows_that_are_neither_held_nor_quarantined_are_found(folder):
    path = shard_path(folder, 64, 1, "json")
    value = json.loads(path.read_bytes())
    shorter = {name: value[name][:-1] for name in ("rows", "crc32", "sizes")}
    change(path, **shorter, grids=pack(unpack(value["grids"], 64)[:-1]))
    sign(folder)
    assert {p.what for p in check(folder).problems} == {
        "does not account for the rows 64 to 127",
        "holds other rows than at 32 px",
        "lists other rows than its index",
    }


def test_an_index_of_another_shard_is_found(folder):
    shutil.copy(shard_path(folder, 64, 0, "idx"), shard_path(folder, 64, 1, "idx"))
    sign(folder)
    assert check(folder).problems == [Problem("64/000001.json", "lists other rows than its index")]


def test_a_plan_with_a_row_missing_or_an_image_renamed_is_found(folder):
    rows = read_rows(folder / "rows.parquet")
    write_rows(folder / "rows.parquet", rows.iloc[:-1])
    sign(folder)
    assert check(folder).problems == [Problem("rows.parquet", "does not hold the rows 0 to 149")]
    rows.loc[3, "image_id"] = "another"
    write_rows(folder / "rows.parquet", rows)
    sign(folder)
    assert check(folder).problems == [Problem("rows.parquet", "does not match the set id in set.json")]


@pytest.mark.parametrize(
    ("name", "image", "what"),
    [
        ("tiny_set", lambda jpeg: b"no picture", "not an image"),
        ("tiny_set", lambda jpeg: jpeg[: len(jpeg) // 2], "truncated"),
        ("tiny_set", lambda jpeg: encode(np.zeros((16, 16), np.uint8), 95), "16 × 16 px"),
        ("raw_set", lambda pgm: b"no picture", "not an image"),
        ("raw_set", lambda pgm: pgm_header(33, 32) + pgm[15:], "truncated"),
        ("raw_set", lambda pgm: pgm_header(31, 32) + pgm[15:], "corrupt"),
        ("raw_set", lambda pgm: pgm_header(16, 64) + pgm[15:], "64 × 16 px"),
    ],
)
def test_deep_finds_an_image_that_was_written_wrong(request, tmp_path, name, image, what):
    folder = copy_set(request.getfixturevalue(name), tmp_path / "set")
    replace_image(folder, 32, 70, image(image_bytes(folder, 32, 70)))
    assert check(folder).problems == []
    problems = check(folder, deep=True).problems
    assert [(p.path, p.what.split(": ")[-1].split(" is ")[-1]) for p in problems] == [("32/000001.tar", what)]
    assert "row 70" in problems[0].what


def test_deep_finds_a_checksum_of_another_image(either_set, tmp_path):
    folder = copy_set(either_set, tmp_path / "set")
    assert check(folder, deep=True).problems == []
    path = shard_path(folder, 64, 0, "json")
    crc32 = json.loads(path.read_bytes())["crc32"]
    change(path, crc32=[*crc32[:5], crc32[5] ^ 1, *crc32[6:]])
    sign(folder)
    assert check(folder, deep=True).problems == [
        Problem("64/000000.tar", "row 5 differs from its crc32", is_signed=True)
    ]


def test_deep_finds_an_image_that_decodes_and_is_another(either_set, tmp_path):
    folder = copy_set(either_set, tmp_path / "set")
    codec = read_set(folder).codec
    replace_image(
        folder, 32, 70, encode_member(np.full((32, 32), 90, np.uint8), codec, 95 if codec == "jpeg" else None)
    )
    assert check(folder).problems == []
    (problem,) = check(folder, deep=True).problems
    assert problem.path == "32/000001.tar"
    assert re.fullmatch(r"row 70 differs from its grid, by up to \d+\.\d grey levels", problem.what)


def test_deep_finds_a_grid_that_is_off_by_more_than_decoding_may_be(folder):
    path = shard_path(folder, 64, 1, "json")
    grids = unpack(json.loads(path.read_bytes())["grids"], 64).copy()
    grids[6, 3, 0] += np.int16(1.5 * STEPS * tolerance("jpeg", 95, 64))
    change(path, grids=pack(grids))
    sign(folder)
    assert [p.what[:28] for p in check(folder, deep=True).problems] == ["row 70 differs from its grid"]


def test_a_set_of_an_earlier_version_is_whole_and_its_line_says_that_it_holds_no_grids(folder):
    assert "grids" not in check(folder).summary(folder)
    without_grids(folder, [(64, 1)])
    verdict = check(folder, deep=True)
    assert (verdict.problems, verdict.without_grids) == ([], 1)
    assert "whole; shards that hold no grids: 1 (`cxrfast verify --repair` adds them)" in verdict.summary(folder)


@pytest.mark.parametrize("what", ["empty folder", "folder in the place of a file", "dangling link", "pipe"])
def test_what_is_no_regular_file_is_found(folder, what):
    path = folder / "32" / "000001.idx"
    if what == "empty folder":
        (folder / "512").mkdir()
    elif what == "dangling link":
        (folder / "32" / "000009.tar").symlink_to("nowhere")
    else:
        path.unlink()
        path.mkdir() if what.startswith("folder") else os.mkfifo(path)
    expected = {
        "empty folder": ("512/", "not part of the set"),
        "dangling link": ("32/000009.tar", "not part of the set"),
    }.get(what, ("32/000001.idx", "is no regular file"))
    assert [(p.path, p.what) for p in check(folder).problems] == [expected]


def test_a_plan_whose_patients_are_dealt_otherwise_is_found(folder):
    rows = read_rows(folder / "rows.parquet")
    rows.loc[3, "fold"] = (rows.loc[3, "fold"] + 1) % 5
    write_rows(folder / "rows.parquet", rows, read_set(folder))
    sign(folder)
    assert [p.what for p in check(folder).problems] == ["deals patients to other folds than the seed in set.json does"]


def test_deep_finds_images_in_each_other_s_place(folder):
    """A tar of the right rows, with all hashes right, whose samples are of other images."""
    tar = shard_path(folder, 32, 1, "tar")
    data = tar.read_bytes()
    a, b = re.findall(rb'"image_id": "(.*?)"', data)[:2]
    tar.write_bytes(data.replace(a, b"x" * len(a)).replace(b, a).replace(b"x" * len(a), b))
    change(shard_path(folder, 32, 1, "json"), sha256=sha256(tar))
    sign(folder)
    assert check(folder).problems == []
    assert [p.what for p in check(folder, deep=True).problems] == ["holds other images than the plan says"]


# Nothing can be compared


def test_a_set_that_was_never_finished_is_refused(folder):
    (folder / "SHA256SUMS").unlink()
    with pytest.raises(ShardError, match="not finished"):
        check(folder)


def test_a_set_of_another_schema_version_is_refused(folder):
    change(folder / "set.json", schema=99)
    write_rows(folder / "rows.parquet", read_rows(folder / "rows.parquet"), replace(read_set(folder), schema=99))
    sign(folder)
    with pytest.raises(ShardError, match="schema version 99"):
        check(folder)


def test_a_folder_that_is_no_set_is_refused(tmp_path):
    with pytest.raises(ShardError, match="not a shard set"):
        check(tmp_path)


# What the command says


def test_a_whole_set_and_its_source_are_one_line_each(tiny_set, phantoms):
    result = inspect(tiny_set, Tree(phantoms), deep=True)
    source, whole = result.lines
    assert source.endswith("as listed in SHA256SUMS.txt")
    assert whole.startswith(f"{tiny_set}: 150 rows at 32 px, 150 rows at 64 px; 150 planned, 0 quarantined; ")
    assert whole.endswith(" MB/s, every image decoded: whole")
    assert result.is_whole


@pytest.mark.parametrize(("repaired", "advice"), [(False, "; `cxrfast verify --repair` mends what it can"), (True, "")])
def test_a_repair_is_advised_unless_it_was_tried(repaired, advice, folder):
    (folder / "32" / "000001.idx").unlink()
    result = inspect(folder, None, is_repaired=repaired)
    assert (result.is_whole, result.lines) == (False, [])
    assert result.advice() == f"{folder}: 1 problems, named above{advice}"


def test_damage_that_was_signed_is_said_to_need_a_copy(folder):
    replace_image(folder, 32, 70, b"no picture")
    assert "restore these shards from a copy" in inspect(folder, None, deep=True).advice()


def test_problems_of_the_source_alone_are_no_reason_to_repair_the_set(folder, phantoms, tmp_path):
    tree = Path(shutil.copytree(phantoms, tmp_path / "tree"))
    (tree / read_rows(folder / "rows.parquet")["path"].iloc[0]).unlink()
    result = inspect(folder, Tree(tree))
    assert [line.endswith(": 1 problems") for line in result.lines] == [True]
    assert result.advice() == f"{folder}: 1 problems, named above"


def test_the_default_source_counts_where_it_is_needed_is_a_url_or_is_there(tmp_path):
    def found(*arguments) -> str | None:
        tree = find_source(*arguments)
        return str(tree) if tree else None

    absent = str(tmp_path / "absent")
    assert found(None, absent, False) is None
    assert found(None, absent, True) == absent
    assert found(None, str(tmp_path), False) == str(tmp_path)
    assert found(None, "memory://tree", False) == "memory://tree"
    assert found(str(tmp_path), absent, False) == str(tmp_path)
