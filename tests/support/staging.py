"""Sets staged to folders and to the buckets of an S3 server on this machine."""

import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pytest

SERVER = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=True)
server.start()
print("http://%s:%d" % server.get_host_and_port(), flush=True)
sys.stdin.read()  # ends with its parent
"""


@contextmanager
def s3_server(log: Path) -> Iterator[fsspec.AbstractFileSystem]:
    """An S3 server of this machine as fsspec sees it, and in the environment all that other clients need; `log`: its requests."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("AWS_")}
    with (
        open(log, "wb") as errors,
        pytest.MonkeyPatch.context() as patch,
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", SERVER],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        ) as child,
    ):
        patch.setenv("AWS_ENDPOINT_URL", next(line for line in child.stdout if line.startswith("http")).strip())
        patch.setenv("AWS_ACCESS_KEY_ID", "somebody")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        yield fsspec.filesystem("s3", skip_instance_cache=True, use_listings_cache=False)
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        child.stdin.close()


class Bucket:
    """A bucket of an S3 server on this machine, a folder of fsspec's memory, or a folder of this machine."""

    def __init__(self, fs: fsspec.AbstractFileSystem, name: str) -> None:
        self.fs, self.name = fs, name
        self.is_s3, self.is_folder = "s3" in fs.protocol, "file" in fs.protocol
        self.root = f"/{name}" if self.is_folder else f"{'s3' if self.is_s3 else 'memory'}://{name}"
        self.url = f"{self.root}/some/set"
        fs.mkdir(self.root)

    def contents(self) -> dict[str, bytes]:
        """Every object of the set, by its relative name."""
        root = self.at("").rstrip("/")
        return {path.removeprefix(f"{root}/"): self.fs.cat_file(path) for path in self.fs.find(root)}

    def at(self, name: str) -> str:
        return f"{'' if self.is_s3 else '/'}{self.name}/some/set/{name}"

    def uploads(self) -> list[dict]:
        """Multipart uploads neither finished nor aborted: invisible, and they cost money."""
        return self.fs.list_multipart_uploads(self.name) if self.is_s3 else []


def sums(names: dict[str, bytes]) -> dict[str, str]:
    return {name: hashlib.sha256(data).hexdigest() for name, data in names.items() if name != "SHA256SUMS"}


def of_scale(files: dict[str, bytes], *scales: int) -> dict[str, bytes]:
    """The files of these scales, and those of the set itself."""
    return {
        name: data
        for name, data in files.items()
        if name != "SHA256SUMS" and ("/" not in name or int(name.split("/")[0]) in scales)
    }


def start(source: Path | str, to: Path | str) -> subprocess.Popen:
    command = [sys.executable, "-m", "cxrfast", "stage", str(source), str(to), "--workers", "2"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def signal_when(source: Path | str, to: Path | str, ready: Callable[[], bool], which: signal.Signals) -> int:
    """Stage in a process that is sent a signal as soon as `ready`; its return code."""
    with start(source, to) as child:
        while child.poll() is None and not ready():
            time.sleep(0.001)
        child.send_signal(which)
        child.communicate()
    return child.returncode


@contextmanager
def web_server(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """A folder served by HTTP on this machine: its URL, and the paths that were asked for."""
    asked = []

    class Handler(SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            super().do_GET()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()
