"""Run the tasks of a build in processes on this machine.

Tasks go in; (task, error or None) come out as they end. When a worker dies, its open shards are rebuilt; an image that
crashes the decoder on its own is quarantined.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.connection import Connection
from multiprocessing.connection import wait as wait_for_exit
from typing import Any

import cv2

from cxrfast.errors import ShardError
from cxrfast.shards.building.tasks import Task, build_shard
from cxrfast.shards.images.bad_image import Reason

Outcome = tuple[Task, Exception | None]

SPAWN = multiprocessing.get_context("spawn")

CRASHES = {int(s) for s in (signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE, signal.SIGABRT)}
"""Signals of a crashed decoder; anything else that ends a process comes from outside."""


class _Pool(ProcessPoolExecutor):
    def submit(self, *args: Any, **kwargs: Any) -> Future[Any]:
        """As usual; a worker that this starts inherits a blocked SIGINT, so Ctrl-C never meets one that is starting."""
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            return super().submit(*args, **kwargs)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def start_pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Processes for `run_here`, started on demand; terminated at once if the block raises."""
    before = multiprocessing.active_children()
    pool = _Pool(workers, mp_context=SPAWN, initializer=start_worker)
    try:
        yield pool
        pool.shutdown()
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():
            if process not in before:
                process.terminate()  # its temporary files are removed later
                process.join()
        raise


def run_here(
    tasks: Iterable[Task], workers: int, note: Callable[[str], None], pool: ProcessPoolExecutor
) -> Generator[Outcome]:
    """Build in `pool`, of `workers` processes. When one dies, its open shards are rebuilt and a new pool takes over."""
    queue = iter(tasks)
    lost: list[Task] = []
    yield from _in_pool(queue, workers, lost, pool)
    while lost:
        note(f"a worker process died: {len(lost)} open shards are rebuilt, each in its own process")
        with ThreadPoolExecutor(max(1, workers // 2)) as threads:  # fewer, in case memory ran out
            yield from threads.map(_alone, lost)
        lost.clear()
        with start_pool(workers) as fresh:
            yield from _in_pool(queue, workers, lost, fresh)


def _in_pool(queue: Iterator[Task], workers: int, lost: list[Task], pool: ProcessPoolExecutor) -> Generator[Outcome]:
    """Run tasks, submitting a few ahead, until none are left or a worker dies; then open ones go to `lost`."""
    waiting: dict[Future[None], Task] = {}
    while not lost:
        while len(waiting) < 2 * workers and (task := next(queue, None)):
            try:
                waiting[pool.submit(build_shard, task)] = task
            except BrokenProcessPool:
                lost.append(task)
                break
        if not waiting:
            return
        for future in wait(waiting, return_when=FIRST_COMPLETED).done:
            task, error = waiting.pop(future), future.exception()
            if isinstance(error, BrokenProcessPool):
                lost.append(task)
            else:
                yield task, as_exception(error)
    for future, task in waiting.items():  # the pool is broken: all its futures end now
        error = future.exception()
        if isinstance(error, BrokenProcessPool):
            lost.append(task)
        else:
            yield task, as_exception(error)


def as_exception(error: BaseException | None) -> Exception | None:
    if error is None or isinstance(error, Exception):
        return error
    raise error


def _alone(task: Task) -> Outcome:
    """Build a shard in its own process, leaving out images that crash it."""
    while True:
        ours, theirs = SPAWN.Pipe(duplex=False)
        process = SPAWN.Process(target=_build_and_tell, args=(task, theirs), daemon=True)
        process.start()
        theirs.close()
        row, result = _listen(ours)
        process.join()
        code = process.exitcode or 0
        if isinstance(result, Exception) or code == 0:
            return task, result
        if row is None or -code not in CRASHES:
            advice = "if memory is short, use fewer --workers"
            how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            if code > 0:
                advice = "see its output above; a script that builds needs `if __name__ == '__main__':`"
            return task, ShardError(f"shard {task.shard}: its worker process died twice ({how}): {advice}")
        if task.held is not None and row in task.held:
            return task, ShardError(
                f"shard {task.shard}: row {row} was fine at other scales but crashes the decoder now"
            )
        task = replace(task, quarantined={**task.quarantined, str(row): Reason.CRASHED.value})


def _build_and_tell(task: Task, pipe: Connection) -> None:
    """In the child: send each row before its image, and the error at the end."""
    start_worker()
    try:
        build_shard(task, pipe.send)
    except Exception as error:
        pipe.send(error)


def _listen(pipe: Connection) -> tuple[int | None, Exception | None]:
    """The last row that the child began, and its error."""
    row: int | None = None
    while True:
        try:
            message: Any = pipe.recv()
        except EOFError:
            return row, None
        if isinstance(message, Exception):
            return row, message
        row = message


def start_worker() -> None:
    """Set up a worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends its workers
    cv2.setNumThreads(1)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_exit_with, args=(parent.sentinel,), daemon=True).start()


def _exit_with(sentinel: int) -> None:
    """Exit when the parent dies, so as not to write alongside the build that takes over."""
    wait_for_exit([sentinel])
    os._exit(1)
