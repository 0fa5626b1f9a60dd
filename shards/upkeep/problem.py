"""A problem with a file of a set or of its source tree."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    path: str
    """Relative to the set, or to the source tree."""
    what: str
    is_signed: bool = False
    """True if the file has its hash in SHA256SUMS: it was built this way, and nothing in the set says what was right."""


def hashing_speed(n: int, seconds: float) -> str:
    """`1,234 MB hashed at 567 MB/s`, from bytes and seconds."""
    return f"{n / 1e6:,.0f} MB hashed at {n / 1e6 / max(seconds, 1e-9):,.0f} MB/s"
