"""Who is writing into a shard set: one build, or the parts of a job array. A second one is refused, a killed one never in the way.

A lock is a file made with O_EXCL, since many cluster file systems lack flock. Its holder writes a rising number into
it. Whether a holder on this machine lives is asked of the system; any other one is watched for a few beats, so that
clocks need not agree.
"""

import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from cxrfast.errors import ShardError
from cxrfast.files import temporary_name
from cxrfast.shards.format.names import LOCK_FILE

log = logging.getLogger(__name__)

BEAT = 5.0
"""Seconds between two signs of life."""

WATCH = 4 * BEAT
"""Seconds without one after which a holder that cannot be asked counts as dead."""

Part = tuple[int, int]
"""(i, n): the i-th of n parts of a build, from 1."""


class Lock:
    """The right to write into the set `folder`, as a context manager; `part` shares it with the other parts of a job array.

    Raises ShardError naming the holder if a live one is in the way. `check` raises it if the lock was lost.
    """

    def __init__(self, folder: Path, part: Part | None = None) -> None:
        self.folder, self.part = folder, part
        self.path = folder / (f"lease-{part[0]}-of-{part[1]}.json" if part else "lease.json")
        self._descriptor = -1
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> "Lock":
        self._take()
        try:
            for other in self._others():
                self._refuse_if_alive(other)
                other.unlink(missing_ok=True)
        except BaseException:
            self._release()
            raise
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._ended.set()
        self._thread.join()  # before the descriptor is closed, and its number perhaps another file's
        self._release()

    def check(self) -> None:
        if not self._is_ours():
            raise ShardError(
                f"{self.folder}: another build took over, because this one gave no sign of life for {WATCH:.0f} s "
                "(suspended, or the file system hung); nothing is lost"
            )

    def alone(self) -> bool:
        """Is no other part at work, as far as this machine can tell?"""
        others = [path for path in self.folder.glob("lease*.json") if path != self.path]
        return all(_alive_here(_content(path)) is False for path in others)

    def _take(self) -> None:
        while True:
            try:
                self._descriptor = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
            except FileExistsError:
                self._set_aside(self._refuse_if_alive(self.path))
            else:
                break
        try:
            self._write(0)
        except BaseException:
            self._release()
            raise

    def _set_aside(self, dead: dict[str, Any]) -> None:
        """Remove a dead holder's lock. Renamed first: of two that take over, one finds it gone and starts again."""
        aside = temporary_name(self.path)
        try:
            os.rename(self.path, aside)
        except FileNotFoundError:
            return
        try:
            if _holder(_content(aside)) != _holder(dead):  # a third was quicker: this is its fresh lock
                os.link(aside, self.path)
        except OSError:
            pass  # the third finds its lock gone, and stops
        finally:
            aside.unlink(missing_ok=True)

    def _others(self) -> Iterator[Path]:
        """Locks that exclude this one: every other, but for parts of the same division."""
        for path in sorted(self.folder.glob("lease*.json")):
            same = self.part and path.name.endswith(f"-of-{self.part[1]}.json")
            if LOCK_FILE.fullmatch(path.name) and path != self.path and not same:
                yield path

    def _refuse_if_alive(self, path: Path) -> dict[str, Any]:
        """What the lock of a dead holder says; raises ShardError for a living one."""
        holder = _content(path)
        alive = _alive_here(holder)
        if alive is None:
            alive = _beats(path)
        if alive:
            job = f", job {holder['job']}" if holder.get("job") else ""
            raise ShardError(
                f"{self.folder} is being built by process {holder.get('pid', '?')} on "
                f"{holder.get('host', 'an unknown machine')}{job}: wait for it or end it, then run this command again"
            )
        return holder

    def _write(self, beat: int) -> None:
        text = json.dumps({**_me(), "beat": beat}).ljust(512) + "\n"
        os.pwrite(self._descriptor, text.encode(), 0)
        os.fsync(self._descriptor)

    def _beat(self) -> None:
        beat = 0
        while not self._ended.wait(BEAT):
            beat += 1
            with suppress(OSError):  # a full disk; a beat is left out
                self._write(beat)

    def _is_ours(self) -> bool:
        try:
            ours, there = os.fstat(self._descriptor), os.stat(self.path)
        except OSError:
            return False
        return (ours.st_dev, ours.st_ino) == (there.st_dev, there.st_ino)

    def _release(self) -> None:
        if self._is_ours():
            self.path.unlink(missing_ok=True)
        descriptor, self._descriptor = self._descriptor, -1
        os.close(descriptor)


@contextmanager
def locked(folder: Path, part: Part | None = None) -> Iterator[Lock]:
    """The folder of a set, made if need be and held by a lock; gone again if nothing came of it."""
    new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with Lock(folder, part) as lock:
            yield lock
    finally:
        if new and not any(folder.iterdir()):
            folder.rmdir()


def _me() -> dict[str, Any]:
    process = psutil.Process()
    return {
        "host": socket.gethostname(),
        "pid": process.pid,
        "job": os.environ.get("SLURM_JOB_ID"),
        "started": process.create_time(),
        "machine": _machine(),
    }


def _machine() -> str:
    """This boot and process name space: within it, a pid says whether somebody lives."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"{socket.gethostname()} {psutil.boot_time():.0f}"


def _content(path: Path) -> dict[str, Any]:
    """What a lock says; nothing if it is gone or was never written."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _holder(content: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in content.items() if key != "beat"}


def _alive_here(holder: dict[str, Any]) -> bool | None:
    """Does the holder live? None where this machine cannot tell."""
    if holder.get("machine") != _machine():
        return None
    try:
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return False
    except (PermissionError, KeyError, TypeError):
        return None  # somebody else's, of whom no more may be seen
    try:
        process = psutil.Process(holder["pid"])
        same = abs(process.create_time() - holder["started"]) < 1
        return same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
    except (psutil.AccessDenied, KeyError, TypeError):
        return None


def _beats(path: Path) -> bool:
    """Watch a lock until it changes (True), is gone, or has been still for long (False)."""
    before, start = _content(path), time.monotonic()
    log.warning(f"{path} is from another machine; waiting {WATCH:.0f} s for a sign of life")
    while time.monotonic() - start < WATCH:
        time.sleep(BEAT / 5)
        if not path.exists():
            return False
        now = _content(path)
        if now and now != before:
            return True
    return False
