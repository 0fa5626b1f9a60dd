"""docs/quickstart.ipynb: as it is stored, a reader sees its results and nothing of the machine; and it runs."""

import base64
import os
import re
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest

ROOT = Path(__file__).parents[1]
PATH = ROOT / "docs" / "quickstart.ipynb"

LARGEST, LARGEST_PICTURE = 300_000, 80_000
"""Bytes of the notebook and of one of its pictures."""


def stored() -> Any:
    return nbformat.read(PATH, as_version=4)


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def text_of(output: Any) -> str:
    """Text of an output, whatever its kind."""
    return output.get("text", "") + "".join(output.get("data", {}).get("text/plain", ""))


def pictures(notebook: Any) -> list[bytes]:
    data = [output.get("data", {}) for cell in code_cells(notebook) for output in cell.outputs]
    return [base64.b64decode(one["image/png"]) for one in data if "image/png" in one]


def test_the_stored_notebook_was_run_from_top_to_bottom_without_an_error() -> None:
    notebook = stored()
    nbformat.validate(notebook)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    kinds = [output.output_type for cell in cells for output in cell.outputs]
    assert "error" not in kinds
    assert not [output for cell in cells for output in cell.outputs if output.get("name") == "stderr"]
    assert len(pictures(notebook)) == 3


def test_the_stored_notebook_is_small_and_names_no_machine() -> None:
    text = PATH.read_text()
    assert len(text) < LARGEST
    assert max(map(len, pictures(stored()))) < LARGEST_PICTURE
    shown = re.sub(r'"image/png": "[^"]*"', "", text)
    assert not re.findall(r"/(?:home|root|tmp|work|usr|Users|mnt|var)/|site-packages", shown)
    assert set(stored().metadata) <= {"kernelspec", "language_info"}
    assert stored().metadata.kernelspec.name == "python3"


def test_readers_are_led_to_the_notebook() -> None:
    assert "(docs/quickstart.ipynb)" in (ROOT / "README.md").read_text()


@pytest.mark.slow
def test_the_notebook_runs_and_stays_in_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nbclient import NotebookClient

    tools, work = tmp_path / "tools", tmp_path / "work"
    tools.mkdir(), work.mkdir()
    (tools / "cxrfast").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m cxrfast "$@"\n')
    (tools / "cxrfast").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
    notebook, before = stored(), stored()
    client = NotebookClient(
        notebook,
        timeout=1800,
        kernel_name="python3",
        resources={"metadata": {"path": str(work)}},
        coalesce_streams=True,
    )
    client.execute()  # raises for a cell that fails
    assert {path.name for path in work.iterdir()} == {
        "phantoms",
        "shards",
        "runs",
        "model",
        "log.txt",
        "thresholds.txt",
    }
    assert len(pictures(notebook)) == len(pictures(before))
    for mine, theirs in zip(code_cells(notebook), code_cells(before), strict=True):
        kinds = [[output.output_type for output in cell.outputs] for cell in (mine, theirs)]
        assert kinds[0] == kinds[1], mine.source
    printed = "\n".join(text_of(output) for cell in code_cells(notebook) for output in cell.outputs)
    assert "Thresholds by the rule sensitivity=0.8" in (work / "thresholds.txt").read_text()
    assert re.search(r"^Cardiomegaly +0\.\d+ +(positive|negative)$", printed, re.MULTILINE)
    assert (work / "runs" / "report.html").is_file()
