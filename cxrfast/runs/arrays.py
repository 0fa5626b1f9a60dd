"""Arrays of a run at rest: predictions.zarr and maps.zarr, each written by one process under a temporary name, then renamed."""

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from cxrfast.errors import RunError
from cxrfast.files import TEMPORARY
from cxrfast.runs.run import Run


@dataclass(frozen=True)
class Predictions:
    """What a run says of one part of its rows."""

    row: np.ndarray
    """int64 (n,), ascending, unique."""
    logits: np.ndarray
    """float32 (n, L)"""


def write_predictions(run: Run, parts: Mapping[str, Predictions]) -> None:
    """Write predictions.zarr with one group a part. Raises RunError if rows are repeated."""
    arrays = {}
    for part, p in parts.items():
        if len(np.unique(p.row)) != len(p.row):
            raise RunError(f"{run.name}: rows of {part} were predicted twice")
        order = np.argsort(p.row)
        arrays[f"{part}/row"], arrays[f"{part}/logits"] = (
            p.row[order].astype(np.int64),
            p.logits[order].astype(np.float32),
        )
    write_arrays(
        run.folder / "predictions.zarr",
        arrays,
        {"set_id": run.config.set_id, "config_hash": run.config.hash, "labels": list(run.config.labels)},
    )


def read_predictions(run: Run, part: str) -> Predictions:
    """Raises RunError if the run has not predicted `part` or if the store is another configuration's."""
    path = run.folder / "predictions.zarr"
    if not path.is_dir():
        raise RunError(f"{run.name} has no predictions: `cxrfast predict {run.folder}`")
    group = open_arrays(path)
    if group.attrs.get("config_hash") != run.config.hash or group.attrs.get("set_id") != run.config.set_id:
        raise RunError(f"{path} belongs to another run: predict again with `cxrfast predict {run.folder}`")
    if part not in group:
        raise RunError(f"{path} has no part {part!r}: predict again with `cxrfast predict {run.folder}`")
    again = f"predict again with `cxrfast predict {run.folder}`"
    return Predictions(read_array(group, f"{part}/row", again), read_array(group, f"{part}/logits", again))


def has_predictions(run: Run) -> bool:
    return (run.folder / "predictions.zarr").is_dir()


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray], attributes: Mapping[str, Any]) -> None:
    """Write a zarr group that takes `path`'s place when it is whole."""
    temporary, old = path.with_name(path.name + TEMPORARY), path.with_name(path.name + ".old")
    for leftover in (temporary, old):
        shutil.rmtree(leftover, ignore_errors=True)
    group = zarr.open_group(temporary, mode="w", zarr_format=3)
    for name, array in arrays.items():
        lost = np.nan if array.dtype.kind == "f" else 0  # what a chunk that is lost later reads as; 0 is zarr's own
        made = group.create_array(name, shape=array.shape, dtype=array.dtype, fill_value=lost)
        made[...] = array
    group.attrs.update(dict(attributes))
    if path.exists():
        os.replace(path, old)
    os.replace(temporary, path)
    shutil.rmtree(old, ignore_errors=True)


def update_arrays(path: Path, arrays: Mapping[str, np.ndarray], attributes: Mapping[str, Any]) -> None:
    """Write `arrays` and `attributes` into the group at `path`, keeping what it holds under other names.

    Raises RunError if a group is there that cannot be read: it is neither used nor overwritten.
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
    """An array of an open store. Raises RunError with `advice` if it is absent, damaged or has lost a chunk."""
    try:
        array = np.asarray(group[name][:])
    except Exception as error:  # of zarr, of its codecs, of the file system
        raise RunError(f"{name} in {group.store_path} cannot be read ({type(error).__name__}): {advice}") from error
    if array.dtype.kind == "f" and np.isnan(array).any():
        raise RunError(f"{name} in {group.store_path} has lost values, or holds some that are not finite: {advice}")
    return array


def open_arrays(path: Path) -> Any:
    """The zarr group at `path`, read-only. Raises RunError if it is none."""
    try:
        return zarr.open_group(path, mode="r")
    except Exception as error:  # zarr's own classes differ by version
        raise RunError(f"{path} cannot be read ({type(error).__name__}): make it again") from error
