"""Standard streams that commands can write to whatever becomes of the terminal: closed, gone, or not UTF-8.

A reader that leaves early, as in `cxrfast status | head -1`, must not end a training or show a traceback.
"""

import codecs
import errno
import io
import os
import sys
from typing import TextIO

DEGRADE = "cxrfast"
"""Name of the error handler that replaces what an encoding lacks."""

ASCII = {
    "→": "->",
    "×": "x",
    "±": "+/-",
    "∓": "-/+",
    "−": "-",
    "–": "-",
    "—": "-",
    "…": "...",
    "·": "*",
    "†": "*",
    "‡": "**",
    "§": "***",
    "≥": ">=",
    "≤": "<=",
    "µ": "u",
    "σ": "sigma",
    "“": '"',
    "”": '"',
    "‘": "'",
    "’": "'",
}
"""Characters of tables and messages, and what stands for them where they cannot be shown."""

GONE = (errno.EPIPE, errno.EIO, errno.EBADF)
"""Errors of a stream that nobody reads any more."""


def _degrade(error: UnicodeError) -> tuple[str | bytes, int]:
    """Error handler of codecs: a character becomes that of `ASCII`, or its escape."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    found = error.object[error.start : error.end]
    return "".join(ASCII.get(c) or c.encode("ascii", "backslashreplace").decode() for c in found), error.end


codecs.register_error(DEGRADE, _degrade)


def degraded(text: str, encoding: str) -> str:
    """Text with replacements for what `encoding` lacks."""
    return text.encode(encoding, DEGRADE).decode(encoding)


class _Output(io.FileIO):
    """Raw standard output or error. Once nobody reads it any more, what is written to it is lost without an error."""

    def __init__(self, descriptor: int) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self.may_fail = descriptor == 1  # results that are lost on a full disk are an error

    def write(self, data: object) -> int:
        try:
            return super().write(data)  # type: ignore[arg-type]
        except OSError as error:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.fileno())  # for processes started later, too, and for what is still buffered
            os.close(null)
            if self.may_fail and error.errno not in GONE:
                raise
            return memoryview(data).nbytes  # type: ignore[arg-type]


def prepare() -> None:
    """Make the standard streams safe to write to. Streams that another program has replaced keep their target."""
    for descriptor in range(3):  # else the next file that is opened would become a standard stream
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    sys.stdout = _safe(sys.stdout, sys.__stdout__, 1)
    sys.stderr = _safe(sys.stderr, sys.__stderr__, 2)


def _safe(stream: TextIO | None, original: TextIO | None, descriptor: int) -> TextIO:
    if stream is None:  # it was closed when Python started
        return open(os.devnull, "w", encoding="utf-8")
    if stream is original and isinstance(stream, io.TextIOWrapper) and _leads_to(stream, descriptor):
        stream.flush()
        return io.TextIOWrapper(
            io.BufferedWriter(_Output(descriptor)),
            encoding=stream.encoding,
            errors=DEGRADE,
            line_buffering=stream.line_buffering or descriptor == 2,
            write_through=stream.write_through,
        )
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors=DEGRADE)
    return stream


def _leads_to(stream: io.TextIOWrapper, descriptor: int) -> bool:
    try:
        return stream.fileno() == descriptor
    except OSError:
        return False
