"""Leases: only one process, or the parts of one job array, writes into a folder. A killed process never blocks others.

A file names the holder, and filelock touches it every few seconds. filelock takes over from a process that died on this
machine or has been silent for `WATCH` seconds. This module adds messages that name the holder and its job, and a takeover on
file systems that cannot exchange names (NFS) and of files of other users, where filelock never takes over.
"""

import errno
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
from filelock import LeaseSettingsMismatch, SoftFileLease, Timeout

from cxrfast.errors import CxrfastError, ShardError
from cxrfast.files import open_file, temporary_name
from cxrfast.shards.format.names import LOCK_FILE

log = logging.getLogger(__name__)

BEAT = 5.0
"""Seconds between two signs of life."""

WATCH = 4 * BEAT
"""Seconds without one after which a holder counts as dead."""

Part = tuple[int, int]
"""(i, n): the i-th of n parts of a build, from 1."""


LARGEST_LEASE = 2**16
"""Characters of a lease that are read; it has a few lines."""


@dataclass(frozen=True)
class _Mark:
    """State of a lease file; every sign of life changes it."""

    inode: int
    time_ns: int
    text: str

    @classmethod
    def read(cls, path: Path, refused: type[CxrfastError] = ShardError) -> "_Mark":
        """Raises `refused` for what is not a regular file."""
        try:
            descriptor = open_file(path, os.O_NOFOLLOW)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ELOOP):
                raise
            raise refused(f"{path} is not a file that cxrfast leaves: delete it") from error
        with open(descriptor, errors="replace") as file:
            status = os.fstat(file.fileno())  # not of the path, which NFS caches
            return cls(status.st_ino, status.st_mtime_ns, file.read(LARGEST_LEASE))

    @property
    def holder(self) -> dict[str, str]:
        """`pid`, `host`, in SLURM `job`, and `task` if the holder named one; empty until it is written."""
        return dict(line.split("=", 1) for line in self.text.splitlines() if "=" in line)

    def runs_here(self) -> bool | None:
        """Is the holder a living process? None if it is one of another machine."""
        host, _, namespace = self.holder.get("host", "").partition("?pidns-")
        try:
            ours = f"{os.stat('/proc/self/ns/pid').st_ino:x}"
            pid = int(self.holder.get("pid", ""))
        except (OSError, ValueError):
            return None
        if host != socket.gethostname() or namespace not in ("", ours):
            return None
        try:
            process = psutil.Process(pid)
            return process.status() != psutil.STATUS_ZOMBIE and process.create_time() < self.time_ns / 1e9 + 1
        except psutil.NoSuchProcess:
            return False
        except psutil.Error:
            return None


class Lease:
    """The right to write, held by the file `path`, as a context manager. Raises `error` naming a live holder, with a message
    that begins with `doing`, such as `/set is being built`. `task`: what this holder does, for the messages of others."""

    def __init__(self, path: Path, doing: str, error: type[CxrfastError], task: str = "") -> None:
        self.path, self.doing, self.error, self.task = path, doing, error, task
        self._lease = SoftFileLease(path, lease_duration=WATCH, heartbeat_interval=BEAT, thread_local=False)

    def __enter__(self) -> "Lease":
        first, start = None, time.monotonic()
        while not self.take():
            try:
                mark = _Mark.read(self.path, self.error)
            except FileNotFoundError:
                continue
            if mark.runs_here() is False:  # killed, but its parent has not asked for its exit code yet
                self._set_aside(mark)
                continue
            holder = mark.holder
            who = f"process {holder.get('pid', '?')} on {holder.get('host', 'an unknown machine').partition('?')[0]}"
            if mark.runs_here() or (first and mark != first):
                job = f", job {holder['job']}" if "job" in holder else ""
                task = f" ({holder['task']})" if "task" in holder else ""
                raise self.error(
                    f"{self.doing} by {who}{job}{task}: wait for it or end it, then run this command again"
                )
            if not first:
                log.warning(f"{self.path} is held by {who}; waiting {WATCH:.0f} s for a sign of life")
                first = mark
            elif time.monotonic() - start > WATCH + BEAT:
                self._set_aside(first)
            time.sleep(BEAT / 5)
        more = {"job": os.environ.get("SLURM_JOB_ID"), "task": self.task}
        if lines := "".join(f"{name}={value}\n" for name, value in more.items() if value):
            with suppress(OSError), open(self.path, "a") as file:
                file.write(lines)
        return self

    def __exit__(self, *exc: object) -> None:
        self._lease.release()

    def take(self) -> bool:
        """Take the lease if it is free or its holder is known to be dead; False otherwise."""
        try:
            self._lease.acquire(blocking=False)
        except (Timeout, LeaseSettingsMismatch, IsADirectoryError):
            return False
        except PermissionError:  # another user's
            if not self.path.exists():
                raise
            return False
        return True

    def check(self) -> None:
        """Raises `error` if the lease was lost."""
        owner = self._lease.owner
        if owner is None or owner.token != self._lease.token:
            raise self.error(
                f"{self.path.parent}: another process took over, because this one gave no sign of life for {WATCH:.0f} s "
                "(suspended, or the file system hung); nothing is lost"
            )

    def _set_aside(self, dead: _Mark) -> None:
        """Remove the file of a dead holder. Renamed first: of two that take over, one finds it gone and starts again."""
        aside = temporary_name(self.path)
        with suppress(FileNotFoundError):
            os.rename(self.path, aside)
            if _Mark.read(aside) != dead:  # another process was quicker, and this is its new lease
                with suppress(OSError):  # it notices the loss, and stops
                    os.link(aside, self.path)
        aside.unlink(missing_ok=True)


class Lock(Lease):
    """The lease of the set `folder`; `part` shares it with the other parts of a job array."""

    def __init__(self, folder: Path, part: Part | None = None) -> None:
        self.folder, self.part = folder, part
        name = f"lease-{part[0]}-of-{part[1]}.lock" if part else "lease.lock"
        super().__init__(folder / name, f"{folder} is being built", ShardError)

    def __enter__(self) -> "Lock":
        super().__enter__()
        try:
            for path in self._others():
                if path.suffix == ".json":
                    path.unlink(missing_ok=True)  # from an earlier version, whose process then stops
                elif path.suffix != ".lock":  # of a takeover
                    _remove_old(path)
                elif not (self.part and path.name.endswith(f"-of-{self.part[1]}.lock")):
                    with Lease(path, self.doing, self.error):
                        pass
        except BaseException:
            self.__exit__()
            raise
        return self

    def alone(self) -> bool:
        """True unless another part is running, as far as this machine knows."""
        return all(_is_dead_here(path) for path in self._others() if path.suffix == ".lock")

    def _others(self) -> list[Path]:
        names = sorted(self.folder.glob("lease*"))
        return [path for path in names if LOCK_FILE.fullmatch(path.name) and path != self.path]


def _is_dead_here(path: Path) -> bool:
    """Was the lease's holder a process of this machine that has ended? Also True if there is no lease any more."""
    try:
        return _Mark.read(path).runs_here() is False
    except FileNotFoundError:
        return True


def _remove_old(path: Path) -> None:
    """Remove what a killed takeover left; one that runs takes a moment."""
    with suppress(FileNotFoundError):
        if time.time() - path.stat().st_mtime > 10 * WATCH:
            path.unlink()


@contextmanager
def locked(folder: Path, part: Part | None = None) -> Iterator[Lock]:
    """Make and lock the folder of a set; remove it again if it stays empty."""
    new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with Lock(folder, part) as lock:
            yield lock
    finally:
        if new and not any(folder.iterdir()):
            folder.rmdir()
