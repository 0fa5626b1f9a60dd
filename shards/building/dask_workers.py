"""Run the tasks of a build on the workers of a dask cluster."""

from collections.abc import Generator, Iterable
from typing import Any

import cv2

from cxrfast.errors import ShardError
from cxrfast.shards.building.tasks import Task, build_shard
from cxrfast.shards.building.workers import Outcome, as_exception
from cxrfast.shards.format.info import versions

TIMEOUT = 20.0
"""Seconds to wait for a dask scheduler."""


def run_on_dask(tasks: Iterable[Task], address: str) -> Generator[Outcome]:
    """Build on the workers of the dask scheduler at `address`, which need this version of cxrfast.

    They must see the same folders. dask gives a lost worker's open shards to others. Raises ShardError if dask, the
    scheduler or workers are missing.
    """
    try:
        from distributed import Client, KilledWorker, as_completed
    except ImportError:
        raise ShardError("--dask needs dask.distributed: pip install 'cxrfast[dask]'") from None
    try:
        client = Client(address, timeout=TIMEOUT, set_as_default=False)
    except (OSError, ValueError) as error:
        raise ShardError(
            f"no dask scheduler answers at {address} ({error}): start one with `dask scheduler`, "
            "and workers with `dask worker ADDRESS`"
        ) from error
    with client:
        threads = sum(client.nthreads().values())
        if not threads:
            raise ShardError(f"the dask scheduler at {address} has no workers: start some with `dask worker {address}`")
        queue = iter(tasks)
        waiting: dict[Any, Task] = {}
        completed = as_completed(loop=client.loop)
        while True:
            while len(waiting) < 2 * threads and (task := next(queue, None)):
                future = client.submit(_build_there, task, versions(), pure=False)
                waiting[future] = task
                completed.add(future)
            if not waiting:
                return
            future = next(completed)
            task, failure = waiting.pop(future), future.exception()
            if isinstance(failure, KilledWorker):
                failure = ShardError(
                    f"shard {task.shard}: {failure.allowed_failures + 1} dask workers died building it"
                )
            yield task, as_exception(failure)


def _build_there(task: Task, expected: dict[str, str]) -> None:
    """Build on a dask worker. Its library versions must match the client's, or the bytes might differ."""
    if versions() != expected:
        raise ShardError(f"shard {task.shard}: the dask worker has {versions()}, the set is built with {expected}")
    cv2.setNumThreads(1)
    build_shard(task)
