"""How a model came about, for its card: the data set, the steps before the networks, the training's settings.

In: cohort, recipe and configurations. Out: tables and lines of Markdown.
"""

from collections.abc import Sequence

from cxrfast.config import TrainConfig
from cxrfast.exports.card.checklist import TO_FILL_IN
from cxrfast.exports.card.cohort import UNKNOWN, Cohort, views_text
from cxrfast.runs.run import Run
from cxrfast.shards.format.recipe import ImageRecipe
from cxrfast.tables import Table


def label_limit(cohort: Cohort) -> str:
    if cohort.info is not None and cohort.info.source in ("mimic", "chexpert", "nih"):
        return (
            "In the published data set a program read the labels from radiology reports, so they hold its errors and what reports "
            "leave out; a finding that a report does not mention counts by the label policies below."
        )
    return f"How the labels were made, by whom and from what, is {UNKNOWN} to cxrfast: {TO_FILL_IN}."


SOURCES = {
    "mimic": "MIMIC-CXR-JPG, as its tables and folders are laid out",
    "chexpert": "CheXpert, as its tables and folders are laid out",
    "nih": "NIH ChestX-ray14, as its tables and folders are laid out",
    "table": "a table of the author's own",
}


def data_table(cohort: Cohort) -> Table:
    info, config = cohort.info, cohort.run.config
    folds = "five folds, dealt by patient" if info is None or not info.own_folds else "folds given by the source"
    split = {"folds": folds, "official": "the official one of the data set (train, validate, test)"}.get(
        config.split, UNKNOWN
    )
    shared = "patients may be in two parts (--allow-shared-patients)" if config.allow_shared_patients else "patients"
    source = whole = labels_from = UNKNOWN
    if info is not None:
        source = SOURCES.get(info.source, info.source)
        whole = f"{info.images:,} images, {info.studies:,} studies, {info.patients:,} patients"
        labels_from = info.labels_from.split(" sha256:")[0] or "not replaced"
    rows = [
        ["Data set", source],
        ["Id of the shard set", config.set_id],
        ["The whole set", whole],
        ["Views", views_text(cohort)],
        ["Split", split],
        ["Parts are disjoint by", shared],
        ["Labels replaced from", labels_from],
        ["Sites, dates, devices, age, sex", UNKNOWN],
        ["Consent, ethics, de-identification", f"{UNKNOWN} to cxrfast: to be filled in by the author"],
    ]
    return Table("", ["", "Value"], rows, text=["Value"])


GREYS = {
    "none": "8-bit images as they are; deeper ones by their full range",
    "mimic": "deeper images to 8 bits as MIMIC-CXR-JPG did (histogram equalised)",
    "window": "deeper images by the window that the file gives",
}


def preprocessing_steps(recipe: ImageRecipe, scales: Sequence[int], mean: str, std: str) -> str:
    """From a film to the network, as a numbered list. mean, std: of the network's three channels."""
    shape = {
        "squash": "both sides become the scale, whatever the aspect",
        "pad": "the longer side becomes the scale, centred on a black square",
    }[recipe.resize]
    codec = (
        f"encoded as grey JPEG of quality {recipe.quality} ({recipe.dct} DCT) and decoded, since the networks were trained on such pixels"
        if recipe.codec == "jpeg"
        else "kept uncompressed"
    )
    steps = [
        f"Decode to grey (`grey: {recipe.grey}`): {GREYS[recipe.grey]}.",
        f"Resize to {sides_text(scales)} (`resize: {recipe.resize}`): {shape}; area averaging where an axis shrinks, bilinear where it grows.",
        f"`codec: {recipe.codec}`: {codec}.",
        f"In the network: grey / 255, copied to three channels, minus {mean}, over {std} (mean and standard deviation of each).",
    ]
    return "".join(f"{number}. {step}\n" for number, step in enumerate(steps, 1)) + "\n"


NOT_SHOWN = (
    *("set_id", "labels", "weights", "scale", "fold", "arch", "split", "views", "limit", "subset"),
    *(
        "policy",
        "label_policies",
        "blank",
        "unlabelled",
        "allow_shared_patients",
        "allow_partial",
        "weighted_validation",
    ),
)
"""Fields of TrainConfig that other chapters tell."""

SETTINGS = {
    "positive_weights": "Positives weighted by negatives / positives",
    "global_batch": "Images per optimiser step",
    "micro_batch": "Images per forward pass",
    "epochs": "Epochs at most",
    "factor": "Factor of the learning rate on a plateau",
    "patience": "Plateau: epochs without a lower validation loss",
    "stop_after": "Training stops after such epochs",
    "degrees": "Rotation, ± degrees",
    "flip": "Probability of a horizontal flip",
    "sizes": "Smaller images first, side x epochs",
    "sync_bn": "BatchNorm over the batches of all GPUs",
    "order": "Order of rows",
    "optimizer": "Optimiser",
}
"""What readers call fields of TrainConfig; others have the name of the field."""


def recipe_table(runs: Sequence[Run]) -> Table:
    """Every other field of the configurations: one value if all networks share it, else by network."""
    records = []
    for name in (name for name in TrainConfig.__dataclass_fields__ if name not in NOT_SHOWN):
        by_value: dict[str, list[str]] = {}
        for run in runs:
            by_value.setdefault(_words(getattr(run.config, name)), []).append(run.name)
        shared = len(by_value) == 1
        told = [value if shared else f"{value}: {', '.join(names)}" for value, names in by_value.items()]
        records.append([SETTINGS.get(name, name.replace("_", " ").capitalize()), "; ".join(told)])
    note = (
        "Loss: binary cross-entropy with logits over the labels that count. The weights used are those of the epoch with the "
        "lowest validation loss."
    )
    return Table("", ["Setting", "Value"], records, note, text=["Value"])


def _words(value: object) -> str:
    if isinstance(value, tuple):
        return ", ".join("=".join(map(str, one)) if isinstance(one, tuple) else str(one) for one in value) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def sides_text(scales: Sequence[int]) -> str:
    """`256, 512 and 1024 px`."""
    *others, last = map(str, scales)
    return f"{', '.join(others)} and {last} px" if others else f"{last} px"
