"""Assign images to rows and rows to shards. Pure: tables in, tables out."""

import hashlib
import json
from dataclasses import asdict

import numpy as np
import pandas as pd

from cxrfast.errors import ShardError
from cxrfast.shards.format.recipe import ImageRecipe
from cxrfast.shards.format.rows import COLUMNS, kept_names, reference_names
from cxrfast.shuffle import permutation
from cxrfast.splits import deal

SMALLEST, LARGEST = 8, 4096
"""Range of scales, px."""


def check_scales(scales: list[int]) -> list[int]:
    """The scales, sorted and unique. Raises ShardError for one out of range."""
    for scale in scales:
        if not SMALLEST <= scale <= LARGEST:
            raise ShardError(
                f"--scale {scale} is not between {SMALLEST} and {LARGEST} px (usual: 256, 512, 1024, 2048)"
            )
    if not scales:
        raise ShardError("no scale given: add --scale 256 (or 512, 1024, 2048); repeat --scale for more scales")
    return sorted(set(scales))


ROW_ORDER = 2**63
"""Second part of the key of the set's own permutation, which no epoch uses."""


def assign_rows(images: pd.DataFrame, labels: tuple[str, ...], seed: int) -> pd.DataFrame:
    """A source's images → the rows table, `bytes` still 0: permuted once, patients assigned to folds and blocks.

    Folds that the source gives, in a column `fold`, are kept.
    The order of the source's own tables does not matter: images are sorted by id before they are permuted.
    """
    rows = images.sort_values("image_id", ignore_index=True)
    rows = rows.iloc[permutation(len(rows), seed, ROW_ORDER)].reset_index(drop=True)
    rows["row"] = np.arange(len(rows))
    rows["bytes"] = 0
    for side in ("height", "width"):
        rows[side] = rows[side].fillna(0).astype(np.int32)
    own = rows["fold"].to_numpy() if "fold" in rows else None
    rows["fold"], rows["block"] = deal(rows["patient_id"].tolist(), seed, own)
    return rows[[*COLUMNS, *labels, *reference_names(rows), *kept_names(rows)]]


def rows_per_shard(n: int) -> int:
    """1,024 in large sets; fewer in small ones, so that every core has shards to build and a kill costs little."""
    return min(1024, max(64, -(-n // 64)))


def set_id(rows: pd.DataFrame, recipe: ImageRecipe, own_folds: bool = False) -> str:
    """Hash of row, image, patient and recipe: equal ids mean equal pixels in equal rows, the same patients and folds.

    The DCT counts only where it is accurate: earlier sets had no such choice, and keep their ids. The recipe's seed decides
    the folds; if the source gave them (`own_folds`), they are hashed themselves.
    """
    parts = {name: value for name, value in asdict(recipe).items() if name != "dct" or value == "accurate"}
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode())
    for row, image, patient in zip(rows["row"], rows["image_id"], rows["patient_id"], strict=True):
        digest.update(f"\n{row}\t{image}\t{patient}".encode())
    if own_folds:
        digest.update(b"\nfolds\t" + rows["fold"].to_numpy(np.uint8).tobytes())
    return digest.hexdigest()[:32]
