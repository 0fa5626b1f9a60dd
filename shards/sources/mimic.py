"""Source trees: each source is one function that takes the tree and returns the images it lists, with their labels.

Tables and names of files are read, images are not. `docs/sources.md` shows how to write another one.
"""

import inspect
import pkgutil
import posixpath
import re
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from cxrfast.errors import CxrfastError, ShardError
from cxrfast.labels import EARLIER, MIMIC
from cxrfast.shards.format.rows import REFERENCE
from cxrfast.shards.sources.any_table import table as any_table
from cxrfast.shards.sources.source import Source, checked
from cxrfast.shards.sources.tables import filled, find_table, lines, pixels, raw_labels, read_table, tables_in
from cxrfast.shards.storage import Tree

# MIMIC-CXR-JPG


def mimic(tree: Tree, *, labels: str = "chexpert") -> Source:
    """MIMIC-CXR-JPG 2.0.0 or 2.1.0 (Johnson et al. 2019), labels by study, the official split.

    `labels`: `chexpert` or `negbio`, the labeller whose table is read. The radiologist's labels of 2.1.0 are carried as
    references where their table is there.
    """
    if labels not in ("chexpert", "negbio"):
        raise ShardError(f"--labels {labels!r} is unknown: use chexpert or negbio")
    labelled = _mimic_table(tree, labels, ["study_id", *MIMIC])
    metadata = _mimic_table(tree, "metadata", ["dicom_id", "subject_id", "study_id", "ViewPosition", "Rows", "Columns"])
    split = _mimic_table(tree, "split", ["dicom_id", "split"])
    if not tree.is_dir("files"):
        raise ShardError(f"{tree} has no folder files/: give --data the folder that holds files/ and the CSV tables")
    _once(labelled["study_id"], f"the {labels} table in {tree}")
    _once(split["dicom_id"], f"the split table in {tree}")
    if (empty := metadata[["dicom_id", "subject_id", "study_id"]].isna().any(axis=1)).any():
        raise ShardError(f"the metadata table in {tree} lacks ids in {int(empty.sum()):,} lines: download it again")
    image, subject, study = metadata["dicom_id"], metadata["subject_id"], metadata["study_id"]
    values = {name: raw_labels(labelled[name], f"the {labels} table in {tree}").to_numpy() for name in MIMIC}
    raw = pd.DataFrame(values, index=labelled["study_id"])
    reference = _radiologist(tree)
    frame = pd.DataFrame(
        {
            "image_id": image,
            "study_id": study,
            "patient_id": subject,
            "path": "files/p" + subject.str[:2] + "/p" + subject + "/s" + study + "/" + image + ".jpg",
            "view": metadata["ViewPosition"],
            "height": pixels(metadata["Rows"], f"the metadata table in {tree}"),
            "width": pixels(metadata["Columns"], f"the metadata table in {tree}"),
            "split": split.set_index("dicom_id")["split"].reindex(image).set_axis(metadata.index),
        }
    )
    by_study = [raw.reindex(study), reference.add_prefix(REFERENCE).reindex(study)]
    frame = pd.concat([frame, *(values.set_axis(metadata.index) for values in by_study)], axis=1)
    counts = {
        "studies without a label row": study[~study.isin(raw.index)].nunique(),
        "label rows that are all blank": int(raw.isna().all(axis=1).sum()),
        "studies read by a radiologist": int(reference.index.isin(study).sum()),
        "studies read by a radiologist, without an image": int((~reference.index.isin(study)).sum()),
    }
    return Source(images=frame, labels=MIMIC, counts=counts)


def _mimic_table(tree: Tree, kind: str, columns: list[str]) -> pd.DataFrame:
    """The needed columns of mimic-cxr-2.x.y-KIND.csv: the latest version there, unpacked rather than packed."""
    path = _mimic_path(tree, kind)
    if path is None:
        raise ShardError(
            f"no mimic-cxr-2.0.0-{kind}.csv or .csv.gz in {tree} (its tables: {tables_in(tree)}): "
            "download it, or give it back its published name"
        )
    return read_table(tree, path, columns, f"the {kind} table of MIMIC-CXR-JPG")


def _mimic_path(tree: Tree, kind: str) -> str | None:
    pattern = re.compile(rf"mimic-cxr-(2(?:\.\d+)*)-{kind}\.csv")
    versions = {m[1] for name in tree.files("") if (m := pattern.match(name))}
    latest = sorted(versions, key=lambda v: [int(part) for part in v.split(".")], reverse=True)
    return find_table(tree, [f"mimic-cxr-{version}-{kind}.csv" for version in latest])


def _radiologist(tree: Tree) -> pd.DataFrame:
    """The radiologist's labels of the test set, float32, by study: those of `MIMIC` that its table has; else nothing."""
    path = _mimic_path(tree, "test-set-labeled")
    if path is None:
        return pd.DataFrame(index=pd.Index([], dtype=object))
    what = "the radiologist's table of MIMIC-CXR-JPG 2.1.0"
    labelled = read_table(tree, path, ["study_id"], what, optional=[*MIMIC, *EARLIER])
    labelled = labelled.rename(columns={old: new for old, new in EARLIER.items() if new not in labelled})
    where = posixpath.join(str(tree), path)
    _once(filled(labelled["study_id"], where), where)
    found = [name for name in MIMIC if name in labelled]
    if not found:
        raise ShardError(f"{where} has no column of a label: is it {what}?")
    values = {name: raw_labels(labelled[name], where).to_numpy() for name in found}
    return pd.DataFrame(values, index=labelled["study_id"])


def _once(column: pd.Series, where: str) -> None:
    if repeated := int(column.duplicated().sum()):
        raise ShardError(f"{where} lists {repeated:,} entries twice: download it again")


# CheXpert

CHEXPERT_TABLES = {"train": ("train.csv",), "validate": ("valid.csv",), "test": ("test_labels.csv", "test.csv")}
"""The tables of each part; where a part has two, the first that is there."""

CHEXPERT_PATH = re.compile(r"(?:.*/)?(train|valid|val|test)/(patient\d+)/(study\d+)/([^/]+)(\.\w+)$")
CHEXPERT_BATCH = re.compile(r"CheXpert-v1\.0 batch \d+", re.IGNORECASE)
"""How the archives of the full-size download unpack: `CheXpert-v1.0 batch 2 (train 1)/patient00001/…`."""


def chexpert(tree: Tree) -> Source:
    """CheXpert (Irvin et al. 2019), small or full size: the tables in the tree itself or in its CheXpert… folder.

    Labels are in MIMIC's order, so that models carry over. Sizes of the images are not known to the tables.
    """
    folders = ["", *(name for name in tree.folders("") if name.lower().startswith("chexpert"))]
    parts = []
    for split, names in CHEXPERT_TABLES.items():
        there = {folder: path for folder in folders if (path := find_table(tree, names, folder))}
        if len(there) > 1 and "" not in there:
            raise ShardError(f"{tree} has {' and '.join(there.values())}: give --data the folder of one of them")
        for folder, path in list(there.items())[:1]:
            parts.append(_chexpert_part(tree, folder, path, split))
    if not parts:
        wanted = ", ".join(name for names in CHEXPERT_TABLES.values() for name in names)
        raise ShardError(
            f"none of {wanted} (or .gz) in {tree} or a CheXpert… folder in it (its tables: {tables_in(tree)}): "
            "give --data the folder that holds train.csv, or the one that holds the batches of the full download"
        )
    images = pd.concat(parts, ignore_index=True)
    return Source(
        images=images,
        labels=MIMIC,
        counts={"images whose labels are all blank": int(images[list(MIMIC)].isna().all(axis=1).sum())},
    )


def _chexpert_part(tree: Tree, folder: str, path: str, split: str) -> pd.DataFrame:
    """The images of one table, which lies in `folder`."""
    what = f"the {split} table of CheXpert"
    table = read_table(tree, path, ["Path", *MIMIC], what, optional=["AP/PA"])  # the test table has no views
    where = posixpath.join(str(tree), path)
    found = [CHEXPERT_PATH.match(p) for p in filled(table["Path"], where)]
    if None in found:
        at = table.index[found.index(None)]
        raise ShardError(
            f"{where} lists {table['Path'][at]} in line {at}, which is not …/patient00001/study1/view1_….jpg"
        )
    pieces = pd.DataFrame(
        [m.groups() for m in found if m], columns=["part", "patient", "study", "view", "suffix"], index=table.index
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
        }
    )


def _chexpert_folders(tree: Tree, folder: str, pieces: pd.DataFrame) -> pd.Series:
    """The folder of each line's patient: train/, valid/ or test/ beside the table, else a batch of the full download."""
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


# NIH ChestX-ray14

NIH = (
    "Atelectasis",
    "Cardiomegaly",
    "Consolidation",
    "Edema",
    "Effusion",
    "Emphysema",
    "Fibrosis",
    "Hernia",
    "Infiltration",
    "Mass",
    "Nodule",
    "Pleural_Thickening",
    "Pneumonia",
    "Pneumothorax",
    "No Finding",
)
"""The fourteen findings as the table spells them, and what it says where there is none."""

NIH_SPLIT = {"train_val_list.txt": "train", "test_list.txt": "test"}


def nih(tree: Tree) -> Source:
    """NIH ChestX-ray14 (Wang et al. 2017): every finding is 1 where the table names it and 0 where it does not.

    Height and width are the table's, those of the radiographs before they were published as 1024 × 1024 px.
    """
    names = ("Data_Entry_2017_v2020.csv", "Data_Entry_2017.csv")
    path = find_table(tree, names)
    if path is None:
        raise ShardError(
            f"no {' or '.join(names)} (or .gz) in {tree} (its tables: {tables_in(tree)}): give --data its folder"
        )
    # the commas in OriginalImage[Width,Height] cut its name in two
    columns = [
        "Image Index",
        "Finding Labels",
        "Follow-up #",
        "Patient ID",
        "View Position",
        "OriginalImage[Width",
        "Height]",
    ]
    table = read_table(tree, path, columns, "the table of NIH ChestX-ray14")
    where = posixpath.join(str(tree), path)
    image, patient, visit = (filled(table[c], where) for c in ("Image Index", "Patient ID", "Follow-up #"))
    found = image.map(_nih_images(tree))
    split, counts = _nih_split(tree, image)
    frame = pd.DataFrame(
        {
            "image_id": image.str.removesuffix(".png"),
            "study_id": patient + "_" + visit,
            "patient_id": patient,
            "path": found.where(found.notna(), "images/" + image),
            "view": table["View Position"],
            "height": pixels(table["Height]"], where),
            "width": pixels(table["OriginalImage[Width"], where),
            "split": split,
            **_nih_labels(filled(table["Finding Labels"], where), where),
        }
    )
    return Source(images=frame, labels=NIH, counts=counts)


def _nih_labels(findings: pd.Series, where: str) -> dict[str, pd.Series]:
    """`Mass|Nodule` → 1 for both and 0 for the rest, float32, by finding."""
    kinds = {text: set(text.split("|")) for text in findings.unique()}
    if unknown := sorted(set().union(*kinds.values()) - set(NIH)):
        at = lines(findings.index[[unknown[0] in kinds[text] for text in findings]])
        raise ShardError(f"{where} names the finding {unknown[0]!r} in {at}: known are {', '.join(NIH)}")
    codes, texts = pd.factorize(findings)
    return {
        name: pd.Series(np.array([name in kinds[t] for t in texts], np.float32)[codes], findings.index) for name in NIH
    }


def _nih_images(tree: Tree) -> dict[str, str]:
    """Path of every image by its name: images_001/images/ … images_012/images/, or all in images/ or the tree itself."""
    found: dict[str, str] = {}
    for folder in reversed(["", *(name for name in tree.folders("") if name.startswith("images"))]):
        for place in dict.fromkeys((f"{folder}/images" if folder else "", folder)):
            found |= {name: posixpath.join(place, name) for name in tree.files(place)}
    return found


def _nih_split(tree: Tree, image: pd.Series) -> tuple[pd.Series, dict[str, int]]:
    """train or test by the published lists, null for images in neither; and how many those are."""
    listed: dict[str, str] = {}
    for name in (name for name in NIH_SPLIT if tree.exists(name)):
        try:
            names = tree.read(name).decode().split()
        except (OSError, UnicodeDecodeError) as error:
            raise ShardError(f"{name} in {tree} cannot be read ({error}): download it again") from error
        if both := listed.keys() & set(names):
            raise ShardError(
                f"{len(both):,} images (first: {min(both)}) are in both lists in {tree}: download them again"
            )
        listed |= dict.fromkeys(names, NIH_SPLIT[name])
    split = image.map(listed).astype(object)
    if not listed:
        return split, {}
    unknown = len(listed.keys() - set(image))
    return split, {
        "images in no list of the split": int(split.isna().sum()),
        "listed images that the table lacks": unknown,
    }


# Reading any of them

SOURCES: dict[str, Callable[..., Source]] = {"mimic": mimic, "chexpert": chexpert, "nih": nih, "table": any_table}


def read_source(name: str, tree: Tree | Path | str, options: dict[str, Any] | None = None) -> Source:
    """The images that source `name` lists in `tree`: one of `SOURCES`, or a function named `package.module:function`.

    `options` are the function's keyword arguments. Every row is checked, so that what comes back can be planned. Raises
    ShardError for whatever is wrong with the tree, its tables or the options.
    """
    tree = tree if isinstance(tree, Tree) else Tree(tree)
    options = options or {}
    function = SOURCES.get(name) or _imported(name)
    _check_options(name, function, options)
    if not tree.is_dir(""):
        raise ShardError(f"the source {tree} does not exist, or is no folder: give --data DIR or set CXRFAST_DATA")
    if name in SOURCES:
        return checked(function(tree, **options), tree)
    try:
        listed = function(tree, **options)
    except CxrfastError:
        raise
    except Exception as error:  # someone else's code: whatever it raises is a message, with the place to look at
        frames = traceback.extract_tb(error.__traceback__)
        code = getattr(function, "__code__", None)
        at = ([f for f in frames if code and f.filename == code.co_filename] or frames)[-1]
        raise ShardError(
            f"source {name} failed at {at.filename}:{at.lineno}: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(listed, Source):
        raise ShardError(
            f"source {name} returned {type(listed).__name__}: it must return a cxrfast.shards.sources.mimic.Source"
        )
    return checked(listed, tree)


def _imported(name: str) -> Callable[..., Source]:
    """The function behind `package.module:function`."""
    if ":" not in name:
        raise ShardError(f"source {name!r} is unknown: use {', '.join(SOURCES)} or package.module:function")
    try:
        function = pkgutil.resolve_name(name)
    except Exception as error:  # importing runs someone else's code
        raise ShardError(
            f"source {name} cannot be imported ({type(error).__name__}: {error}): install its package, or name its folder in "
            "PYTHONPATH"
        ) from error
    if not callable(function):
        raise ShardError(f"source {name} is no function but {type(function).__name__}")
    return function


def _check_options(name: str, function: Callable[..., Source], options: dict[str, Any]) -> None:
    """Raises ShardError for an option that the source does not take, and for one that it needs and was not given."""
    kinds = inspect.Parameter
    try:
        taken = list(inspect.signature(function).parameters.values())[1:]
    except (TypeError, ValueError) as error:
        raise ShardError(f"source {name} does not tell its arguments ({error}): name a Python function") from error
    if any(p.kind is kinds.VAR_KEYWORD for p in taken):
        return
    names = [p.name for p in taken if p.kind in (kinds.KEYWORD_ONLY, kinds.POSITIONAL_OR_KEYWORD)]
    if unknown := [option for option in options if option not in names]:
        known = ", ".join(map(_flag, names)) or "none"
        raise ShardError(f"{_flag(unknown[0])} is no option of source {name} (its options: {known})")
    if absent := [p.name for p in taken if p.default is kinds.empty and p.name in names and p.name not in options]:
        raise ShardError(f"source {name} needs {' and '.join(map(_flag, absent))}")


def with_defaults(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """The options of a source, those that were not given with the values that they then have."""
    function = SOURCES.get(name) or _imported(name)
    defaults = {p.name: p.default for p in inspect.signature(function).parameters.values()}
    return {**{key: value for key, value in defaults.items() if value is not inspect.Parameter.empty}, **options}


def _flag(option: str) -> str:
    return "--" + option.replace("_", "-")
