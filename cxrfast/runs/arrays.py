"""Arrays on disk: a zarr group, written by one process under a temporary name, then renamed."""

import os
import shutil
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from cxrfast.errors import RunError
from cxrfast.files import TEMPORARY
from cxrfast.machine import memory_bytes
from cxrfast.units import size

CHUNK_BYTES = 2**24
"""Most bytes in a chunk of several rows."""


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray], attributes: Mapping[str, Any]) -> None:
    """Write a zarr group that replaces `path` once it is complete."""
    temporary, old = path.with_name(path.name + TEMPORARY), path.with_name(path.name + ".old")
    for leftover in (temporary, old):
        shutil.rmtree(leftover, ignore_errors=True)
    group = zarr.open_group(temporary, mode="w", zarr_format=3)
    for name, array in arrays.items():
        lost = np.nan if array.dtype.kind == "f" else 0  # value of a chunk that is lost later; zarr's default is 0
        made = group.create_array(
            name, shape=array.shape, dtype=array.dtype, chunks=_chunk_shape(array), fill_value=lost
        )
        made[...] = array
    group.attrs.update(dict(attributes))
    if path.exists():
        os.replace(path, old)
    os.replace(temporary, path)
    shutil.rmtree(old, ignore_errors=True)


def _chunk_shape(array: np.ndarray) -> tuple[int, ...]:
    """Whole rows, so that one file holds most arrays: each file costs a look-up, which network storage answers slowly."""
    rows = CHUNK_BYTES * len(array) // max(array.nbytes, 1)
    return max(min(rows, len(array)), 1), *(max(side, 1) for side in array.shape[1:])


def update_arrays(path: Path, arrays: Mapping[str, np.ndarray], attributes: Mapping[str, Any]) -> None:
    """Write `arrays` and `attributes` into the group at `path`, keeping others that are there.

    Raises RunError if the existing group cannot be read: it is neither used nor overwritten.
    """
    kept_arrays: dict[str, np.ndarray] = {}
    kept_attributes: dict[str, Any] = {}
    old = path.with_name(path.name + ".old")  # where `write_arrays` leaves it if killed between two renames
    if (existing := path if path.exists() else old).exists():
        try:
            group = open_arrays(existing)
            members = [(name, m) for name, m in group.members(max_depth=None) if isinstance(m, zarr.Array)]
            kept_arrays = {name: np.asarray(array[:]) for name, array in members}
            kept_attributes = dict(group.attrs)
        except Exception as error:  # zarr's own classes differ by version
            raise RunError(f"{existing} is damaged ({error}): delete it and try again") from error
    write_arrays(path, {**kept_arrays, **arrays}, {**kept_attributes, **attributes})


def read_array(group: Any, name: str, advice: str) -> np.ndarray:
    """An array of an open group. Raises RunError with `advice` if it is missing, damaged or has lost a chunk."""
    try:
        stored = group[name]
        if (claimed := stored.nbytes) > memory_bytes():
            raise RunError(f"{name} in {group.store_path} claims {size(claimed)}, more than this machine has: {advice}")
        array = np.asarray(stored[:])
    except RunError:
        raise
    except Exception as error:  # of zarr, of its codecs, of the file system
        raise RunError(f"{name} in {group.store_path} cannot be read ({type(error).__name__}): {advice}") from error
    if array.dtype.kind == "f" and np.isnan(array).any():
        raise RunError(f"{name} in {group.store_path} has lost values, or holds some that are not finite: {advice}")
    return array


def open_arrays(path: Path) -> Any:
    """The zarr group at `path`, read-only. Raises RunError if it cannot be read, or holds anything but files and folders.

    It may come from elsewhere: reading a pipe would never end, and a link may lead anywhere.
    """
    for folder, folders, names in os.walk(path):
        for entry in (Path(folder, name) for name in (*folders, *names)):
            if not stat.S_ISREG(mode := entry.lstat().st_mode) and not stat.S_ISDIR(mode):
                raise RunError(f"{entry} is neither a file nor a folder: delete {path} and make it again")
    try:
        return zarr.open_group(path, mode="r", zarr_format=3)  # arrays of version 2 may hold pickles, which run code
    except Exception as error:  # zarr's own classes differ by version
        raise RunError(f"{path} cannot be read ({type(error).__name__}): make it again") from error
