"""From what a user names (films, folders, patterns) to a list of films in a fixed order. Reads names and a few first bytes."""

import errno
import glob
import os
import re
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cxrfast.errors import RunError
from cxrfast.files import open_file
from cxrfast.shards.images.decode import UNSUPPORTED, with_preamble
from cxrfast.shards.images.png import SIGNATURE

IMAGES = {
    *("jpg", "jpeg", "jpe", "jfif", "png", "dcm", "dicom", "dic", "ima"),
    *("tif", "tiff", "bmp", "gif", "webp", "jp2", "j2k", "jxl"),
}
"""Suffixes of images, among them formats that are not decoded: such a film becomes a line that says so."""

SNIFFED = 4096
"""First bytes of a file without such a suffix, which tell whether it is an image."""


@dataclass(frozen=True, slots=True)
class Listed:
    """One film that was found."""

    name: str
    """Its path as the user gave or named it."""
    bytes: int = -1
    """Size of the file; -1 if it cannot be told."""
    modified: int = -1
    """Time of its last change, ns."""
    problem: str = ""
    """Why it cannot be read; "" if it may be."""

    @property
    def path(self) -> Path:
        return Path(self.name)


def list_films(given: Sequence[str]) -> list[Listed]:
    """The films that paths of files, folders and patterns name, in the order given; those of a folder in natural order.

    A folder stands for every JPEG, PNG and DICOM file below it, whatever its suffix, links to folders included, hidden files
    and folders left out; files with the suffix of another image format are listed too, to be lines with a reason. A pattern
    is expanded as a shell would, `**` included. A film that is named twice, also by a link, is listed once.

    Raises RunError for a path or pattern that matches nothing, and for a folder without films.
    """
    found: dict[str, Listed] = {}
    for name in given:
        is_pattern = glob.has_magic(name) and not os.path.lexists(name)
        matches = natural(glob.glob(name, recursive=True)) if is_pattern else [name]
        listed = [film for match in matches for film in _films_of(match)]
        if not listed or not (matches and (is_pattern or os.path.lexists(name))):
            raise RunError(_nothing(name, is_pattern, bool(matches)))
        for real, film in listed:
            found.setdefault(real, film)
    return list(found.values())


def natural(names: Sequence[str]) -> list[str]:
    """Sorted so that numbers count as numbers: film-2 before film-10."""
    return sorted(names, key=natural_key)


def natural_key(name: str) -> tuple[list[int | str], str]:
    """Sort key of a path: digits by their value, other text as it is; equal ones by their spelling."""
    parts = re.split(r"([0-9]+)", name)  # text and digits by turns, so that like is compared with like
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], name


MISSING = "missing"


def _nothing(name: str, is_pattern: bool, matches: bool) -> str:
    if is_pattern and not matches:
        return f"no file matches {name}"
    if is_pattern or os.path.isdir(name):
        return f"there are no films in {name}: no JPEG, PNG or DICOM file"
    return f"{name} is not a run, a shard set or a film: there is no such file"


def _films_of(name: str) -> list[tuple[str, Listed]]:
    """(real path, film) of a file, or of every film below a folder, in natural order."""
    try:
        status = os.stat(name)
    except OSError as error:
        return [(os.path.abspath(name), Listed(name, problem=_why(error)))]
    real = os.path.realpath(name)
    if stat.S_ISDIR(status.st_mode):
        return sorted(_walk(name, real, (real,)), key=lambda item: natural_key(item[1].name))
    return [(real, _listed(name, status))]


def _walk(name: str, real: str, above: tuple[str, ...]) -> Iterator[tuple[str, Listed]]:
    """(real path, film) of each film below a folder. `above`: real paths of this folder and of those that it was reached by."""
    try:
        with os.scandir(name) as entries:
            inside = [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        yield real, Listed(name, problem=_why(error))
        return
    for entry in inside:
        path = os.path.join(name, entry.name)
        where = os.path.realpath(path) if entry.is_symlink() else os.path.join(real, entry.name)
        try:
            if entry.is_dir():
                if where in above or real.startswith(where.rstrip("/") + "/"):
                    yield path, Listed(path, problem="a link that leads back to a folder above it")
                else:
                    yield from _walk(path, where, (*above, where))
                continue
            status = entry.stat()
        except OSError as error:
            yield path, Listed(path, problem=_why(error))
            continue
        if not stat.S_ISREG(status.st_mode) or _is_image(path, entry.name):
            yield where, _listed(path, status)


def _listed(name: str, status: os.stat_result) -> Listed:
    if not stat.S_ISREG(status.st_mode):
        return Listed(name, problem="not a file: a pipe, a socket or a device")
    return Listed(name, status.st_size, status.st_mtime_ns)


def _why(error: OSError) -> str:
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return MISSING
    if error.errno == errno.ELOOP:
        return "unreadable: a link that leads to itself"
    return f"unreadable: {error.strerror or error}"


def _is_image(path: str, name: str) -> bool:
    """Whether a file in a folder is an image, by its suffix or, if it has none of an image, by its first bytes."""
    if name.rpartition(".")[2].lower() in IMAGES:
        return True
    if name == "DICOMDIR":  # the index of a disc, a DICOM file without pixels
        return False
    try:
        with open(open_file(Path(path)), "rb") as file:
            first = file.read(SNIFFED)
    except OSError:
        return False
    known = first.startswith((b"\xff\xd8\xff", SIGNATURE, *(start for start, _ in UNSUPPORTED if len(start) > 3)))
    return known or with_preamble(first) is not None
