"""One source file on this machine: its size, its bytes, and whether an error may pass by itself.

Only regular files are read: opening a FIFO would wait for ever, and a device may never end.
"""

import errno
import os
import stat
from pathlib import Path

from cxrfast.files import open_file

MISSING, NOT_A_FILE, UNREADABLE = -1, -2, -3
"""In the place of a size: there is nothing under the path; there is a folder, FIFO or device, or links that lead in a circle;
the file system refuses to say."""

TRANSIENT = frozenset(
    code
    for name in (
        *("ESTALE", "EIO", "ETIMEDOUT", "ENOTCONN", "EREMOTEIO", "ENOLINK", "EAGAIN", "EINTR", "EBUSY"),
        *(
            "ECONNRESET",
            "ECONNREFUSED",
            "ECONNABORTED",
            "EHOSTDOWN",
            "EHOSTUNREACH",
            "ENETDOWN",
            "ENETUNREACH",
            "ESHUTDOWN",
        ),
    )
    if (code := getattr(errno, name, None)) is not None
)
"""Errors of a file server or network that may be back in a moment."""

EXHAUSTED = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS))
"""Errors of this machine, not of a file: it has no memory or no descriptors left."""

PAUSES = (0.5, 2.0)
"""Seconds before each new try after such an error."""


def size_of(path: str) -> int:
    """Bytes of a regular file, or MISSING, NOT_A_FILE or UNREADABLE. Raises OSError only if the error may pass."""
    try:
        found = os.stat(path)
    except OSError as error:
        if error.errno in TRANSIENT | EXHAUSTED:
            raise
        return size_after(error)
    return found.st_size if stat.S_ISREG(found.st_mode) else NOT_A_FILE


def size_after(error: OSError) -> int:
    """What an error says about a file: MISSING, NOT_A_FILE or UNREADABLE."""
    if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG):
        return MISSING
    if error.errno in (errno.EINVAL, errno.EISDIR, errno.ELOOP, errno.ENXIO):  # as `open_file` and `open` say
        return NOT_A_FILE
    return UNREADABLE


def read_file(path: str, first: int | None = None) -> bytes:
    """Return a regular file, whole or its `first` bytes. Raises OSError, also for anything else."""
    with open(open_file(Path(path)), "rb", buffering=0 if first is None else -1) as file:
        return file.read(-1 if first is None else first)
