"""The documentation holds what it shows: files, links, commands and examples."""

import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import torch
import yaml

import cxrfast
from cxrfast.cli.main import cli
from cxrfast.shards.build import build
from cxrfast.training import setup

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")]
TEXT = {page.relative_to(ROOT).as_posix(): page.read_text() for page in PAGES}


def test_files_named_in_the_documentation_exist():
    pattern = r"`((?:shards|pipelines|cxrfast|bench|tests|docs)/[\w./-]*)`"
    named = {(page, name) for page, text in TEXT.items() for name in re.findall(pattern, text)}
    absent = {(page, name) for page, name in named if not (ROOT / name).exists()}
    assert {name for _, name in absent} <= {"shards/sources/padchest.py", "tests/shards/sources/test_padchest.py"}


def test_links_lead_to_files_and_headings():
    for page in PAGES:
        for link, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", page.read_text()):
            target = page.parent / link if link else page
            assert target.exists(), f"{page.name}: {link}"
            if anchor:
                assert anchor in anchors(target.read_text()), f"{page.name}: {link}#{anchor}"


def anchors(text: str) -> set[str]:
    """Anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def options() -> Iterator[tuple[str, str, str]]:
    """(page, command, option) of each command that a page shows."""
    names = "|".join(cli.commands)
    for page, text in TEXT.items():
        joined = text.replace("\\\n", " ")
        shown = re.findall(rf"(?:cxrfast |-m cxrfast\.(?=train)|`)((?:{names})\b[^`#\n]*)", joined)
        for line in shown:
            yield from ((page, line, option) for option in re.findall(r"(?<!\S)(--[a-z][a-z-]*)", line))


def test_commands_shown_in_the_documentation_have_their_options():
    shown = list(options())
    assert ("README.md", "--nproc") in {(page, option) for page, _, option in shown}
    unknown = [(page, line, option) for page, line, option in shown if option not in options_of(line)]
    assert unknown == []


def options_of(line: str) -> set[str]:
    command: click.Command = cli
    for word in line.split():
        if isinstance(command, click.Group) and word in command.commands:
            command = command.commands[word]
    return {name for parameter in command.params for name in parameter.opts} | {"--help"}


@pytest.mark.parametrize("page", ["README.md", "docs/loading.md"])
def test_the_training_loop_of_a_page_runs_on_the_training_rows_alone(page, phantoms, tmp_path, monkeypatch, capsys):
    """As it stands, with a network and a number of epochs that a CPU can do."""
    (code,) = re.findall(r"```python\n(.*?)```", TEXT[page], re.DOTALL)
    assert code.count("densenet121") == code.count("range(10)") == 1
    build(phantoms, tmp_path / "shards", [256], workers=1)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    given = {} if page == "README.md" else {"device": "cpu"}
    code = code.replace("densenet121", "shufflenet_v2_x0_5").replace("range(10)", "range(2)")
    exec(compile(code, page, "exec"), given)
    made = setup.make_config(tmp_path / "shards", 256, device="cpu")
    chosen = setup.select_rows(given["shards"].rows(), made, given["reader"].rows)
    assert given["order"].rows.tolist() == chosen.loc[chosen["part"] == "train", "row"].tolist()
    if page == "README.md":
        found = re.findall(r"^epoch (\d): validation loss (\d+\.\d+)$", capsys.readouterr().out, re.MULTILINE)
        assert [epoch for epoch, _ in found] == ["0", "1"]
        assert given["val_loader"].order.rows.tolist() == chosen.loc[chosen["part"] == "val", "row"].tolist()


def test_the_citation_names_this_version_and_its_licence():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (citation["cff-version"], citation["version"]) == ("1.2.0", cxrfast.__version__)
    assert citation["license"] == "MIT"
    assert citation["references"][0]["doi"] == "10.1117/1.JMI.10.4.044503"
