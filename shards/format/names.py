"""Names of the files of a shard set, permanent and temporary."""

import os
import re
from pathlib import Path

SCALE = re.compile(r"[1-9][0-9]{0,4}")
SHARD_FILE = re.compile(r"[0-9]{6,9}\.(tar|idx|json)")
NAMES = re.compile(rf"(set\.json|rows\.parquet|quarantine\.csv|{SCALE.pattern}/{SHARD_FILE.pattern})")
"""Files of a set other than SHA256SUMS, relative to it."""


def shard_name(scale: int, shard: int, suffix: str) -> str:
    """A shard's file, relative to the set."""
    return f"{scale}/{shard:06d}.{suffix}"


def shard_files(scale: int, shard: int) -> list[str]:
    """A shard's tar, index and manifest, relative to the set, in the order they are written: a manifest means a whole shard."""
    return [shard_name(scale, shard, suffix) for suffix in ("tar", "idx", "json")]


def shard_path(folder: Path, scale: int, shard: int, suffix: str) -> Path:
    return Path(folder) / shard_name(scale, shard, suffix)


SET_FILES = ("rows.parquet", "quarantine.csv", "set.json")
"""Files of the set itself, in the order they are copied: set.json means that the others are there."""


LOCK_FILE = re.compile(r"lease(-\d+-of-\d+)?\.(json|lock(\.(break|restore)\..*)?)")
"""Exists only while a process writes into the set; see `lock`. Earlier versions wrote JSON."""


WORKSHOP = "repair.tmp"
"""Folder in the set where a repair rebuilds broken shards."""


TEMPORARIES = re.compile(
    r"(set\.json|rows\.parquet|quarantine\.csv|SHA256SUMS|lease.*\.(json|lock)|[0-9]{6,9}\.(tar|idx|json))\.[\w.-]+\.tmp"
)


def is_temporary(path: Path) -> bool:
    """Is this a file of a set that is being written?"""
    return TEMPORARIES.fullmatch(path.name) is not None


def is_foreign(path: Path) -> bool:
    """Is this something that no build leaves before it has laid out its set?"""
    ours = is_temporary(path) or LOCK_FILE.fullmatch(path.name)
    return not (ours or (path.is_dir() and SCALE.fullmatch(path.name)))


def files_in(folder: Path) -> list[str]:
    """Files in a set's folder and its subfolders, except SHA256SUMS and locks; relative, sorted. Empty folders end with "/".

    Raises OSError for a folder that cannot be read.
    """
    names: list[str] = []
    for name in os.listdir(folder):
        if name == "SHA256SUMS" or LOCK_FILE.fullmatch(name):
            continue
        if (folder / name).is_dir():
            names += [f"{name}/{inner}" for inner in os.listdir(folder / name)] or [f"{name}/"]
        else:
            names.append(name)
    return sorted(names)
