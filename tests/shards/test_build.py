import csv
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import psutil
import pytest
from damage import contents, copy_set
from sets import build, many

from cxrfast.errors import ShardError
from cxrfast.phantoms.dataset import synth
from cxrfast.pipelines.reader import Reader
from cxrfast.shards.building.layout import assign_rows
from cxrfast.shards.format.codec import encode_member
from cxrfast.shards.format.info import read_set
from cxrfast.shards.format.manifest import read_manifest
from cxrfast.shards.format.recipe import ImageRecipe
from cxrfast.shards.format.rows import read_rows
from cxrfast.shards.images.cell_means import SIDE, grid
from cxrfast.shards.images.decode import encode
from cxrfast.shards.images.jpeg import decode_grey
from cxrfast.shards.images.resize import at_scales
from cxrfast.shards.sources.read import read_source
from cxrfast.shards.upkeep.verify import verify


def paths(folder: Path) -> list[str]:
    """Paths of the source images, by row."""
    return read_rows(folder / "rows.parquet")["path"].tolist()


def repair(tree: Path, path: str, sound: Path) -> None:
    (tree / path).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(sound / path, tree / path)


# The same bytes


def states(folder: Path) -> dict[Path, tuple[int, int]]:
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in [folder, *folder.rglob("*")]}


def test_two_workers_and_scales_in_another_order_give_the_same_bytes(phantoms, either_set, tmp_path):
    out, recipe, source = tmp_path / "set", read_set(either_set).recipe, states(phantoms)
    processes = set(psutil.Process().children(recursive=True))
    report = build(phantoms, out, [64, 32, 64], workers=2, recipe=recipe)
    left = set(psutil.Process().children(recursive=True)) - processes
    assert not [p.cmdline() for p in left if "spawn_main" in " ".join(p.cmdline())]
    assert states(phantoms) == source, "nothing is written into the source"
    assert contents(out) == contents(either_set)
    assert report.complete
    assert report.rows == {32: 150, 64: 150}
    assert report.bytes == {s: sum(p.stat().st_size for p in (either_set / str(s)).glob("*.tar")) for s in (32, 64)}

    before = {scale: states(out / scale) for scale in ("32", "64")}
    report = build(phantoms, out, [32, 64], recipe=recipe)
    assert report.complete
    assert report.estimate.images == {}
    assert contents(out) == contents(either_set)
    assert {scale: states(out / scale) for scale in ("32", "64")} == before, "a whole set is left alone"


def test_scales_added_one_at_a_time_in_parts_give_the_same_bytes(phantoms, tiny_set, tmp_path):
    out = tmp_path / "set"
    report = build(phantoms, out, [64], limit=65)
    assert not report.complete
    assert report.rows == {64: 128}, "the two shards that hold the first 65 rows"
    assert verify(out).problems == []
    first = contents(out / "64")
    report = build(phantoms, out, [64])
    assert report.complete
    assert {name: data for name, data in contents(out / "64").items() if name in first} == first
    assert build(phantoms, out, [32]).complete
    assert contents(out) == contents(tiny_set)


def test_a_set_holds_the_pixels_of_its_source_resized_and_their_grids_in_either_codec(phantoms, tiny_set, raw_set):
    for scale in (32, 64):
        with Reader(tiny_set, scale) as jpegs, Reader(raw_set, scale) as raws:
            assert jpegs.grids.shape == (150, SIDE, SIDE)
            np.testing.assert_array_equal(jpegs.grids, raws.grids)
            for row, path in enumerate(paths(tiny_set)):
                picture = at_scales(decode_grey((phantoms / path).read_bytes()), [32, 64])[scale]
                assert bytes(jpegs.read(row)) == encode(picture, 95)
                assert bytes(raws.read(row)) == encode_member(picture, "raw", None, None)
                np.testing.assert_array_equal(jpegs.grids[row], grid(picture))


def test_a_dry_run_writes_nothing_and_its_estimate_is_near(phantoms, either_set, tmp_path):
    report = build(phantoms, tmp_path / "set", [32, 64], dry_run=True, recipe=read_set(either_set).recipe)
    assert not (tmp_path / "set").exists()
    assert not report.complete
    assert report.estimate.images == {32: 150, 64: 150}
    assert report.estimate.files == {32: 9, 64: 9}
    for scale in (32, 64):
        size = sum(path.stat().st_size for path in (either_set / str(scale)).iterdir())
        assert 0.7 < report.estimate.bytes[scale] / size < 1.4
    assert "to do at 64 px: 150 rows" in "\n".join(report.lines(tmp_path / "set"))
    report = build(phantoms, tmp_path / "set", [256, 2048], dry_run=True, recipe=ImageRecipe(codec="raw"))
    assert report.estimate.bytes == {scale: pytest.approx(150 * scale**2, rel=0.05) for scale in (256, 2048)}


# Images that cannot be used


def test_images_that_cannot_be_used_are_left_out_and_listed_with_their_reasons(corrupt, sound, corrupt_set):
    out, report = corrupt_set
    damaged = {path for path in paths(out) if (corrupt / path).read_bytes() != (sound / path).read_bytes()}
    with open(out / "quarantine.csv", newline="") as file:
        listed = list(csv.DictReader(file))
    assert {line["path"] for line in listed} == damaged
    assert all(paths(out)[int(line["row"])] == line["path"] for line in listed)
    assert Counter(line["reason"] for line in listed) == {"truncated": 2, "empty": 2, "not an image": 2}
    assert report.rows == {32: 64}
    assert report.complete
    assert report.quarantined == {int(line["row"]): line["reason"] for line in listed}
    assert "quarantined: 6; " in "\n".join(report.lines(out))
    verdict = verify(out, deep=True)
    assert verdict.problems == []
    assert verdict.quarantined == 6


def test_a_row_left_out_once_is_left_out_at_scales_added_later_until_asked_to_try_again(
    corrupt, sound, corrupt_set, tmp_path
):
    out = copy_set(corrupt_set[0], tmp_path / "set")
    report = build(corrupt, out, [32], retry_quarantined=True)
    assert report.quarantined == corrupt_set[1].quarantined
    assert contents(out) == contents(corrupt_set[0]), "trying again in vain changes nothing"
    shutil.copytree(corrupt, tmp_path / "empty", ignore=shutil.ignore_patterns("p1*"))
    (tmp_path / "empty" / "files").mkdir(exist_ok=True)
    with pytest.raises(ShardError, match="give --data the tree that the set was built from"):
        build(tmp_path / "empty", out, [32], retry_quarantined=True, allow_missing=True)
    assert contents(out) == contents(corrupt_set[0])
    tree = copy_set(corrupt, tmp_path / "mimic")
    for row in corrupt_set[1].quarantined:
        repair(tree, paths(out)[row], sound)
    report = build(tree, out, [16])
    assert report.rows == {16: 64, 32: 64}
    assert report.quarantined == corrupt_set[1].quarantined
    assert verify(out).problems == []

    report = build(tree, out, [16], retry_quarantined=True)
    assert report.rows == {16: 70, 32: 70}
    assert report.quarantined == {}
    build(sound, tmp_path / "sound", [16, 32])
    assert contents(out) == contents(tmp_path / "sound")


# Half a download


def test_half_a_download_stops_before_anything_is_written_and_says_where_images_are_missing(
    tree, phantoms, tiny_set, tmp_path
):
    out, gone = tmp_path / "set", paths(tiny_set)[10:14]
    for path in gone:
        (tree / path).unlink()
    missing, listed = (Counter("/".join(path.split("/")[:2]) for path in some) for some in (gone, paths(tiny_set)))
    with pytest.raises(ShardError, match="4 of 150 images are missing") as caught:
        build(tree, out, [32])
    _, *folders, advice = str(caught.value).splitlines()
    assert folders == [f"  {folder}: {n} of {listed[folder]}" for folder, n in sorted(missing.items())]
    assert "--allow-missing" in advice
    assert not out.exists()

    report = build(tree, out, [32], allow_missing=True)
    assert report.quarantined == {row: "missing" for row in range(10, 14)}
    assert report.rows == {32: 146}
    for path in gone:
        repair(tree, path, phantoms)
    build(tree, out, [64], retry_quarantined=True)
    assert contents(out) == contents(tiny_set), "as if the download had been whole"
    (tree / "files").rename(tree / "other")
    (tree / "files").mkdir()
    with pytest.raises(ShardError, match=r"none of the 150 images .* is in .*mimic .*the folder that holds the tables"):
        build(tree, tmp_path / "another", [32], allow_missing=True)


def test_one_image_in_a_thousand_may_be_missing(phantoms, tmp_path):
    tree = many(tmp_path / "mimic", 1100, sorted(phantoms.rglob("*.jpg"))[:1])
    first, second = sorted(tree.rglob("*.jpg"))[:2]
    first.unlink()
    assert build(tree, tmp_path / "set", [8], dry_run=True).estimate.images == {8: 1100}
    second.unlink()
    with pytest.raises(ShardError, match="2 of 1,100 images are missing"):
        build(tree, tmp_path / "set", [8], dry_run=True)


# A source that changes


@pytest.mark.parametrize("what", ["grown", "vanished"])
def test_an_image_that_changes_later_stops_its_shard_and_no_other(tree, phantoms, tiny_set, tmp_path, what):
    out, path = tmp_path / "set", paths(tiny_set)[70]
    build(tree, out, [32], limit=1)
    if what == "grown":
        (tree / path).write_bytes((tree / path).read_bytes() + b"\0")
        message = rf"shard 1: {path} has [\d,]+ bytes, but had [\d,]+ when the set was planned"
    else:
        (tree / path).unlink()
        message = rf"shard 1: {path} has vanished since the set was planned"
    with pytest.raises(ShardError, match=message) as caught:
        build(tree, out, [32])
    assert str(caught.value).startswith("1 shards could not be built, all others are kept")
    assert [n for n in range(3) if read_manifest(out, 32, n)] == [0, 2]
    assert not list(out.rglob("*.tmp"))
    repair(tree, path, phantoms)
    assert build(tree, out, [32]).complete
    assert contents(out / "32") == contents(tiny_set / "32")
    assert verify(out).problems == []


def test_an_image_that_was_fine_at_another_scale_and_is_damaged_now_stops_its_shard(tree, tiny_set, tmp_path):
    out, path = copy_set(tiny_set, tmp_path / "set"), paths(tiny_set)[70]
    size = (tree / path).stat().st_size
    (tree / path).write_bytes((tree / path).read_bytes()[: size // 2].ljust(size, b"\0"))
    with pytest.raises(ShardError, match=rf"shard 1: {path} was fine at other scales but is truncated now"):
        build(tree, out, [16])
    assert read_manifest(out, 16, 1) is None
    assert sorted(path.name for path in (out / "16").glob("*.tar")) == ["000000.tar", "000002.tar"]
    with pytest.raises(ShardError, match=r"is not finished \(SHA256SUMS lists only some of its shards\)"):
        verify(out)


# Refused


@pytest.mark.parametrize(
    ("source", "recipe", "difference"),
    [
        ("phantoms", ImageRecipe(seed=1), "seed 0 there, 1 requested"),
        ("phantoms", ImageRecipe(quality=90), "quality 95 there, 90 requested"),
        (
            "phantoms",
            ImageRecipe(codec="raw", resize="pad"),
            r"\(codec jpeg there, raw requested; resize squash there, pad requested\)",
        ),
        (
            "sound",
            ImageRecipe(),
            r"built from other input \(its images differ\): it is a set of 150 images from mimic; choose another --out",
        ),
    ],
)
def test_another_recipe_or_other_images_for_the_same_set_are_refused_and_the_difference_named(
    request, tiny_set, folder, source, recipe, difference
):
    with pytest.raises(ShardError, match=difference):
        build(request.getfixturevalue(source), folder, [128], recipe=recipe)
    assert contents(folder) == contents(tiny_set)


def test_a_folder_with_other_things_in_it_is_refused_and_keeps_them(phantoms, tmp_path):
    for name in ("thesis.tex", "notes.tmp"):
        (tmp_path / name).write_text("all of it")
    with pytest.raises(ShardError, match="is not empty and not a shard set: choose another --out"):
        build(phantoms, tmp_path, [32])
    assert contents(tmp_path) == dict.fromkeys(["thesis.tex", "notes.tmp"], b"all of it")


# Trying again


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
    done = subprocess.run([sys.executable, tmp_path / "script.py", step, sound, out], check=False)
    assert done.returncode == -9
    build(sound, out, [32], retry_quarantined=True)
    assert contents(out) == contents(sound_set)


def test_a_retry_never_loses_a_row_that_was_fine_and_touches_the_scales_that_its_shards_have(tmp_path):
    tree, out = tmp_path / "mimic", tmp_path / "set"
    synth(tree, images=130, size=64, workers=1)
    source = read_source("mimic", tree)
    left_out, fine = (tree / path for path in assign_rows(source.images, source.labels, 0)["path"][5:7])
    data = left_out.read_bytes()
    left_out.write_bytes(b"no image")
    build(tree, out, [16, 32])
    left_out.write_bytes(data)
    part = copy_set(out, tmp_path / "part")

    data = fine.read_bytes()
    fine.write_bytes(bytes(len(data)))
    with pytest.raises(ShardError, match="was fine at other scales but is not an image now"):
        build(tree, out, [32], retry_quarantined=True)
    assert 6 in read_manifest(out, 32, 0).rows, "the old shard is still there"
    fine.write_bytes(data)
    assert build(tree, out, [32], retry_quarantined=True).quarantined == {}

    shutil.rmtree(part / "16")
    build(tree, part, [16], limit=1)
    assert build(tree, part, [32], retry_quarantined=True).quarantined == {}
    assert [n for n in range(3) if read_manifest(part, 16, n)] == [0]
    assert read_manifest(part, 16, 0).rows == read_manifest(part, 32, 0).rows == list(range(64))
