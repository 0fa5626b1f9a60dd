from pathlib import Path

from cxrfast.runs import find_runs
from cxrfast.study import study

RECIPE = {"weights": "none", "epochs": 1, "global_batch": 8, "micro_batch": 8, "limit": 24}


def test_a_study_trains_what_is_missing_and_repeats_nothing(tiny_set: Path, tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    one = study(tiny_set, tmp_path, [32], [0], device="cpu", recipe=RECIPE)
    assert len(one.tables) == 1
    weights = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("best.safetensors")}
    maps = (tmp_path / "densenet121-32" / "fold-0" / "maps.zarr").stat().st_mtime_ns
    both = study(tiny_set, tmp_path, [32, 64], [0], device="cpu", recipe=RECIPE)
    assert [run.name for run in find_runs(tmp_path)] == ["densenet121-32/fold-0", "densenet121-64/fold-0"]
    assert len(both.tables) == 2, "two scales make an ensemble"
    assert {p: p.stat().st_mtime_ns for p in weights} == weights
    assert (tmp_path / "densenet121-32" / "fold-0" / "maps.zarr").stat().st_mtime_ns == maps
    assert "is done already" in capsys.readouterr().err
    html = both.report.read_text()
    for part in ("Effective receptive fields", "Grad-CAM", "theoretical 2071 px"):
        assert part in html
    assert list(tmp_path.glob("*/fold-0/gradcam-*.png"))


def test_a_study_trains_with_several_processes(tiny_set: Path, tmp_path: Path) -> None:
    study(
        tiny_set, tmp_path, [32], [1], nproc=2, device="cpu", recipe={**RECIPE, "micro_batch": 4, "views": ("AP", "PA")}
    )
    (run,) = find_runs(tmp_path)
    assert run.is_done
    assert run.config.views == ("AP", "PA")
    assert run.config.fold == 1
