"""The model card of an export: what the networks are, what they were trained on, how good they are, and what is not known.

In: the exported ensemble and its runs. Out: Markdown with the headings of Mitchell et al. 2019, "Model cards for model
reporting". Nothing is invented: what the runs do not tell is unknown, or for the author to fill in. Names from outside, such as
labels, are text and never markup.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined

from cxrfast import __version__, metrics
from cxrfast.analysis.join import rules_note
from cxrfast.analysis.marks import footnotes, marked
from cxrfast.exports.card.checklist import TO_FILL_IN, checklist
from cxrfast.exports.card.cohort import UNKNOWN, Cohort, findings_table, parts_table, read_cohort
from cxrfast.exports.card.external import Validation, validation_table, validations
from cxrfast.exports.card.provenance import data_table, label_limit, preprocessing_steps, recipe_table, sides_text
from cxrfast.exports.card.scorecard import Scorecard, auroc_table, score, thresholds_table
from cxrfast.exports.description import Description
from cxrfast.exports.formats import BATCHES, BOUND, Difference
from cxrfast.inference.ensemble import Member, ScaleEnsemble
from cxrfast.runs.lineage import origin_of
from cxrfast.runs.remarks import remarks_on
from cxrfast.runs.run import Run
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
    archs = sorted({member.network.arch for member in ensemble.members})
    normalise = ensemble.members[0].network.normalise
    mean, std = (", ".join(f"{value:g}" for value in of.flatten().tolist()) for of in (normalise.mean, normalise.std))
    external = validations(ensemble, facts.runs)
    lines = _lines(facts)
    notes = footnotes(lines)
    heads = list(marked({name: _scale_name(facts, name) for name in facts.groups()}, lines).values())
    formats = sorted({kind for _, kind in facts.differences})
    values = {
        "todo": TO_FILL_IN,
        "archs": archs,
        "summary": f"{counted(len(ensemble.labels), 'finding')} at {sides_text(ensemble.scales)}",
        "overview": _overview(facts, cohort, scores, external).markdown(),
        "own_code": [arch for arch in archs if ":" in arch],
        "formats": formats,
        "example": facts.description.members[0],
        "outputs": len(ensemble.labels),
        "mean": mean,
        "std": std,
        "networks": _networks(facts, lines).markdown(),
        "combination": _combination(ensemble),
        "weights_table": _weights(ensemble, heads).markdown() if len(ensemble.scales) > 1 else "",
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "version": __version__,
        "label_limit": label_limit(cohort),
        "weighted": first.config.positive_weights,
        "data": data_table(cohort).markdown(),
        "parts": parts_table(cohort).markdown(),
        "findings": findings_table(cohort).markdown(),
        "rules": _paragraphs(rules_note(facts.groups())),
        "preprocessing": preprocessing_steps(ensemble.recipe, ensemble.scales, mean, std),
        "recipe": recipe_table(list(facts.runs.values())).markdown(),
        "auroc": auroc_table(scores, heads).markdown(),
        "own_rows": _own_rows(ensemble),
        "rule": f"`{ensemble.thresholds.rule}`" if ensemble.thresholds else "",
        "thresholds": thresholds_table(scores).markdown(),
        "thresholds_note": _thresholds_note(ensemble),
        "external": _external(external),
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
    return _rendered(values)


def _rendered(values: Mapping[str, Any]) -> str:
    """The template with these values."""
    environment = Environment(
        loader=PackageLoader("cxrfast.exports.card", "."),
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


def _overview(facts: Facts, cohort: Cohort, scores: Scorecard, external: Sequence[Validation]) -> Table:
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
            ["External validation", ", ".join(one.name for one in external) or "none known"],
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
            "The threshold is that of the mean over folds (the mean of the folds' thresholds as log-odds). Sensitivity, "
            "specificity, PPV and NPV are means over folds, and counts are sums over folds, each fold by its own threshold on its "
            "own rows. " + text
        )
    return text


def _external(found: Sequence[Validation]) -> str:
    """A table per other set."""
    if not found:
        return "None is known to cxrfast."
    intro = (
        "The exported model itself, folds averaged, with its own thresholds. Rows of patients and images that are among the "
        "runs' rows are left out. Intervals: not computed.\n"
    )
    return "\n".join(
        [intro, *(f"#### {markdown_text(one.name)}\n\n{validation_table(one).markdown()}" for one in found)]
    )


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
