"""Source images that cannot be read: how many a set may lack, and which failures leave an image out or stop its shard.

Left out: what was missing, not a file or unreadable when the set was planned, and a single file that cannot be read now
while the rest of the tree can. Stopped: a file that was there and has vanished or changed, unless the user allows images to
be missing; and more failures than a few bad files explain, since a file server that is gone must not cost rows.
"""

import posixpath
import time
from dataclasses import dataclass, field

import pandas as pd

from cxrfast.errors import ShardError
from cxrfast.shards.images.bad_image import BadImage, Reason
from cxrfast.shards.source_file import EXHAUSTED, MISSING, NOT_A_FILE, PAUSES, TRANSIENT, UNREADABLE, size_after
from cxrfast.shards.sources.image_files import is_image, where_instead
from cxrfast.shards.storage import Tree

# While a shard is built


FAILING = 0.01
"""Fraction of a shard's images that may fail to be read; at least one image may."""

PLANNED = {MISSING: Reason.MISSING, NOT_A_FILE: Reason.NOT_A_FILE, UNREADABLE: Reason.UNREADABLE}
"""Why an image without a size is left out."""


@dataclass(kw_only=True)
class ImageReader:
    """Reads the images of one shard, of `images` rows."""

    tree: Tree
    images: int
    allow_missing: bool
    failed: list[str] = field(default_factory=list)
    """What could not be read, and why."""

    def read(self, path: str, size: int) -> bytes:
        """The file, which had `size` bytes when the set was planned. Raises BadImage, or ShardError if the shard must stop."""
        if size < 0:
            raise BadImage(PLANNED[size])
        try:
            data = self._read(path)
        except OSError as error:
            raise self._failure(path, error) from error
        if len(data) != size:
            raise ShardError(f"{path} has {len(data):,} bytes, but had {size:,} when the set was planned")
        return data

    def _read(self, path: str) -> bytes:
        for pause in PAUSES:
            try:
                return self.tree.read(path)
            except OSError as error:
                if error.errno not in TRANSIENT:
                    raise
            time.sleep(pause)
        return self.tree.read(path)

    def _failure(self, path: str, error: OSError) -> BadImage | ShardError:
        """What to raise for a file that cannot be read."""
        state = size_after(error)
        why = (
            "has vanished since the set was planned"
            if state == MISSING
            else f"cannot be read ({error.strerror or error})"
        )
        if state != UNREADABLE and not self.allow_missing:
            return ShardError(f"{path} {why}: put it back, or leave it out with --allow-missing")
        if error.errno in EXHAUSTED:
            return ShardError(f"{path} {why}: use fewer --workers, or raise this machine's limits")
        self.failed.append(f"{path} {why}")
        is_lasting = self.allow_missing and state == UNREADABLE and error.errno not in TRANSIENT
        if len(self.failed) > max(1, FAILING * self.images) and not is_lasting:
            leave = "" if self.allow_missing or error.errno in TRANSIENT else ", or leave them out with --allow-missing"
            return ShardError(
                f"{len(self.failed)} images cannot be read, the last because {path} {why}: check the tree and its file server"
                + leave
            )
        if not self.tree.is_there():
            return ShardError(f"{path} {why}, and {self.tree} is empty or cannot be reached")
        return BadImage({MISSING: Reason.VANISHED, NOT_A_FILE: Reason.NOT_A_FILE}.get(state, Reason.UNREADABLE))


# When a set is planned


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
        folders = _missing_by_folder(rows).query("missing > 0")
        lines = [f"  {name}: {m:,} of {n:,}" for name, n, m in folders.head(20).itertuples()]
        lines += [text for text in (why, _elsewhere(tree, missing)) if text]
        what = "missing or unreadable" if unreadable else "missing"
        raise ShardError(
            "\n".join([f"{len(lacking):,} of {len(rows):,} images are {what} in {tree}:", *lines])
            + "\nfinish the download, or leave them out with --allow-missing"
        )


def images_found(tree: Tree, rows: pd.DataFrame) -> dict[str, int]:
    """How many listed images the tree has, and how many files that look like images no line lists, for a report.

    The latter are counted in folders with listed images, unless these are too many to list.
    """
    found = {"listed images found in the tree": int(rows["bytes"].ge(0).sum())}
    paths = set(rows["path"])
    folders = {posixpath.dirname(path) for path in paths}
    if tree.is_local and len(folders) <= MOST_FOLDERS:
        there = (posixpath.join(folder, name) for folder in folders for name in tree.files(folder) if is_image(name))
        found["image files in the same folders that no line lists"] = sum(path not in paths for path in there)
    return found


MOST_FOLDERS = 1000
"""Folders that are listed to count images that the table does not name."""


def _elsewhere(tree: Tree, missing: list[str]) -> str:
    """Where the missing images seem to be; "" if that cannot be told."""
    try:
        return where_instead(tree, missing) if missing else ""
    except ShardError:  # a folder that may not be listed
        return ""


def _missing_by_folder(rows: pd.DataFrame) -> pd.DataFrame:
    """Images listed and missing (`bytes` -1), one line per pair of top folders of the paths."""
    folder = rows["path"].str.split("/").str[:2].str.join("/")
    return pd.DataFrame({"listed": 1, "missing": rows["bytes"].lt(0)}).groupby(folder).sum()
