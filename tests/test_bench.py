import json
from pathlib import Path

import pytest

from cxrfast.bench.harness import Figure, interleave
from cxrfast.bench.step import bench
from cxrfast.errors import LoadError


def test_every_scale_is_measured_with_its_real_loop(tiny_set: Path, tmp_path: Path) -> None:
    result = bench(tiny_set, [], tmp_path, seconds=0.3, micro_batch=8, device="cpu")
    assert result.failed == {}
    assert [line.scale for line in result.lines] == [32, 64]
    for line in result.lines:
        assert min(line.load, line.train, line.cached, line.validate) > 0
        assert 2**20 < line.saved_bytes_per_image < 2**26
        assert 2**28 < line.process_bytes < 2**34, "a process that trains densenet121 holds a good part of a GiB"
        assert line.torch_peak_bytes is None
        assert line.micro_batch == 8
    assert json.loads((tmp_path / "bench.json").read_text())["provenance"]["torch"]
    assert (tmp_path / "bench.md").read_text().startswith("| px | micro-batch |")
    assert (tmp_path / "bench.png").read_bytes()[:4] == b"\x89PNG"


def test_an_absent_scale_is_refused_before_anything_is_measured(tiny_set: Path, tmp_path: Path) -> None:
    with pytest.raises(LoadError, match="no shards at 4096 px"):
        bench(tiny_set, [32, 4096], tmp_path / "out", device="cpu")
    assert not (tmp_path / "out").exists()


def test_a_scale_that_cannot_be_measured_is_named_and_costs_only_its_line(tiny_set: Path, tmp_path: Path) -> None:
    result = bench(tiny_set, [32], tmp_path, seconds=0.1, micro_batch=1000, device="cpu")
    assert result.lines == []
    assert "do not fill one global batch of 1000" in result.failed[32]


def test_measurements_take_turns() -> None:
    calls: list[str] = []

    def measurement(name: str, rate: float):  # type: ignore[no-untyped-def]
        return lambda seconds: calls.append(name) or rate

    figures = interleave({"a": measurement("a", 6.0), "b": measurement("b", 3.0)}, 1.0, 3)
    assert calls == ["a", "b"] * 4, "a burn-in each, then three rounds"
    assert figures["a"].ratio(figures["b"]) == 2.0


def test_a_ratio_is_taken_round_by_round() -> None:
    assert Figure([10.0, 1.0, 4.0]).ratio(Figure([5.0, 0.5, 2.0])) == 2.0
