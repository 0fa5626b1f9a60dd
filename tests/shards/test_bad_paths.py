"""Paths under which there is no file to read: each costs its own row, and a file server that is gone costs none."""

import csv
import errno
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import run
from damage import contents, mounted, repair
from sets import build

from cxrfast.errors import ShardError
from cxrfast.shards.building.reading import ImageReader
from cxrfast.shards.format.manifest import read_manifest
from cxrfast.shards.format.rows import read_rows
from cxrfast.shards.images.bad_image import BadImage
from cxrfast.shards.source_file import MISSING, NOT_A_FILE, UNREADABLE
from cxrfast.shards.storage import Tree
from cxrfast.shards.upkeep.counts import count_set
from cxrfast.shards.upkeep.verify import verify

ROW = 70


def a_folder(path: Path) -> None:
    path.mkdir()


def a_fifo(path: Path) -> None:
    os.mkfifo(path)


def a_socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # the path of a socket has 107 bytes at most
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path.name)
    os.chdir(here)


def a_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def a_loop(path: Path) -> None:
    path.symlink_to(path.name)


def a_dangling_link(path: Path) -> None:
    path.symlink_to("nowhere.jpg")


def an_error(path: Path) -> None:
    """A file of which every read is an input/output error."""
    path.symlink_to("/proc/self/mem")


def replace(path: Path, how: Callable[[Path], None]) -> None:
    path.unlink()
    how(path)


KINDS = {
    a_folder: "not a file",
    a_fifo: "not a file",
    a_socket: "not a file",
    a_device: "not a file",
    a_loop: "not a file",
    a_dangling_link: "missing",
    an_error: "unreadable",
}


def test_each_bad_path_costs_its_row_alone_and_its_reason_is_listed(tree, phantoms, tiny_set, tmp_path):
    paths = read_rows(tiny_set / "rows.parquet")["path"]
    expected = {}
    for n, (how, reason) in enumerate(KINDS.items()):
        row = ROW + 20 * n % 150  # of several shards
        replace(tree / paths[row % 150], how)
        expected[row % 150] = reason
    out = tmp_path / "set"
    with pytest.raises(ShardError, match=r"6 of 150 images are missing or unreadable(.|\n)*5 of them cannot be read"):
        build(tree, out, [32])
    assert not out.exists()
    report = build(tree, out, [32], allow_missing=True)
    assert report.complete
    assert report.quarantined == expected
    with open(out / "quarantine.csv", newline="") as file:
        assert {int(line["row"]): line["reason"] for line in csv.DictReader(file)} == expected
    assert verify(out, deep=True).problems == []
    reasons = count_set(out).reasons
    assert dict(zip(reasons["reason"], reasons["images"], strict=True)) == {"not a file": 5, "unreadable": 1}
    for row in expected:
        (tree / paths[row]).rmdir() if (tree / paths[row]).is_dir() else (tree / paths[row]).unlink()
        shutil.copy(phantoms / paths[row], tree / paths[row])
    build(tree, out, [32], retry_quarantined=True)
    assert contents(out / "32") == contents(tiny_set / "32")


@pytest.fixture
def tree_of_twelve(phantoms, tmp_path) -> tuple[Path, list[str]]:
    """A table of twelve phantoms, and their paths."""
    tree = tmp_path / "tree"
    tree.mkdir()
    names = [f"i{n:02}.jpg" for n in range(12)]
    for name, image in zip(names, sorted(phantoms.rglob("*.jpg")), strict=False):
        shutil.copy(image, tree / name)
    write_table(tree, names)
    return tree, names


def write_table(tree: Path, names: list[str]) -> None:
    lines = [f"{name},i{n:02},p{n},{n % 2}" for n, name in enumerate(names)]
    (tree / "t.csv").write_text("\n".join(["path,image_id,patient_id,Edema", *lines]) + "\n")


TABLE = {"source": "table", "source_options": {"table": "t.csv", "image_column": "image_id", "label": ["Edema"]}}


def test_a_name_that_no_file_system_takes_is_missing(tree_of_twelve, tmp_path):
    tree, names = tree_of_twelve
    long = ["x" * 300 + ".jpg", "/".join(["y" * 200] * 15) + ".jpg", "i00.jpg/inside.jpg", "none/" * 3 + "i.jpg"]
    write_table(tree, [*names, *long])
    report = build(tree, tmp_path / "set", [32], allow_missing=True, **TABLE)
    assert list(report.quarantined.values()) == ["missing"] * 4
    assert report.rows == {32: 12}


def test_folders_in_archives_and_memory_are_no_files(tree_of_twelve, tmp_path):
    tree, _ = tree_of_twelve
    (tree / "i03.jpg").unlink()
    (tree / "i03.jpg").mkdir()
    (tree / "i03.jpg" / "inside.txt").write_text("in it")
    (tree / "i04.jpg").unlink()
    archive = shutil.make_archive(str(tmp_path / "tree"), "zip", tree)
    report = build(f"zip://::{archive}", tmp_path / "set", [32], allow_missing=True, **TABLE)
    assert sorted(report.quarantined.values()) == ["missing", "not a file"]
    build(tree, tmp_path / "local", [32], allow_missing=True, **TABLE)
    assert contents(tmp_path / "local") == contents(tmp_path / "set")


def test_sizes_say_what_is_wrong_and_reading_says_why(tmp_path):
    for how in KINDS:
        how(tmp_path / how.__name__)
    tree = Tree(tmp_path)
    found = dict(
        zip((how.__name__ for how in KINDS), tree.sizes([how.__name__ for how in KINDS]).tolist(), strict=True)
    )
    expected = {"not a file": NOT_A_FILE, "missing": MISSING, "unreadable": 0}  # 0: an error of reading alone
    assert found == {how.__name__: expected[reason] for how, reason in KINDS.items()}
    for how in KINDS:
        with pytest.raises(OSError, match=r"\[Errno \d+\]"):
            tree.read(how.__name__)


# Permissions, as somebody who is not root


def shard_without_privileges(tree: Path, out: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """`cxrfast shard` at 32 px, where permissions count; root needs `setpriv` for that."""
    command = [
        sys.executable,
        "-m",
        "cxrfast",
        "shard",
        "--data",
        tree,
        "--out",
        out,
        "--scale",
        "32",
        "--workers",
        "1",
    ]
    if os.geteuid() == 0:
        if not shutil.which("setpriv"):
            pytest.skip("root needs setpriv to lose the right to read everything")
        command = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", *command]
    return run(*command, *words)


@pytest.mark.slow
def test_a_file_that_may_not_be_read_costs_its_row_and_many_stop_their_shard_unless_allowed(tree, tiny_set, tmp_path):
    out = tmp_path / "set"
    paths = read_rows(tiny_set / "rows.parquet")["path"]
    for row in (3, 64, 70, 71):
        (tree / paths[row]).chmod(0)
    done = shard_without_privileges(tree, out)
    assert done.returncode == 2
    assert (
        f"shard 1: 2 images cannot be read, the last because {paths[70]} cannot be read (Permission denied)"
        in done.stderr
    )
    assert [n for n in range(3) if read_manifest(out, 32, n)] == [0, 2]
    assert read_manifest(out, 32, 0).quarantined == {"3": "unreadable"}
    assert "quarantined: 4; unreadable: 4" in shard_without_privileges(tree, out, "--allow-missing").stdout
    for row in (3, 64, 70, 71):
        (tree / paths[row]).chmod(0o644)
    assert "quarantined: 0" in shard_without_privileges(tree, out, "--retry-quarantined").stdout
    assert contents(out / "32") == contents(tiny_set / "32")


@pytest.mark.slow
def test_a_folder_that_may_not_be_entered_is_named_and_costs_its_rows_if_allowed(tree, tiny_set, tmp_path):
    out, path = tmp_path / "set", read_rows(tiny_set / "rows.parquet")["path"][ROW]
    (tree / path).parent.chmod(0)
    done = shard_without_privileges(tree, out)
    assert "images are missing or unreadable" in done.stderr
    assert f"of them cannot be read (first: {path}: Permission denied)" in done.stderr
    assert not (out).exists()
    shard_without_privileges(tree, out, "--allow-missing")
    reasons = read_manifest(out, 32, ROW // 64).quarantined
    assert reasons[str(ROW)] == "unreadable"
    assert set(reasons.values()) == {"unreadable"}
    (tree / path).parent.chmod(0o755)


# After the set was planned


@pytest.mark.parametrize(("how", "reason"), [(Path.unlink, "vanished"), (a_fifo, "not a file")])
def test_an_image_that_vanishes_later_stops_its_shard_unless_images_may_be_missing(
    tree, tiny_set, tmp_path, how, reason
):
    out, path = tmp_path / "set", tree / read_rows(tiny_set / "rows.parquet")["path"][ROW]
    build(tree, out, [32], limit=1)
    path.unlink() if how is Path.unlink else replace(path, how)
    with pytest.raises(ShardError, match="put it back, or leave it out with --allow-missing"):
        build(tree, out, [32])
    report = build(tree, out, [32], allow_missing=True)
    assert report.quarantined == {ROW: reason}
    assert verify(out).problems == []


@pytest.mark.slow
def test_a_row_that_another_scale_holds_is_never_left_out(tree, folder):
    path = read_rows(folder / "rows.parquet")["path"][ROW]
    replace(tree / path, an_error)
    for options in ({}, {"allow_missing": True}):
        with pytest.raises(ShardError, match=f"shard 1: {path}"):
            build(tree, folder, [16], **options)
    (tree / path).unlink()
    with pytest.raises(ShardError, match="was fine at other scales but is vanished"):
        build(tree, folder, [16], allow_missing=True)


@pytest.mark.slow
def test_a_mount_that_is_lost_costs_no_row_whatever_is_allowed(phantoms, tiny_set, tmp_path):
    tree, out = tmp_path / "mimic", tmp_path / "set"
    shutil.copytree(phantoms, tree, ignore=shutil.ignore_patterns("files"))
    with mounted(tree / "files", "size=16m") as disk:
        shutil.copytree(phantoms / "files", disk, dirs_exist_ok=True)
        build(tree, out, [32], limit=1)
    for options in ({}, {"allow_missing": True}):
        with pytest.raises(ShardError, match=r"2 shards could not be built"):
            build(tree, out, [32], **options)
        assert [n for n in range(3) if read_manifest(out, 32, n)] == [0]
    with mounted(tree / "files2", "size=16m"):  # the right disk again
        shutil.rmtree(tree / "files")
        shutil.copytree(phantoms / "files", tree / "files")
        build(tree, out, [32])
    assert contents(out / "32") == contents(tiny_set / "32")


class Failing(Tree):
    """A tree whose reads fail with these errors, one after the other, and then succeed."""

    def __init__(self, location: Path, codes: list[int]) -> None:
        super().__init__(location)
        self.codes = codes

    def read(self, path: str) -> bytes:
        if self.codes:
            code = self.codes.pop(0)
            raise OSError(code, os.strerror(code), path)
        return super().read(path)


@pytest.fixture
def no_pauses(monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)


@pytest.mark.usefixtures("no_pauses")
@pytest.mark.parametrize("code", [errno.ESTALE, errno.EIO, errno.ETIMEDOUT, errno.ENOTCONN])
def test_an_error_that_passes_costs_nothing_and_one_that_stays_costs_a_row_but_not_many(tmp_path, code):
    (tmp_path / "a.jpg").write_bytes(b"image")

    def reader(errors: int) -> ImageReader:
        return ImageReader(tree=Failing(tmp_path, [code] * errors), images=150, allow_missing=True)

    assert reader(2).read("a.jpg", 5) == b"image"
    lasting = reader(9)
    with pytest.raises(BadImage, match="unreadable"):
        lasting.read("a.jpg", 5)
    with pytest.raises(ShardError, match=rf"2 images cannot be read, .*{os.strerror(code)}.*file server") as caught:
        lasting.read("a.jpg", 5)
    assert not isinstance(caught.value, BadImage)


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENOMEM])
def test_a_machine_that_has_nothing_left_stops_the_shard(tmp_path, code):
    (tmp_path / "a.jpg").write_bytes(b"image")
    reader = ImageReader(tree=Failing(tmp_path, [code]), images=150, allow_missing=True)
    with pytest.raises(ShardError, match="use fewer --workers") as caught:
        reader.read("a.jpg", 5)
    assert not isinstance(caught.value, BadImage)


@pytest.mark.usefixtures("no_pauses")
def test_an_error_while_the_tree_is_away_stops_the_shard(tmp_path):
    reader = ImageReader(tree=Failing(tmp_path, [errno.EIO] * 9), images=150, allow_missing=False)
    with pytest.raises(ShardError, match="is empty or cannot be reached") as caught:
        reader.read("a.jpg", 5)
    assert not isinstance(caught.value, BadImage)


@pytest.mark.usefixtures("no_pauses")
def test_lookups_that_fail_are_tried_again_and_many_that_stay_so_are_a_server_that_is_gone(tmp_path, monkeypatch):
    names = [f"{n}.jpg" for n in range(3000)]
    (tmp_path / "0.jpg").write_bytes(b"image")
    for failing, message in ((3, ""), (4, "4 of 3,000 images cannot be looked up .*Stale file handle")):
        real, gone = os.stat, {f"{tmp_path}/{name}" for name in names[1 : failing + 1]}

        def stat(path, *args, gone=gone, real=real, **kwargs):
            if path in gone:
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), path)
            return real(path, *args, **kwargs)

        with monkeypatch.context() as patched:
            patched.setattr(os, "stat", stat)
            if message:
                with pytest.raises(ShardError, match=message):
                    Tree(tmp_path).sizes(names)
            else:
                assert Tree(tmp_path).sizes(names).tolist() == [5, *[UNREADABLE] * 3, *[MISSING] * 2996]


def test_a_rows_table_made_again_remembers_what_was_no_file(tree, tiny_set, phantoms, tmp_path):
    out, path = tmp_path / "set", tree / read_rows(tiny_set / "rows.parquet")["path"][ROW]
    replace(path, a_folder)
    build(tree, out, [32], allow_missing=True)
    whole = contents(out)
    path.rmdir()
    shutil.copy(phantoms / path.relative_to(tree), path)
    (out / "rows.parquet").unlink()
    repair(out, tree)
    assert contents(out) == whole
