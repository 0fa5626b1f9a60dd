"""The right to write into the folder of a run, which one process has at a time; a killed one never blocks the next."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING

from cxrfast.errors import RunError
from cxrfast.runs.folder import RunFolder
from cxrfast.shards.format.lock import Lease

if TYPE_CHECKING:
    from cxrfast.distributed import World  # torch, which tables do without


class InUse(RunError):
    """Another process writes into the run, or took it over."""


@contextmanager
def locked(run: RunFolder, task: str) -> Iterator[Lease]:
    """Hold the lease of a run, whose folder is made, and removed again if it stays empty.

    `task`: what the holder does, such as `training`; it is told to others. Raises InUse naming a live holder.
    """
    absent = [path for path in (run.folder, *run.folder.parents) if not path.exists()]
    run.folder.mkdir(parents=True, exist_ok=True)
    try:
        with Lease(run.lease_path, f"{run.folder} is in use", InUse, task) as lease:
            yield lease
    finally:
        for folder in absent:
            with suppress(OSError):  # others have written there
                folder.rmdir()


@contextmanager
def locked_by_first(run: RunFolder, task: str, ranks: "World") -> Iterator[Lease | None]:
    """Rank 0 holds the lease for all ranks, which call this together; the others get None, or exit if it is refused."""
    with ExitStack() as stack:
        held: list[Lease] = []
        ranks.on_first(lambda: held.append(stack.enter_context(locked(run, task))))
        yield held[0] if held else None
