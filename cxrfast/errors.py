"""One exception class per layer. A message says what was found, where, and what to do about it.

The command line turns each of them into one line and exit code 2.
"""

import difflib
import errno
from collections.abc import Iterable


class CxrfastError(Exception):
    """Base class: bad input or a bad environment, explained to the user."""


class ShardError(CxrfastError):
    """A source tree or a shard set (`cxrfast.shards`) is invalid."""


class LoadError(CxrfastError):
    """Rows of a shard set (`cxrfast.pipelines`) cannot be read, decoded or ordered as requested."""


class RunError(CxrfastError):
    """A study, a run or its configuration (`cxrfast.*`) is invalid."""


class NotDefined(RunError):
    """What was asked for means nothing for this network, such as the feature map of one that has none."""


class DeviceError(CxrfastError):
    """A requested GPU, driver or library cannot be used here."""


def did_you_mean(names: Iterable[str], known: Iterable[str]) -> str:
    """`did you mean 'Pneumonia'? `, for the known names that are most like any of `names`; "" if none is."""
    by_plain = {other.lower().strip(): other for other in known}
    close = [
        near for name in names for near in difflib.get_close_matches(name.lower().strip(), by_plain, n=1, cutoff=0.7)
    ]
    meant = ", ".join(repr(by_plain[near]) for near in dict.fromkeys(close))
    return f"did you mean {meant}? " if close else ""


MEMORY_WORDS = (
    *("out of memory", "out_of_memory", "outofmemory", "not enough memory", "memoryerror", "memoryallocation"),
    *("bad_alloc", "alloc_failed", "allocation failed", "allocation_failed"),
    *("can't allocate", "cannot allocate", "failed to allocate", "unable to allocate"),
    *("could not create a", "could not execute a"),
    "unable to find an engine",
)
"""Found in messages of torch, NumPy, DALI, CUDA's libraries, oneDNN and cuDNN (the last two lines) when memory runs out."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the machine or a GPU ran out of memory. Libraries report that in all kinds of RuntimeErrors.

    Also true for an error caused by such an error, for example when torch writes to a buffer that cannot grow.
    """
    if isinstance(error, CxrfastError):
        return False
    words = f"{type(error).__name__}: {error}".lower()
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(w in words for w in MEMORY_WORDS)):
        return True
    before = error.__cause__ or error.__context__
    return isinstance(error, RuntimeError) and before is not None and is_out_of_memory(before)


def is_disk_full(error: OSError) -> bool:
    """Whether no space or quota is left; network file systems report it at write, fsync or close."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)
