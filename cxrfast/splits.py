"""Training, validation and test parts. Patients, not images, are assigned to parts; pure numpy."""

import hashlib
from collections.abc import Sequence

import numpy as np

from cxrfast.errors import RunError

FOLDS, BLOCKS = 5, 10
LARGE = 5000
"""Above this many patients, each is assigned by its own hash, so that added or missing patients do not move others."""

PARTS = ("train", "val", "test")


def deal(patients: Sequence[str], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Fold (0–4) and block (0–9) of every entry of `patients`, int8 each: equal patients, equal parts.

    Up to 5,000 patients are assigned in the order of their hashes: folds, and blocks within a fold, differ by at most
    one patient.
    """
    unique, inverse = np.unique(np.asarray(patients, dtype=str), return_inverse=True)
    digests = [hashlib.blake2b(f"{seed}/{p}".encode(), digest_size=8).digest() for p in unique.tolist()]
    hashes = np.array([int.from_bytes(d, "big") for d in digests], np.uint64)
    if len(unique) > LARGE:
        cell = hashes % np.uint64(FOLDS * BLOCKS)
        fold, block = cell // np.uint64(BLOCKS), cell % np.uint64(BLOCKS)
    else:
        fold = np.empty(len(unique), np.int64)
        fold[np.argsort(hashes, kind="stable")] = np.arange(len(unique)) % FOLDS
        by_fold = np.lexsort((hashes, fold))
        block = np.empty(len(unique), np.int64)
        # starting at 2, ten patients are enough for every fold to have a validation block in other folds
        block[by_fold] = (np.arange(len(unique)) + 2) % BLOCKS
    return fold.astype(np.int8)[inverse], block.astype(np.int8)[inverse]


def part_masks(fold: np.ndarray, block: np.ndarray, k: int) -> dict[str, np.ndarray]:
    """Boolean masks of train, val and test for fold `k`: test = fold k, val = block 2k of the other folds."""
    if not 0 <= k < FOLDS:
        raise RunError(f"fold {k} does not exist: folds are 0 to {FOLDS - 1}")
    test = fold == k
    val = ~test & (block == 2 * k)
    return {"train": ~test & ~val, "val": val, "test": test}


def official_masks(split: np.ndarray) -> dict[str, np.ndarray]:
    """Boolean masks from the data set's own split column (train, validate, test)."""
    return {"train": split == "train", "val": split == "validate", "test": split == "test"}


def check_parts(masks: dict[str, np.ndarray], what: str) -> None:
    """Raises RunError naming the first empty part."""
    for part in PARTS:
        if not masks[part].any():
            raise RunError(f"{what}: the {part} part has no rows; the set is too small or holds too few patients")
