import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from damage import copy_set, sign
from staging import SERVER, Bucket, change

from cxrfast.files import sha256
from cxrfast.shards.storage import CHUNK


@pytest.fixture(scope="module")
def server() -> Iterator[fsspec.AbstractFileSystem]:
    """An S3 server of this machine as fsspec sees it, and in the environment all that other clients need."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("AWS_")}
    with (
        pytest.MonkeyPatch.context() as patch,
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", SERVER],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        ) as child,
    ):
        patch.setenv("AWS_ENDPOINT_URL", child.stdout.readline().strip())
        patch.setenv("AWS_ACCESS_KEY_ID", "somebody")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        yield fsspec.filesystem("s3", skip_instance_cache=True, use_listings_cache=False)
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        child.stdin.close()


@pytest.fixture
def bucket(server: fsspec.AbstractFileSystem, request: pytest.FixtureRequest) -> Bucket:
    return Bucket(server, f"bucket-{hashlib.sha256(request.node.nodeid.encode()).hexdigest()[:20]}")


@pytest.fixture(scope="module")
def large_set(tiny_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny set with tars of several chunks at 64 px, by zeros at their ends as tar allows them."""
    folder = copy_set(tiny_set, tmp_path_factory.mktemp("large") / "set")
    for path in folder.glob("64/*.tar"):
        size = 2 * CHUNK + 512
        os.truncate(path, size)
        change(path.with_suffix(".json"), sha256=sha256(path), bytes=size)
    sign(folder)
    return folder
