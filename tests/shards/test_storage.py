import multiprocessing
import operator
import os
import pickle
import posixpath
import sys
import uuid
import zipfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import fsspec
import numpy as np
import pytest
from commands import run
from hypothesis import given, settings
from hypothesis import strategies as st
from staging import s3_server, web_server

from cxrfast.errors import ShardError
from cxrfast.shards.storage import FEW, Tree, relative

FILES = {
    "train.csv": b"Path\n",
    "README": b"",
    "files/p10/s1/a.jpg": b"\xff\xd8 one",
    "files/p10/s1/b.jpg": b"\xff\xd8 two, longer",
    "files/p11/s2/ä [1].jpg": b"three",
    "batch 2 (train & more)/patient1/x.png": b"four",
}
KINDS = ("folder", "file://", "zip://", "zip folder", "memory://", "dir://")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The files as a folder whose own name could be taken for a pattern."""
    root = tmp_path_factory.mktemp("tree") / "mimic [old] *"
    for path, data in FILES.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(data)
    return root


def pack(path: Path, under: str = "") -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in FILES.items():
            archive.writestr(under + name, data)
    return path


@pytest.fixture(params=KINDS)
def tree(request, folder, tmp_path):
    """The same files in each kind of place."""
    kind = request.param
    if kind == "folder":
        return Tree(folder)
    if kind == "file://":
        return Tree(f"file://{folder}")
    if kind == "zip://":
        return Tree(f"zip://::{pack(tmp_path / 'a.zip')}")
    if kind == "zip folder":
        return Tree(f"zip://some/folder::{pack(tmp_path / 'a.zip', 'some/folder/')}")
    if kind == "dir://":
        return Tree(f"dir://{folder.name}::file://{folder.parent}")
    memory, root = fsspec.filesystem("memory"), f"/{uuid.uuid4().hex}/mimic"
    for path, data in FILES.items():
        memory.pipe(f"{root}/{path}", data)
    return Tree(f"memory:/{root}")


def test_every_kind_of_tree_lists_what_a_folder_lists(tree, folder):
    for path in ("", "files", "files/p10", "files/p10/s1", "./files//p11/", "batch 2 (train & more)"):
        here = folder / path
        assert tree.files(path) == sorted(p.name for p in here.iterdir() if p.is_file())
        assert tree.folders(path) == sorted(p.name for p in here.iterdir() if p.is_dir())
        assert tree.is_dir(path)
        assert tree.exists(path)
    for path in ("train.csv", "files/p10/s1/a.jpg"):
        assert tree.exists(path)
        assert not tree.is_dir(path)
        assert tree.files(path) == tree.folders(path) == []
    for path in ("absent", "files/p1", "train.csv/more", "files/p10/s1/a.jp"):
        assert not tree.exists(path)
        assert not tree.is_dir(path)
        assert tree.files(path) == tree.folders(path) == []
    assert str(tree) == tree.location
    assert tree.is_local == (tree.location.startswith(("file://", "/")))
    if not tree.location.startswith("zip"):
        assert tree.name in (folder.name, "mimic")


def test_patterns_find_what_pathlib_finds(tree, folder):
    for pattern in (
        "*",
        "*.csv",
        "files/p1?/*/*.jpg",
        "files/*/s1",
        "batch*",
        "none*",
        "files/p10",
        "*/p[!1]*",
        "?[e-z]*.csv",
    ):
        assert tree.glob(pattern) == sorted(str(p.relative_to(folder)) for p in folder.glob(pattern)), pattern


def test_every_kind_of_tree_gives_the_bytes_and_sizes_of_its_files_and_os_errors_where_there_is_none(tree):
    for path, data in FILES.items():
        assert tree.read(path) == data
        with tree.open(path) as file:
            assert file.read() == data
    for read in (tree.read, tree.open):
        with pytest.raises(FileNotFoundError):
            read("files/p10/s1/absent.jpg")
    with pytest.raises(OSError, match="files"):
        tree.read("files")
    asked = [*FILES, "absent", "files/p10/s1/absent.jpg", "files/p99/s1/a.jpg", "nowhere/x"] * 2
    sizes = tree.sizes(asked)
    assert sizes.dtype == np.int64
    assert sizes.tolist() == [len(FILES[path]) if path in FILES else -1 for path in asked]
    assert tree.sizes([]).shape == (0,)


def test_no_way_of_reading_waits_for_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    tree = Tree(tmp_path)
    for read in (tree.read, tree.open, lambda path: tree.head(path, 1)):
        with pytest.raises(OSError, match="is not a regular file"):
            read("pipe")


def test_no_path_leads_out_of_a_tree(tree):
    for path in ("/etc/passwd", "../secret", "files/../../secret", "s3://other/x", "a\0b", "/"):
        for use in (tree.read, tree.open, tree.exists, tree.is_dir, tree.files, tree.folders, tree.glob):
            with pytest.raises(ShardError, match="not a path below the source tree"):
                use(path)
        with pytest.raises(ShardError, match="not a path below the source tree"):
            tree.sizes(["train.csv", path])


def test_relative_locations_and_links_are_folders_like_others(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    for location, name in ((".", folder.name), ("files/p10", "p10"), ("files/p10/", "p10"), ("", folder.name)):
        assert (Tree(location).is_local, Tree(location).name) == (True, name)
    assert Tree("").sizes(["README", "train.csv"]).tolist() == [0, 5]
    assert Tree(Path("files")).folders("") == ["p10", "p11"]
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "files").symlink_to(folder / "files")
    (tmp_path / "linked" / "gone").symlink_to(tmp_path / "nowhere")
    (tmp_path / "linked" / "loop").symlink_to(tmp_path / "linked" / "loop")
    tree = Tree(tmp_path / "linked")
    assert tree.folders("") == ["files"]
    assert len(tree.glob("files/*/*/*.jpg")) == 3
    assert tree.sizes(["gone", "files/p10/s1/a.jpg"]).tolist() == [-1, 6]
    (tmp_path / "link").symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    assert set(Tree("link").roots) == {f"{tmp_path}/link/", f"{folder}/"}, "absolute paths begin with one"
    assert Tree("memory://box/mimic/").roots == ("memory://box/mimic/",)


def test_a_pickled_tree_is_read_in_a_spawned_process(folder, tmp_path):
    for tree in (Tree(folder), Tree(f"file://{folder}"), Tree(f"zip://::{pack(tmp_path / 'a.zip')}")):
        assert len(pickle.dumps(tree)) < 500, "its location travels, no open file or connection"
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            assert pool.submit(operator.methodcaller("read", "files/p10/s1/a.jpg"), tree).result() == b"\xff\xd8 one"
            assert pool.submit(str, tree).result() == tree.location


part = st.sampled_from(["a", "b", "ab", "a.b", "ä ", "[a]"])
paths = st.lists(part, min_size=1, max_size=4).map(lambda parts: "/".join([*(f"{p}_" for p in parts[:-1]), parts[-1]]))


@settings(max_examples=60)
@given(st.dictionaries(paths, st.integers(0, 9), min_size=1, max_size=60), st.lists(paths, max_size=60))
def test_sizes_from_listings_are_those_of_the_files_however_they_are_spread(files, others):
    memory, root = fsspec.filesystem("memory"), f"/{uuid.uuid4().hex}"
    for path, size in files.items():
        memory.pipe(f"{root}/{path}", bytes(size))
    asked = [*others, *files]
    assert Tree(f"memory:/{root}").sizes(asked).tolist() == [files.get(path, -1) for path in asked]
    memory.rm(root, recursive=True)


@given(st.lists(st.sampled_from(["a", "..", ".", "", "b c", "...", ".a"]), max_size=6).map("/".join))
def test_a_relative_path_is_tidied_as_posix_says_or_refused(path):
    if path.startswith("/") or ".." in path.split("/"):
        with pytest.raises(ShardError):
            relative(path)
    else:
        assert relative(path) == posixpath.normpath(path).removeprefix(".") or relative(path) == posixpath.normpath(
            path
        )
        assert relative(relative(path)) == relative(path)


# What cannot be reached


def test_a_driver_that_is_not_installed_is_named():
    code = (
        "import sys; sys.modules['s3fs'] = sys.modules['gcsfs'] = None\n"
        "from cxrfast.errors import ShardError\nfrom cxrfast.shards.storage import Tree\n"
        "for url in sys.argv[1:]:\n try: Tree(url)\n except ShardError as error: print(error)\n"
    )
    s3, gs = run(sys.executable, "-c", code, "s3://b/x", "gs://b").stdout.splitlines()
    assert "s3://b/x needs a driver that is not installed" in s3
    assert "s3fs" in s3
    assert "pip install 'cxrfast[remote]'" in s3
    assert "gs://b needs a driver that is not installed" in gs
    assert "gcsfs" in gs
    assert "cxrfast[remote]" not in gs


def test_what_cannot_be_opened_is_named_and_a_damaged_archive_never_gives_wrong_bytes(tmp_path):
    (tmp_path / "a.zip").write_bytes(b"no archive")
    for location, message in (
        ("nope://x", "Protocol not known: nope.*give a folder, or a URL that fsspec knows"),
        ("zip://::/nowhere/x.zip", "cannot be opened.*No such file"),
        (f"zip://::{tmp_path / 'a.zip'}", "cannot be opened.*not a zip file"),
    ):
        with pytest.raises(ShardError, match=message):
            Tree(location)
    data = bytearray(pack(tmp_path / "b.zip").read_bytes())
    start = data.index(b"train.csv") + len("train.csv")
    data[start + 1] ^= 0xFF
    (tmp_path / "b.zip").write_bytes(data)
    with pytest.raises(OSError, match=r"Error|error|CRC"):
        Tree(f"zip://::{tmp_path / 'b.zip'}").read("train.csv")


def test_a_server_that_does_not_answer_is_named():
    pytest.importorskip("aiohttp")
    tree = Tree("http://127.0.0.1:9/tree")
    for ask in (tree.files, tree.folders):
        with pytest.raises(ShardError, match=r"http://127.0.0.1:9/tree/x cannot be reached \("):
            ask("x")
    with pytest.raises(ShardError, match="cannot be reached"):
        tree.sizes(["x.jpg"])
    with pytest.raises(OSError, match="9"):
        tree.read("x.jpg")


def test_a_web_server_gives_tables_and_says_that_images_must_be_copied(folder):
    pytest.importorskip("aiohttp")
    with web_server(folder) as (url, _):
        tree = Tree(url)
        assert tree.read("train.csv") == FILES["train.csv"]
        with pytest.raises(ShardError, match=r"does not report the size of train.csv: copy it to a local disk"):
            tree.sizes(["train.csv"])


# An object store, where nothing is a folder


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """URL of a tree on an S3 server, whose 80 images lie in 40 folders, and the server's log of requests."""
    pytest.importorskip("moto")
    log = tmp_path_factory.mktemp("s3") / "log"
    with s3_server(log) as fs:
        fs.mkdir("trees")
        for i in range(40):
            for name in ("a", "b"):
                fs.pipe_file(f"trees/mimic/files/p{i:02}/{name}.jpg", bytes(i))
        fs.pipe_file("trees/mimic/train.csv", b"Path\n")
        yield "s3://trees/mimic", log


@pytest.mark.slow
def test_a_bucket_is_a_tree_and_sizes_take_a_few_listings_not_a_request_a_file(store):
    url, log = store
    tree = Tree(url)
    assert (tree.files(""), tree.folders(""), len(tree.folders("files"))) == (["train.csv"], ["files"], 40)
    assert tree.is_dir("")
    assert tree.is_dir("files/p07")
    assert not tree.is_dir("train.csv")
    assert not Tree("s3://trees/nothing").is_dir("")
    assert tree.read("train.csv") == b"Path\n"
    asked = [f"files/p{i:02}/{name}.jpg" for i in range(40) for name in "abc"]
    before = log.read_text().count(" HTTP/")
    sizes = Tree(url).sizes(asked)
    assert sizes.tolist() == [i if name != "c" else -1 for i in range(40) for name in "abc"]
    assert 0 < log.read_text().count(" HTTP/") - before <= FEW
    before = log.read_text().count(" HTTP/")
    below = Tree(f"{url}/files").sizes([path.removeprefix("files/") for path in asked])
    assert below.tolist() == sizes.tolist()
    assert 0 < log.read_text().count(" HTTP/") - before <= FEW, "though no two folders share a parent but the tree"
    with pytest.raises(FileNotFoundError):
        tree.read("files/p07/c.jpg")


@pytest.mark.slow
def test_what_was_added_to_a_bucket_since_is_seen_by_a_new_tree_and_one_out_of_reach_is_named(store, monkeypatch):
    url, _ = store
    assert Tree(url).sizes(["new/x.jpg"]).tolist() == [-1]
    assert "new" not in Tree(url).folders("")
    fsspec.filesystem("s3", skip_instance_cache=True).pipe_file("trees/mimic/new/x.jpg", b"123")
    assert Tree(url).sizes(["new/x.jpg"]).tolist() == [3]
    assert "new" in Tree(url).folders("")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    with pytest.raises(ShardError, match=r"s3://trees/mimic cannot be reached \("):
        Tree(url).is_dir("")
    fsspec.get_filesystem_class("s3").clear_instance_cache()
