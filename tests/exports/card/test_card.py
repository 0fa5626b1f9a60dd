"""The model card tells what the runs tell, marks what they do not, and takes no name for markup."""

import json
import re
import shutil
from html import escape
from pathlib import Path

import numpy as np
import pytest
from markdown_it import MarkdownIt
from runs import SMALL, make_run, predict, study_rows

from cxrfast.analysis.ensemble import ensemble
from cxrfast.analysis.evaluate import evaluate
from cxrfast.analysis.thresholds import evaluate_thresholds
from cxrfast.exports.card.checklist import TO_FILL_IN
from cxrfast.exports.export import export, select
from cxrfast.models.classifier import Classifier
from cxrfast.runs.run import Run
from cxrfast.shards.shard_set import ShardSet


@pytest.fixture(scope="module")
def runs(study, tmp_path_factory) -> Path:
    """A copy of the study, one run of which is done."""
    copy = shutil.copytree(study, tmp_path_factory.mktemp("card") / "runs")
    Run.find(copy)[0].set_state("done", epoch=1)
    return Path(copy)


@pytest.fixture(scope="module")
def card(runs) -> str:
    return (export(Run.find(runs), runs.parent / "model") / "README.md").read_text()


def table_below(card: str, heading: str) -> dict[str, list[str]]:
    """By first cell: the other cells of the first table below a heading."""
    text = card.split(f"# {heading}\n", 1)[1]
    lines = re.search(r"(?:^\|.*\n)+", text, re.MULTILINE)[0].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return {name: rest for name, *rest in cells}


def test_it_says_first_that_it_is_no_medical_device(card):
    assert (
        card.split("# Chest X-ray classifier: 14 findings at 32 and 64 px\n", 1)[1]
        .lstrip()
        .startswith("**This is not a medical")
    )


def test_counts_are_those_of_the_rows(card, runs, tiny_set):
    counts = table_below(card, "Images, studies and patients")
    rows = Run.find(runs)[0].rows()
    studies = ShardSet(tiny_set).rows(["row", "study_id"])["study_id"][rows["row"]]
    assert counts["All"] == ["All", f"{len(rows)}", f"{studies.nunique()}", f"{rows['patient_id'].nunique()}"]
    positives = table_below(card, "Findings")["Pneumothorax"]
    raw = rows["Pneumothorax"]
    assert positives[3:] == [
        f"{(raw == 1).sum()}",
        f"{(raw == 0).sum()}",
        f"{(raw == -1).sum()}",
        f"{raw.isna().sum()}",
    ]


def test_aurocs_are_those_of_evaluate_and_ensemble(card, runs, tmp_path):
    copy = Path(shutil.copytree(runs, tmp_path / "runs"))
    by_scale, stacked = evaluate(copy), ensemble(copy)
    found = table_below(card, "Ranking: AUROC")["Pneumothorax"]
    at = by_scale.labels.index("Pneumothorax")
    expected = [by_scale.matrix(name)[:, at] for name in by_scale.names] + [stacked.matrix("stacked")[:, at]]
    for cell, values in zip(found, expected, strict=True):
        assert cell.strip("*") == f"{values.mean():.3f} ± {values.std(ddof=1):.3f}"


def test_intervals_are_said_to_be_missing_and_what_only_the_author_knows_is_marked(card):
    assert "**Confidence intervals: not computed.**" in card
    assert card.count(TO_FILL_IN) >= 4
    assert "| 42 | Funding | to be filled in by the author |" in card


def test_unfinished_runs_are_marked_and_explained(card):
    (note,) = re.findall(r"^‡ .*", card, re.MULTILINE)
    assert (
        "unfinished, state.json is missing: mobilenet_v3_small-32 (fold 1), mobilenet_v3_small-64 (folds 0, 1)" in note
    )
    assert "| mobilenet\\_v3\\_small-32‡/fold-0 |" in card or "| mobilenet_v3_small-32‡/fold-0 |" in card


def test_thresholds_have_the_rule_and_their_counts_add_up(card, runs):
    assert "Rule: `youden`, on validation rows." in card
    cells = table_below(card, "Thresholds")["Pneumothorax"]
    tested = sum((run.rows()["part"] == "test").sum() for run in Run.find(runs) if run.config.scale == 32)
    assert sum(map(int, cells[-1].split(" / "))) == tested


def test_thresholds_do_what_the_command_thresholds_says(card, runs):
    result = evaluate_thresholds(runs)
    compared = 0
    for label, cells in table_below(card, "Thresholds").items():
        lines = result.lines[(result.lines["label"] == label) & (result.lines["name"] == result.ensemble)]
        if lines.empty:
            continue
        means = [lines[f"test_{ratio}"].mean() for ratio in ("sensitivity", "specificity", "ppv", "npv")]
        assert cells[3:7] == ["–" if np.isnan(mean) else f"{100 * mean:.1f} %" for mean in means]
        sums = [f"{lines[f'test_{count}'].sum()}" for count in ("tp", "fp", "tn", "fn")]
        assert cells[7] == " / ".join(sums)
        compared += 1
    assert compared > 5


def test_what_the_set_would_tell_is_unknown_where_the_set_is_gone(study, tiny_set, tmp_path):
    runs = shutil.copytree(study, tmp_path / "runs")
    for run in Run.find(runs):
        stored = json.loads(run.config_path.read_text())
        run.config_path.write_text(json.dumps({**stored, "shards": str(tmp_path / "gone")}))
    card = (export(select(Run.find(runs), scales=[32]), tmp_path / "m", shards=tiny_set) / "README.md").read_text()
    assert table_below(card, "Training data")["Views"] == ["unknown"]
    assert table_below(card, "Training data")["The whole set"] == ["unknown"]
    assert table_below(card, "Images, studies and patients")["All"][2] == "unknown"


HOSTILE = (
    "<img src=x onerror=alert(1)>",
    "[a](javascript:b)",
    "`code` | cell",
    "**bold**_x_",
    "{{ 7 * 7 }}",
    "# heading",
)


def test_markup_in_labels_is_text(tiny_set, tmp_path):
    rows = study_rows(0)
    rows = rows.rename(columns=dict(zip(("Edema", "Fracture", "Lung Lesion", "Pneumonia"), HOSTILE, strict=False)))
    rows[list(HOSTILE[4:])] = np.float32(0)
    rows.loc[::3, list(HOSTILE[4:])] = np.float32(1)
    known = {"labels": HOSTILE, "arch": SMALL, "set_id": ShardSet(tiny_set).info.id, "shards": tiny_set}
    run = make_run(tmp_path / "runs", 32, rows=rows, quality=None, **known)
    run.write_weights(Classifier(SMALL, len(HOSTILE)).state_dict())
    predict(run, 1.0)
    card = (export([run], tmp_path / "model") / "README.md").read_text()
    html = MarkdownIt("commonmark", {"html": True}).enable("table").render(card.split("---\n", 2)[2])
    assert not re.search(r"<img|<a [^>]*javascript|<code>code</code>|<strong>bold|<h1>heading", html)
    cells = re.findall(r"<td[^>]*>(.*?)</td>", html)
    assert {escape(label, quote=False) for label in HOSTILE} <= set(cells)
