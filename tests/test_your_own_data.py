"""docs/your-own-data.md: its commands are run in an empty folder, and print what the page shows."""

import os
import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from clinic import real_clinic, small_clinic
from commands import run
from sets import REAL

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "your-own-data.md").read_text()

MEASURED = re.compile(r"\d[\d.,]* ?(?:[kMGT]?B/s|[kMGT]?B|s|images/s|/s)\b|\d+m\d+s|\d+ ms")
"""Times, speeds and bytes, which differ from one machine to the next."""

NUMBER = re.compile(r"[-+−]?\d[\d.,]*")
TABLE_LINES = ("shard", "verify", "describe")
"""Commands whose numbers are the same on every machine; those of a training are only like those on the page."""


@dataclass(frozen=True)
class Example:
    """A command of the page and the lines that it shows of its output."""

    command: str
    output: list[str]

    @property
    def fails(self) -> bool:
        return any(line.startswith("cxrfast: ") for line in self.output)


def examples() -> list[Example]:
    found = []
    for block in re.findall(r"```console\n(.*?)```", PAGE, re.DOTALL):
        for text in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, _, output = text.replace("\\\n", " ").partition("\n")
            lines = [line for line in output.splitlines() if line.strip() and line.strip() != "…"]
            found.append(Example(" ".join(command.split()), lines))
    return found


def write_files(folder: Path) -> None:
    """The files of options that the page shows."""
    for name, text in re.findall(r"```toml\n# (\S+)\n(.*?)```", PAGE, re.DOTALL):
        (folder / name).write_text(text)


def printed(example: Example, folder: Path) -> list[str]:
    words = shlex.split(example.command)
    assert words[0] == "cxrfast"
    environment = {"PYTHONPATH": str(ROOT), "COLUMNS": "120", "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    done = run(sys.executable, "-m", *words, folder=folder, timeout=3600, **environment)
    assert (done.returncode == 2) == example.fails, f"{example.command}\n{done.stdout}{done.stderr}"
    assert done.returncode in (0, 2), f"{example.command}\n{done.stdout}{done.stderr}"
    return (done.stdout + done.stderr).splitlines()


def comparable(line: str, command: str) -> str:
    """A line without what differs from one machine to the next: rules of tables, measured values, numbers of a training."""
    plain = " ".join(MEASURED.sub("…", re.sub(r"[─]+", "", line)).split())
    return plain if command.split()[1] in TABLE_LINES else NUMBER.sub("#", plain)


SAID = ("listed images", "image files", "labels read", "decimal commas", "kept:", "warning: no labels")
"""Starts of lines that do not depend on which films they are about, apart from their numbers."""


def without_numbers(line: str, command: str) -> str:
    return NUMBER.sub("#", comparable(line, command))


def test_the_page_shows_every_step():
    steps = [example.command.split()[1] for example in examples()]
    assert list(dict.fromkeys(steps)) == [
        *("shard", "verify", "describe", "study", "thresholds", "table", "predict", "export"),
    ]
    assert "cxrfast app" in PAGE


def test_the_page_s_commands_on_a_table_work_on_small_images_laid_out_alike(tmp_path):
    small_clinic(tmp_path)
    write_files(tmp_path)
    for example in (e for e in examples() if e.command.split()[1] in TABLE_LINES):
        found = {without_numbers(line, example.command) for line in printed(example, tmp_path)}
        said = [without_numbers(line, example.command) for line in example.output if line.startswith(SAID)]
        assert [line for line in said if line not in found] == [], example.command


@pytest.mark.slow
def test_the_page_s_commands_print_what_it_shows_on_real_films(tmp_path):
    if not (REAL / "kermany224.tar").exists():
        pytest.skip("the real radiographs are not here")
    real_clinic(tmp_path)
    write_files(tmp_path)
    for example in examples():
        found = {comparable(line, example.command) for line in printed(example, tmp_path)}
        absent = [line for line in example.output if comparable(line, example.command) not in found]
        assert absent == [], f"{example.command}\n" + "\n".join(sorted(found))
    assert (tmp_path / "runs" / "report.html").is_file()
    assert (tmp_path / "model" / "README.md").is_file()
    answers = (tmp_path / "answers.csv").read_text().splitlines()
    assert len(answers) == len(list((tmp_path / "new").iterdir())) + 1
