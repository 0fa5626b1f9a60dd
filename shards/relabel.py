"""Other labels for the images of a shard set, from a table keyed by image or by study.

In: a set's rows.parquet and set.json, and a CSV, TSV or Parquet table. Out: the same two files and SHA256SUMS with the
table's labels in place of all former ones. Never touched: tars, manifests, folds, reference columns and the set id.
"""

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd

from cxrfast.errors import ShardError
from cxrfast.files import sha256, sync_folder, write_bytes
from cxrfast.labels import MIMIC
from cxrfast.progress import progress
from cxrfast.shards.columns import columns_of, filled, raw_labels, read_table
from cxrfast.shards.lease import Lease
from cxrfast.shards.manifest import RELABELLING, SetInfo, is_temporary, read_set, read_sums, sums_bytes
from cxrfast.shards.rows import COLUMNS, REFERENCE, label_names, read_rows, reference_names, write_rows
from cxrfast.shards.tree import Tree

KEYS = {"imageid": "image_id", "dicomid": "image_id", "imageindex": "image_id", "studyid": "study_id"}
"""Column of the set by the plain name (see `_plain`) of the table's column that holds its ids."""

NO_LABELS = {
    *("subjectid", "patientid", "sex", "patientsex", "patientgender", "age", "patientage", "followup"),
    *("path", "split", "view", "viewposition", "frontallateral", "appa", "studydate", "studytime"),
    *("row", "rows", "columns", "bytes", "height", "width", "fold", "block", "indexlevel0"),
}
"""Plain names of columns that tables of this field hold beside their ids and labels."""


@dataclass(frozen=True, kw_only=True)
class Relabelled:
    """What became of the labels of a set."""

    info: SetInfo
    """As it is now."""
    before: tuple[str, ...]
    """The labels that went."""
    table: str
    key: str
    """The table's column by which lines and images were matched."""
    by: str
    """What it holds: image_id or study_id."""
    matched: int
    """Images with a line in the table; the others are blank now."""
    labelled: int
    """Images with at least one label that is not blank."""
    unmatched: pd.DataFrame
    """A line an id that only one side knows, sorted: image_id or study_id, only_in (set or table), images of the set."""


def relabel(
    folder: Path,
    table: str | Path,
    *,
    labels: list[str] | None = None,
    key: str | None = None,
    unmatched: Path | None = None,
    quiet: bool = False,
) -> Relabelled:
    """Replace all labels of the set by those of `table`: a local path or an fsspec URL of a .csv, .tsv (.gz) or .parquet.

    `labels`: columns to take; default: all but those of ids and bookkeeping. `key`: the column of image or study ids;
    default: by its name. `unmatched`: a CSV file for the ids that only one side knows. Images that the table does not
    list become blank. Raises ShardError, with nothing written, for a table that is not of this set or holds other
    values than 1, 0, -1 and blank. A run killed at any instant is finished by the same call.
    """
    folder = Path(folder)
    images = read_set(folder).images
    if unmatched is not None and Path(unmatched).resolve().is_relative_to(folder.resolve()):
        raise ShardError(f"--unmatched {unmatched} lies in the set {folder}: choose a file outside of it")
    found = read_labels(str(table), labels, key)
    with Lease(folder), progress("relabelling", images, quiet=quiet) as advance:
        result = _replace_labels(folder, found, unmatched)
        advance(images)
    return result


def _replace_labels(folder: Path, found: "Labels", unmatched: Path | None) -> Relabelled:
    _check_undamaged(folder)
    info, rows = read_set(folder), read_rows(folder / "rows.parquet", relabelling=True)
    rows = rows.astype({"image_id": object, "study_id": object})  # pandas looks Arrow's text up ten times more slowly
    by = found.by or most_known(found, rows)
    known, ids = rows[by], match_ids(found, rows[by])
    if not ids.isin(known).any():
        raise ShardError(
            f"no {found.key} of {found.table} is in {folder} (the table's are like {ids.iloc[0]!r}, the {by}s of the set "
            f"like {known.iloc[0]!r}): give the table of these images, or another --key; nothing was changed"
        )
    strangers = _strangers(ids, known)
    if unmatched is not None:
        write_bytes(Path(unmatched), strangers.to_csv(index=False, lineterminator="\n").encode())
    values = found.values.set_axis(pd.Index(ids)).reindex(known).set_axis(rows.index)
    info, before = replace(info, labels=found.values.columns.tolist()), label_names(rows)
    write_labels(folder, info, pd.concat([rows[list(COLUMNS)], values, rows[list(reference_names(rows))]], axis=1))
    return Relabelled(
        info=info,
        before=before,
        table=found.table,
        key=found.key,
        by=by,
        matched=int(known.isin(ids).sum()),
        labelled=int(values.notna().any(axis=1).sum()),
        unmatched=strangers,
    )


# The table


@dataclass(frozen=True, kw_only=True)
class Labels:
    """What a table says."""

    table: str
    key: str
    """Its column of ids."""
    by: str | None
    """The column of the set that `key` is by its name, image_id or study_id; None where the name does not tell."""
    ids: pd.Series
    """Text, as the table writes them."""
    values: pd.DataFrame
    """float32, a column a label: 1, 0, -1 or NaN; lines as in `ids`."""


def read_labels(table: str, asked: list[str] | None, key: str | None) -> Labels:
    """Ids and labels of a table. Raises ShardError for whatever is wrong with it."""
    head, chain, rest = table.partition("::")  # zip://labels.csv::archive.zip
    folder, slash, name = head.rpartition("/")
    tree = Tree(folder + slash + chain + rest)
    columns = columns_of(tree, name)
    key, by = find_key(columns, table, key)
    labels = find_labels(columns, table, key, asked)
    lines = read_table(tree, name, [key, *labels])
    if lines.empty:
        raise ShardError(f"{table} holds no lines: give a table of ids and labels")
    try:
        values = pd.DataFrame({label: raw_labels(lines[label], table) for label in labels})
    except ShardError as error:
        raise ShardError(f"{error}; choose the columns that are labels with --label, once for each") from None
    return Labels(table=table, key=key, by=by, ids=filled(lines[key], table), values=values)


def _plain(name: str) -> str:
    """`Image Index` → `imageindex`."""
    return re.sub("[^a-z0-9]", "", name.lower())


def find_key(columns: list[str], table: str, key: str | None) -> tuple[str, str | None]:
    """The table's column of ids, and the set's column that it holds by its name. Raises ShardError where it is not clear."""
    known = [name for name in columns if _plain(name) in KEYS]
    if key is None:
        if len(known) != 1:
            what = f"has the id columns {', '.join(known)}" if known else f"has no id column ({', '.join(columns)})"
            raise ShardError(f"{table} {what}: name that of image or study ids with --key COLUMN")
        key = known[0]
    if key not in columns:
        raise ShardError(f"{table} has no column {key!r} (--key): its columns are {', '.join(columns)}")
    return key, KEYS.get(_plain(key))


def find_labels(columns: list[str], table: str, key: str, asked: list[str] | None) -> list[str]:
    """The columns that are labels: in MIMIC's order if they are its fourteen, else in the table's.

    Raises ShardError for one that is absent, or that a rows table cannot hold as a label.
    """
    if absent := [name for name in asked or () if name not in columns]:
        raise ShardError(f"{table} has no column {absent[0]!r} (--label): its columns are {', '.join(columns)}")
    ignored = {"", key, *(name for name in columns if _plain(name) in NO_LABELS | KEYS.keys())}
    names = [name for name in columns if (name in asked if asked else name not in ignored)]
    if not names:
        raise ShardError(f"{table} has no label columns ({', '.join(columns)}): name them with --label COLUMN")
    for name in names:
        if name in COLUMNS or name == key or name.startswith(REFERENCE):
            raise ShardError(
                f"{name!r} of {table} cannot be a label, the name means something else in a set: rename it"
            )
    return list(MIMIC) if set(names) == set(MIMIC) else names


# Ids


def most_known(found: Labels, rows: pd.DataFrame) -> str:
    """Of image_id and study_id, the column of the set that holds more of the table's ids."""
    ids = {by: rows[by] for by in ("image_id", "study_id")}
    return max(ids, key=lambda by: int(_like(found, ids[by]).isin(ids[by]).sum()))


def match_ids(found: Labels, known: pd.Series) -> pd.Series:
    """The table's ids as the set writes them. Raises ShardError for ids that are listed twice or lack their zeros."""
    ids = _like(found, known)
    if repeated := ids[ids.duplicated()].drop_duplicates().tolist():
        more = f" and {len(repeated) - 3:,} more" if len(repeated) > 3 else ""
        raise ShardError(
            f"{found.table} lists {found.key} {', '.join(repeated[:3])}{more} more than once: keep one line for each"
        )
    here, there = ids[~ids.isin(known)], known[~known.isin(ids)].dropna()
    bare = there.str.lstrip("0")
    apart = here[here.str.lstrip("0").isin(bare)]
    if len(apart):
        whole = there[bare == apart.iloc[0].lstrip("0")].iloc[0]
        raise ShardError(
            f"{len(apart):,} ids of {found.table} differ from the set's in leading zeros alone ({apart.iloc[0]} is {whole} "
            f"there): write {found.key} as text, with its zeros"
        )
    return ids


def _like(found: Labels, known: pd.Series) -> pd.Series:
    """Ids as the set may write them: 50000014.0 is study 50000014, unless the set says 50000014.0 itself."""
    bare = found.ids.str.strip().str.replace(r"(?<=\d)\.0+$", "", regex=True)
    if (found.ids.ne(bare) & bare.str.len().gt(15)).any():  # more digits than a float64 holds
        raise ShardError(
            f"{found.table} holds floating-point numbers too long for ids in {found.key}: write them as text"
        )
    exact = found.ids.astype(object)
    return exact.where(exact.isin(known), bare.astype(object))


def _strangers(ids: pd.Series, known: pd.Series) -> pd.DataFrame:
    """Ids that only one side knows; `images` says how many images of the set go without labels for it."""
    lost = known[~known.isin(ids)].value_counts().sort_index()
    alone = sorted(ids[~ids.isin(known)])
    return pd.DataFrame(
        {
            known.name: [*lost.index, *alone],
            "only_in": ["set"] * len(lost) + ["table"] * len(alone),
            "images": [*lost.tolist(), *[0] * len(alone)],
        }
    )


# The set


def _check_undamaged(folder: Path) -> None:
    """Raises ShardError if the files to be replaced are not those that were signed: damage would be signed anew."""
    if (folder / "SHA256SUMS").exists():
        sums = read_sums(folder)
        for name in ("rows.parquet", "set.json"):
            if name in sums and (folder / name).is_file() and sha256(folder / name) != sums[name]:
                raise ShardError(f"{folder / name} is not as it was written: `cxrfast verify` lists what is damaged")


def write_labels(folder: Path, info: SetInfo, rows: pd.DataFrame) -> None:
    """Write rows.parquet and set.json, and their hashes into SHA256SUMS, so that no reader takes one for the other's.

    SHA256SUMS is renamed to `RELABELLING` first and back last. While a file of that name is there `read_rows` and
    `verify` refuse the set, whatever else is written; only a relabelling reads on, and one that was killed is finished by
    the same call. The other files' hashes are kept, not taken anew: damage stays visible. A set that no build has
    finished has no SHA256SUMS before or after.
    """
    sums, underway = folder / "SHA256SUMS", folder / RELABELLING
    for stale in filter(is_temporary, list(folder.iterdir())):  # of a killed relabelling
        stale.unlink(missing_ok=True)
    if sums.exists():
        os.replace(sums, underway)
    elif not underway.exists():
        write_bytes(underway, b"")
    sync_folder(folder)
    write_rows(folder / "rows.parquet", rows, info)
    info.write(folder)
    if underway.stat().st_size:
        known = read_sums(folder, RELABELLING)
        known |= {name: sha256(folder / name) for name in ("rows.parquet", "set.json")}
        write_bytes(underway, sums_bytes(known))
        os.replace(underway, sums)
    else:
        underway.unlink()
    sync_folder(folder)


def describe(result: Relabelled, folder: Path, shown: int = 20) -> str:
    """What a person wants to know after a relabelling."""
    info = result.info
    one, many = ("image", "images") if result.by == "image_id" else ("study", "studies")
    gone = [name for name in result.before if name not in info.labels]
    lines = [
        f"{result.matched:,} of {info.images:,} images found in {result.table} by {result.key}, "
        f"{result.labelled:,} have a label",
        f"labels: {', '.join(info.labels)}" + (f" (gone: {', '.join(gone)})" if gone else ""),
    ]
    for side, where in (("set", "in the set alone, blank now"), ("table", "in the table alone")):
        ids = result.unmatched.loc[result.unmatched["only_in"] == side, result.by].tolist()
        if ids:
            more = f" and {len(ids) - shown:,} more (--unmatched FILE lists all)" if len(ids) > shown else ""
            lines.append(f"{where}: {len(ids):,} {many if len(ids) > 1 else one}: {', '.join(ids[:shown])}{more}")
    lines.append(f"set {info.id} in {folder}: relabelled; runs keep the labels that they were trained on")
    return "\n".join(lines)
