"""Copy the files of a shard set between storages, hashing them on the way and retrying those that fail."""

import hashlib
import threading
from collections.abc import Callable
from concurrent.futures import Executor, as_completed

from cxrfast.errors import ShardError, is_disk_full
from cxrfast.shards.set_storage import CHUNK, SetStorage
from cxrfast.shards.storage import as_oserror

WAITS = (0.5, 2.0)
"""Seconds before a file that could not be copied is tried again."""


class _Damaged(ShardError):
    """A file of the source differs from its SHA256SUMS."""


class _Stopped(ShardError):
    """Another thread failed."""


class Transfer:
    """Copies files from `origin` to `target`; `digests`: sha256 by name; `count` is called with the bytes copied."""

    def __init__(
        self, origin: SetStorage, target: SetStorage, digests: dict[str, str], count: Callable[[int], None]
    ) -> None:
        self.origin, self.target, self.digests, self.count = origin, target, digests, count
        self.stop = threading.Event()

    def copy(self, pool: Executor, set_files: list[str], shards: list[list[str]], there: dict[str, int]) -> list[str]:
        """Copy the set's own files, then the shards in any order; `there`: what the target holds already.

        Returns the names of damaged files; the rest of their shards is not copied. Raises ShardError.
        """
        if damaged := self._copy(set_files):
            return damaged
        futures = [pool.submit(self._copy_shard, names, there) for names in shards]
        try:
            return [name for future in as_completed(futures) for name in future.result()]
        except BaseException:
            self.stop.set()
            for future in futures:
                future.cancel()
            raise

    def _copy_shard(self, names: list[str], there: dict[str, int]) -> list[str]:
        if names[-1] in there:
            self.target.remove(names[-1])  # a manifest means a whole shard
        return self._copy(names)

    def _copy(self, names: list[str]) -> list[str]:
        """Copy files in order; stop at a damaged one and return its name."""
        for name in names:
            try:
                self._copy_file(name)
            except _Damaged:
                return [name]
        return []

    def _copy_file(self, name: str) -> None:
        """Copy one file, in up to three tries. Raises _Damaged if it differs from its digest."""
        for wait in (*WAITS, None):
            try:
                with as_oserror(name):
                    return self._try_to_copy(name)
            except OSError as error:
                if is_disk_full(error):
                    raise ShardError(
                        f"no space or quota left in {self.target}: what was copied is kept; make room and run the same "
                        "command again"
                    ) from error
                if wait is None or isinstance(error, PermissionError):
                    raise ShardError(
                        f"{name} could not be copied from {self.origin} to {self.target} ({error.strerror or error}): "
                        "what was copied is kept; fix the cause and run the same command again"
                    ) from error
            self.stop.wait(wait)

    def _try_to_copy(self, name: str) -> None:
        hashed, done = hashlib.sha256(), 0
        try:
            with self.origin.open(name) as file, self.target.writing(name) as copy:
                while chunk := file.read(CHUNK):
                    if self.stop.is_set():
                        raise _Stopped
                    hashed.update(chunk)
                    copy.write(chunk)
                    done += len(chunk)
                    self.count(len(chunk))
                if hashed.hexdigest() != self.digests[name]:
                    raise _Damaged(name)  # inside, so that the copy is discarded
        except BaseException:
            self.count(-done)
            raise
