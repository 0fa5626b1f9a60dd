"""Shard sets that tests build and relabel, and the trees that they read."""

import dataclasses
import hashlib
from pathlib import Path

import numpy as np
import pandas as pd
from damage import contents
from pictures import noise
from PIL import Image

from cxrfast.labels import MIMIC
from cxrfast.shards.build import build as build_set
from cxrfast.shards.building.build_report import Report
from cxrfast.shards.format.info import read_set
from cxrfast.shards.format.rows import read_rows
from cxrfast.shards.upkeep.relabel import relabel
from cxrfast.shards.upkeep.verify import verify

REAL = Path(__file__).parents[3] / "shared" / "real"
"""Real radiographs, where they are at hand."""


def build(data: Path, out: Path, scales: list[int], **options) -> Report:
    return build_set(data, out, scales, **{"workers": 1, **options})


def many(tree: Path, n: int, images: list[Path]) -> Path:
    """A tree of `n` images that are links to a few, each of a patient of its own: many shards for little work."""
    (tree / "files").mkdir(parents=True)
    lines = {
        "chexpert": [",".join(["subject_id", "study_id", *MIMIC])],
        "metadata": ["dicom_id,subject_id,study_id,ViewPosition,Rows,Columns"],
        "split": ["dicom_id,split"],
    }
    for i in range(n):
        subject, study = 10_000_000 + i, 50_000_000 + i
        path = tree / f"files/p10/p{subject}/s{study}/image-{i}.jpg"
        path.parent.mkdir(parents=True)
        path.hardlink_to(images[i % len(images)])
        lines["chexpert"].append(f"{subject},{study},1.0" + "," * (len(MIMIC) - 1))
        lines["metadata"].append(f"image-{i},{subject},{study},AP,128,105")
        lines["split"].append(f"image-{i},train")
    for kind, text in lines.items():
        (tree / f"mimic-cxr-2.0.0-{kind}.csv").write_text("\n".join(text) + "\n")
    return tree


WRITTEN = {"rows.parquet", "set.json", "SHA256SUMS"}
MIMIC_CHEXPERT = "mimic-cxr-2.0.0-chexpert.csv.gz"


def rows_of(folder: Path) -> pd.DataFrame:
    return read_rows(folder / "rows.parquet")


def chexpert(tree: Path) -> pd.DataFrame:
    return pd.read_csv(tree / MIMIC_CHEXPERT)


def is_as_planned(folder: Path, tiny_set: Path, table: str | Path) -> bool:
    """Is the set unchanged after relabelling with its own labels, except for `labels_from`?"""
    name = str(table).partition("::")[0].rpartition("/")[2]
    info = read_set(folder)
    file, _, digest = info.labels_from.partition(" sha256:")
    if "://" not in str(table):
        assert digest == hashlib.sha256(Path(table).read_bytes()).hexdigest()
    tars = [{n: d for n, d in contents(f).items() if n not in WRITTEN} for f in (folder, tiny_set)]
    return (
        (file, len(digest)) == (name, 64)
        and dataclasses.replace(info, labels_from="") == read_set(tiny_set)
        and rows_of(folder).equals(rows_of(tiny_set))
        and tars[0] == tars[1]
        and verify(folder).problems == []
    )


def other_labels(table: pd.DataFrame) -> pd.DataFrame:
    """The same studies, with other values for every label."""
    rng = np.random.default_rng(7)
    return table.assign(**{name: rng.choice([1.0, 0.0, -1.0, np.nan], len(table)) for name in MIMIC})


def write_table(tree: Path, patients: list[str], **columns: list) -> Path:
    """A tree of small noise images, i00.jpg and so on, with a table t.csv: path, patient_id and `columns`."""
    tree.mkdir(parents=True, exist_ok=True)
    names = [f"i{n:02d}.jpg" for n in range(len(patients))]
    for n, name in enumerate(names):
        Image.fromarray(noise(32, 32, n)).save(tree / name)
    pd.DataFrame({"path": names, "patient_id": patients, **columns}).to_csv(tree / "t.csv", index=False)
    return tree


def table_arguments(tree: Path, out: Path, *labels: str) -> list[str]:
    """Arguments of `cxrfast shard` for a tree that `write_table` wrote."""
    named = [f"--label={label}" for label in labels]
    return [
        "--data",
        str(tree),
        "--out",
        str(out),
        "--source=table",
        "--table=t.csv",
        "--scale=32",
        "--workers=1",
        *named,
    ]


def relabel_rows(
    shards: Path, tmp_path: Path, changed: dict[tuple[int, str], float], dropped: tuple[str, ...] = ()
) -> None:
    """Relabel the set with its own labels, except those in `changed`, by row and label; `dropped` labels are left out."""
    rows = read_rows(shards / "rows.parquet").drop(columns=list(dropped))
    for (row, label), value in changed.items():
        rows.loc[row, label] = value
    names = [name for name in rows.columns[12:] if not name.startswith("radiologist/")]
    table = tmp_path / "labels.csv"
    rows[["image_id", *names]].rename(columns={"image_id": "dicom_id"}).to_csv(table, index=False)
    relabel(shards, table, labels=names)
