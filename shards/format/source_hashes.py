"""Hashes of the source images that a shard's rows were made from: the first 16 bytes of each file's sha256.

A scale that is added later must come from the same files. A manifest holds them as 22 bytes of text per row.
"""

import base64
from hashlib import sha256

SIZE = 16
"""Bytes of a hash. By chance, two files of a set of a million agree once in 10^26."""


def source_hash(data: bytes) -> bytes:
    """Hash of a source file's content."""
    return sha256(data).digest()[:SIZE]


def pack(hashes: list[bytes]) -> str:
    """Hashes as one base64 text."""
    return base64.b64encode(b"".join(hashes)).decode()


def unpack(text: str, rows: int) -> list[bytes]:
    """The hashes in a text that `pack` made for `rows` rows. Raises ValueError for any other text."""
    data = base64.b64decode(text, validate=True)
    if len(data) != rows * SIZE:
        raise ValueError("hashes of another number of rows")
    return [data[at : at + SIZE] for at in range(0, len(data), SIZE)]
