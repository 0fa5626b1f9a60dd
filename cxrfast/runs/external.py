"""Predictions of a run on another set than its own, RUN/external/NAME.zarr, and that set's ids and raw labels, NAME.parquet.

Tables are made from them alone: neither shards nor GPU are needed. Equal names are the same finding; nothing is guessed.
"""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from cxrfast.errors import RunError, did_you_mean
from cxrfast.files import make_own_folder, open_file, replacing
from cxrfast.labels import EARLIER
from cxrfast.runs.arrays import open_arrays, read_array, write_arrays
from cxrfast.runs.folder import RunFolder
from cxrfast.runs.run import Run
from cxrfast.splits import PARTS
from cxrfast.text import label_fault, shown
from cxrfast.units import counted

IDS = ("row", "image_id", "study_id", "patient_id")
"""Columns of the table; after them one float32 column per label of the set with the raw value 1, 0, -1 or null."""

KEY = b"cxrfast"
"""Key of the set's description in the metadata of the table."""

LONGEST = 100
"""Bytes of a name; names of files have more."""


@dataclass(frozen=True, kw_only=True)
class OtherSet:
    """What is known about the set that a run was tried on."""

    name: str
    """As the user calls it."""
    set_id: str
    labels: tuple[str, ...]
    """All labels of the set."""
    views: tuple[str, ...] = ()
    """The only view positions that were scored; none: all."""
    is_partial: bool = False
    """Whether the set's build was not finished."""
    recipe: str = ""
    """How its images were made otherwise than those the run was trained on, as `resize pad, not squash`; "" if alike or unknown."""
    knows_files: bool = False
    """Whether its source files were compared with those of the run's own set."""


@dataclass(frozen=True, kw_only=True)
class External:
    """A run's logits on another set, with ids and raw labels of the rows."""

    other: OtherSet
    rows: pd.DataFrame
    """row (ascending), image_id, study_id, patient_id, then the raw labels of the set."""
    logits: np.ndarray
    """float32 (n, L), findings in the order of the run."""
    copy_of: np.ndarray
    """int64 (n,): the row of the run's own set whose source file is the same, byte for byte; -1 if none, or not known."""


# Names


def check_name(name: str) -> None:
    """Raises RunError if predictions on another set cannot have this name: it is that of files and folders."""
    fault = label_fault(name)
    if not name.strip():
        fault = "is empty"
    elif "/" in name or name.startswith((".", "-")):
        fault = "holds a slash, or starts with a dot or a dash"
    elif len(name.encode(errors="replace")) > LONGEST:
        fault = f"has more than {LONGEST} bytes"
    elif name.lower() in PARTS:
        fault = "is the name of a part of the runs' own rows"
    if fault:
        raise RunError(f"--on {shown(name)} {fault}: give another name for the set, such as --on hospital-b")


def names(run: RunFolder) -> list[str]:
    """Names of the other sets that the run has predictions on, ascending."""
    tables = {path.name.removesuffix(".parquet") for path in run.external_path.glob("*.parquet")}
    stores = {path.name.removesuffix(".zarr") for path in run.external_path.glob("*.zarr") if path.is_dir()}
    return sorted(tables & stores)


def known_names(runs: Iterable[RunFolder]) -> str:
    """`hospital-b (10 runs), odd (1 run)`: the other sets that runs have predictions on; "" if there is none."""
    count: dict[str, int] = {}
    for run in runs:
        for name in names(run):
            count[name] = count.get(name, 0) + 1
    return ", ".join(f"{name} ({counted(n, 'run')})" for name, n in sorted(count.items()))


def _table(run: RunFolder, name: str) -> Path:
    return run.external_path / f"{name}.parquet"


def store_path(run: RunFolder, name: str) -> Path:
    """Where the logits on the set called `name` are, or will be."""
    return run.external_path / f"{name}.zarr"


# Findings


@dataclass(frozen=True, kw_only=True)
class Matching:
    """Findings of a run next to the labels of another set."""

    both: tuple[str, ...]
    """In the order of the run."""
    only_run: tuple[str, ...]
    only_set: tuple[str, ...]

    @classmethod
    def of(cls, findings: Sequence[str], labels: Sequence[str]) -> "Matching":
        """Equal names are the same finding, others are not."""
        return cls(
            both=tuple(name for name in findings if name in labels),
            only_run=tuple(name for name in findings if name not in labels),
            only_set=tuple(name for name in labels if name not in findings),
        )

    def near_misses(self) -> list[str]:
        """Labels of the set that differ from a finding of the run only in case, blanks and signs, or are an earlier name of
        it, in sentences."""
        found = []
        for finding in self.only_run:
            alike = [name for name in self.only_set if _plain(name) == _plain(finding) or EARLIER.get(name) == finding]
            if alike:
                hint = did_you_mean([finding], alike).strip() or f"did you mean {alike[0]!r}?"
                found.append(f"{shown(finding)} of the runs is not matched, {hint}")
        return found


def _plain(name: str) -> str:
    return re.sub(r"[\W_]+", "", name.casefold())


# Store


def check_free(run: Run, name: str, set_id: str, folder: Path) -> None:
    """Raises RunError if the run has predictions of this name on a set other than `set_id`, which is in `folder`."""
    for read in (_read_table_description, _read_store_owner):
        try:
            known = read(run, name)
        except (OSError, RunError):  # absent, or damaged: it is replaced
            continue
        if known != set_id:
            raise RunError(
                f"{run.name} has predictions on another set named {name} (set {known}; {folder} is set {set_id}): give this one "
                f"another name with --on, or delete {_table(run, name)} and {store_path(run, name)}"
            )


def write_external(run: Run, external: External) -> None:
    """Write table and logits; what was there under this name is replaced."""
    other, rows = external.other, external.rows
    raw = rows[list(other.labels)].astype(np.float32)
    table = pa.Table.from_pandas(pd.concat([rows[list(IDS)], raw], axis=1), preserve_index=False)
    description = json.dumps({**asdict(other), "config_hash": run.hash}, sort_keys=True, ensure_ascii=False)
    run.check_lease()
    make_own_folder(run.external_path)
    with replacing(_table(run, other.name)) as file:
        pq.write_table(table.replace_schema_metadata({KEY: description.encode()}), file, compression="zstd")
    arrays = {
        "row": rows["row"].to_numpy(np.int64),
        "logits": external.logits.astype(np.float32),
        "copy_of": external.copy_of.astype(np.int64),
    }
    owner = {"set_id": other.set_id, "config_hash": run.hash, "labels": list(run.config.labels)}
    run.check_lease()
    write_arrays(store_path(run, other.name), arrays, owner)


def read_external(run: Run, name: str, ids: bool = True) -> External:
    """The run's predictions on the set called `name`; `ids`: with the ids of images, studies and patients, most of the table.

    Raises RunError if there are none, if they are damaged, or if they are not of this configuration.
    """
    if name not in names(run):
        known = known_names([run])
        there = f"it has those on {known}" if known else "it has none on any other set"
        raise RunError(
            f"{run.name} has no predictions on {shown(name)} ({there}): `cxrfast predict {run.folder} SET --on {name}`"
        )
    again = f"predict again with `cxrfast predict {run.folder} SET --on {name}`"
    other, rows = _read_table(run, name, ids, again)
    group = open_arrays(store_path(run, name))
    if group.attrs.get("config_hash") != run.hash or group.attrs.get("set_id") != other.set_id:
        raise RunError(f"{store_path(run, name)} belongs to another run or set: {again}")
    row, logits, copy_of = (read_array(group, array, again) for array in ("row", "logits", "copy_of"))
    shape = len(row), len(run.config.labels)
    if logits.shape != shape or copy_of.shape != row.shape or logits.dtype.kind != "f":
        raise RunError(f"{store_path(run, name)} holds logits {logits.shape}, not {shape}: {again}")
    if not np.array_equal(row, rows["row"].to_numpy()):
        raise RunError(f"{store_path(run, name)} and {_table(run, name)} hold different rows: {again}")
    return External(other=other, rows=rows, logits=logits, copy_of=copy_of)


def _read_table(run: Run, name: str, ids: bool, again: str) -> tuple[OtherSet, pd.DataFrame]:
    path = _table(run, name)
    try:
        with open(open_file(path), "rb") as file:
            stored = pq.ParquetFile(file)
            described = _description(stored)
            owner = described.pop("config_hash", None)
            other = msgspec.convert(described, OtherSet)
            columns = [*(IDS if ids else IDS[:1]), *other.labels]
            rows = stored.read(columns=columns).to_pandas(ignore_metadata=True)
        row = rows["row"].to_numpy()
        if row.dtype.kind != "i" or (np.diff(row) <= 0).any():
            raise ValueError("its rows are not ascending numbers")
        if wrong := [label for label in other.labels if rows[label].dtype.kind != "f"]:
            raise ValueError(f"{shown(wrong[0])} holds no numbers")
    except (OSError, pa.ArrowException, ValueError, KeyError, TypeError, RecursionError) as error:
        raise RunError(f"{path} is damaged ({error}): {again}") from error
    if owner != run.hash or other.name != name:
        raise RunError(f"{path} belongs to another run or set: {again}")
    return other, rows


def _description(stored: pq.ParquetFile) -> dict[str, Any]:
    """The description in an open table. Raises ValueError if there is none."""
    value = json.loads((stored.schema_arrow.metadata or {}).get(KEY, b"null"))
    if not isinstance(value, dict):
        raise ValueError("it does not say which set it is about")
    return value


def _read_table_description(run: Run, name: str) -> Any:
    """Id of the set that the table is about. Raises RunError or OSError if it cannot be read."""
    try:
        with open(open_file(_table(run, name)), "rb") as file:
            return _description(pq.ParquetFile(file))["set_id"]
    except (pa.ArrowException, ValueError, KeyError, RecursionError) as error:
        raise RunError("damaged") from error


def _read_store_owner(run: Run, name: str) -> Any:
    """Id of the set that the logits are of. Raises RunError if they cannot be read."""
    known = open_arrays(store_path(run, name)).attrs.get("set_id")
    if known is None:
        raise RunError("damaged")
    return known
