"""The model card of an export: what the networks are, what they were trained on, how good they are, and what is not known.

In: the exported ensemble and its runs. Out: Markdown with the headings of Mitchell et al. 2019, "Model cards for model
reporting". Nothing is invented: what the runs do not tell is unknown, or for the author to fill in. Names from outside, such as
labels, are text and never markup.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np
import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined

from cxrfast import __version__, metrics
from cxrfast.analysis.join import rules_note
from cxrfast.analysis.marks import footnotes, marked
from cxrfast.config import TrainConfig
from cxrfast.inference.checklist import TODO, checklist
from cxrfast.inference.cohort import UNKNOWN, Cohort, findings_table, parts_table, read_cohort, views_text
from cxrfast.inference.description import Description
from cxrfast.inference.ensemble import Member, ScaleEnsemble
from cxrfast.inference.formats import BATCHES, BOUND, Difference
from cxrfast.inference.scorecard import Scorecard, auroc_table, score, thresholds_table
from cxrfast.models.classifier import MEAN, STD
from cxrfast.runs.lineage import origin_of
from cxrfast.runs.remarks import remarks_on
from cxrfast.runs.run import Run
from cxrfast.shards.format.recipe import ImageRecipe
from cxrfast.tables import Table, markdown_text
from cxrfast.thresholds import YOUDEN
from cxrfast.units import counted


@dataclass(frozen=True)
class Facts:
    """What a card is made of."""

    ensemble: ScaleEnsemble
    description: Description
    runs: Mapping[str, Run]
    """By name of the member."""
    differences: Mapping[tuple[str, str], Difference | None]
    """By member and format; None: not compared."""
    files: Mapping[str, int]
    """Bytes of each file of the export, by relative path."""

    def groups(self) -> dict[str, dict[int, Run]]:
        """By name of the group, then by fold."""
        found: dict[str, dict[int, Run]] = {}
        for member in self.ensemble.members:
            run = self.runs[member.name]
            found.setdefault(run.folder.parent.name, {})[member.fold] = run
        return found

    def by_fold(self) -> dict[int, list[Run]]:
        """By fold: the run of each scale, ascending."""
        return {
            fold: [self.runs[member.name] for member in self.ensemble.members if member.fold == fold]
            for fold in self.ensemble.folds
        }


def card_text(facts: Facts) -> str:
    """The model card, Markdown. Raises RunError if the runs' rows or predictions are damaged."""
    ensemble, first = facts.ensemble, next(iter(facts.runs.values()))
    of_folds = facts.by_fold()
    cohort = read_cohort({fold: runs[0] for fold, runs in of_folds.items()})
    scores = score(of_folds, ensemble.weights, ensemble.thresholds.rule if ensemble.thresholds else YOUDEN)
    lines = _lines(facts)
    notes = footnotes(lines)
    heads = list(marked({name: _scale_name(facts, name) for name in facts.groups()}, lines).values())
    formats = sorted({kind for _, kind in facts.differences})
    values = {
        "todo": TODO,
        "archs": sorted({member.network.arch for member in ensemble.members}),
        "summary": f"{counted(len(ensemble.labels), 'finding')} at {_sides(ensemble.scales)}",
        "overview": _overview(facts, cohort, scores).markdown(),
        "needs_code": "",
        "formats": formats,
        "example": facts.description.members[0],
        "outputs": len(ensemble.labels),
        "mean": ", ".join(map(str, MEAN)),
        "std": ", ".join(map(str, STD)),
        "networks": _networks(facts, lines).markdown(),
        "combination": _combination(ensemble),
        "weights_table": _weights(ensemble, heads).markdown() if len(ensemble.scales) > 1 else "",
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "version": __version__,
        "label_limit": _label_limit(cohort),
        "weighted": first.config.positive_weights,
        "data": _data(cohort).markdown(),
        "parts": parts_table(cohort).markdown(),
        "findings": findings_table(cohort).markdown(),
        "rules": _paragraphs(rules_note(facts.groups())),
        "preprocessing": _preprocessing(ensemble.recipe, ensemble.scales),
        "recipe": _recipe(list(facts.runs.values())).markdown(),
        "auroc": auroc_table(scores, heads).markdown(),
        "own_rows": _own_rows(ensemble),
        "rule": f"`{ensemble.thresholds.rule}`" if ensemble.thresholds else "",
        "thresholds": thresholds_table(scores).markdown(),
        "thresholds_note": _thresholds_note(ensemble),
        "external": "None is known to cxrfast.",
        "remarks": _paragraphs(notes) if notes else "None.",
        "files": _files(facts.files).markdown(),
        "equality": _equality(facts).markdown() if facts.differences else "",
        "batches": ", ".join(map(str, BATCHES[:-1])) + f" and {BATCHES[-1]}",
        "bound": f"{BOUND:g}",
        "versions": Table(
            "", ["Library", "Version"], list(map(list, facts.description.versions.items())), text=["Version"]
        ).markdown(),
        "checklist": checklist(first, ensemble, formats, cohort).markdown(),
    }
    environment = Environment(
        loader=PackageLoader("cxrfast.inference", "."),
        undefined=StrictUndefined,
        autoescape=False,  # Markdown: every text from outside goes through `markdown_text`
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    stripped = {name: value.strip() if isinstance(value, str) else value for name, value in values.items()}
    return environment.get_template("card.md.j2").render(stripped)


def _paragraphs(text: str) -> str:
    """Plain lines as Markdown paragraphs."""
    return "".join(f"{markdown_text(line)}\n\n" for line in text.split("\n") if line.strip())


def _scale_name(facts: Facts, group: str) -> str:
    return f"{next(iter(facts.groups()[group].values())).config.scale} px"


def _sides(scales: Sequence[int]) -> str:
    """`256, 512 and 1024 px`."""
    *others, last = map(str, scales)
    return f"{', '.join(others)} and {last} px" if others else f"{last} px"


def _lines(facts: Facts) -> pd.DataFrame:
    """A line per network: name of the group, start, fold, remark."""
    remarks = remarks_on(facts.runs.values())
    return pd.DataFrame(
        [
            {
                "name": run.folder.parent.name,
                "start": origin_of(run),
                "fold": run.config.fold,
                "remark": remarks[run.folder],
            }
            for run in facts.runs.values()
        ]
    )


def _overview(facts: Facts, cohort: Cohort, scores: Scorecard) -> Table:
    ensemble = facts.ensemble
    means, shared = metrics.over_findings([*scores.scales.values(), scores.ensemble])
    images = len(np.unique(np.concatenate([rows["row"] for rows in cohort.rows.values()])))
    what = f"{counted(len(ensemble.scales), 'scale')} × {counted(len(ensemble.folds), 'fold')}"
    return Table(
        "",
        ["", "Value"],
        [
            ["Findings", ", ".join(ensemble.labels)],
            ["Networks", f"{len(ensemble.members)}: {what}"],
            ["Architecture", ", ".join(sorted({member.network.arch for member in ensemble.members}))],
            ["Images used", f"{images:,}"],
            ["Test AUROC, mean over findings", f"{means[-1].mean():.3f}" if shared else "undefined"],
            ["External validation", "none known"],
        ],
        text=["Value"],
    )


def _networks(facts: Facts, lines: pd.DataFrame) -> Table:
    signs = marked({name: name for name in facts.groups()}, lines)
    records = []
    for member in facts.ensemble.members:
        run = facts.runs[member.name]
        group, _, fold = member.name.rpartition("/")
        best = _best_epoch(run)
        records.append(
            [
                f"{signs[group]}/{fold}",
                member.network.arch,
                f"{member.scale:,}",
                str(member.fold),
                f"{_parameters(member):,}",
                origin_of(run),
                f"{len(run.metrics()) or UNKNOWN}",
                UNKNOWN if best is None else str(best),
            ]
        )
    heads = ["Network", "Architecture", "Scale, px", "Fold", "Parameters", "First weights", "Epochs", "Epoch used"]
    return Table(
        "",
        heads,
        records,
        "Epoch used: the one with the lowest validation loss, counted from 1.",
        text=["Architecture", "First weights"],
    )


def _parameters(member: Member) -> int:
    return sum(parameter.numel() for parameter in member.network.parameters())


def _best_epoch(run: Run) -> int | None:
    """Number of the epoch with the lowest validation loss, from 1; None if no epoch has one."""
    losses = {line["epoch"] + 1: line.get("val_loss") for line in run.metrics()}
    known = {epoch: loss for epoch, loss in losses.items() if loss is not None}
    return min(known, key=known.__getitem__) if known else None


def _combination(ensemble: ScaleEnsemble) -> str:
    folds = "the mean over the folds of " if len(ensemble.folds) > 1 else ""
    if len(ensemble.scales) == 1:
        return f"The model's probability of a finding is {folds}its network's probability, σ(logit).\n"
    return (
        f"The model's probability of a finding is {folds}Σ w · σ(logit) over the scales. The weights w of each finding and fold were "
        "fitted on the logits of that fold's validation rows (stacking, Haque et al. 2023); `model.json` holds them.\n"
    )


def _weights(ensemble: ScaleEnsemble, heads: Sequence[str]) -> Table:
    mean = np.mean(list(ensemble.weights.values()), axis=0)
    return Table(
        "",
        ["Finding, weights (mean over folds)", *heads],
        [[label, *(f"{w:.2f}" for w in row)] for label, row in zip(ensemble.labels, mean, strict=True)],
    )


def _label_limit(cohort: Cohort) -> str:
    if cohort.info is not None and cohort.info.source in ("mimic", "chexpert", "nih"):
        return (
            "Labels were read from radiology reports by a program, so they hold its errors and what reports leave out; a finding "
            "that a report does not mention counts by the label policies below."
        )
    return f"How the labels were made, by whom and from what, is {UNKNOWN} to cxrfast: {TODO}."


SOURCES = {
    "mimic": "MIMIC-CXR-JPG, as its tables and folders are laid out",
    "chexpert": "CheXpert, as its tables and folders are laid out",
    "nih": "NIH ChestX-ray14, as its tables and folders are laid out",
    "table": "a table of the author's own",
}


def _data(cohort: Cohort) -> Table:
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


def _preprocessing(recipe: ImageRecipe, scales: Sequence[int]) -> str:
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
        f"Resize to {_sides(scales)} (`resize: {recipe.resize}`): {shape}; area averaging where an axis shrinks, bilinear where it grows.",
        f"`codec: {recipe.codec}`: {codec}.",
        "In the network: grey / 255, copied to three channels, minus "
        f"{', '.join(map(str, MEAN))}, over {', '.join(map(str, STD))} (ImageNet's mean and standard deviation).",
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


def _recipe(runs: Sequence[Run]) -> Table:
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


def _own_rows(ensemble: ScaleEnsemble) -> str:
    if len(ensemble.folds) == 1:
        return "Test rows served neither training nor the choice of epoch, weights or thresholds."
    return (
        "Each fold's networks were tested on that fold's test rows, which served neither their training nor the choice of epoch, "
        "weights or thresholds. The exported model averages the folds; every row of the set trained, validated or tested one of "
        "them, so the average itself can only be tested on other data."
    )


def _thresholds_note(ensemble: ScaleEnsemble) -> str:
    several = len(ensemble.folds) > 1
    text = "PPV and NPV hold at the prevalence of the test rows. – means undefined. Intervals: not computed."
    if several:
        text = (
            "The threshold is that of the mean over folds (the mean of the folds' thresholds as log-odds). Validation values are "
            "means over folds; test counts are sums over folds, each fold by its own threshold on its own test rows. "
            + text
        )
    return text


def _files(files: Mapping[str, int]) -> Table:
    from cxrfast.units import size

    return Table("", ["File", "Size"], [[name, size(number)] for name, number in sorted(files.items())])


def _equality(facts: Facts) -> Table:
    records = []
    for (member, kind), difference in facts.differences.items():
        if difference is None:
            told = ["not compared: onnxruntime was not installed", NONE, NONE]
        else:
            told = [f"{difference.largest:.2g}", f"{difference.bound:.2g}", f"{difference.logit:.3g}"]
        records.append([member, kind, *told])
    heads = ["Network", "Format", "Largest difference of a logit", "Bound", "Largest logit"]
    return Table("", heads, records, text=["Format"])


NONE = "–"
