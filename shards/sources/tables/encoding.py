"""Bytes of a table or list → text. Files that only pretend to be tables are named for what they are.

Text is UTF-8, or UTF-16 or UTF-32 with a byte order mark; nothing is guessed. Byte order marks never become text.
"""

import codecs
import gzip
import re

from cxrfast.errors import ShardError

GZIP = b"\x1f\x8b"
PARQUET = b"PAR1"

FOREIGN = {
    b"PK\x03\x04": "an Excel workbook or another zip archive: save the sheet as CSV",
    b"\xd0\xcf\x11\xe0": "an old Excel workbook: save the sheet as CSV",
    b"version https://git-lfs": "a Git LFS pointer, not the table: run `git lfs pull`",
    b"%PDF": "a PDF: export the table as CSV",
    b"SQLite format 3": "an SQLite database: export the table as CSV",
    b"\x89HDF": "an HDF5 file: export the table as CSV",
    b"\x93NUMPY": "a NumPy array: export the table as CSV",
}
"""First bytes of files that are no tables, and what to do."""

WEB_PAGE = re.compile(rb"\s*(?:<!doctype|<html|<head|<body|<\?xml|<!--|<error)", re.IGNORECASE)

MARKS = {
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}
"""Byte order marks; UTF-32 comes before UTF-16, whose mark it starts with."""

LINE_BREAK = re.compile(rb"\r\n|\r|\n")


def unpacked(data: bytes, where: str, *, packed: bool, parquet: bool) -> bytes:
    """A table's bytes, without gzip if it is `packed`. Raises ShardError if they are not those of a table at all.

    Raises OSError, EOFError or zlib.error for damaged gzip.
    """
    _check_kind(data, where)
    if not packed:
        if data.startswith(GZIP):
            raise ShardError(f"{where} is compressed with gzip: rename it to end in .gz")
    else:
        if data and not data.startswith(GZIP):
            raise ShardError(f"{where} is not compressed with gzip: rename it without .gz, or download it again")
        data = gzip.decompress(data)
        if data.startswith(GZIP):
            raise ShardError(f"{where} is compressed with gzip twice: decompress it once")
        _check_kind(data, where)
    if data.startswith(PARQUET) and not parquet:
        raise ShardError(f"{where} is a Parquet table: rename it to end in .parquet")
    return data


def _check_kind(data: bytes, where: str) -> None:
    if kind := next((kind for start, kind in FOREIGN.items() if data.startswith(start)), None):
        raise ShardError(f"{where} is {kind}")
    if WEB_PAGE.match(data.removeprefix(codecs.BOM_UTF8)[:1000]):
        raise ShardError(f"{where} is a web page or XML, perhaps of a login or an error: download the table again")


def decoded(data: bytes, where: str) -> str:
    r"""Text of a file; all line ends become \n, and byte order marks at the start of any line are dropped.

    Raises ShardError that names the first line which is not text, and how to convert the file.
    """
    mark = next((mark for mark in MARKS if data.startswith(mark)), b"")
    encoding, body = MARKS.get(mark, "utf-8"), data[len(mark) :]
    if encoding == "utf-8" and b"\0" in body:
        raise ShardError(_nul_message(body, where))
    try:
        text = body.decode(encoding)
    except UnicodeDecodeError as error:
        raise ShardError(_not_text(body, encoding, error, where)) from error
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if "\0" in text:
        raise ShardError(_nul_message(text.encode(), where))
    if "\ufeff" in text:  # where files with marks were joined
        text = re.sub("^\ufeff+", "", text, flags=re.MULTILINE)
    return text


def _nul_message(data: bytes, where: str) -> str:
    line = len(LINE_BREAK.findall(data[: data.index(b"\0")])) + 1
    if data.count(b"\0") > len(data) // 4 and data[:100].count(b"\0") > len(data[:100]) // 4:
        byte_order = "BE" if data.startswith(b"\0") else "LE"
        return f"{where} is UTF-16 without a byte order mark: convert it with iconv -f UTF-16{byte_order} -t UTF-8"
    return f"{where} holds NUL bytes, first in line {line}: it is damaged, download it again"


def _not_text(data: bytes, encoding: str, error: UnicodeDecodeError, where: str) -> str:
    if encoding != "utf-8":
        before = data[: error.start].decode(encoding, "replace").replace("\r\n", "\n").replace("\r", "\n")
        line = before.count("\n") + 1
        return f"{where} starts with a byte order mark of {encoding.upper()[:6]} but is not, in line {line}: download it again"
    line = len(LINE_BREAK.findall(data[: error.start])) + 1
    if error.reason == "unexpected end of data":
        return f"{where} ends within a character, in line {line}: it was cut off, download it again"
    return (
        f"{where} is not UTF-8: line {line} holds the byte 0x{data[error.start]:02X}. Convert it, "
        "for example: iconv -f LATIN1 -t UTF-8 (or CP1252, in place of LATIN1, for tables of Windows programs)"
    )
