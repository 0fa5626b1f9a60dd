import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from damage import change, copy_set, flip_bit, image_bytes, problems, replace_image, sign, swap, without_grids

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
from cxrfast.shards.upkeep.verify import find_source, inspect, verify
from cxrfast.shards.upkeep.verify_source import verify_source


def test_a_set_as_it_was_built_has_no_problems_and_is_not_written_to(either_set, phantoms):
    before = {path: path.stat().st_mtime_ns for path in either_set.rglob("*")}
    verdict = verify(either_set)
    assert verdict.problems == []
    assert verdict.rows == {32: 150, 64: 150}
    assert verdict.quarantined == 0
    assert verdict.bytes == sum(p.stat().st_size for p in before if p.is_file() and p.name != "SHA256SUMS")
    result = inspect(either_set, Tree(phantoms), deep=True)
    assert not result.problems
    source, whole = result.lines
    assert source.endswith("as listed in SHA256SUMS.txt")
    assert whole.startswith(f"{either_set}: 150 rows at 32 px, 150 rows at 64 px; 150 planned, 0 quarantined; ")
    assert whole.endswith(" MB/s, every image decoded: whole")
    assert {path: path.stat().st_mtime_ns for path in either_set.rglob("*")} == before


@pytest.mark.parametrize(
    "name", ["32/000001.tar", "32/000001.idx", "64/000002.json", "rows.parquet", "quarantine.csv", "set.json"]
)
def test_a_single_flipped_bit_anywhere_in_a_file_is_found(folder, name):
    rng = np.random.default_rng(len(name))
    data = (folder / name).read_bytes()
    for position in {0, len(data) - 1, *rng.integers(len(data), size=6).tolist()}:
        flip_bit(folder / name, position, 1 << int(rng.integers(8)))
        try:
            assert Problem(name, "its bytes have changed") in verify(folder).problems, f"byte {position}"
        except ShardError:
            assert name == "set.json", "only without it there is nothing to compare"
        (folder / name).write_bytes(data)
    assert verify(folder).problems == []


def test_files_that_are_missing_foreign_swapped_or_not_regular_are_found(folder):
    for name in ("64/000000.tar", "64/000000.idx", "64/000002.json", "rows.parquet", "quarantine.csv"):
        (folder / name).rename(folder.parent / "aside")
        assert verify(folder).problems == [Problem(name, "missing")]
        (folder.parent / "aside").rename(folder / name)
    swap(folder, "tar")
    (folder / "32/000001.idx").unlink()
    (folder / "32/000001.idx").mkdir()
    (folder / "32/000002.idx").unlink()
    os.mkfifo(folder / "32/000002.idx")
    (folder / "512").mkdir()
    (folder / "32/000009.tar").symlink_to("nowhere")
    for name in ("64/000003.tar", "32/000001.tar.1.tmp", "notes.txt"):
        (folder / name).touch()
    assert {(p.path, p.what) for p in verify(folder).problems} == {
        *((f"32/00000{n}.tar", "its bytes have changed") for n in (0, 1)),
        *((f"32/00000{n}.idx", "is not a regular file") for n in (1, 2)),
        *((name, "not part of the set") for name in ("512/", "32/000009.tar", "64/000003.tar")),
        *((name, "not part of the set") for name in ("32/000001.tar.1.tmp", "notes.txt")),
    }


# The hashes agree, but the files contradict each other


def lose_shard(folder: Path) -> None:
    for suffix in ("tar", "idx", "json"):
        shard_path(folder, 64, 1, suffix).unlink()


def lose_row(folder: Path) -> None:
    path = shard_path(folder, 64, 1, "json")
    value = json.loads(path.read_bytes())
    shorter = {name: value[name][:-1] for name in ("rows", "crc32", "sizes")}
    change(path, **shorter, grids=pack(unpack(value["grids"], 64)[:-1]), sources="")


def copied(*suffixes: str, to: int) -> Callable[[Path], None]:
    def copy(folder: Path) -> None:
        for suffix in suffixes:
            shutil.copy(shard_path(folder, 64, 0, suffix), shard_path(folder, to, 0 if to == 32 else 1, suffix))

    return copy


def said(**fields) -> Callable[[Path], None]:
    return lambda folder: change(shard_path(folder, 64, 1, "json"), **fields)


def planned(edit: Callable[[pd.DataFrame], pd.DataFrame]) -> Callable[[Path], None]:
    return lambda folder: write_rows(
        folder / "rows.parquet", edit(read_rows(folder / "rows.parquet")), read_set(folder)
    )


CONTRADICTIONS = {
    "two shards swapped whole": (
        lambda folder: swap(folder, "tar", "idx", "json"),
        {
            "32/000000.json: is the manifest of shard 1 at 32 px",
            "32/000000.json: does not account for the rows 0 to 63",
            "32/000001.json: is the manifest of shard 0 at 32 px",
            "32/000001.json: does not account for the rows 64 to 127",
            "64/000000.json: holds other rows than at 32 px",
            "64/000001.json: holds other rows than at 32 px",
        },
    ),
    "a row neither held nor quarantined": (
        lose_row,
        {
            "64/000001.json: does not account for the rows 64 to 127",
            "64/000001.json: holds other rows than at 32 px",
            "64/000001.json: lists other rows than its index",
        },
    ),
    "another scale": (copied("tar", "idx", "json", to=32), {"32/000000.json: is the manifest of shard 0 at 64 px"}),
    "another tar": (said(bytes=512), {"64/000001.json: is the manifest of another tar"}),
    "another hash": (said(sha256="0" * 64), {"64/000001.json: is the manifest of another tar"}),
    "another set": (said(set="0" * 32), {"64/000001.json: belongs to another set"}),
    "another index": (copied("idx", to=64), {"64/000001.json: lists other rows than its index"}),
    "a shard lost between others": (
        lose_shard,
        {"64/000002.json: shard 1 is missing at 64 px: `cxrfast shard --scale 64` builds it"},
    ),
    "another description": (
        lambda folder: change(folder / "set.json", labels_from="x"),
        {"set.json: differs from its copy in rows.parquet, or from the labels there"},
    ),
    "a row lost": (planned(lambda rows: rows.iloc[:-1]), {"rows.parquet: does not hold the rows 0 to 149"}),
    "an image renamed": (
        planned(lambda rows: rows.assign(image_id=["another", *rows["image_id"][1:]])),
        {"rows.parquet: does not match the set id in set.json"},
    ),
    "a patient dealt to another fold": (
        planned(lambda rows: rows.assign(fold=[(rows["fold"][0] + 1) % 5, *rows["fold"][1:]])),
        {"rows.parquet: assigns patients to other folds than the seed in set.json gives"},
    ),
}


@pytest.mark.parametrize(("damage", "found"), CONTRADICTIONS.values(), ids=CONTRADICTIONS)
def test_files_that_contradict_each_other_are_found_although_every_hash_is_right(folder, damage, found):
    damage(folder)
    sign(folder)
    assert set(problems(folder)) == found


# The hashes agree, but the images are wrong


def change_checksum(folder: Path) -> None:
    path = shard_path(folder, 32, 1, "json")
    crc32 = json.loads(path.read_bytes())["crc32"]
    change(path, crc32=[*crc32[:6], crc32[6] ^ 1, *crc32[7:]])


def shift_grid(folder: Path) -> None:
    """By more than decoding may."""
    path = shard_path(folder, 32, 1, "json")
    grids = unpack(json.loads(path.read_bytes())["grids"], 64).copy()
    grids[6, 3, 0] += np.int16(1.5 * STEPS * tolerance("jpeg", 95, 32))
    change(path, grids=pack(grids))


def exchange_images(folder: Path) -> None:
    """The rows stay, the samples are of one another."""
    tar = shard_path(folder, 32, 1, "tar")
    data = tar.read_bytes()
    a, b = re.findall(rb'"image_id": "(.*?)"', data)[:2]
    tar.write_bytes(data.replace(a, b"x" * len(a)).replace(b, a).replace(b"x" * len(a), b))
    change(shard_path(folder, 32, 1, "json"), sha256=sha256(tar))


def written(image: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda folder: replace_image(folder, 32, 70, image(image_bytes(folder, 32, 70)))


FLAT = np.full((32, 32), 90, np.uint8)
OFF = r"row 70 differs from its grid, by up to \d+\.\d grey levels"


@pytest.mark.parametrize(
    ("name", "damage", "what"),
    [
        ("tiny_set", written(lambda jpeg: b"no picture"), "row 70: not an image"),
        ("tiny_set", written(lambda jpeg: jpeg[: len(jpeg) // 2]), "row 70: truncated"),
        ("tiny_set", written(lambda jpeg: encode(np.zeros((16, 16), np.uint8), 95)), "row 70 is 16 × 16 px"),
        ("tiny_set", written(lambda jpeg: encode(FLAT, 95)), OFF),
        ("raw_set", written(lambda pgm: b"no picture"), "row 70: not an image"),
        ("raw_set", written(lambda pgm: pgm_header(33, 32) + pgm[15:]), "row 70: truncated"),
        ("raw_set", written(lambda pgm: pgm_header(31, 32) + pgm[15:]), "row 70: corrupt"),
        ("raw_set", written(lambda pgm: pgm_header(16, 64) + pgm[15:]), "row 70 is 64 × 16 px"),
        ("raw_set", written(lambda pgm: encode_member(FLAT, "raw", None, None)), OFF),
        ("tiny_set", change_checksum, "row 70 differs from its crc32"),
        ("raw_set", change_checksum, "row 70 differs from its crc32"),
        ("tiny_set", shift_grid, OFF),
        ("tiny_set", exchange_images, "holds other images than planned"),
    ],
)
def test_deep_finds_an_image_that_was_written_wrong_or_is_another(request, tmp_path, name, damage, what):
    folder = copy_set(request.getfixturevalue(name), tmp_path / "set")
    damage(folder)
    sign(folder)
    assert verify(folder).problems == []
    (problem,) = verify(folder, deep=True).problems
    assert (problem.path, problem.is_signed) == ("32/000001.tar", True)
    assert re.fullmatch(what, problem.what)


def test_a_set_of_an_earlier_version_is_whole_and_its_line_says_that_it_holds_no_grids(folder):
    assert "grids" not in verify(folder).summary(folder)
    without_grids(folder, [(64, 1)])
    verdict = verify(folder, deep=True)
    assert (verdict.problems, verdict.without_grids) == ([], 1)
    assert "whole; shards without grids: 1 (`cxrfast verify --repair` adds them)" in verdict.summary(folder)


def test_a_set_that_was_never_finished_and_one_of_another_version_and_a_folder_that_is_not_a_set_are_refused(folder):
    sums = (folder / "SHA256SUMS").read_bytes()
    (folder / "SHA256SUMS").unlink()
    with pytest.raises(ShardError, match=r"is not finished \(no SHA256SUMS\): run the same `cxrfast shard`"):
        verify(folder)
    (folder / "SHA256SUMS").write_bytes(sums)
    change(folder / "set.json", schema=99)
    write_rows(folder / "rows.parquet", read_rows(folder / "rows.parquet"), replace(read_set(folder), schema=99))
    sign(folder)
    with pytest.raises(ShardError, match="schema version 99"):
        verify(folder)
    with pytest.raises(ShardError, match=r"is not a shard set \(no set.json\): give the folder that"):
        verify(folder.parent)


# The source


def test_images_of_the_source_that_are_changed_missing_or_not_listed_are_named(tiny_set, tree):
    changed, missing, unlisted = read_rows(tiny_set / "rows.parquet")["path"][:3]
    flip_bit(tree / changed, 99)
    (tree / missing).unlink()
    lines = (tree / "SHA256SUMS.txt").read_text().splitlines(keepends=True)
    (tree / "SHA256SUMS.txt").write_text("".join(line for line in lines if unlisted not in line))
    result = inspect(tiny_set, Tree(tree))
    assert set(result.problems) == {
        Problem(changed, "its bytes have changed"),
        Problem(missing, "missing"),
        Problem(unlisted, "not listed in SHA256SUMS.txt"),
    }
    assert [line.endswith(": 3 problems") for line in result.lines] == [True]
    assert result.advice == f"{tiny_set}: 3 problems, named above", "no reason to repair the set"


def test_an_image_as_it_was_published_that_the_set_was_not_built_from_is_named(tiny_set, tree):
    path = read_rows(tiny_set / "rows.parquet")["path"][70]
    flip_bit(tree / path, 99)
    lines = [line.split() for line in (tree / "SHA256SUMS.txt").read_text().splitlines()]
    (tree / "SHA256SUMS.txt").write_text("".join(f"{sha256(tree / name)} {name}\n" for _, name in lines))
    assert verify_source(tiny_set, Tree(tree)).problems == [
        Problem(path, "is as listed, but the set was built from other bytes")
    ]


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


# What the command says


def test_a_repair_is_advised_unless_it_was_tried_and_damage_that_was_signed_needs_a_copy(folder):
    replace_image(folder, 32, 70, b"no picture")
    assert "restore these shards from a copy" in inspect(folder, None, deep=True).advice
    (folder / "32" / "000001.idx").unlink()
    for repaired, advice in ((False, "; `cxrfast verify --repair` repairs what it can"), (True, "")):
        result = inspect(folder, None, is_repaired=repaired)
        assert result.lines == []
        assert result.advice == f"{folder}: 1 problems, named above{advice}"


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
