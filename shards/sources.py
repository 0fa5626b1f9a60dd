"""Source trees: each source is one function that takes the folder and returns the images it lists, with their labels.

Tables are read, images are not. A new source is one more function in `SOURCES`.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from cxrfast.errors import ShardError
from cxrfast.labels import MIMIC


@dataclass(frozen=True, kw_only=True)
class Source:
    """What a source tree lists."""

    images: pd.DataFrame
    """image_id, study_id, patient_id, path, view, height, width, split, then one float column a label."""
    labels: tuple[str, ...]
    counts: dict[str, int]
    """What a person should know of the tables: for instance, how many studies have no labels."""


def mimic(data: Path) -> Source:
    """MIMIC-CXR-JPG 2.0.0 or 2.1.0 (Johnson et al. 2019), packed or unpacked CSVs, CheXpert labels by study."""
    labels = _table(data, "chexpert", ["study_id", *MIMIC])
    metadata = _table(data, "metadata", ["dicom_id", "subject_id", "study_id", "ViewPosition", "Rows", "Columns"])
    split = _table(data, "split", ["dicom_id", "split"])
    if not (data / "files").is_dir():
        raise ShardError(f"{data} has no folder files/: give --data the folder that holds files/ and the CSV tables")
    for table, key, what in ((labels, "study_id", "chexpert"), (split, "dicom_id", "split")):
        if repeated := int(table[key].duplicated().sum()):
            raise ShardError(f"the {what} table in {data} lists {repeated:,} entries twice: download it again")
    if (blank := metadata[["dicom_id", "subject_id", "study_id"]].isna().any(axis=1)).any():
        raise ShardError(f"the metadata table in {data} lacks ids in {int(blank.sum()):,} lines: download it again")
    unlabelled = ~metadata["study_id"].isin(labels["study_id"])
    images = metadata.merge(split, how="left", on="dicom_id")
    images = images.merge(labels, how="left", on="study_id")
    subject, study = images["subject_id"].astype(str), images["study_id"].astype(str)
    path = "files/p" + subject.str[:2] + "/p" + subject + "/s" + study + "/" + images["dicom_id"] + ".jpg"
    frame = pd.DataFrame(
        {
            "image_id": images["dicom_id"],
            "study_id": study,
            "patient_id": subject,
            "path": path,
            "view": images["ViewPosition"],
            "height": images["Rows"],
            "width": images["Columns"],
            "split": images["split"],
            **{name: images[name] for name in MIMIC},
        }
    )
    counts = {
        "studies without a label row": int(metadata.loc[unlabelled, "study_id"].nunique()),
        "label rows that are all blank": int(labels[list(MIMIC)].isna().all(axis=1).sum()),
    }
    return Source(images=frame, labels=MIMIC, counts=counts)


SOURCES: dict[str, Callable[[Path], Source]] = {"mimic": mimic}


def read_source(name: str, data: Path) -> Source:
    """The images that source `name` lists in the folder `data`. Raises ShardError for whatever is wrong with its tables."""
    if not data.is_dir():
        raise ShardError(f"the source folder {data} does not exist: give --data DIR or set CXRFAST_DATA")
    if name not in SOURCES:
        raise ShardError(f"source {name!r} is unknown: use {', '.join(SOURCES)}")
    source = SOURCES[name](data)
    ids = source.images["image_id"]
    if not len(ids):
        raise ShardError(f"the tables in {data} list no images")
    if ids.duplicated().any():
        raise ShardError(f"the tables in {data} list image {ids[ids.duplicated()].iloc[0]} twice: download them again")
    for label in source.labels:
        values = source.images[label]
        known = values.isna() | values.isin((1.0, 0.0, -1.0))
        if not known.all():
            raise ShardError(
                f"the tables in {data} hold {values[~known].iloc[0]!r} for {label}: only 1, 0, -1 and blank are known"
            )
        source.images[label] = values.astype(np.float32)
    return source


def _table(data: Path, kind: str, columns: list[str]) -> pd.DataFrame:
    """The needed columns of mimic-cxr-2.x.y-KIND.csv or .csv.gz."""
    found = sorted(data.glob(f"mimic-cxr-2.*-{kind}.csv")) or sorted(data.glob(f"mimic-cxr-2.*-{kind}.csv.gz"))
    if not found:
        others = sorted(p.name for p in data.glob("*.csv*"))
        raise ShardError(
            f"no mimic-cxr-2.0.0-{kind}.csv or .csv.gz in {data} (its tables: {', '.join(others) or 'none'}): "
            "download it, or give it back its published name"
        )
    text = {name: str for name in ("dicom_id", "ViewPosition", "split")}
    try:
        header = pd.read_csv(found[-1], nrows=0).columns
        if absent := [c for c in columns if c not in header]:
            raise ShardError(
                f"{found[-1]} lacks the columns {', '.join(absent)}: is it the {kind} table of MIMIC-CXR-JPG?"
            )
        return pd.read_csv(found[-1], usecols=columns, dtype=text)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise ShardError(f"{found[-1]} cannot be read as a CSV table ({error}): download it again") from error
