"""Sets staged to folders and to the buckets of an S3 server on this machine."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import fsspec

from cxrfast.shards.upkeep.stage import Staged
from cxrfast.shards.upkeep.stage import stage as stage_set

SERVER = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print("http://%s:%d" % server.get_host_and_port(), flush=True)
sys.stdin.read()  # ends with whoever started it
"""


def stage(source: Path | str, to: Path | str, scales: list[int] | None = None, **options) -> Staged:
    return stage_set(source, to, scales, **options)


class Bucket:
    """A bucket of an S3 server on this machine."""

    def __init__(self, fs: fsspec.AbstractFileSystem, name: str) -> None:
        self.fs = fs
        fs.mkdir(name)
        self.name, self.url = name, f"s3://{name}/some/set"

    def contents(self) -> dict[str, bytes]:
        """Every object of the set, by its relative name."""
        root = f"{self.name}/some/set"
        return {path.removeprefix(f"{root}/"): self.fs.cat_file(path) for path in self.fs.find(root)}

    def at(self, name: str) -> str:
        return f"{self.name}/some/set/{name}"

    def uploads(self) -> list[dict]:
        """Multipart uploads that were neither finished nor given up: they cost money, and nobody sees them."""
        return self.fs.list_multipart_uploads(self.name)


def change(path: Path, **fields) -> None:
    path.write_text(json.dumps({**json.loads(path.read_bytes()), **fields}) + "\n")


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
    return subprocess.Popen(
        [sys.executable, "-m", "cxrfast", "stage", str(source), str(to), "--workers", "2"],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def signal_when(source: Path | str, to: Path | str, ready: Callable[[], bool], which: signal.Signals) -> int:
    """Stage in a process that is sent a signal as soon as `ready`; its return code."""
    with start(source, to) as child:
        while child.poll() is None and not ready():
            time.sleep(0.001)
        child.send_signal(which)
        child.communicate()
    return child.returncode
