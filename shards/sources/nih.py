"""The images and labels that an NIH ChestX-ray14 tree lists."""

import posixpath
from collections.abc import Sequence

import numpy as np
import pandas as pd

from cxrfast.errors import ShardError
from cxrfast.shards.sources.ids import check_join, normal_id, normal_ids
from cxrfast.shards.sources.kept import kept_columns, notes_on_commas
from cxrfast.shards.sources.source import Source
from cxrfast.shards.sources.table_files import find_table, read_list, read_table, tables_in
from cxrfast.shards.sources.tables.text_columns import filled, lines, pixels
from cxrfast.shards.storage import Tree

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
"""The fourteen findings as the table spells them, and its word for none."""

NIH_SPLIT = {"train_val_list.txt": "train", "test_list.txt": "test"}


FILE = r"^0*(\d+)_\d+\.png$"
"""Published names of images: the patient's number with leading zeros, then the image's."""


def nih(tree: Tree, *, allow_unmatched: bool = False, keep: Sequence[str] = ()) -> Source:
    """NIH ChestX-ray14 (Wang et al. 2017): a finding is 1 if the table names it, else 0.

    Height and width are the table's: the size before publication, which scaled all images to 1024 × 1024 px.
    `allow_unmatched`: accept lists of the split that name other images than the table. `keep`: columns of the table to carry
    along.
    """
    names = ("Data_Entry_2017_v2020.csv", "Data_Entry_2017.csv")
    path = find_table(tree, names)
    if path is None:
        raise ShardError(
            f"no {' or '.join(names)} (or .gz) in {tree} (its tables: {tables_in(tree)}): give --data its folder"
        )
    columns = ["Image Index", "Finding Labels", "Follow-up #", "Patient ID", "View Position"]
    sizes = ["OriginalImage[Width", "Height]"]  # the comma splits the published name
    table = read_table(tree, path, list(dict.fromkeys((*columns, *sizes, *keep))), "the table of NIH ChestX-ray14")
    where = posixpath.join(str(tree), path)
    image, patient, visit = (normal_ids(table[c], where) for c in ("Image Index", "Patient ID", "Follow-up #"))
    patient = _patients(image, patient, where)
    found = image.map(_nih_images(tree))
    split, counts = _nih_split(tree, image, allow_unmatched)
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
            **(kept := kept_columns(table, keep)),
        }
    )
    return Source(images=frame, labels=NIH, counts=counts, kept=tuple(keep), notes=notes_on_commas(table, kept))


def _patients(image: pd.Series, patient: pd.Series, where: str) -> pd.Series:
    """Patients without leading zeros. Raises ShardError for one who is not the patient in the image's published name."""
    number = patient.str.replace(r"^0+(?=\d+$)", "", regex=True)
    named = image.str.extract(FILE)[0]
    if (wrong := named.notna() & (named != number)).any():
        at = patient.index[wrong]
        raise ShardError(
            f"{where} gives {image[at[0]]} the Patient ID {patient[at[0]]} in {lines(at)}: the name of the image says "
            f"{named[at[0]]}; download the table again"
        )
    return number


def _nih_labels(findings: pd.Series, where: str) -> dict[str, pd.Series]:
    """`Mass|Nodule` → 1 for both and 0 for the rest, float32, by finding."""
    kinds = {text: set(text.split("|")) for text in findings.unique()}
    if unknown := sorted(set().union(*kinds.values()) - set(NIH)):
        at = lines(findings.index[[unknown[0] in kinds[text] for text in findings]])
        raise ShardError(f"{where} names the finding {unknown[0]!r} in {at}: known are {', '.join(NIH)}")
    if both := sorted(text for text, names in kinds.items() if "No Finding" in names and len(names) > 1):
        at = lines(findings.index[findings == both[0]])
        raise ShardError(f"{where} names {both[0]!r} in {at}, a finding and none: download the table again")
    return {name: findings.map({t: float(name in kinds[t]) for t in kinds}).astype(np.float32) for name in NIH}


def _nih_images(tree: Tree) -> dict[str, str]:
    """{name: path} of every image in images_001/images/ … images_012/images/, images/ (also in itself) or the tree itself."""
    found: dict[str, str] = {}
    for folder in reversed(["", *(name for name in tree.folders("") if name.startswith("images"))]):
        for place in dict.fromkeys(
            (f"{folder}/images" if folder else "", f"{folder}/{folder}" if folder else "", folder)
        ):
            found |= {name: posixpath.join(place, name) for name in tree.files(place)}
    return found


def _nih_split(tree: Tree, image: pd.Series, allow_unmatched: bool) -> tuple[pd.Series, dict[str, int]]:
    """train or test by the published lists, null for images in neither; and how many images the lists miss or add."""
    listed: dict[str, str] = {}
    for name in (name for name in NIH_SPLIT if tree.exists(name)):
        names = [_stem(entry) for entry in read_list(tree, name)]
        if both := listed.keys() & set(names):
            raise ShardError(
                f"{len(both):,} images (first: {min(both)}) are in both lists in {tree}: download them again"
            )
        listed |= dict.fromkeys(names, NIH_SPLIT[name])
    stems = image.map(_stem)
    split = stems.map(listed).astype(object)
    if not listed:
        return split, {}
    sides = {"images": "the table", "table": "the lists of the split", "what": "images"}
    check_join(stems, pd.Series(list(listed)), allowed=allow_unmatched, **sides)
    unknown = len(listed.keys() - set(stems))
    return split, {
        "images in no list of the split": int(split.isna().sum()),
        "listed images that the table lacks": unknown,
    }


def _stem(name: str) -> str:
    """`00000001_000` for `images_001/images/00000001_000.png`, as other copies of the lists name it."""
    return normal_id(posixpath.basename(name)).removesuffix(".png")
