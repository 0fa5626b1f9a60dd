"""Small builds of shard sets, and the trees that they read."""

from pathlib import Path

from cxrfast.labels import MIMIC
from cxrfast.shards.build import build as build_set
from cxrfast.shards.building.report import Report


def build(data: Path, out: Path, scales: list[int], **options) -> Report:
    return build_set(data, out, scales, **{"workers": 1, "quiet": True, **options})


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
