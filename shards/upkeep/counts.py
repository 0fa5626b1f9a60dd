"""Counts of a shard set: splits, labels, exclusions, image sizes, bytes.

In: set.json, rows.parquet, quarantine.csv and the manifests of a set, finished or not. Out: frames. Opens no tar and writes
nothing.
"""

import csv
import io
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from cxrfast.errors import ShardError
from cxrfast.files import read_file
from cxrfast.labels import targets
from cxrfast.shards.building.cautions import cautions, copies_in_words, hashes_by_row
from cxrfast.shards.format.info import SetInfo
from cxrfast.shards.format.manifest import ShardManifest, read_manifests
from cxrfast.shards.format.rows import REFERENCE, kept_names, label_names, reference_names
from cxrfast.shards.shard_set import ShardSet
from cxrfast.shards.source_file import MISSING
from cxrfast.splits import FOLDS, PARTS, part_masks
from cxrfast.text import find_fault, name_fault

COUNTED = ("images", "studies", "patients")
"""Columns of most tables."""

STATES = {"positive": 1.0, "negative": 0.0, "uncertain": -1.0}


@dataclass(frozen=True, kw_only=True)
class SetCounts:
    """Counts of a set, as frames. Unless stated otherwise, a frame counts all images that the set lists."""

    info: SetInfo
    splits: pd.DataFrame
    """Official split (`none` if an image has none), images, studies, patients."""
    folds: pd.DataFrame
    """fold, part (train, val, test), images, studies, patients."""
    labels: pd.DataFrame
    """label, fold (-1: all; k: the test part of fold k), and its images: positive, negative, uncertain, blank."""
    references: pd.DataFrame
    """label, studies labelled by a radiologist, and how many are positive, negative, uncertain; empty if there are none."""
    flow: pd.DataFrame
    """step, images, studies, patients: from the images listed to those used in training; see `exclusions`."""
    reasons: pd.DataFrame
    """reason, images: why images in the tree cannot be used."""
    parts: pd.DataFrame
    """part, images, studies, patients that fold 0 uses."""
    sizes: pd.DataFrame
    """height, width (px), images; most frequent first, without images of unknown size."""
    decoded: int
    """Images in `sizes` with the size of the decoded image; the others have the size in the source's tables."""
    differing: int
    """Decoded images with another size in the tables."""
    unknown: int
    """Images of unknown size."""
    scales: pd.DataFrame
    """scale (px), shards, rows, bytes (of the tars), files, kB_per_image."""
    views: pd.DataFrame
    """view (`unknown` if an image has none), images, studies, patients; most frequent first."""
    cautions: list[str]
    """What to know about the rows before training on them."""
    remarks: pd.DataFrame
    """row, remark: what is noteworthy about images that are held; a row may have several remarks."""
    kept: pd.DataFrame
    """The columns that were carried along, and those that they are tabulated by; `kept_counts` counts them."""
    state: str
    """`complete`, or what is missing so that the counts are not final."""


def count_set(folder: Path) -> SetCounts:
    """Count what is in the set. Raises ShardError if set.json, rows.parquet or a manifest is missing or damaged."""
    folder = Path(folder)
    shards = ShardSet(folder)
    info, rows = shards.info, shards.rows()
    if len(rows) != info.images or list(label_names(rows)) != info.labels:
        raise ShardError(
            f"{folder / 'rows.parquet'} does not belong to the set.json next to it: `cxrfast verify {folder}`"
        )
    built = read_built(folder, info, rows)
    count = counter(rows)
    raw = rows[info.labels].to_numpy(np.float32)
    sizes = image_sizes(rows, built)
    listed = np.ones(len(rows), bool)
    return SetCounts(
        info=info,
        splits=_by_value(rows["split"].fillna("none"), "split", count, order=("train", "validate", "test")),
        folds=_folds(rows, listed, count),
        labels=label_counts(info.labels, raw, rows["fold"].to_numpy()),
        references=reference_counts(rows),
        **exclusions(rows, raw, built, count),
        **sizes,
        scales=_scales(info, built.manifests),
        views=_by_value(rows["view"].fillna("unknown"), "view", count),
        cautions=[*cautions(info, rows), *copies_in_words(hashes_by_row(built.manifests), rows)],
        remarks=pd.DataFrame(
            [(row, remark) for row, on_row in sorted(built.remarks.items()) for remark in on_row],
            columns=["row", "remark"],
        ),
        kept=rows[["patient_id", "split", "fold", *kept_names(rows)]],
        state=_state(info, built),
    )


# What is built


@dataclass(frozen=True, kw_only=True)
class Built:
    """Rows in the shards built so far."""

    manifests: list[ShardManifest]
    tried: np.ndarray
    """bool (N,): rows whose shard is built at any scale."""
    quarantined: dict[int, str]
    """{row: why it could not be used}."""
    remarks: dict[int, list[str]]
    """{row held: what is noteworthy about its image}."""
    sizes: np.ndarray
    """int32 (N, 2): height and width of the decoded image, px; 0 if unknown."""

    @property
    def held(self) -> np.ndarray:
        """bool (N,): rows that can be loaded."""
        held = self.tried.copy()
        held[list(self.quarantined)] = False
        return held


def read_built(folder: Path, info: SetInfo, rows: pd.DataFrame) -> Built:
    """Read the manifests, or quarantine.csv if there are none, as in a copy without its scales."""
    tried, sizes = np.zeros(info.images, bool), np.zeros((info.images, 2), np.int32)
    quarantined: dict[int, str] = {}
    remarks: dict[int, list[str]] = {}
    manifests = list(read_manifests(folder))
    for m in manifests:
        left_out = {int(row): reason for row, reason in m.quarantined.items()}
        mine = [*m.rows, *left_out]
        size = np.array(m.sizes, np.int32) if all(len(pair) == 2 for pair in m.sizes) else np.empty(0)
        if m.set != info.id or len(size) != len(m.rows) or not set(mine) <= set(info.rows_of(m.shard)):
            raise ShardError(
                f"shard {m.shard} at {m.scale} px in {folder} is not of this set: `cxrfast verify {folder}`"
            )
        tried[mine] = True
        quarantined |= left_out
        remarks |= {int(row): on_row for row, on_row in m.remarks.items()}
        sizes[m.rows] = size.reshape(-1, 2)
    if not manifests and (folder / "quarantine.csv").exists():
        quarantined = read_quarantine(folder / "quarantine.csv", info.images)
        tried[:] = True
    return Built(manifests=manifests, tried=tried, quarantined=quarantined, remarks=remarks, sizes=sizes)


def read_quarantine(path: Path, images: int) -> dict[int, str]:
    """{row: reason}. Raises ShardError if the file is damaged."""
    try:
        lines = list(csv.DictReader(io.StringIO(read_file(path).decode(), newline="")))
        reasons = {int(line["row"]): line["reason"] for line in lines}
        if fault := find_fault(reasons.values(), name_fault):
            raise ValueError(fault)
    except (KeyError, TypeError, ValueError, OSError, csv.Error) as error:
        raise ShardError(f"{path} is damaged: `cxrfast verify --repair {path.parent}` restores it") from error
    if not set(reasons) <= set(range(images)):
        raise ShardError(f"{path} lists rows that the set does not have: `cxrfast verify {path.parent}`")
    return reasons


def _state(info: SetInfo, built: Built) -> str:
    if not built.tried.any():
        return "planned, no shard is built yet"
    if not built.manifests:
        return "its manifests are not here: images that quarantine.csv does not list are counted as held"
    shards = Counter(m.scale for m in built.manifests)
    lacking = [
        f"{n:,} of {info.shards:,} shards at {scale} px" for scale, n in sorted(shards.items()) if n < info.shards
    ]
    return f"not complete: {', '.join(lacking)}" if lacking else "complete"


# Counts

CountMask = Callable[[np.ndarray], tuple[int, int, int]]


def counter(rows: pd.DataFrame) -> CountMask:
    """A function: mask (N,) → numbers of images, distinct studies and distinct patients."""
    codes = [pd.factorize(rows[name])[0] for name in ("study_id", "patient_id")]  # -1 for none

    def count(mask: np.ndarray) -> tuple[int, int, int]:
        studies, patients = (int(np.count_nonzero(np.bincount(c[mask] + 1)[1:])) for c in codes)
        return int(mask.sum()), studies, patients

    return count


def _frame(name: str, masks: dict[str, np.ndarray], count: CountMask) -> pd.DataFrame:
    """One line per mask: `name`, images, studies, patients."""
    return pd.DataFrame([(key, *count(mask)) for key, mask in masks.items()], columns=[name, *COUNTED])


def _by_value(column: pd.Series, name: str, count: CountMask, order: tuple[str, ...] = ()) -> pd.DataFrame:
    """One line per value: those in `order` first, then the most frequent."""
    found = column.value_counts()
    values = [*(v for v in order if v in found), *(v for v in found.index if v not in order)]
    return _frame(name, {value: (column == value).to_numpy(bool) for value in values}, count)


def _folds(rows: pd.DataFrame, among: np.ndarray, count: CountMask) -> pd.DataFrame:
    frames = []
    for fold in range(FOLDS):
        masks = part_masks(rows["fold"].to_numpy(), rows["block"].to_numpy(), fold)
        frames.append(_frame("part", {part: masks[part] & among for part in PARTS}, count).assign(fold=fold))
    return pd.concat(frames, ignore_index=True)[["fold", "part", *COUNTED]]


def label_counts(names: list[str], raw: np.ndarray, fold: np.ndarray) -> pd.DataFrame:
    """Images by label and raw value (N, L), in all (-1) and in each fold."""
    lines = []
    for k in (-1, *range(FOLDS)):
        mine = raw if k < 0 else raw[fold == k]
        by_state = {state: (mine == value).sum(axis=0) for state, value in STATES.items()}
        lines.append(pd.DataFrame({"label": names, "fold": k, **by_state, "blank": np.isnan(mine).sum(axis=0)}))
    return pd.concat(lines, ignore_index=True)


def reference_counts(rows: pd.DataFrame) -> pd.DataFrame:
    """Studies by reference label; all images of a study share its reading."""
    names = list(reference_names(rows))
    studies = rows.groupby("study_id")[names].first() if names else pd.DataFrame()
    columns = {state: [int((studies[name] == value).sum()) for name in names] for state, value in STATES.items()}
    read = [int(studies[name].notna().sum()) for name in names]
    return pd.DataFrame({"label": [name.removeprefix(REFERENCE) for name in names], "studies": read, **columns})


def exclusions(rows: pd.DataFrame, raw: np.ndarray, built: Built, count: CountMask) -> dict[str, Any]:
    """The frames `flow`, `reasons` and `parts`: images left after each exclusion.

    The last step is the default of `cxrfast train`: rows that the set holds and that have a label.
    """
    found = rows["bytes"].ne(MISSING).to_numpy()
    labelled = targets(raw)[1].any(axis=1)
    masks = {"listed by the tables": np.ones(len(rows), bool), "found in the tree": found}
    if not built.tried.all():
        masks["in shards built so far"] = found & built.tried
    masks["readable"] = found & built.held
    masks["with a label"] = masks["readable"] & labelled
    reasons = Counter(reason for row, reason in built.quarantined.items() if found[row])
    used = part_masks(rows["fold"].to_numpy(), rows["block"].to_numpy(), 0)
    return {
        "flow": _frame("step", masks, count),
        "reasons": pd.DataFrame(reasons.most_common(), columns=["reason", "images"]),
        "parts": _frame("part", {part: used[part] & masks["with a label"] for part in PARTS}, count),
    }


def image_sizes(rows: pd.DataFrame, built: Built) -> dict[str, Any]:
    """The frame `sizes`, and `decoded`, `differing` and `unknown`."""
    claimed = rows[["height", "width"]].to_numpy(np.int32)
    is_decoded, is_claimed = (a.min(axis=1) > 0 for a in (built.sizes, claimed))
    known = np.where(is_decoded[:, None], built.sizes, claimed)[is_decoded | is_claimed]
    pairs, images = np.unique(known, axis=0, return_counts=True)
    frame = pd.DataFrame({"height": pairs[:, 0], "width": pairs[:, 1], "images": images})
    return {
        "sizes": frame.sort_values("images", ascending=False, kind="stable", ignore_index=True),
        "decoded": int(is_decoded.sum()),
        "differing": int((is_decoded & is_claimed & (built.sizes != claimed).any(axis=1)).sum()),
        "unknown": len(rows) - len(known),
    }


def _scales(info: SetInfo, manifests: list[ShardManifest]) -> pd.DataFrame:
    lines = []
    for scale in sorted({m.scale for m in manifests}):
        mine = [m for m in manifests if m.scale == scale]
        rows, size = sum(len(m.rows) for m in mine), sum(m.bytes for m in mine)
        lines.append((scale, len(mine), rows, size, 3 * len(mine), size / 1000 / rows if rows else np.nan))
    return pd.DataFrame(lines, columns=["scale", "shards", "rows", "bytes", "files", "kB_per_image"])
