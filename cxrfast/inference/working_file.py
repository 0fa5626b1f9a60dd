"""The answers of a prediction that is under way, in a file next to its output: killed at any instant, it is continued.

One line of JSON per film, appended batch by batch, after a first line that says which model they are of. A line that a kill
cut short is ignored. Only one process at a time writes it.
"""

import base64
import fcntl
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from cxrfast.errors import RunError
from cxrfast.files import open_file
from cxrfast.inference.listing import Listed


class Answer(msgspec.Struct, kw_only=True, omit_defaults=True):
    """What was found about one film."""

    film: str
    """Its `key`."""
    bytes: int
    modified: int
    error: str = ""
    height: int | None = None
    width: int | None = None
    remarks: list[str] = []
    unlike: list[str] | None = None
    logits: str = ""
    """base64 of the members' logits, float32 (M, L), little endian; "" where there is an error."""

    def holds(self, film: Listed) -> bool:
        """Whether it is of this file as it is now. A file that could not be read is tried again."""
        return (self.bytes, self.modified) == (film.bytes, film.modified) and not (
            film.bytes >= 0 and self.error.startswith("unreadable")
        )


class _Head(msgspec.Struct, kw_only=True):
    cxrfast: str
    """`films`"""
    model: str
    """Fingerprint of everything that the answers depend on besides the films."""
    before: dict[str, str | None]
    """By output: its sha256 when the prediction began, None if it was absent."""


class _Tail(msgspec.Struct, kw_only=True):
    finished: dict[str, str]
    """By output: the sha256 that it gets."""


def pack(logits: np.ndarray) -> str:
    """float32 (M, L) → base64."""
    return base64.b64encode(np.ascontiguousarray(logits, "<f4").tobytes()).decode()


def unpack(text: str, shape: tuple[int, int]) -> np.ndarray:
    """What `pack` made → float32 (M, L); NaN for ""."""
    return np.frombuffer(base64.b64decode(text), "<f4").reshape(shape) if text else np.full(shape, np.nan, np.float32)


def key(name: str) -> str:
    """Name of a film as text that JSON can hold, whatever bytes it is made of."""
    return os.fsencode(name).decode("latin-1")


class WorkingFile:
    """The open working file, locked.

    before: state of the outputs now, by name, checked by the caller to be ours. It counts if the file is new; an older file
    keeps its own. `others` says whether the file was of another model and starts over.
    Raises RunError if another process has it.
    """

    def __init__(self, path: Path, model: str, before: dict[str, str | None]) -> None:
        self.path = path
        self._file = open(open_file(path, os.O_RDWR | os.O_CREAT), "r+b")  # noqa: SIM115, it stays open
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.close()
            raise RunError(f"another process is predicting into {path}: wait for it, or give another --out") from error
        self._places: dict[str, tuple[int, int]] = {}
        """By film: offset and length of its last line."""
        self.finished: dict[str, str] = {}
        """The sha256 that outputs get, by name, if the prediction was about to end."""
        self.others = False
        try:
            self._open(model, before)
        except BaseException:
            self._file.close()
            raise

    def _open(self, model: str, before: dict[str, str | None]) -> None:
        head = self._read()
        if head is None or head.model != model:
            self.others = head is not None
            self._places = {}
            head = _Head(cxrfast="films", model=model, before=head.before if head else before)
            self._file.seek(0)
            self._file.truncate()
            self._file.write(msgspec.json.encode(head) + b"\n")
        self.before = head.before
        """State of the outputs when the prediction began."""
        self._end = self._file.seek(0, os.SEEK_END)

    def _read(self) -> _Head | None:
        """Find the answers; None for an empty file or a damaged first line. What was cut short at the end is removed."""
        decoder, tail = msgspec.json.Decoder(Answer), msgspec.json.Decoder(_Tail)
        first = self._file.readline()
        try:
            head = msgspec.json.decode(first, type=_Head) if first.endswith(b"\n") else None
        except msgspec.DecodeError:
            head = None
        if head is None or head.cxrfast != "films":
            if first:
                raise RunError(f"{self.path} was not written by cxrfast predict, or is damaged: move it away")
            return None
        at = len(first)
        for line in self._file:
            if not line.endswith(b"\n"):
                self._file.truncate(at)
                break
            try:
                self._places[decoder.decode(line).film] = (at, len(line))
            except msgspec.DecodeError:
                with suppress(msgspec.DecodeError):  # damaged: its film is done again
                    self.finished = tail.decode(line).finished
            at += len(line)
        return head

    def get(self, film: Listed) -> Answer | None:
        """The answer for a film as it is now; None if there is none."""
        place = self._places.get(key(film.name))
        if place is None:
            return None
        answer = msgspec.json.decode(os.pread(self._file.fileno(), place[1], place[0]), type=Answer)
        return answer if answer.holds(film) else None

    def add(self, answers: Iterable[Answer]) -> None:
        """Append answers. They survive a kill of the process at once, and a power cut once `sync` has returned."""
        lines = [(answer.film, msgspec.json.encode(answer) + b"\n") for answer in answers]
        self._file.seek(self._end)
        self._file.write(b"".join(line for _, line in lines))
        self._file.flush()
        for film, line in lines:
            self._places[film] = (self._end, len(line))
            self._end += len(line)

    def finish(self, outputs: dict[str, str]) -> None:
        """Note what the outputs are about to become."""
        self._file.seek(self._end)
        self._file.write(msgspec.json.encode(_Tail(finished=outputs)) + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self._end = self._file.tell()
        self.finished = outputs

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
        self.close()

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> "WorkingFile":
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()
