import hashlib
import os

import fsspec
import pytest
from damage import change, copy_set, sign
from staging import Bucket, s3_server

from cxrfast.files import sha256
from cxrfast.shards.set_storage import CHUNK


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    pytest.importorskip("moto")
    with s3_server(tmp_path_factory.mktemp("s3") / "log") as fs:
        yield fs


def _bucket(kind: str, request: pytest.FixtureRequest) -> Bucket:
    fs = fsspec.filesystem("memory") if kind == "memory" else request.getfixturevalue("server")
    return Bucket(fs, f"bucket-{hashlib.sha256(request.node.nodeid.encode()).hexdigest()[:20]}")


@pytest.fixture
def s3_bucket(request):
    return _bucket("s3", request)


@pytest.fixture(params=["memory", pytest.param("s3", marks=pytest.mark.slow)])
def bucket(request):
    """An object store: fsspec's memory, and an S3 server where the slow tests run."""
    return _bucket(request.param, request)


@pytest.fixture(scope="module")
def large_set(tiny_set, tmp_path_factory):
    """The tiny set with tars of several chunks at 64 px, by zeros at their ends as tar allows them."""
    folder = copy_set(tiny_set, tmp_path_factory.mktemp("large") / "set")
    for path in folder.glob("64/*.tar"):
        size = 2 * CHUNK + 512
        os.truncate(path, size)
        change(path.with_suffix(".json"), sha256=sha256(path), bytes=size)
    sign(folder)
    return folder


@pytest.fixture(params=["folder", "memory", pytest.param("s3", marks=pytest.mark.slow)])
def place(request, tmp_path):
    """A folder of this machine, or an object store."""
    if request.param == "folder":
        return Bucket(fsspec.filesystem("file"), str(tmp_path / "place").removeprefix("/"))
    return _bucket(request.param, request)
