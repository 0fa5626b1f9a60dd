"""One source file on this machine: its size, and what an error says about it."""

import errno
import os
import stat

MISSING, NOT_A_FILE, UNREADABLE = -1, -2, -3
"""In the place of a size: there is nothing under the path; there is a folder, FIFO or device, or links that lead in a
circle; the file system refuses to say."""

TRANSIENT = frozenset(
    code
    for name in (
        *("ESTALE", "EIO", "ETIMEDOUT", "ENOTCONN", "EREMOTEIO", "ENOLINK", "EAGAIN", "EINTR", "EBUSY"),
        *("ECONNRESET", "ECONNREFUSED", "ECONNABORTED", "EHOSTDOWN", "EHOSTUNREACH", "ENETDOWN"),
        *("ENETUNREACH", "ESHUTDOWN"),
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
