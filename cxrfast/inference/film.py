"""One film on its way to the networks: its bytes in, pixels at every scale out, and what is noteworthy about it.

The steps are those of a build (`shards.format.film`), so the pixels are those that a set of the same recipe would hold.
"""

import errno
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cxrfast.files import NOT_REGULAR, read_file
from cxrfast.inference.likeness import colour_reason, reasons
from cxrfast.runs.reference import Reference
from cxrfast.shards.format.film import as_stored, decoded
from cxrfast.shards.format.recipe import ImageRecipe
from cxrfast.shards.images.bad_image import BadImage, Reason, check_size
from cxrfast.shards.images.decode import with_preamble
from cxrfast.shards.images.remark import remarks_on

LARGEST_FILM = 2**29
"""Bytes of a film; the pixels of the largest are a quarter of it."""

NO_GREY = (
    "DICOM, and the training set was made from 8-bit images (its --grey is none): convert the file to a JPEG or PNG as its "
    "images were converted, or train on a set built with --grey mimic or --grey window"
)


@dataclass(frozen=True, kw_only=True)
class Film:
    """A film, ready for the networks."""

    images: dict[int, np.ndarray]
    """By scale: uint8 (scale, scale)."""
    height: int
    """Size of the film as it was given, px."""
    width: int
    remarks: tuple[str, ...] = ()
    """What was noteworthy when it was decoded, such as an invalid window; see `shards.images.remark`."""
    unlike: tuple[str, ...] | None = None
    """Reasons why it is unlike the training set, with numbers; () if it is like it, None if that was not assessed."""


def read_film(path: Path) -> bytes:
    """The bytes of a film. Raises BadImage if it cannot be read: missing, a folder, a pipe, unreadable."""
    try:
        return read_file(path, LARGEST_FILM)
    except OSError as error:
        raise BadImage(*_why_not(error)) from error


def _why_not(error: OSError) -> tuple[Reason, str]:
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return Reason.MISSING, ""
    if error.errno == errno.EISDIR:
        return Reason.NOT_A_FILE, "a folder"
    if error.strerror == NOT_REGULAR or error.errno in (errno.ENXIO, errno.ENODEV):
        return Reason.NOT_A_FILE, "a pipe, a socket or a device"
    if error.errno == errno.EFBIG:
        return Reason.TOO_LARGE, f"more than {LARGEST_FILM:,} bytes"
    return Reason.UNREADABLE, error.strerror or str(error)


def prepared(
    film: Path | str | bytes | np.ndarray,
    scales: Sequence[int],
    recipe: ImageRecipe,
    reference: Reference | None = None,
) -> Film:
    """A film from its path, its bytes or its decoded pixels, uint8 (H, W).

    scales: px, ascending; `reference`: of the lowest of them, to tell whether the film is like the training set.

    Raises BadImage if it cannot be used, ShardError where a library for it is missing.
    """
    if isinstance(film, np.ndarray):
        image, colour = _checked(film), []
        remarks = remarks_on(image)
    else:
        data = film if isinstance(film, bytes) else read_film(Path(film))
        if recipe.grey == "none" and with_preamble(data):
            raise BadImage(Reason.UNSUPPORTED, NO_GREY)
        image, remarks = decoded(data, recipe)
        colour = colour_reason(data) if reference else []
    height, width = image.shape
    images = as_stored(image, scales, recipe)
    unlike = None
    if reference:
        unlike = (*reasons(reference, images[scales[0]], height, width, scales[-1]), *colour)
    return Film(
        images=images, height=height, width=width, remarks=tuple(remark.value for remark in remarks), unlike=unlike
    )


def _checked(image: np.ndarray) -> np.ndarray:
    """Pixels that were decoded elsewhere. Raises BadImage unless they are uint8 (H, W) of a sensible size."""
    if image.dtype != np.uint8 or image.ndim != 2:
        shape = " × ".join(map(str, image.shape))
        raise BadImage(Reason.UNSUPPORTED, f"an array of {image.dtype}, {shape}: give uint8 grey pixels, (H, W)")
    check_size(*image.shape)
    return np.ascontiguousarray(image)
