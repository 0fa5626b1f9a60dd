"""The images that a MIMIC-CXR-JPG tree lists, with the labels of their studies."""

import posixpath
import re
from collections.abc import Sequence

import numpy as np
import pandas as pd

from cxrfast.errors import ShardError
from cxrfast.labels import EARLIER, MIMIC
from cxrfast.shards.format.rows import REFERENCE
from cxrfast.shards.sources.ids import check_join, normal_ids
from cxrfast.shards.sources.kept import kept_columns, notes_on_commas
from cxrfast.shards.sources.source import Source
from cxrfast.shards.sources.table_files import find_table, read_table, tables_in
from cxrfast.shards.sources.tables.text_columns import lines, notes_on_words, pixels, raw_labels
from cxrfast.shards.storage import Tree

IN_PATHS = {"dicom_id": r"\.(?:jpe?g|png|dcm)$", "subject_id": r"^p(?=\d+$)", "study_id": r"^s(?=\d+$)"}
"""Columns of ids, and what ids have more in paths: the letter of a folder, the suffix of a file."""


def mimic(tree: Tree, *, labels: str = "chexpert", allow_unmatched: bool = False, keep: Sequence[str] = ()) -> Source:
    """MIMIC-CXR-JPG 2.0.0 or 2.1.0 (Johnson et al. 2019), labels by study, the official split.

    `labels`: the labeller whose table is read, `chexpert` or `negbio`. If the tree has the radiologist's table of 2.1.0, its
    labels become reference columns. `allow_unmatched`: accept tables that name other studies or images than the metadata.
    `keep`: columns of the metadata to carry along.
    """
    if labels not in ("chexpert", "negbio"):
        raise ShardError(f"--labels {labels!r} is unknown: use chexpert or negbio")
    columns = ["dicom_id", "subject_id", "study_id", "ViewPosition", "Rows", "Columns"]
    metadata = _mimic_table(tree, "metadata", list(dict.fromkeys((*columns, *keep))))
    split = _mimic_table(tree, "split", ["dicom_id", "split"], ["subject_id", "study_id"])
    labelled = _mimic_table(tree, labels, ["study_id", *MIMIC], ["subject_id"])
    if not tree.is_dir("files"):
        raise ShardError(f"{tree} has no folder files/: give --data the folder that holds files/ and the CSV tables")
    for name, other, key, what in ((labels, labelled, "study_id", "studies"), ("split", split, "dicom_id", "images")):
        _once(other[key], f"the {name} table in {tree}")
        _check_same(metadata, other, key, f"the {name} table in {tree}")
        sides = {"images": "the metadata table", "table": f"the {name} table"}
        check_join(metadata[key], other[key], **sides, what=what, allowed=allow_unmatched)
    image, subject, study = metadata["dicom_id"], metadata["subject_id"], metadata["study_id"]
    values = {name: raw_labels(labelled[name], f"the {labels} table in {tree}").to_numpy() for name in MIMIC}
    raw = pd.DataFrame(values, index=labelled["study_id"])
    reference = _radiologist(tree)
    sides = {"images": "the radiologist's table", "table": "the metadata table", "what": "studies"}
    check_join(
        reference.index, study[study.isin(reference.index)], **sides, allowed=allow_unmatched
    )  # reads a part only
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
    kept = kept_columns(metadata, keep)
    by_study = [raw.reindex(study), reference.add_prefix(REFERENCE).reindex(study)]
    frame = pd.concat([frame, *(values.set_axis(metadata.index) for values in by_study)], axis=1).assign(**kept)
    studies, with_labels, read = (set(ids) for ids in (study, raw.index, reference.index))
    counts = {
        "studies without a label row": len(studies - with_labels),
        "label rows without an image": len(with_labels - studies),
        "images without an official split": int(frame["split"].isna().sum()),
        "label rows that are all blank": int(raw.isna().all(axis=1).sum()),
        "studies read by a radiologist": len(read & studies),
        "studies read by a radiologist, without an image": len(read - studies),
    }
    return Source(
        images=frame,
        labels=MIMIC,
        counts=counts,
        notes=(*notes_on_words(labelled[list(MIMIC)]), *notes_on_commas(metadata, kept)),
        kept=tuple(keep),
    )


def _check_same(metadata: pd.DataFrame, other: pd.DataFrame, key: str, where: str) -> None:
    """Raises ShardError if a table gives a study or image to another patient or study than the metadata does."""
    place = {id_: n for n, id_ in enumerate(metadata[key].tolist())}
    same = np.array([place.get(id_, -1) for id_ in other[key].tolist()])
    for name in (name for name in ("subject_id", "study_id") if name != key and name in other):
        expected, found = metadata[name].to_numpy(object)[same], other[name].to_numpy(object)
        if (wrong := (same >= 0) & (expected != found)).any():
            at, of = other.index[wrong], other[key][wrong].iloc[0]
            raise ShardError(
                f"{where} gives {key} {of} the {name} {found[wrong][0]} in {lines(at)}, and the metadata "
                f"{expected[wrong][0]}: use tables of the same release"
            )


def _mimic_table(tree: Tree, kind: str, columns: list[str], optional: list[str] | None = None) -> pd.DataFrame:
    """Read columns of mimic-cxr-2.x.y-KIND.csv, with normal ids; the latest version wins, uncompressed before .gz."""
    path = _mimic_path(tree, kind)
    if path is None:
        raise ShardError(
            f"no mimic-cxr-2.0.0-{kind}.csv or .csv.gz in {tree} (its tables: {tables_in(tree)}): "
            "download it, or restore its published name"
        )
    table = read_table(tree, path, columns, f"the {kind} table of MIMIC-CXR-JPG", optional=optional or ())
    found = [name for name in IN_PATHS if name in table]
    return table.assign(
        **{name: normal_ids(table[name], f"the {kind} table in {tree}", IN_PATHS[name]) for name in found}
    )


def _mimic_path(tree: Tree, kind: str) -> str | None:
    pattern = re.compile(rf"mimic-cxr-(2(?:\.\d+)*)-{kind}\.csv")
    versions = {m[1] for name in tree.files("") if (m := pattern.match(name))}
    latest = sorted(versions, key=lambda v: [int(part) for part in v.split(".")], reverse=True)
    return find_table(tree, [f"mimic-cxr-{version}-{kind}.csv" for version in latest])


def _radiologist(tree: Tree) -> pd.DataFrame:
    """The radiologist's labels of the test set, float32, by study; no columns without the table."""
    path = _mimic_path(tree, "test-set-labeled")
    if path is None:
        return pd.DataFrame(index=pd.Index([], dtype=object))
    what = "the radiologist's table of MIMIC-CXR-JPG 2.1.0"
    labelled = read_table(tree, path, ["study_id"], what, optional=[*MIMIC, *EARLIER])
    labelled = labelled.rename(columns={old: new for old, new in EARLIER.items() if new not in labelled})
    where = posixpath.join(str(tree), path)
    labelled["study_id"] = normal_ids(labelled["study_id"], where, IN_PATHS["study_id"])
    _once(labelled["study_id"], where)
    found = [name for name in MIMIC if name in labelled]
    if not found:
        raise ShardError(f"{where} has no label column: is it {what}?")
    values = {name: raw_labels(labelled[name], where).to_numpy() for name in found}
    return pd.DataFrame(values, index=labelled["study_id"])


def _once(column: pd.Series, where: str) -> None:
    if repeated := int(column.duplicated().sum()):
        raise ShardError(f"{where} lists {repeated:,} entries twice: download it again")
