"""Decide whether a tree that lacks images is complete enough to plan a set."""

import pandas as pd

from cxrfast.errors import ShardError
from cxrfast.shards.building.layout import missing_by_folder
from cxrfast.shards.source_file import MISSING
from cxrfast.shards.sources.image_files import where_instead
from cxrfast.shards.storage import Tree

MISSING_ALLOWED = 0.001
"""Fraction of the images that may be missing or unreadable; with more, the download is taken to be incomplete."""


def check_missing(tree: Tree, rows: pd.DataFrame, allow_missing: bool) -> None:
    """Raises ShardError if no image can be read, or, unless `allow_missing`, if too many cannot."""
    lacking = rows[rows["bytes"] < 0]
    missing = lacking.loc[lacking["bytes"] == MISSING, "path"].tolist()
    unreadable = lacking.loc[lacking["bytes"] != MISSING, "path"].tolist()
    if len(lacking) == len(rows) and not unreadable:
        advice = _elsewhere(tree, missing) or "give --data the folder that holds the tables and the images"
        raise ShardError(
            f"none of the {len(rows):,} images that the tables list is in {tree} (first: {missing[0]}): {advice}"
        )
    why = (
        f"{len(unreadable):,} of them cannot be read (first: {unreadable[0]}: {tree.why_not(unreadable[0])})"
        if unreadable
        else ""
    )
    if len(lacking) == len(rows):
        raise ShardError(f"none of the {len(rows):,} images that the tables list can be read in {tree}: {why}")
    if len(lacking) > MISSING_ALLOWED * len(rows) and not allow_missing:
        folders = missing_by_folder(rows).query("missing > 0")
        lines = [f"  {name}: {m:,} of {n:,}" for name, n, m in folders.head(20).itertuples()]
        lines += [text for text in (why, _elsewhere(tree, missing)) if text]
        what = "missing or unreadable" if unreadable else "missing"
        raise ShardError(
            "\n".join([f"{len(lacking):,} of {len(rows):,} images are {what} in {tree}:", *lines])
            + "\nfinish the download, or leave them out with --allow-missing"
        )


def _elsewhere(tree: Tree, missing: list[str]) -> str:
    """Where the missing images seem to be; "" if that cannot be told."""
    try:
        return where_instead(tree, missing) if missing else ""
    except ShardError:  # a folder that may not be listed
        return ""
