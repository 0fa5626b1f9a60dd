"""One source image on its way into a set, step by step: decode, scale, encode; and the pixels that a reader of the set gets.

A build takes the steps one at a time, since it compares and records in between; whoever predicts a new film takes them all
by `as_stored`. Both get the same pixels, bit for bit.
"""

from collections.abc import Iterable

import numpy as np

from cxrfast.shards.format.codec import decode_member, encode_member
from cxrfast.shards.format.recipe import ImageRecipe
from cxrfast.shards.images.decode import decode_with_remarks
from cxrfast.shards.images.remark import Remark
from cxrfast.shards.images.resize import at_scales


def decoded(data: bytes, recipe: ImageRecipe) -> tuple[np.ndarray, list[Remark]]:
    """The bytes of a JPEG, PNG or DICOM file → uint8 (H, W), and remarks. Raises as `images.decode.decode` does."""
    return decode_with_remarks(data, recipe.grey)


def scaled(image: np.ndarray, scales: Iterable[int], recipe: ImageRecipe) -> dict[int, np.ndarray]:
    """uint8 (H, W) → {scale: uint8 (scale, scale)}, before encoding."""
    return at_scales(image, sorted(scales), recipe.resize)


def encoded(picture: np.ndarray, recipe: ImageRecipe) -> bytes:
    """uint8 (scale, scale) → the bytes of an image in a tar."""
    return encode_member(picture, recipe.codec, recipe.quality, recipe.dct)


def as_stored(image: np.ndarray, scales: Iterable[int], recipe: ImageRecipe) -> dict[int, np.ndarray]:
    """uint8 (H, W) → {scale: uint8 (scale, scale)} as they are read from a set of this recipe: with the errors of its JPEG."""
    pictures = scaled(image, scales, recipe)
    if recipe.codec == "raw":
        return pictures
    return {scale: decode_member(encoded(picture, recipe), recipe.codec) for scale, picture in pictures.items()}
