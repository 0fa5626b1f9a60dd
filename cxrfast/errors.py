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


def is_disk_full(error: OSError) -> bool:
    """True if no space or no quota is left; network file systems say so at write, fsync or close."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)
