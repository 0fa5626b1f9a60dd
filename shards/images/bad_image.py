"""Why an image is refused, and the largest one that is accepted. The decoders share it."""

from enum import StrEnum

from cxrfast.errors import ShardError

MAX_PIXELS = 2**26
"""More than any radiograph has (a 14 × 17 inch film scanned at 50 µm has 61 million); a header that claims more is a bomb."""
MAX_SIDE = 2**16 - 1
"""px; the largest side that JPEG and DICOM headers can hold."""


class Reason(StrEnum):
    """Why an image is quarantined."""

    MISSING = "missing"
    VANISHED = "vanished"
    NOT_A_FILE = "not a file"
    UNREADABLE = "unreadable"
    EMPTY = "empty"
    NOT_AN_IMAGE = "not an image"
    UNSUPPORTED = "unsupported format"
    NOT_A_RADIOGRAPH = "not a radiograph"
    MULTI_FRAME = "more than one frame"
    TRUNCATED = "truncated"
    CORRUPT = "corrupt"
    TOO_LARGE = "too large"
    CRASHED = "crashes the decoder"


class BadImage(ShardError):
    """An image that cannot be used; `reason` is the category, the message may add details."""

    def __init__(self, reason: Reason, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else str(reason))
        self.reason = reason


def check_size(height: int, width: int) -> None:
    """Raise BadImage for a size that no radiograph has. Call it with the header's size before allocating anything."""
    if height < 1 or width < 1:
        raise BadImage(Reason.CORRUPT, f"{height} × {width} px")
    if max(height, width) > MAX_SIDE or height * width > MAX_PIXELS:
        raise BadImage(Reason.TOO_LARGE, f"{height:,} × {width:,} px")
