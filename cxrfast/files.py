"""Files that are whole or absent: written under a temporary name in the same folder, synced, renamed."""

import hashlib
import json
import os
import secrets
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from cxrfast.errors import is_disk_full

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TEMPORARY = ".tmp"
"""Suffix of files being written. Leftovers of a killed process are overwritten or removed by the next one."""


def temporary_name(path: Path) -> Path:
    """Name under which to write `path`: different each time, so that two writers never share one."""
    return path.with_name(f"{path.name}.{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}{TEMPORARY}")


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Open a binary file that replaces `path` when the block ends, and is removed if the block raises."""
    temporary = temporary_name(path)
    try:
        with open(temporary, "wb") as file:  # open(), unlike mkstemp, honours umask and setgid
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` survive a power cut, if the file system supports that."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if is_disk_full(error):
            raise
        # some network file systems refuse fsync on a folder
    finally:
        os.close(descriptor)


def write_bytes(path: Path, data: bytes) -> None:
    with replacing(path) as file:
        file.write(data)


def write_figure(path: Path, figure: "Figure", dpi: float | None = None) -> None:
    """A PNG, the same bytes for the same figure. `dpi`: default: the figure's own."""
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=dpi or figure.dpi, metadata={"Software": None})


def json_bytes(value: Any) -> bytes:
    """Readable JSON with a fixed layout, so that equal values are equal bytes."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def write_json(path: Path, value: Any) -> None:
    write_bytes(path, json_bytes(value))


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
