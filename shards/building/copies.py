"""Images of different patients whose source files are the same, byte for byte: links, copies, or one patient with two ids."""

from collections.abc import Iterable

import pandas as pd

from cxrfast.shards.format.manifest import ShardManifest, source_hashes

SHOWN = 3
"""Groups of equal images that the sentence names."""


def hashes_by_row(manifests: Iterable[ShardManifest]) -> dict[int, bytes]:
    """{row held: hash of its source image}; without rows of manifests that hold no hashes."""
    found: dict[int, bytes] = {}
    for m in manifests:
        found |= source_hashes(m)
    return found


def copies_in_words(hashes: dict[int, bytes], rows: pd.DataFrame) -> list[str]:
    """A sentence if different patients have the same image, else []; it names images by row.

    `hashes`: from `hashes_by_row`; `rows`: the table of the set, in the order of its rows.
    """
    held = pd.DataFrame({"row": list(hashes), "hash": list(hashes.values())}).sort_values("row")
    held = held[held["hash"].duplicated(keep=False)]
    held["patient"] = rows["patient_id"].to_numpy(object)[held["row"].to_numpy(int)]
    shared = held[held.groupby("hash")["patient"].transform("nunique") > 1]
    if shared.empty:
        return []
    groups = [group.drop_duplicates("patient")["row"].tolist() for _, group in shared.groupby("hash", sort=False)]
    shown = "; ".join(" and ".join(f"row {row}" for row in group[:SHOWN]) for group in groups[:SHOWN])
    more = "; and others" if len(groups) > SHOWN else ""
    return [
        f"the same image under different patients: {len(shared):,} images have source files that are equal byte for byte, such "
        f"as {shown}{more}; if these are one patient, a model is tested on images that it was trained on"
    ]
