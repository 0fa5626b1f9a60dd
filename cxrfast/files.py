"""Files that are whole or absent: written under a temporary name in the same folder, synced, renamed."""

import errno
import hashlib
import json
import logging
import os
import re
import secrets
import shutil
import socket
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from cxrfast.errors import is_disk_full

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)

NOT_REGULAR = "is not a regular file"

TEMPORARY = ".tmp"
"""Suffix of files being written. Leftovers of a killed process are overwritten or removed by the next one."""


def temporary_name(path: Path) -> Path:
    """Name under which to write `path`: different each time, so that two writers never share one."""
    return path.with_name(f"{path.name}.{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}{TEMPORARY}")


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Open a binary file that replaces `path` when the block ends, and is removed if the block raises.

    An OSError of the file names `path`, not the temporary name.
    """
    temporary = temporary_name(path)
    try:
        with open(temporary, "wb") as file:  # open(), unlike mkstemp, honours umask and setgid
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and str(error.filename) == str(temporary):
            raise OSError(error.errno, error.strerror, str(path)) from error
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


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Make a folder that replaces the folder `path`, which may be absent, when the block ends; removed if the block raises.

    Leftovers of processes of this machine that were killed are removed at the end.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, aside = temporary_name(path), temporary_name(path)
    temporary.mkdir()
    try:
        yield temporary
        sync_folder(temporary)
        if path.exists():
            os.rename(path, aside)
        try:
            os.rename(temporary, path)
        except OSError:
            if aside.exists():
                os.rename(aside, path)
            raise
        sync_folder(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for leftover in (aside, *_leftovers(path)):
        shutil.rmtree(leftover, ignore_errors=True)


def _leftovers(path: Path) -> list[Path]:
    """Temporary folders next to `path` of processes of this machine that are gone."""
    import psutil  # not at the top: the command line loads this module

    of_host = re.compile(
        re.escape(f"{path.name}.{socket.gethostname()}-") + r"(\d+)-[0-9a-f]{8}" + re.escape(TEMPORARY)
    )
    named = [(folder, of_host.fullmatch(folder.name)) for folder in path.parent.iterdir()]
    return [folder for folder, match in named if match and not psutil.pid_exists(int(match[1]))]


def write_bytes(path: Path, data: bytes) -> None:
    with replacing(path) as file:
        file.write(data)


def make_own_folder(path: Path) -> None:
    """Make a folder for results if it is absent. Raises OSError for a link, which could lead anywhere, and for a file."""
    if path.is_symlink():
        raise OSError(errno.ELOOP, "is a link, and results are not written where it leads: remove it", str(path))
    path.mkdir(exist_ok=True)


def write_figure(path: Path, figure: "Figure", dpi: float | None = None) -> None:
    """A PNG, the same bytes for the same figure. `dpi`: default: the figure's own.

    One line says which characters its font lacks; boxes stand for them.
    """
    with replacing(path) as file, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        figure.savefig(file, format="png", dpi=dpi or figure.dpi, metadata={"Software": None})
    lacking = []
    for one in caught:
        if glyph := GLYPH.match(str(one.message)):
            lacking.append(chr(int(glyph[1])))
        else:
            warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)
    if lacking:
        log.warning(f"{path}: the figure's font lacks {' '.join(sorted(set(lacking)))}, and boxes stand for them")


GLYPH = re.compile(r"Glyph (\d+) .*missing from font", re.DOTALL)
"""matplotlib's warning about a character that is drawn as a box."""


LARGEST = 2**30
"""Bytes of a file that is read whole, unless said otherwise; those of the largest sets are a tenth of it."""


def open_file(path: Path, flags: int = 0) -> int:
    """Descriptor of an existing regular file, or of a link to one, open for reading unless `flags` say otherwise.

    A folder from elsewhere may hold anything: raises OSError for a pipe, which would never answer, and for a device.
    """
    descriptor = os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK, 0o600)  # of a new file, which `open_own` makes
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, NOT_REGULAR, str(path))
    return descriptor


def read_file(path: Path, largest: int = LARGEST, flags: int = 0) -> bytes:
    """Content of a regular file. Raises OSError as `open_file` does, and for more than `largest` bytes."""
    with open(open_file(path, flags), "rb") as file:
        if os.fstat(file.fileno()).st_size > largest:
            raise OSError(errno.EFBIG, f"has more than {largest:,} bytes", str(path))
        return file.read()


def open_own(path: Path, flags: int = 0) -> int:
    """Descriptor of a file in a folder that others may write to, such as /tmp; made if absent, and nobody else can open it.

    A file with a name that others can guess may be theirs, or a link to one of ours. Raises OSError unless it is a regular
    file of this user without other names.
    """
    try:
        descriptor = open_file(path, flags | os.O_CREAT | os.O_NOFOLLOW | os.O_RDWR)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise OSError(errno.ELOOP, "is a link, which another user may have put there", str(path)) from error
    found = os.fstat(descriptor)
    if found.st_uid != os.geteuid() or found.st_nlink != 1:
        os.close(descriptor)
        what = "has a second name" if found.st_uid == os.geteuid() else f"belongs to user {found.st_uid}"
        raise OSError(errno.EPERM, what, str(path))
    os.fchmod(descriptor, 0o600)
    return descriptor


def json_bytes(value: Any) -> bytes:
    """Readable JSON with a fixed layout, so that equal values are equal bytes."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def write_json(path: Path, value: Any) -> None:
    write_bytes(path, json_bytes(value))


def sha256(path: Path) -> str:
    """Hash of a regular file, in hexadecimal digits. Raises OSError as `open_file` does."""
    with open(open_file(path), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
