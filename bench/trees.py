"""Source trees to measure sharding on: radiographs of a tree come in, copies with a table of their own go out.

The given tree is only read; what is made lies in the folder that the caller names, and is the caller's to remove.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from cxrfast.errors import ShardError
from cxrfast.labels import MIMIC
from cxrfast.shards.images import BadImage, decode_grey, encode
from cxrfast.shards.plan import PLANNING, permutation
from cxrfast.shards.recipe import Recipe
from cxrfast.shards.sources import read_source
from cxrfast.shards.tree import Tree

SOURCE: dict[str, Any] = {"source": "table", "source_options": {"table": "images.csv", "label": list(MIMIC)}}
"""How `build` reads the trees that are made here."""

FULL_SIZE = 16
"""In a mixed tree, one row in so many is a radiograph of full size."""


def sample(tree: Tree, folder: Path, images: int) -> list[Path]:
    """Copy `images` sound JPEGs, picked evenly from a MIMIC-CXR-JPG tree, into `folder`; all it has if they are fewer.

    Raises ShardError where there is none.
    """
    paths = read_source("mimic", tree).images["path"]
    found: list[Path] = []
    for index in permutation(len(paths), 0):
        try:
            data = tree.read(paths[index])
            decode_grey(data)
        except (BadImage, OSError):
            continue
        found.append(folder / f"{len(found):06d}.jpg")
        found[-1].write_bytes(data)
        if len(found) == images:
            break
    if not found:
        raise ShardError(f"none of the {len(paths):,} images that {tree} lists is a sound JPEG: give another --data")
    return found


def crowd(images: list[Path], folder: Path, rows: int, mixed: bool = False) -> Path:
    """A tree of `rows` files, each a hard link to one of `images`, with its table. Returns its folder.

    `mixed`: only one row in `FULL_SIZE`, spread evenly over the shards, is one of `images`; the others are 16 px square.
    """
    folder.mkdir()
    small = folder.with_suffix(".jpg")
    small.write_bytes(encode(np.full((16, 16), 128, np.uint8), 95))
    names = [f"{n:06d}" for n in range(rows)]
    # row r of the plan is the image at permutation[r] of those sorted by name
    order = permutation(rows, Recipe().seed, PLANNING) if mixed else range(rows)
    for row, index in enumerate(order):
        full = not mixed or row % FULL_SIZE == 0
        os.link(
            images[row // (FULL_SIZE if mixed else 1) % len(images)] if full else small, folder / f"{names[index]}.jpg"
        )
    table = pd.DataFrame({"path": [f"{name}.jpg" for name in names], "patient_id": names, **dict.fromkeys(MIMIC, "")})
    table.to_csv(folder / "images.csv", index=False)
    return folder
