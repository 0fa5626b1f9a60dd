"""Tables and plots, drawn again from the results that are committed under bench/results."""

import json
from pathlib import Path
from typing import Any

import pytest

from cxrfast.bench.loading.load import LoadingResult
from cxrfast.bench.report import Column, Result, table, write_results
from cxrfast.bench.sharding.shard import ShardingResult
from cxrfast.bench.training.curriculum import CurriculumResult
from cxrfast.bench.training.ladder import LINE, LadderResult
from cxrfast.bench.training.step import StepResult

RESULTS = Path(__file__).parents[2] / "bench" / "results"


def stored(path: Path) -> Result:
    values: dict[str, Any] = json.loads(path.read_bytes())
    if kind := {"bench": StepResult, "curriculum": CurriculumResult, "shard": ShardingResult}.get(path.stem):
        return kind(**values)
    assert values["engines"] == []
    by_scale = {name: {int(scale): n for scale, n in values[name].items()} for name in ("images", "batch")}
    return LoadingResult(**values | by_scale)


@pytest.mark.parametrize(
    "name", ["step/bench", "shard/shard", "load-large/load", "load-256/load", "curriculum-64/curriculum"]
)
def test_a_committed_result_still_gives_its_tables_and_its_json(name: str, tmp_path: Path) -> None:
    path = RESULTS / f"cpu-2-cores-{name}.json"
    write_results(tmp_path, path.stem, stored(path))
    before, after = path.with_suffix(".md").read_text(), (tmp_path / f"{path.stem}.md").read_text()
    rows = [line for line in before.splitlines() if line.startswith("|") and any(c.isdigit() for c in line)]
    assert len(rows) >= 3
    assert [row for row in rows if row not in after] == []
    assert after.endswith(before[before.index("- command: ") :]), "where it ran"
    assert json.loads(path.read_bytes()).items() <= json.loads((tmp_path / path.name).read_bytes()).items()
    assert (tmp_path / f"{path.stem}.png").read_bytes()[:4] == b"\x89PNG"


def test_a_ladder_names_what_failed_and_what_was_left_out(tmp_path: Path) -> None:
    lines = [
        {"rung": "torchvision", "rounds": [2.0, 4.0, 3.0], "ratio": 1.0, "peak_bytes": 2**30},
        {"rung": "ours", "failed": "exit code -11"},
    ]
    origin = {"gpu": None, "processor": "abacus", "cores": 2}
    lines = [dict.fromkeys(LINE) | {"scale": 64, "micro_batch": 8} | line for line in lines]
    result = LadderResult(lines, origin, {"torchvision": "theirs", "ours": "ours"}, {"128 px": "no time left"})
    write_results(tmp_path, "ladder", result)
    text = (tmp_path / "ladder.md").read_text()
    assert text.startswith("## Ladder of training densenet121 (abacus, 2 cores)")
    assert "| rung | px | micro-batch | images/s | × first | peak GiB |\n" in text, "no column of a GPU"
    assert "| torchvision | 64 | 8 | 3.0 | 1.00 | 1.00 |" in text
    assert "| ours | 64 | 8 | - | - | - |" in text
    assert "ours, 64 px: exit code -11\n\nLeft out: 128 px (no time left)." in text
    assert (tmp_path / "ladder.png").read_bytes()[:4] == b"\x89PNG"


def test_a_column_without_a_figure_is_left_out_with_its_note() -> None:
    columns = {"real": Column("real", ".1f", 10, "a tenth"), "imag": Column("none", note="never")}
    found = table("Numbers", columns, [type("N", (), {"real": 25, "none": None})()], "All of them.")
    assert (found.head, found.rows, found.note) == (["real"], [("2.5",)], "real: a tenth.\nAll of them.")
