"""One exception class a layer. A message says what was found, where, and what to do about it.

The command line turns each of them into one line and exit code 2; nothing else may reach the user as such a line.
"""

import errno


class CxrfastError(Exception):
    """Base class: bad input or a bad environment, explained to the user."""


class ShardError(CxrfastError):
    """A source tree or a shard set (`cxrfast.shards`) is not what it should be."""


class LoadError(CxrfastError):
    """Rows of a shard set (`cxrfast.pipelines`) cannot be read, decoded or ordered as asked."""


class RunError(CxrfastError):
    """A study, a run or its configuration (`cxrfast.*`) is not what it should be."""


class DeviceError(CxrfastError):
    """A GPU, a driver or a library that was asked for cannot be used here."""


MEMORY_WORDS = (
    *("out of memory", "out_of_memory", "outofmemory", "not enough memory", "memoryerror", "memoryallocation"),
    *("bad_alloc", "alloc_failed", "allocation failed", "allocation_failed"),
    *("can't allocate", "cannot allocate", "failed to allocate", "unable to allocate"),
    *("could not create a", "could not execute a"),
)
"""In the messages of torch, CUDA's libraries, NumPy, DALI and oneDNN (the last line) when memory runs out."""


def is_out_of_memory(error: BaseException) -> bool:
    """Did memory run out, of the machine or of a GPU? torch, CUDA's libraries and DALI say so in RuntimeErrors of all kinds.

    Also true for what another error became of it, as where torch cannot write to a buffer that cannot grow.
    """
    if isinstance(error, CxrfastError):
        return False
    words = f"{type(error).__name__}: {error}".lower()
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(w in words for w in MEMORY_WORDS)):
        return True
    before = error.__cause__ or error.__context__
    return isinstance(error, RuntimeError) and before is not None and is_out_of_memory(before)


def is_disk_full(error: OSError) -> bool:
    """True if no space or no quota is left; network file systems say so at write, fsync or close."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)
