"""Training, validation and test parts. Patients, not images, are assigned to parts; pure numpy."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from cxrfast.errors import RunError

FOLDS, BLOCKS = 5, 10
LARGE = 5000
"""Above this many patients, each is assigned by its own hash, so that added or missing patients do not move others."""

PARTS = ("train", "val", "test")

SHOWN = 3
"""Patients that a message about shared patients names."""


def check_fold(split: str, fold: int) -> None:
    """Raises RunError if the split, folds or official, has no such fold."""
    if split == "official" and fold:
        raise RunError(f"--fold {fold} with --split official: there is only one official split, give --fold 0")
    if not 0 <= fold < FOLDS:
        raise RunError(f"--fold {fold} does not exist: folds are 0 to {FOLDS - 1}")


def deal(patients: Sequence[str], seed: int, folds: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Fold (0–4) and block (0–9) of every entry of `patients`, int8 each: equal patients, equal parts.

    Up to 5,000 patients are assigned in the order of their hashes: folds, and blocks within a fold, differ by at most
    one patient. `folds` (N,): folds to keep; only blocks are dealt then, and a patient in two folds has a block in each.
    """
    names = np.asarray(patients, dtype=str)
    dealt = names if folds is None else np.char.add(np.char.add(folds.astype(str), "/"), names)
    _, first, inverse = np.unique(dealt, return_index=True, return_inverse=True)
    digests = [hashlib.blake2b(f"{seed}/{p}".encode(), digest_size=8).digest() for p in names[first].tolist()]
    hashes = np.array([int.from_bytes(d, "big") for d in digests], np.uint64)
    if len(first) > LARGE:
        cell = hashes % np.uint64(FOLDS * BLOCKS)
        fold, block = cell // np.uint64(BLOCKS), cell % np.uint64(BLOCKS)
    else:
        fold = np.empty(len(first), np.int64)
        fold[np.argsort(hashes, kind="stable")] = np.arange(len(first)) % FOLDS
    if folds is not None:
        fold = folds[first]
    if len(first) <= LARGE:
        by_fold = np.lexsort((hashes, fold))
        block = np.empty(len(first), np.int64)
        # starting at 2, ten patients are enough for every fold to have a validation block in other folds
        block[by_fold] = (np.arange(len(first)) + 2) % BLOCKS
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


@dataclass(frozen=True, kw_only=True)
class SharedPatients:
    """Patients in two or more parts of a split, so that a model is tested on patients it was trained on."""

    patients: int
    images: int
    """Images of these patients that are in a part."""
    examples: tuple[dict[str, int], ...]
    """For each of the first patients: position of an image by part."""

    def in_words(self, name: Callable[[int], str]) -> str:
        """`2 patients with 5 images are in more than one part, such as row 3 in train and row 8 in test; …`.

        `name` names the image at a position.
        """
        several = self.patients > 1
        shown = "; ".join(" and ".join(f"{name(at)} in {part}" for part, at in one.items()) for one in self.examples)
        more = "; and others" if self.patients > len(self.examples) else ""
        return (
            f"{self.patients:,} patient{'s' if several else ''} with {self.images:,} images "
            f"{'are' if several else 'is'} in more than one part, such as {shown}{more}"
        )


def shared_patients(patients: Sequence[str], parts: Sequence[object]) -> SharedPatients | None:
    """The patients in two or more parts; None if there are none. An image whose part is null or "" is in no part."""
    text = ["" if part is None or part != part else str(part) for part in parts]
    patient, part = _numbered(patients), _numbered(text)
    is_in_part = np.array([bool(name) for name in text], bool)
    found = np.zeros((patient.max(initial=-1) + 1, part.max(initial=-1) + 1), bool)
    found[patient[is_in_part], part[is_in_part]] = True
    shared = found.sum(axis=1) > 1
    if not shared.any():
        return None
    images = np.flatnonzero(shared[patient] & is_in_part)
    first = list(dict.fromkeys(patient[images].tolist()))[:SHOWN]
    examples = []
    for one in first:
        by_part = {text[at]: at for at in reversed(images[patient[images] == one].tolist())}
        examples.append(dict(sorted(by_part.items(), key=lambda item: item[1])))
    return SharedPatients(patients=int(shared.sum()), images=len(images), examples=tuple(examples))


def _numbered(values: Sequence[str]) -> np.ndarray:
    """Number of each value, int64, counted from 0 in the order of their first places. Faster than sorting text."""
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(value, len(numbers)) for value in values], np.int64)


def check_official(masks: dict[str, np.ndarray]) -> None:
    """Raises RunError if the data set's own split lacks a part."""
    lacking = [part for part in PARTS if not masks[part].any()]
    if lacking == list(PARTS):
        raise RunError("--split official: the set has no split of its own; use --split folds")
    if lacking:
        raise RunError(
            f"--split official: the set's own split has no {' and no '.join(lacking)} rows, and a training needs all of "
            f"{', '.join(PARTS)}: use --split folds, or build a set whose split has them"
        )


def check_parts(masks: dict[str, np.ndarray], what: str) -> None:
    """Raises RunError naming the first empty part."""
    for part in PARTS:
        if not masks[part].any():
            raise RunError(f"{what}: the {part} part has no rows; the set is too small or holds too few patients")
