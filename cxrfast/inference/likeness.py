"""Is a film like those that the networks were trained on? In: its pixels and size. Out: reasons why not, with numbers.

A flag does not mean that the answer is wrong, nor its absence that it is right: it says that a film lies outside what the
training set's validation films look like, of which about 1 % are flagged.
"""

import cv2
import numpy as np
import simplejpeg

from cxrfast.runs.reference import Reference, features, sampled
from cxrfast.shards.images.jpeg import read_frame
from cxrfast.shards.images.png import PALETTE, RGB, RGB_ALPHA, SIGNATURE

ASPECT_MARGIN = 1.05
"""Factor by which an aspect ratio may leave the usual range."""

SATURATED = 24
"""Grey levels between a pixel's lowest and highest channel from which on it is coloured; JPEG's own errors stay below."""

COLOURED = 0.02
"""Fraction of coloured pixels that is flagged; a coloured label on a radiograph has less."""

PNG_COLOUR = 25
"""Place in a PNG of the byte that says which channels it has."""


def reasons(reference: Reference, image: np.ndarray, height: int, width: int, largest: int) -> list[str]:
    """Why a film is unlike the training set; [] if it is like it.

    image: uint8 (s, s), the film at the reference's scale. height, width: of the film as it was given, px. largest: the
    networks' largest scale, px.
    """
    found = []
    levels, layout = features(sampled(image)[None])
    if (distance := float(reference.grey.distance(levels)[0])) > reference.grey.limit:
        found.append(
            f"grey levels: distance {distance:.1f}, 99.7 % of the validation films are below {reference.grey.limit:.1f} "
            f"(median grey {levels[0, 3]:.0f}, theirs {reference.grey.mean[3]:.0f})"
        )
    if (nearer := float(reference.turned(layout)[0])) > reference.upright:
        found.append(
            f"upside down: turned, it is nearer to the usual layout by {nearer:.1f}, usual is {reference.upright:.1f} at most"
        )
    elif (distance := float(reference.layout.distance(layout)[0])) > reference.layout.limit:
        found.append(
            f"layout of bright and dark: distance {distance:.1f}, 99.7 % of the validation films are below "
            f"{reference.layout.limit:.1f}"
        )
    low, high = reference.aspect
    if not low / ASPECT_MARGIN <= width / height <= high * ASPECT_MARGIN:
        usual = f"{low:.2f}" if round(low, 2) == round(high, 2) else f"{low:.2f} to {high:.2f}"
        found.append(f"width / height {width / height:.2f}, in the training set {usual}")
    if min(height, width) < min(largest, reference.shorter):
        found.append(f"{width} × {height} px is below the largest scale, {largest} px")
    return found


def colour_reason(data: bytes) -> list[str]:
    """[a reason] if an image file, already decoded without an error, has colour in more than 2 % of its pixels."""
    pixels = _in_colour(data)
    if pixels is None:
        return []
    one, two, three = cv2.split(pixels)
    chroma = cv2.subtract(cv2.max(cv2.max(one, two), three), cv2.min(cv2.min(one, two), three))
    share = np.count_nonzero(np.asarray(chroma) >= SATURATED) / np.size(chroma)
    return [f"colour in {share:.0%} of its pixels"] if share > COLOURED else []


def _in_colour(data: bytes) -> np.ndarray | None:
    """uint8 (h, w, 3), reduced; None for a file without colour channels."""
    if data.startswith(b"\xff\xd8"):
        frame = read_frame(data)
        if frame is None or frame.components != 3:
            return None
        try:
            return simplejpeg.decode_jpeg(data, "RGB", min_height=64, min_width=64, min_factor=8, strict=False)
        except ValueError:
            return None
    if data.startswith(SIGNATURE) and data[PNG_COLOUR] in (RGB, RGB_ALPHA, PALETTE):
        return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_REDUCED_COLOR_8)
    return None
