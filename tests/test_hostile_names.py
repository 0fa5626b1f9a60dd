"""Names of findings that look like markup, paths or code, through every command that shows them, up to the report."""

import os
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from damage import contents
from hostile import outcome
from sets import table_arguments, write_table

from cxrfast import ShardSet
from cxrfast.runs.run import Run

NAMES = [
    *(
        "<script>alert(1)</script>",
        "<img src=x onerror=alert(1)>",
        "</td></table>",
        "&lt;b&gt; &amp; &#x41;",
        "\"'`",
        "{{ 7*7 }}{% x %}",
    ),
    *(
        "![x](http://192.0.2.1/x.png)",
        "[x](javascript:alert(1))",
        "http://192.0.2.1/x",
        "**bold** _x_ ~~x~~",
        "a|b\\|c",
        "# title",
        "`code`",
    ),
    *(
        r"$x_1\alpha^2$",
        "$",
        r"\frac{",
        r"\input{/etc/passwd}",
        "100 % & # _ {} ~ ^",
        "<!--",
        "]]>",
        "data:text/html,x",
        "%s %n {0}",
    ),
    *(
        "../../../x",
        "/etc/passwd",
        "..",
        "a/b",
        "C:\\x",
        "-rf",
        "--help",
        "$(touch pwned)",
        "; touch pwned",
        "[bold]x[/nope]",
        "x" * 200,
    ),
    *("肺炎 🫁", "Ö é ñ", "nan", "None", "1", "true", "a=b", "=", "part ", "image id", "row.1", "x,y;z"),
]
"""All of them may be names of findings."""
LABELS = [name for name in NAMES if name == name.strip() and not name.startswith(("=", "-", "+", "@"))]
REFUSED = ["a\nb", "a\tb", "\x1b[31mred", "a\u202eb", "a\u200bb", "=1+cmd|'/C calc'!A0", " x", "x" * 201, "a\u2028b"]
PATIENTS = [f"p{n:02d}" for n in range(40)]
TAGS = {"script", "img", "iframe", "object", "embed", "link", "base", "form", "audio", "video", "source"}


class Page(HTMLParser):
    """Text of a page, its tags and the addresses in them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text, self.tags, self.attributes = "", [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_data(self, data):
        self.text += data + "\n"


@pytest.fixture(scope="module")
def named(tmp_path_factory) -> Path:
    """A set of noise whose findings have these names, with the runs of a training of it and what commands made of them."""
    folder, rng = tmp_path_factory.mktemp("names"), np.random.default_rng(0)
    values = {name: rng.choice([1.0, 0.0, -1.0, np.nan], len(PATIENTS), p=[0.4, 0.4, 0.1, 0.1]) for name in LABELS}
    tree = write_table(folder / "data", PATIENTS, plain=values[LABELS[0]], **values)
    os.chdir(folder)
    assert outcome(["shard", *table_arguments(tree, folder / "set", "plain")], folder, local=False) == "right"
    relabel = ["relabel", "set", tree / "t.csv", "--key=path", *(f"--label={name}" for name in LABELS)]
    assert outcome(relabel, folder) == "right"
    small = [
        "--arch=mobilenet_v3_small",
        "--weights=none",
        "--epochs=1",
        "--global-batch=8",
        "--micro-batch=8",
        "--device=cpu",
    ]
    commands = [
        ["describe", "set", "--out=about"],
        ["train", "--shards=set", "--runs=runs", "--scale=32", *small, f"--label-policy={LABELS[0]}=u_ones"],
        ["predict", "runs/mobilenet_v3_small-32/fold-0", "--device=cpu"],
        *(
            ["gradcam", "runs/mobilenet_v3_small-32/fold-0", "--label", name, "--device=cpu", "--images=1"]
            for name in LABELS[::6]
        ),
        ["evaluate", "runs"],
        ["report", "runs"],
        ["status", "runs"],
    ]
    for words in commands:
        assert outcome(words, folder) == "right", words
    return folder


def test_names_reach_the_tables_as_they_are_spelt(named):
    assert ShardSet(named / "set").info.labels == LABELS
    table = pd.read_csv(named / "runs/evaluation/auroc.csv", keep_default_na=False)
    assert sorted(set(table["finding" if "finding" in table else "label"])) == sorted(LABELS)


def test_a_report_shows_names_as_text_and_asks_for_nothing(named):
    page = Page((named / "runs" / "report.html").read_text())
    assert [name for name in LABELS if name not in page.text] == []
    assert set(page.tags) & (TAGS - {"img"}) == set()
    addresses = [value for name, value in page.attributes if name in ("src", "href", "srcset", "action", "style")]
    assert [value for value in addresses if not value.startswith(("data:image/png;base64,", "#"))] == []
    assert [name for name, _ in page.attributes if name.startswith("on")] == []


def test_no_name_leads_out_of_a_run(named):
    assert sorted(path.name for path in named.iterdir()) == ["about", "data", "runs", "set"]
    assert not list(named.rglob("pwned"))
    figures = Run.open(named / "runs/mobilenet_v3_small-32/fold-0").gradcam_paths()
    assert len(figures) == len(LABELS[::6])


@pytest.mark.parametrize("name", REFUSED)
def test_names_that_nobody_can_read_are_refused_and_change_nothing(named, tmp_path, name):
    tree = write_table(tmp_path / "data", PATIENTS, **{name: [1.0, 0.0] * 20, "plain": [1.0, 0.0] * 20})
    before = contents(named / "set")
    for words in (
        ["relabel", named / "set", tree / "t.csv", "--key=path", f"--label={name}"],
        ["shard", *table_arguments(tree, tmp_path / "set", name)],
    ):
        assert outcome(words, tmp_path, named / "set").startswith("refused ")
    assert contents(named / "set") == before
    assert not (tmp_path / "set").exists()
