"""The images and labels that a CheXpert tree lists."""

import posixpath
import re
from collections.abc import Sequence

import pandas as pd

from cxrfast.errors import ShardError
from cxrfast.labels import MIMIC
from cxrfast.shards.sources.kept import kept_columns, notes_on_commas
from cxrfast.shards.sources.source import Source
from cxrfast.shards.sources.table_files import find_table, read_table, tables_in
from cxrfast.shards.sources.tables.text_columns import filled, raw_labels
from cxrfast.shards.storage import Tree

CHEXPERT_TABLES = {"train": ("train.csv",), "validate": ("valid.csv",), "test": ("test_labels.csv", "test.csv")}
"""Tables of each part; the first one found is read."""

OWN = {"Path", "AP/PA", *MIMIC}
"""Columns that are read in any case."""

CHEXPERT_PATH = re.compile(
    r"^(?:.*/)?(?P<part>train|valid|val|test)/(?P<patient>patient\d+)/(?P<study>study\d+)/(?P<view>[^/]+)(?P<suffix>\.\w+)$"
)

CHEXPERT_BATCH = re.compile(r"CheXpert-v1\.0 batch \d+", re.IGNORECASE)
"""Folders of the full-size download: `CheXpert-v1.0 batch 2 (train 1)/patient00001/…`."""


def chexpert(tree: Tree, *, keep: Sequence[str] = ()) -> Source:
    """CheXpert (Irvin et al. 2019), small or full size, with its tables in the tree itself or in a CheXpert… folder.

    Labels are in MIMIC's order, so that models carry over. The tables do not give image sizes. `keep`: columns to carry along;
    they are blank for the images of a table that lacks them.
    """
    folders = ["", *(name for name in tree.folders("") if name.lower().startswith("chexpert"))]
    parts = []
    for split, names in CHEXPERT_TABLES.items():
        there = {folder: path for folder in folders if (path := find_table(tree, names, folder))}
        if len(there) > 1 and "" not in there:
            raise ShardError(f"{tree} has {' and '.join(there.values())}: give --data the folder of one of them")
        for folder, path in list(there.items())[:1]:
            parts.append(_chexpert_part(tree, folder, path, split, keep))
    if not parts:
        wanted = ", ".join(name for names in CHEXPERT_TABLES.values() for name in names)
        raise ShardError(
            f"none of {wanted} (or .gz) in {tree} or a CheXpert… folder in it (its tables: {tables_in(tree)}): "
            "give --data the folder that holds train.csv, or the one that holds the batches of the full download"
        )
    images = pd.concat(parts)  # the index is each table's own lines
    if absent := [name for name in keep if name not in images]:
        raise ShardError(
            f"no table of CheXpert in {tree} has the column {absent[0]} (--keep): its tables have Sex and Age"
        )
    text = images.reindex(columns=[name for name in keep if name not in MIMIC])  # which `checked` refuses
    kept = kept_columns(text, [name for name in keep if name in text])
    return Source(
        images=images.assign(**kept),
        labels=MIMIC,
        counts={"images whose labels are all blank": int(images[list(MIMIC)].isna().all(axis=1).sum())},
        notes=notes_on_commas(text, kept),
        kept=tuple(keep),
    )


def _chexpert_part(tree: Tree, folder: str, path: str, split: str, keep: Sequence[str]) -> pd.DataFrame:
    """Images of one table in `folder`, with those columns of `keep` that it has, as text."""
    what = f"the {split} table of CheXpert"
    table = read_table(
        tree, path, ["Path", *MIMIC], what, optional=["AP/PA", *(name for name in keep if name not in OWN)]
    )  # the test table has no views
    where = posixpath.join(str(tree), path)
    pieces = filled(table["Path"], where).str.extract(CHEXPERT_PATH)
    if (unknown := pieces["part"].isna()).any():
        at = table.index[unknown][0]
        raise ShardError(
            f"{where} lists {table['Path'][at]} in line {at}, which is not …/patient00001/study1/view1_….jpg"
        )
    study = pieces["patient"] + "/" + pieces["study"]
    image = study + "/" + pieces["view"]
    frontal = table["AP/PA"] if "AP/PA" in table else pd.Series(None, table.index, dtype=object)
    lateral = pieces["view"].str.contains("lateral", regex=False)
    return pd.DataFrame(
        {
            "image_id": image,
            "study_id": study,
            "patient_id": pieces["patient"],
            "path": _chexpert_folders(tree, folder, pieces) + "/" + image + pieces["suffix"],
            "view": frontal.where(~lateral, "LATERAL"),
            "split": split,
            **{name: raw_labels(table[name], where) for name in MIMIC},
            **{name: table[name] for name in keep if name in table and name not in MIMIC},
        }
    )


def _chexpert_folders(tree: Tree, folder: str, pieces: pd.DataFrame) -> pd.Series:
    """Folder of each line's patient: train/, valid/ or test/ next to the table, or a batch of the full download."""
    at = {part: posixpath.join(folder, part) for part in pieces["part"].unique()}
    batches = [
        posixpath.join(place, name)
        for place in dict.fromkeys(("", folder))
        for name in tree.folders(place)
        if CHEXPERT_BATCH.match(name)
    ]
    patients: dict[str, str] = {}
    if not all(tree.is_dir(where) for where in at.values()):
        for batch in reversed(batches):
            inside = tree.folders(batch)
            patients |= dict.fromkeys((name for name in inside if name.startswith("patient")), batch)
            for part in (part for part in at if part in inside):
                patients |= dict.fromkeys(tree.folders(f"{batch}/{part}"), f"{batch}/{part}")
    batch_of = pieces["patient"].map(patients)
    return batch_of.where(batch_of.notna(), pieces["part"].map(at))
